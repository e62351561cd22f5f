"""The stage `distill`: the whole student learns from what the teacher makes of the same text.

B batch · T tokens · D width · N tokens with a target · V vocabulary
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convert.data.batches import Batch
from convert.models.access import hidden_states, layer_outputs
from convert.objectives.base import LayerTerm, LogitTerm
from convert.objectives.recorded import RecordedTeacher
from convert.training.backward import backward, backward_through_head
from convert.training.loop import BatchOfStep, Keeper, Measure, Tracker, train
from convert.training.precision import autocast
from convert.training.settings import Settings, check_objective


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: BatchOfStep,
    settings: Settings,
    *,
    recorded: bool = False,
    track: Tracker | None = None,
    keep: Keeper | None = None,
    measure: Measure | None = None,
) -> PreTrainedModel:
    """The whole student learns the teacher's next-token distribution, its layers' outputs or the text, as the objective
    says; returns the student. Without a term that needs one, the teacher does not run and may be None; so it may where
    the batches have what was `recorded` of one."""
    check_objective("distill", settings.objective, has_teacher=teacher is not None, recorded=recorded)
    objective = settings.objective.build(student, teacher)
    uses_logits, uses_layers = objective.has(LogitTerm), objective.has(LayerTerm)
    needs_teacher_logits = objective.needs_teacher(LogitTerm)
    runs_teacher = objective.needs_teacher() and not recorded

    def learn_from(batch: Batch, whole: Batch) -> Tensor:
        known = batch.target_places
        targets = batch.labels.flatten()[known]
        said = RecordedTeacher(*(each.flatten(0, 1)[known] for each in batch.recorded)) if recorded else None
        teacher_outputs: list[Tensor] = []
        with autocast(batch.input_ids.device, settings.precision):
            if runs_teacher:
                with torch.no_grad(), layer_outputs(teacher, uses_layers) as teacher_outputs:
                    teacher_hidden = hidden_states(teacher, batch).flatten(0, 1)[known]
            with layer_outputs(student, uses_layers) as outputs:
                hidden = hidden_states(student, batch).flatten(0, 1)[known]
            scale = 1 / max(1, whole.num_targets)
            layers = None
            if uses_layers:
                parts = [
                    objective.on_layers(
                        [output[rows, :length].float() for output in outputs],
                        [output[rows, :length].float() for output in teacher_outputs],
                        batch.input_ids[rows, :length].numel() / whole.num_tokens,
                    )
                    for rows, length in batch.unpadded()
                ]
                layers = torch.stack(parts).sum()
            if not uses_logits and layers is not None:
                backward(layers)
                return layers.detach()

            def loss(logits: Tensor, rows: slice) -> Tensor:
                wanted: Tensor | RecordedTeacher | None = None
                if said is not None:
                    wanted = said.rows(rows)
                elif teacher is not None and needs_teacher_logits:
                    with torch.no_grad():
                        wanted = teacher.get_output_embeddings()(teacher_hidden[rows]).float()
                return objective.on_logits(logits, wanted, targets[rows], scale)

            return backward_through_head(hidden, student.get_output_embeddings(), loss, settings.loss_chunk, layers)

    return train(student, learn_from, batches, settings, objective, track=track, keep=keep, measure=measure)
