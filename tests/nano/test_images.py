"""The embedded image teachers are what their cards say."""

import json
import re

import pytest

from convert.data.image_batches import held_out_images
from convert.data.image_sets import image_set
from convert.data.images import read_images
from convert.evaluation.classification import error
from convert.models.catalog import resolve
from convert.models.vision.catalog import EMBEDDED
from convert.models.vision.loading import load_teacher

NAMES = sorted(folder.name for folder in EMBEDDED.iterdir() if folder.is_dir())


def test_all_of_them_are_there():
    assert {"vit-nano", "resnet-nano", "mixer-nano"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small_and_found_by_its_name(name):
    source, folder = resolve(name), EMBEDDED / name
    assert (source.kind, source.domain, source.data) == ("package", "vision", name.partition("-nano-")[2] or "digits")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1e6
    assert f"{load_teacher(source).model.num_parameters():,} parameters" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", [name for name in NAMES if resolve(name).data == "digits"])
def test_it_is_as_good_as_its_card_says(name):
    source, folder = resolve(name), EMBEDDED / name
    teacher, data = load_teacher(source), read_images(image_set("digits"))
    card = (folder / "README.md").read_text()
    first = float(re.search(r"seeds 0, 1, 2: ([0-9.]+) %", card)[1])
    assert 100 - error(teacher.model, held_out_images(data, 500, 500)) == pytest.approx(first, abs=0.21)  # an image
    assert json.loads((folder / "config.json").read_text())["architectures"] == [type(teacher.model).__name__]
