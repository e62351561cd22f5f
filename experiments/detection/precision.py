"""The mean average precision of detections, by COCO's own code (package `pycocotools`)."""

import contextlib
import io
from collections.abc import Sequence

from convert.core.errors import UserError
from experiments.detection.detector import Detections
from experiments.detection.scenes import Pairs


def check_installed() -> None:
    try:
        import pycocotools  # noqa: F401
    except ImportError:
        raise UserError("Precision is measured by the package `pycocotools`: pip install -e '.[detection]'.") from None


def map50(found: Sequence[Detections], pairs: Pairs) -> float:
    """The mean over classes of the average precision at an intersection over union of 0.5, from 0 to 1."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    side = pairs.visible.shape[-1]
    rows = [
        {"id": 1 + i, "image_id": image, "category_id": kind, "bbox": [x, y, r - x, b - y], "iscrowd": 0}
        | {"area": (r - x) * (b - y)}
        for i, (image, (x, y, r, b), kind) in enumerate(
            (image, box, kind)
            for image, (boxes, kinds) in enumerate(zip(pairs.boxes, pairs.classes, strict=True))
            for box, kind in zip(boxes.tolist(), kinds.tolist(), strict=True)
        )
    ]
    guesses = [
        {"image_id": image, "category_id": kind, "bbox": [x, y, r - x, b - y], "score": score}
        for image, each in enumerate(found)
        for (x, y, r, b), kind, score in zip(
            each.boxes.tolist(), each.classes.tolist(), each.scores.tolist(), strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": image, "width": side, "height": side} for image in range(len(pairs))],
            "categories": [{"id": kind, "name": name} for kind, name in enumerate(pairs.class_names)],
            "annotations": rows,
        }
        truth.createIndex()
        if not guesses:
            return 0.0
        judge = COCOeval(truth, truth.loadRes(guesses), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return max(0.0, float(judge.stats[1]))
