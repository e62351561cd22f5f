"""How well image classifiers predict held-out images: accuracy, cross-entropy, calibration, and a student compared with
its teacher. Images whose label is not known are left out.

N images · K classes
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from convert.core.errors import UserError
from convert.data.image_batch import ImageBatch
from convert.evaluation.statistics import CONFIDENCE, RESAMPLES
from convert.models.vision.features import logits
from convert.runs.vision_schemas import Accuracy, Agreement, Estimate

BINS = 15  # of the calibration error (Guo et al. 2017, arXiv 1706.04599)
TOP = 5  # told where there are more than 10 classes (ours)


@dataclass(frozen=True)
class Predictions:
    """What a model says of N images of K classes. `labels` and `predicted` [N] are classes; `rank` [N] is the number of
    classes that it puts before the right one; `confidence` [N] is the probability of the predicted class, and `nats`
    [N] the negative log probability of the right one."""

    labels: np.ndarray
    predicted: np.ndarray
    rank: np.ndarray
    confidence: np.ndarray
    nats: np.ndarray
    num_classes: int

    @property
    def is_right(self) -> np.ndarray:
        return self.predicted == self.labels


@torch.no_grad()
def predict(model: PreTrainedModel, batches: Sequence[ImageBatch]) -> Predictions:
    """Predictions of a model, in the order of the images. Where classes are level, the first counts as predicted.

    Raises UserError where no label is known, and for classes that are not the model's."""
    found: list[tuple[torch.Tensor, ...]] = []
    are_finite: list[torch.Tensor] = []
    with evaluating(model):
        for batch in tqdm(batches, desc="held-out images", unit="batch", dynamic_ncols=True, delay=3, leave=False):
            is_known = batch.targets.sum(-1) > 0
            if not is_known.any():
                continue
            batch = ImageBatch(batch.images[is_known], batch.targets[is_known]).to(model.device)
            scores = logits(model, batch.images).double()
            if scores.shape != batch.targets.shape:
                raise UserError(
                    f"A classifier is measured on the classes that it knows; it has {scores.shape[1]:,}, and the"
                    f" images have {batch.targets.shape[1]:,}."
                )
            are_finite.append(scores.isfinite().all())
            log_p, labels, predicted = scores.log_softmax(-1), batch.targets.argmax(-1), scores.argmax(-1)
            rows, right = torch.arange(len(labels), device=labels.device), scores.gather(1, labels[:, None])
            is_before = torch.arange(scores.shape[1], device=labels.device) < labels[:, None]
            rank = ((scores > right) | ((scores == right) & is_before)).sum(-1)
            found.append((labels, predicted, rank, log_p[rows, predicted].exp(), -log_p[rows, labels]))
    if not found:
        raise UserError("A classifier is measured on images with labels; none of these has one. Give held-out labels.")
    if not torch.stack(are_finite).all():
        raise UserError(
            f"A classifier must give finite logits; those of this {model.config.model_type} are not. Train it again"
            " with a lower rate (lr)."
        )
    labels, predicted, rank, confidence, nats = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    return Predictions(labels, predicted, rank, confidence, nats, batches[0].targets.shape[1])


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Puts a model in eval mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def error(model: PreTrainedModel, batches: Sequence[ImageBatch]) -> float:
    """Top-1 error in percent: the headline metric of images."""
    return 100 * (1 - float(predict(model, batches).is_right.mean()))


def accuracy(found: Predictions) -> Accuracy:
    """Accuracy with its intervals, cross-entropy and calibration of one model."""
    top5 = estimate(found.rank < TOP) if found.num_classes > 10 else None
    return Accuracy(
        top1=estimate(found.is_right),
        top5=top5,
        cross_entropy=float(found.nats.mean()),
        calibration_error=calibration_error(found),
    )


def calibration_error(found: Predictions) -> float:
    """Expected calibration error: the mean over images of |accuracy - mean confidence| of the bin that an image is in,
    with 15 bins of equal width over the confidence (arXiv 1706.04599, equation 3)."""
    number = np.clip(np.ceil(found.confidence * BINS).astype(int) - 1, 0, BINS - 1)
    off = np.bincount(number, found.is_right - found.confidence, BINS)  # images times (accuracy - confidence)
    return float(np.abs(off).sum() / len(number))


def agreement(teacher: Predictions, student: Predictions) -> Agreement:
    """How often both predict the same, and how often each is right."""
    t, s = teacher.is_right, student.is_right
    return Agreement(
        same=float((teacher.predicted == student.predicted).mean()),
        both_right=int((t & s).sum()),
        only_teacher=int((t & ~s).sum()),
        only_student=int((~t & s).sum()),
        both_wrong=int((~t & ~s).sum()),
    )


def difference(teacher: Predictions, student: Predictions) -> Estimate:
    """Top-1 accuracy of the student minus that of the teacher, paired by image."""
    return estimate(student.is_right.astype(float) - teacher.is_right)


def estimate(values: np.ndarray) -> Estimate:
    """The mean of values [N] and its 95 % bootstrap interval: percentiles over 2,000 resamples of the images, always
    the same. The values are few different ones, so a resample is drawn as a number of each of them: the same
    distribution, in little memory."""
    different, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    n = len(values)
    draws = np.random.default_rng(0).multinomial(n, counts / n, size=RESAMPLES)
    low, high = np.quantile(draws @ different / n, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(value=float(counts @ different / n), low=float(low), high=float(high))
