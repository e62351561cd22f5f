"""The stage `supervised`: a model learns a text, or whatever its batches have as targets, without a teacher.

B batch · T tokens · N tokens · V vocabulary
"""

from torch import Tensor
from transformers import PreTrainedModel

from convert.data.batches import Batch
from convert.models.access import hidden_states
from convert.training.backward import backward_through_head
from convert.training.loop import BatchOfStep, Keeper, Measure, Tracker, train
from convert.training.optimizer import Optimizers
from convert.training.precision import autocast
from convert.training.settings import Settings, check_objective


def supervised(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: BatchOfStep,
    settings: Settings,
    *,
    track: Tracker | None = None,
    keep: Keeper | None = None,
    measure: Measure | None = None,
    optimizers: Optimizers | None = None,
) -> PreTrainedModel:
    """The model learns the labels of its batches; returns it. The teacher, which every stage is given, does not run.

    `optimizers(model)` makes other ones than AdamW. The model may be any module that has `hidden_states` (see
    models/access.py) and `get_output_embeddings`."""
    check_objective("supervised", settings.objective, has_teacher=False)
    objective = settings.objective.build(student, None)

    def learn_from(batch: Batch, whole: Batch) -> Tensor:
        targets = batch.labels.flatten()
        known = targets != -100
        scale = 1 / max(1, whole.num_targets)
        with autocast(batch.input_ids.device, settings.precision):
            # The head runs on tokens without a target too: its products then have the shapes of a plain forward pass,
            # and the numbers are bit for bit those of an ordinary training step.
            hidden = hidden_states(student, batch).flatten(0, 1)

            def loss(logits: Tensor, rows: slice) -> Tensor:
                return objective.on_logits(logits[known[rows]], None, targets[rows][known[rows]], scale)

            return backward_through_head(hidden, student.get_output_embeddings(), loss, settings.loss_chunk)

    return train(
        student, learn_from, batches, settings, objective, track=track, keep=keep, measure=measure,
        optimizers=optimizers,
    )  # fmt: skip
