"""Pictures of detections: both bands of a scene, with the boxes that are there and those that were found."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.detection.detector import Detections
from experiments.detection.scenes import Pairs

SURE = 0.3  # score from which a box is drawn (ours)
THERE, FOUND = "#7f7f7f", "#d62728"


def draw(pairs: Pairs, found: Sequence[Detections], file: Path, count: int = 6) -> None:
    """Write a picture of the first scenes: visible above, infrared below; grey boxes are there, red ones were found."""
    count = min(count, len(pairs))
    figure = Figure(figsize=(2.2 * count, 4.8), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    for i in range(count):
        axes[0, i].imshow(pairs.visible[i].permute(1, 2, 0).numpy())
        axes[1, i].imshow(pairs.infrared[i, 0].numpy(), cmap="gray", vmin=0, vmax=255)
        for row in (0, 1):
            axes[row, i].set_axis_off()
            for box, kind in zip(pairs.boxes[i].tolist(), pairs.classes[i].tolist(), strict=True):
                _box(axes[row, i], box, THERE, pairs.class_names[kind], below=True)
            each = found[i]
            for box, score, kind in zip(each.boxes.tolist(), each.scores.tolist(), each.classes.tolist(), strict=True):
                if score >= SURE:
                    _box(axes[row, i], box, FOUND, f"{pairs.class_names[kind]} {score:.0%}", below=False)
    axes[0, 0].set_title("visible", loc="left", fontsize=9)
    axes[1, 0].set_title("infrared", loc="left", fontsize=9)
    figure.savefig(file, dpi=110)


def _box(axes: Axes, box: Sequence[float], colour: str, text: str, below: bool) -> None:
    left, top, right, bottom = box
    axes.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=colour))
    axes.text(left, bottom if below else top, text, color=colour, fontsize=6, va="top" if below else "bottom")
