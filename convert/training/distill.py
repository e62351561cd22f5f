"""The stage `distill`: the whole student learns from what the teacher makes of the same text.

B batch · T tokens · D width · N tokens with a target · V vocabulary
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from convert.data.batches import Batch
from convert.models.access import hidden_states, layer_outputs
from convert.objectives.base import HeadTerm, LayerTerm, LiveObjective, LogitTerm
from convert.training.backward import backward, gradient_through_head
from convert.training.loop import BatchOfStep, Keeper, Measure, Tracker, train
from convert.training.precision import autocast
from convert.training.settings import Settings, check_objective


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: BatchOfStep,
    settings: Settings,
    *,
    track: Tracker | None = None,
    keep: Keeper | None = None,
    measure: Measure | None = None,
) -> PreTrainedModel:
    """The whole student learns the teacher's next-token distribution, its layers' outputs or the text, as the objective
    says; returns the student. Without a term that needs one, the teacher does not run and may be None."""
    check_objective("distill", settings.objective, has_teacher=teacher is not None)
    objective = settings.objective.build(student, teacher)
    uses_logits, uses_layers = objective.has(LogitTerm), objective.has(LayerTerm)
    uses_head = objective.has(HeadTerm)
    needs_teacher_logits = objective.needs_teacher(LogitTerm)

    def learn_from(batch: Batch, whole: Batch) -> Tensor:
        targets = batch.labels.flatten()
        known = targets != -100
        targets = targets[known]
        teacher_outputs: list[Tensor] = []
        with autocast(batch.input_ids.device, settings.precision):
            if objective.needs_teacher():
                with torch.no_grad(), layer_outputs(teacher, uses_layers) as teacher_outputs:
                    teacher_hidden = hidden_states(teacher, batch).flatten(0, 1)[known]
            with layer_outputs(student, uses_layers or uses_head) as outputs:
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
            if not uses_logits and not uses_head and layers is not None:
                backward(layers)
                return layers.detach()

            def teacher_logits_of(rows: slice) -> Tensor:
                assert teacher is not None  # check_objective has seen to it
                with torch.no_grad():
                    return teacher.get_output_embeddings()(teacher_hidden[rows]).float()

            def loss(logits: Tensor, rows: slice) -> Tensor:
                if teacher is None or not needs_teacher_logits:
                    return objective.on_logits(logits, None, targets[rows], scale)
                return objective.on_logits(logits, teacher_logits_of(rows), targets[rows], scale)

            head = student.get_output_embeddings()
            total, gradient = gradient_through_head(hidden, head, loss, settings.loss_chunk)
            roots: list[tuple[Tensor, Tensor | None]] = [(hidden, gradient)]
            if layers is not None:
                total, roots = total + layers.detach(), [*roots, (layers, None)]
            if uses_head:
                chosen = [output.flatten(0, 1)[known] for output in outputs]
                for output, value, gradient in _through_head(
                    objective, chosen, head, teacher_logits_of, targets, scale, settings.loss_chunk
                ):
                    total, roots = total + value, [*roots, (output, gradient)]
            if roots := [root for root in roots if root[0].requires_grad]:
                backward(*(root for root, _ in roots), gradients=tuple(gradient for _, gradient in roots))
            return total

    return train(student, learn_from, batches, settings, objective, track=track, keep=keep, measure=measure)


def _through_head(
    objective: LiveObjective,
    outputs: Sequence[Tensor],
    head: nn.Module,
    teacher_logits: Callable[[slice], Tensor],
    targets: Tensor,
    scale: float,
    chunk: int,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The output [N, D] in the graph, the loss, and the gradient of that output, for each layer of each HeadTerm: one
    chunk of one layer is held at a time."""
    references: dict[str, list[Tensor]] = {}
    found = []
    for weight, term, owned, branch, layer in objective.branches(len(outputs)):
        if term.name not in references:
            chunks = [slice(start, start + chunk) for start in range(0, len(targets), chunk)]
            parts = [term.reference(teacher_logits(rows), targets[rows]) for rows in chunks]
            references[term.name] = [torch.cat(part) for part in zip(*parts, strict=True)]

        def loss(logits: Tensor, rows: slice) -> Tensor:
            part = [tensor[rows] for tensor in references[term.name]]  # noqa: B023
            return weight * scale * term.loss(logits, part, owned).sum()  # noqa: B023

        def head_of(output: Tensor) -> Tensor:
            return head(term.hidden(output, branch, owned))  # noqa: B023

        found.append((outputs[layer], *gradient_through_head(outputs[layer], head_of, loss, chunk)))
    return found
