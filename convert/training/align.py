"""The stage `align`: each new mixer learns the attention it replaced, on the teacher's own inputs.

B batch · T tokens · D width
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from convert.data.batches import Batch
from convert.mixers.base import Context
from convert.models.access import hidden_states, layers_of, slots_of
from convert.models.positions import documents_of
from convert.models.slot import attention_of
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
    """Each new mixer learns its layer's attention output from the teacher's own input to it; returns the student.

    One pass of the teacher trains all layers; each layer's graph is freed before the next one's is made."""
    check_objective("align", settings.objective)
    objective = settings.objective.build(student, teacher)
    slots = slots_of(student)
    blocks = list(layers_of(teacher))

    def learn_from(batch: Batch, whole: Batch) -> Tensor:
        num_tokens = whole.num_tokens * len(slots)
        documents, losses = documents_of(batch.position_ids), []

        def learn(layer: int) -> Callable[[nn.Module, tuple, dict, tuple], None]:
            def hook(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
                x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                with torch.enable_grad(), autocast(x.device, settings.precision):
                    cos, sin = kwargs["position_embeddings"]
                    y, _ = slots[layer].mixer(x, Context(cos, sin, None, documents))
                    parts = [
                        objective.on_attention(
                            y[rows, :length].float(),
                            output[0][rows, :length].float(),
                            batch.input_ids[rows, :length].numel() / num_tokens,
                        )
                        for rows, length in batch.unpadded()
                    ]
                    loss = torch.stack(parts).sum()
                if loss.requires_grad:  # in a hybrid, nothing of a layer may be trained
                    backward(loss)
                losses.append(loss.detach())

            return hook

        hooks = [attention_of(blocks[layer]).register_forward_hook(learn(layer), with_kwargs=True) for layer in slots]
        try:
            with torch.no_grad(), autocast(batch.input_ids.device, settings.precision):
                hidden_states(teacher, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(losses).sum()

    return train(student, learn_from, batches, settings, objective, track=track, keep=keep, measure=measure)
