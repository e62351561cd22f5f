"""The final metrics of an image classifier, and what classifiers cost."""

import dataclasses
import json
import math

import pytest
import torch

from convert.core.errors import UserError
from convert.evaluation.efficiency import multiply_accumulates
from convert.evaluation.vision_metrics import error_in_training, final_metrics, keep_start
from convert.runs import records
from convert.runs.vision_schemas import LayerSimilarity, Predictions, VisionMetrics
from tests.evaluation.classifiers import classifier, image_batches, image_data


def linear(tokens, width, inner, heads_width):
    return 4 * tokens * width * width + 2 * tokens * tokens * heads_width + 2 * tokens * width * inner


def test_multiply_accumulates_by_hand():
    model, tokens = classifier("vit"), 17
    patches = 16 * 4 * 4 * 16  # images of 16 x 16 in patches of 4 x 4, 16 wide
    expected = patches + 3 * linear(tokens, 16, 32, 16) + 16 * 12
    assert multiply_accumulates(model) == expected


def test_final_metrics_are_what_a_report_takes(tmp_path):
    teacher, student, batches = classifier("vit"), classifier("resnet"), image_batches(40, 30)
    rows = [{"stage": "distill", "step": n, "tokens": 16 * n} for n in range(1, 5)]
    for row, error in zip(rows[1:], (50.0, 20.0, 30.0), strict=True):
        row["held_out/error"] = error
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep_start(classifier("resnet", seed=5), teacher, batches, tmp_path)
    kept = (tmp_path / "similarity.json").read_text()
    keep_start(student, teacher, batches, tmp_path)  # a resumed run keeps what it began with
    assert (tmp_path / "similarity.json").read_text() == kept
    found = final_metrics(student, teacher, image_data(), batches, tmp_path)
    again = records.checked(json.loads(json.dumps(dataclasses.asdict(found))), VisionMetrics, "It", "")
    assert again == found
    assert found.in_training == error_in_training(tmp_path)
    assert dataclasses.astuple(found.in_training) == (20.0, 48, 30.0, 64)
    assert found.similarity.before != found.similarity.after
    assert found.headline.student == pytest.approx(100 * (1 - found.accuracy.student.top1.value))
    assert found.images.labelled == 100 and found.images.held_out == 70 and found.images.skipped == 1
    by_hand = Predictions(labels="1 1 2", teacher="0 0 0", student="1 0 0")
    assert by_hand.confusion("student", 3) == [[0, 0, 0], [1, 1, 0], [1, 0, 0]]
    confusion = torch.tensor(found.predictions.confusion("student", 12))
    assert confusion.sum() == 70 and confusion.trace() / 70 == pytest.approx(found.accuracy.student.top1.value)
    assert found.cost.student.parameters == sum(p.numel() for p in student.parameters())
    assert math.isfinite(found.cost.teacher.images_per_s)
    (tmp_path / "similarity.json").write_text(kept.replace("70", "71").replace("64", "65"))
    with pytest.raises(UserError, match=r"similarity\.json is not what was written"):
        final_metrics(student, teacher, image_data(), batches, tmp_path)


@pytest.mark.parametrize("values", [[[]], [[1.0], [1.0, 2.0]]])
def test_damaged_similarities_are_named(values):
    with pytest.raises(UserError, match="a number of some row is missing"):
        records.checked({"images": 8, "values": values}, LayerSimilarity, "It", "")


def test_damaged_predictions_are_named():
    found = final_metrics(classifier("vit"), classifier("vit"), image_data(), image_batches(8))
    row = dataclasses.asdict(found)
    for name, text, words in (
        ("student", "0 1", "another number of images than labels"),
        ("labels", "0 x", "a word that is no class"),
        ("teacher", " ".join(["99"] * 8), "a class that has no name"),
    ):
        with pytest.raises(UserError, match=words):
            records.checked(row | {"predictions": row["predictions"] | {name: text}}, VisionMetrics, "It", "")
