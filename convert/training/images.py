"""The stage `classify`: an image classifier learns from labels, from a teacher's logits and from its stages' outputs.

B images · K classes
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel

from convert.data.image_batch import ImageBatch
from convert.models.vision.features import Features, features, logits, staged
from convert.objectives.terms import LogitTerm, ScanTerm, StageTerm
from convert.training.image_settings import ImageSettings
from convert.training.loop import BatchOfStep, Keeper, Measure, Tracker, train
from convert.training.optimizer import Optimizers
from convert.training.precision import autocast
from convert.training.settings import check_objective


def classify(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: BatchOfStep,
    settings: ImageSettings,
    *,
    track: Tracker | None = None,
    keep: Keeper | None = None,
    measure: Measure | None = None,
) -> PreTrainedModel:
    """The student learns what the objective says; returns it. Both models see the same augmented images, each in its
    own normalisation. Without a term that needs one, the teacher does not run and may be None."""
    check_objective("classify", settings.objective, has_teacher=teacher is not None)
    objective = settings.objective.build(student, teacher, staged)
    uses_stages, uses_scans = objective.has(StageTerm), objective.has(ScanTerm)
    teacher_stages = objective.needs_teacher(StageTerm)

    def outputs(model: PreTrainedModel, images: Tensor, stages: bool) -> Features:
        found = features(model, images, uses_scans) if stages else Features((), logits(model, images))
        return Features(tuple(stage.float() for stage in found.stages), found.logits.float(), found.scans)

    def learn_from(batch: ImageBatch, whole: ImageBatch) -> Tensor:
        with autocast(batch.images.device, settings.precision):
            theirs = None
            if teacher is not None and objective.needs_teacher():
                with torch.no_grad():
                    theirs = outputs(teacher, batch.images, teacher_stages)
            ours = outputs(student, batch.images, uses_stages)
        wanted = None if theirs is None else theirs.logits
        loss = ours.logits.new_zeros(())
        if objective.has(LogitTerm):
            loss = objective.on_logits(ours.logits, wanted, batch.targets, 1 / whole.num_units)
        if uses_stages:
            loss = loss + objective.on_stages(ours, theirs, batch.targets, batch.num_units / whole.num_units)
        loss.backward()
        return loss.detach()

    return train(
        student, learn_from, batches, settings, objective, track=track, keep=keep, measure=measure,
        optimizers=_sgd(settings) if settings.optimizer == "sgd" else None,
        average=moving_average(student, settings.ema) if settings.ema else None,
    )  # fmt: skip


def moving_average(student: PreTrainedModel, decay: float) -> AveragedModel:
    """The exponential moving average of weights and running statistics. After n updates the decay is at most
    (1 + n) / (10 + n), so that a short training forgets where it began (as TensorFlow's; the official code has no such
    rule, and at its length the two are equal)."""

    def update(averages: list[Tensor], latest: list[Tensor], updates: Tensor) -> None:
        if averages[0].is_floating_point():
            n = int(updates)
            get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averages, latest, updates)
        else:  # counts and indices
            torch._foreach_copy_(averages, latest)

    return AveragedModel(student, multi_avg_fn=update, use_buffers=True)


def _sgd(settings: ImageSettings) -> Optimizers:
    """Stochastic gradient descent with momentum; norms and biases have no weight decay."""

    def make(student: PreTrainedModel) -> Sequence[Optimizer]:
        trained = [p for p in student.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        return [SGD([g for g in groups if g["params"]], lr=settings.lr, momentum=settings.momentum, nesterov=True)]

    return make
