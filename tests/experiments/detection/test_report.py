"""The page of a table of detectors, made of stand-in results, without network and in a browser."""

import base64
import io
import re

import pytest
import torch
from PIL import Image

from experiments.detection.detector import Detections
from experiments.detection.report import SCENES, page
from experiments.detection.scenes import Pairs
from tests.reports.browser import BROWSER, opened

RED = (214, 39, 40)


def stand_in(count: int) -> tuple[Pairs, list[Detections]]:
    """Scenes of one object of a class with a hostile name; one box is sure, the other is not."""
    box, images = torch.tensor([[10.0, 12.0, 40.0, 44.0]]), torch.full((count, 3, 64, 64), 90, dtype=torch.uint8)
    there = [box] * count, [torch.tensor([1])] * count
    pairs = Pairs(images, images[:, :1], *there, ("zero", "<script>$\\bad$"))
    boxes = torch.cat((box + 2, box - 8))
    return pairs, [Detections(boxes, torch.tensor([0.9, 0.1]), torch.tensor([1, 0]))] * count


@pytest.fixture(scope="module")
def html() -> str:
    rows = [("detector", "mAP50"), ("<b>small</b>", "55.0 ± 10.0"), *(("long " * 12, "1") for _ in range(3))]
    return page(rows, ["Scenes of digits."], "<i>small</i>", *stand_in(SCENES + 2))


def pictures(html: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(each))).convert("RGBA") for each in found]


def red(image: Image.Image) -> int:
    return sum(count for count, colour in image.getcolors(2**20) if colour[:3] == RED and colour[3])


def test_it_has_the_table_and_both_bands_of_the_first_scenes_and_needs_no_network(html):
    assert "<td>&lt;b&gt;small&lt;/b&gt;</td><td>55.0 ± 10.0</td>" in html and "Scenes of digits." in html
    assert "&lt;i&gt;small&lt;/i&gt;" in html and "<script" not in html and "<i>" not in html
    shown = pictures(html)
    assert len(shown) == SCENES and len(re.findall(r"Scene \d+<", html)) == SCENES
    assert not re.search(r"(src|href)=\"(?!data:)", html) and "prefers-color-scheme: dark" in html
    for image in shown:
        left, right = (image.crop((x, 0, x + image.width // 2, image.height)) for x in (0, image.width // 2))
        assert red(left) > 100 and red(right) > 100 and image.getpixel((0, 0))[3] == 0


def test_only_boxes_of_some_score_are_drawn():
    pairs, (found,) = stand_in(1)
    unsure = Detections(found.boxes, found.scores / 10, found.classes)
    (image,) = pictures(page([("detector",), ("one",)], [], "one", pairs, [unsure]))
    assert red(image) == 0


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width, scheme", [(1100, "light"), (500, "dark")])
def test_a_browser_shows_it(html, tmp_path, width, scheme):
    title, _, logged = opened(html, tmp_path, width, scheme)
    assert "CONSOLE" not in logged and not title.startswith("ERROR")
    wide, window = map(int, re.search(r"WIDTH (\d+) OF (\d+)", title).groups())
    assert wide <= window, "nothing sticks out"
