"""The stage `align` of image classifiers: each new mixer learns the attention it replaced, on the teacher's own inputs.

B images · T tokens · D width
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convert.data.image_batch import ImageBatch
from convert.models.access import first_output, replaced_attention
from convert.models.vision.features import logits
from convert.training.align import Compared, compared_modules, teacher_forced
from convert.training.image_settings import ImageSettings
from convert.training.loop import BatchOfStep, Keeper, Measure, Tracker, train
from convert.training.precision import autocast
from convert.training.settings import check_objective


def align_images(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: BatchOfStep,
    settings: ImageSettings,
    *,
    track: Tracker | None = None,
    keep: Keeper | None = None,
    measure: Measure | None = None,
) -> PreTrainedModel:
    """Each layer of a converted vision transformer learns from the teacher's own input to it, as `align` has it for
    text; returns the student. Labels have no part in it."""
    check_objective("align", settings.objective)
    objective = settings.objective.build(student, teacher)
    compared, num_layers = compared_modules(student, teacher, objective), len(replaced_attention(student))

    def learn_from(batch: ImageBatch, whole: ImageBatch) -> Tensor:
        share = batch.num_units / (whole.num_units * num_layers)

        def loss_of(pair: Compared, x: Tensor, target: Tensor, arguments: dict) -> Tensor:
            y, target, x = (t.float() for t in (first_output(pair.ours(x)), target, x))
            return (
                objective.on_block(y, target, x, share) if pair.is_block else objective.on_attention(y, target, share)
            )

        with (
            teacher_forced(compared, loss_of, settings.precision) as losses,
            torch.no_grad(),
            autocast(batch.images.device, settings.precision),
        ):
            logits(teacher, batch.images)
        return torch.stack(losses).sum()

    return train(student, learn_from, batches, settings, objective, track=track, keep=keep, measure=measure)
