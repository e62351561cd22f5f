"""Numbers of image classifiers against their definitions, on predictions that are known."""

import numpy as np
import pytest
import torch

from convert.core.errors import UserError
from convert.data.image_batch import ImageBatch
from convert.evaluation import classification
from convert.evaluation.classification import Predictions, accuracy, calibration_error, estimate, predict
from convert.evaluation.statistics import interval
from convert.models.vision.features import logits
from tests.evaluation.classifiers import classifier, image_batches


@pytest.fixture
def saying(monkeypatch):
    """A classifier whose logits are the first pixels of an image."""
    model = classifier("vit")
    monkeypatch.setattr(classification, "logits", lambda _, images: images[:, 0, 0])
    return model


def images_of(scores, targets):
    scores = torch.tensor(scores, dtype=torch.float64)
    return ImageBatch(scores[:, None, None], torch.tensor(targets, dtype=torch.float64))


def test_predictions_by_hand(saying):
    batch = images_of(
        [[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 9.0, 0.0]],
        [[0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]],  # of the last the label is not known
    )
    found = predict(saying, [batch])
    assert found.labels.tolist() == [1, 1, 2] and found.predicted.tolist() == [1, 0, 0]
    assert found.rank.tolist() == [0, 2, 2]  # where classes are level the first counts
    p = np.exp([2.0, 3.0, 1.0]) / np.exp([[0, 2, 1], [3, 0, 1], [1, 1, 1]]).sum(1)
    np.testing.assert_allclose(found.confidence, p)
    np.testing.assert_allclose(found.nats, -np.log([p[0], p[1] * np.exp(-3), p[2]]))
    assert classification.error(saying, [batch]) == pytest.approx(100 * 2 / 3)
    assert accuracy(found).top5 is None and accuracy(found).cross_entropy == pytest.approx(found.nats.mean())


def test_predictions_of_batches_are_those_of_the_model_in_eval_mode():
    model, batches = classifier("resnet").train(), image_batches(5, 3)
    images, targets = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "targets"))
    found = predict(model, batches)
    assert model.training
    with torch.no_grad():
        expected = logits(model.eval(), images)
    assert found.predicted.tolist() == expected.argmax(1).tolist()
    in_top5 = (expected.topk(5).indices == targets.argmax(1, keepdim=True)).any(1)
    assert accuracy(found).top5.value == pytest.approx(in_top5.double().mean().item())


@pytest.mark.parametrize(
    "scores, targets, words",
    [
        ([[0.0, 1.0]], [[0, 0]], "none of these has one"),
        ([[0.0, 1.0]], [[0, 0, 1]], "it has 2, and the images have 3"),
        ([[0.0, float("nan")]], [[0, 1]], "finite logits"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(saying, scores, targets, words):
    with pytest.raises(UserError, match=words):
        predict(saying, [images_of(scores, targets)])


def calibrated(confidence, is_right):
    labels = np.zeros(len(confidence), dtype=int)
    return Predictions(labels, 1 - np.asarray(is_right, dtype=int), labels, np.asarray(confidence), labels, 2)


def test_calibration_error_by_hand():
    """Bins end with their upper edges: 1/15 x 9 = 0.6 is in the ninth with 0.55, 0.61 in the tenth."""
    found = calibrated([0.55, 0.6, 0.61, 1.0], [1, 0, 1, 1])
    expected = (2 * abs(0.5 - 0.575) + 1 * abs(1 - 0.61) + 0) / 4
    assert calibration_error(found) == pytest.approx(expected)


def test_an_estimate_has_the_bootstrap_interval():
    values = (np.arange(400) % 5 == 0).astype(float)
    found, (low, high) = estimate(values), interval(list(values))
    assert found.value == values.mean() and found.low == pytest.approx(low, abs=0.004)
    assert found.high == pytest.approx(high, abs=0.004)
    assert estimate(np.ones(3)).low == estimate(np.ones(3)).high == 1.0


def test_student_and_teacher_are_paired():
    labels = np.array([0, 0, 1, 1, 2])
    t, s = (
        Predictions(labels, np.array(predicted), labels, labels, labels, 3)
        for predicted in ([0, 1, 1, 0, 2], [0, 0, 0, 0, 2])
    )
    found = classification.agreement(t, s)
    assert (found.both_right, found.only_teacher, found.only_student, found.both_wrong) == (2, 1, 1, 1)
    assert found.same == pytest.approx(3 / 5)
    assert classification.difference(t, s).value == 0.0 and classification.difference(t, t).high == 0.0
