"""The stage `align`: each new mixer learns the attention it replaced, on the teacher's own inputs. What is compared is
its output, or that of the whole decoder layer around it.

B batch · T tokens · D width
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from convert.data.batches import Batch
from convert.models.access import first_output, hidden_states, layers_of, replaced_attention
from convert.models.positions import documents_of
from convert.models.slot import Call, attention_of
from convert.objectives.base import AttentionTerm, BlockTerm, LiveObjective
from convert.training.backward import backward
from convert.training.loop import BatchOfStep, Keeper, Measure, Tracker, train
from convert.training.precision import autocast
from convert.training.settings import Settings, check_objective


class Compared(NamedTuple):
    """The teacher's attention and the mixer in its place, or both whole layers."""

    theirs: nn.Module
    ours: nn.Module
    is_block: bool


def compared_modules(student: PreTrainedModel, teacher: PreTrainedModel, objective: LiveObjective) -> list[Compared]:
    """What the terms of an objective compare, kind by kind, from the first layer to the last."""
    blocks = [(layers_of(teacher)[layer], layers_of(student)[layer]) for layer in replaced_attention(student)]
    found = list[Compared]()
    if objective.has(AttentionTerm):
        found += [Compared(attention_of(theirs), attention_of(ours), False) for theirs, ours in blocks]
    if objective.has(BlockTerm):
        found += [Compared(theirs, ours, True) for theirs, ours in blocks]
    return found


@contextmanager
def teacher_forced(
    compared: Sequence[Compared], loss_of: Callable[[Compared, Tensor, Tensor, dict], Tensor], precision: str
) -> Iterator[list[Tensor]]:
    """A list that fills with the loss of each pair while the teacher runs inside the block; its gradients are
    accumulated, and its graph is freed, at once.

    `loss_of(pair, x, target, arguments)` is given the input and the output [B, T, D] of the teacher's module, and the
    named arguments that it was called with."""
    losses = list[Tensor]()

    def learn(pair: Compared) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            with torch.enable_grad(), autocast(x.device, precision):
                loss = loss_of(pair, x, first_output(output), kwargs)
            if loss.requires_grad:  # in a hybrid, nothing of a layer may be trained
                backward(loss)
            losses.append(loss.detach())

        return hook

    hooks = [pair.theirs.register_forward_hook(learn(pair), with_kwargs=True) for pair in compared]
    try:
        yield losses
    finally:
        for hook in hooks:
            hook.remove()


def align(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: BatchOfStep,
    settings: Settings,
    *,
    track: Tracker | None = None,
    keep: Keeper | None = None,
    measure: Measure | None = None,
) -> PreTrainedModel:
    """Each layer with a mixer learns from the teacher's own input to it: the mixer the attention's output, or the whole
    decoder layer its output, or both, as the objective says; returns the student.

    One pass of the teacher trains all layers; each layer's graph is freed before the next one's is made."""
    check_objective("align", settings.objective)
    objective = settings.objective.build(student, teacher)
    compared, num_layers = compared_modules(student, teacher, objective), len(replaced_attention(student))

    def learn_from(batch: Batch, whole: Batch) -> Tensor:
        num_tokens = whole.num_tokens * num_layers
        call = Call(document_ids=documents_of(batch.position_ids))

        def loss_of(pair: Compared, x: Tensor, target: Tensor, arguments: dict) -> Tensor:
            y = first_output(pair.ours(x, position_embeddings=arguments["position_embeddings"], call=call))
            parts = []
            for rows, length in batch.unpadded():
                y_real, target_real, x_real = (t[rows, :length].float() for t in (y, target, x))
                share = y_real.shape[:2].numel() / num_tokens
                if pair.is_block:
                    parts.append(objective.on_block(y_real, target_real, x_real, share))
                else:
                    parts.append(objective.on_attention(y_real, target_real, share))
            return torch.stack(parts).sum()

        with (
            teacher_forced(compared, loss_of, settings.precision) as losses,
            torch.no_grad(),
            autocast(batch.input_ids.device, settings.precision),
        ):
            hidden_states(teacher, batch)
        return torch.stack(losses).sum()

    return train(student, learn_from, batches, settings, objective, track=track, keep=keep, measure=measure)
