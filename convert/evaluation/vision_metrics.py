"""The final metrics of an image classifier: what is measured on a finished student, beside its teacher."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from convert.core import manifest
from convert.core.files import parse_json, write_json
from convert.data.image_batch import ImageBatch
from convert.data.images import ImageData
from convert.evaluation.cka import similarity
from convert.evaluation.classification import accuracy, agreement, difference, predict
from convert.evaluation.efficiency import cost
from convert.runs import records
from convert.runs.schemas import Headline, MetricRow
from convert.runs.vision_schemas import (
    Accuracies,
    ErrorInTraining,
    ImageFacts,
    LayerSimilarity,
    ModelCosts,
    Predictions,
    Similarity,
    VisionMetrics,
)

START = "similarity.json"  # of a run: how similar its student was to the teacher before training
NAMED = 100  # skipped files whose names are kept


def final_metrics(
    student: PreTrainedModel, teacher: PreTrainedModel, data: ImageData, batches: Sequence[ImageBatch],
    folder: Path | None = None,
) -> VisionMetrics:  # fmt: skip
    """Measure a finished student beside its teacher on held-out batches of `data`. `folder`: the run's, whose files say
    how training went."""
    found = {name: predict(model, batches) for name, model in (("teacher", teacher), ("student", student))}
    both = found["teacher"], found["student"]
    accuracies = Accuracies(
        teacher=accuracy(found["teacher"]), student=accuracy(found["student"]), difference=difference(*both)
    )
    errors = {name: 100 * (1 - float(predictions.is_right.mean())) for name, predictions in found.items()}
    numbers = {"labels": both[0].labels} | {name: predictions.predicted for name, predictions in found.items()}
    return VisionMetrics(
        headline=Headline(name="error", unit="%", **errors),
        accuracy=accuracies,
        agreement=agreement(*both),
        predictions=Predictions(**{name: " ".join(map(str, classes)) for name, classes in numbers.items()}),
        in_training=None if folder is None else error_in_training(folder),
        similarity=Similarity(
            before=None if folder is None else _start(folder), after=similarity(teacher, student, batches)
        ),
        cost=ModelCosts(teacher=cost(teacher), student=cost(student), threads=torch.get_num_threads()),
        images=ImageFacts(
            class_names=list(data.class_names),
            train=len(data.train),
            labelled=int(data.train.known.sum()),
            held_out=len(both[0].labels),
            skipped=len(data.skipped),
            skipped_names=list(data.skipped[:NAMED]),
        ),
    )


def error_in_training(folder: Path) -> ErrorInTraining | None:
    """The best and the last error in metrics.jsonl of a run; None where training measured none."""
    rows = records.rows(folder / "metrics.jsonl", MetricRow)  # while a run goes on, its hash is an older one's
    found = [(row.error, row.tokens) for row in rows if row.error is not None]
    if not found:
        return None
    (best, best_after), (last, last_after) = min(found), found[-1]
    return ErrorInTraining(best=best, best_after=best_after, last=last, last_after=last_after)


def keep_start(student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[ImageBatch], folder: Path) -> None:
    """Measure how similar a student's representations are to its teacher's before it is trained, and keep that in the
    run's folder; what was kept before stays."""
    if _start(folder) is None:
        with manifest.renewing(folder, START):
            write_json(folder / START, dataclasses.asdict(similarity(teacher, student, batches)))


def _start(folder: Path) -> LayerSimilarity | None:
    """What `keep_start` kept, if it did."""
    manifest.check(folder, START)
    file = folder / START
    if not file.exists():
        return None
    found = parse_json(file.read_bytes(), str(file))
    return records.checked(found, LayerSimilarity, str(file), f"{manifest.WAYS_OUT[START]}.")
