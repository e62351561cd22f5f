"""The report of a table of detectors: one page without network, with what one of them finds drawn on both bands."""

import base64
from collections.abc import Sequence

from markupsafe import Markup

from convert.reports.page import rendered
from convert.reports.sections import Chart, PageSection, Table
from experiments.detection.detector import Detections
from experiments.detection.pictures import SURE, picture
from experiments.detection.scenes import Pairs

SCENES = 8  # that are drawn (ours)


def page(
    rows: Sequence[Sequence[str]], said: Sequence[str], name: str, pairs: Pairs, found: Sequence[Detections]
) -> str:
    """The page as HTML: the table, whose first row is its head, what is `said` of it, and what the detector `name`
    found in the first scenes."""
    pictures = [Chart(f"Scene {i + 1}", _image(picture(pairs, found[i], i))) for i in range(min(SCENES, len(pairs)))]
    boxes = f'Grey boxes are there, red ones were found by "{name}", with scores from {SURE:.0%} on.'
    sections = PageSection("Detectors", tables=[Table(rows)]), PageSection("What is found", note=boxes, charts=pictures)
    return rendered("Objects in two bands", said, sections)


def _image(png: bytes) -> Markup:
    """A picture inside of the page."""
    data = base64.b64encode(png).decode()
    return Markup('<img alt="visible and infrared" src="data:image/png;base64,{}">').format(data)
