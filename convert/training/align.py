"""The stage `align`: each new mixer learns the attention it replaced, on the teacher's own inputs. What is compared is
its output, or that of the whole decoder layer around it.

B batch · T tokens · D width
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from convert.data.batches import Batch
from convert.models.access import first_output, hidden_states, layers_of, slots_of
from convert.models.positions import documents_of
from convert.models.slot import Call, attention_of
from convert.objectives.base import AttentionTerm, BlockTerm
from convert.training.backward import backward
from convert.training.loop import BatchOfStep, Keeper, Measure, Tracker, train
from convert.training.precision import autocast
from convert.training.settings import Settings, check_objective


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
    slots = slots_of(student)
    blocks = [(layers_of(teacher)[layer], layers_of(student)[layer]) for layer in slots]
    compared: list[tuple[nn.Module, nn.Module, bool]] = []  # the teacher's module, the student's, whether whole layers
    if objective.has(AttentionTerm):
        compared += [(attention_of(theirs), attention_of(ours), False) for theirs, ours in blocks]
    if objective.has(BlockTerm):
        compared += [(theirs, ours, True) for theirs, ours in blocks]

    def learn_from(batch: Batch, whole: Batch) -> Tensor:
        num_tokens = whole.num_tokens * len(slots)
        call, losses = Call(document_ids=documents_of(batch.position_ids)), []

        def loss_of(is_block: bool, y: Tensor, target: Tensor, x: Tensor) -> Tensor:
            share = y.shape[:2].numel() / num_tokens
            return objective.on_block(y, target, x, share) if is_block else objective.on_attention(y, target, share)

        def learn(ours: nn.Module, is_block: bool) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
                x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                with torch.enable_grad(), autocast(x.device, settings.precision):
                    y = first_output(ours(x, position_embeddings=kwargs["position_embeddings"], call=call))
                    target, parts = first_output(output), []
                    for rows, length in batch.unpadded():
                        real = (t[rows, :length].float() for t in (y, target, x))
                        parts.append(loss_of(is_block, *real))
                    loss = torch.stack(parts).sum()
                if loss.requires_grad:  # in a hybrid, nothing of a layer may be trained
                    backward(loss)
                losses.append(loss.detach())

            return hook

        hooks = [
            theirs.register_forward_hook(learn(ours, is_block), with_kwargs=True) for theirs, ours, is_block in compared
        ]
        try:
            with torch.no_grad(), autocast(batch.input_ids.device, settings.precision):
                hidden_states(teacher, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(losses).sum()

    return train(student, learn_from, batches, settings, objective, track=track, keep=keep, measure=measure)
