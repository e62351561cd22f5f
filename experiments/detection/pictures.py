"""Pictures of detections: both bands of a scene, with the boxes that are there and those that were found."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.detection.detector import Detections
from experiments.detection.scenes import Pairs

SURE = 0.3  # score from which a box is drawn (ours)
BANDS = "visible", "infrared"
THERE, FOUND = "#7f7f7f", "#d62728"


def draw(pairs: Pairs, found: Sequence[Detections], file: Path, count: int = 6) -> None:
    """Write a picture of the first scenes: visible above, infrared below; grey boxes are there, red ones were found."""
    count = min(count, len(pairs))
    figure = Figure(figsize=(2.2 * count, 4.8), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    for i in range(count):
        _scene(axes[:, i], pairs, found[i], i)
    for each, name in zip(axes[:, 0], BANDS, strict=True):
        each.set_title(name, loc="left", fontsize=9)
    figure.savefig(file, dpi=110)


def picture(pairs: Pairs, found: Detections, i: int) -> bytes:
    """One scene as a PNG file without background: visible on the left, infrared on the right, and the same boxes."""
    figure, written = Figure(figsize=(4.4, 2.4), layout="constrained"), io.BytesIO()
    axes = figure.subplots(1, 2)
    _scene(axes, pairs, found, i)
    for each, name in zip(axes, BANDS, strict=True):
        each.set_title(name, loc="left", fontsize=9, color=THERE)
    figure.savefig(written, dpi=150, transparent=True)
    return written.getvalue()


def _scene(axes: Sequence[Axes], pairs: Pairs, found: Detections, i: int) -> None:
    """Both bands of a scene, with its boxes."""
    axes[0].imshow(pairs.visible[i].permute(1, 2, 0).numpy())
    axes[1].imshow(pairs.infrared[i, 0].numpy(), cmap="gray", vmin=0, vmax=255)
    for each in axes:
        each.set_axis_off()
        for box, kind in zip(pairs.boxes[i].tolist(), pairs.classes[i].tolist(), strict=True):
            _box(each, box, THERE, pairs.class_names[kind], below=True)
        for box, score, kind in zip(found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), strict=True):
            if score >= SURE:
                _box(each, box, FOUND, f"{pairs.class_names[kind]} {score:.0%}", below=False)


def _box(axes: Axes, box: Sequence[float], colour: str, text: str, below: bool) -> None:
    left, top, right, bottom = box
    axes.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=colour))
    below_or_above = (bottom, "top") if below else (top, "bottom")
    axes.text(left, below_or_above[0], text, color=colour, fontsize=6, va=below_or_above[1], parse_math=False)
