"""The parts of a model that training and evaluation need, found in the same way in a teacher, in a converted student
and in a plain transformers model: a causal language model, or an image classifier with attention in each layer.

B batch · T tokens · D width
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from convert.models.slot import Slot
from convert.models.student import ConvertedForCausalLM


class TokenBatch(Protocol):
    """What a model is run on: `input_ids` and `position_ids`, both [B, T]."""

    @property
    def input_ids(self) -> Tensor: ...

    @property
    def position_ids(self) -> Tensor: ...


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers, first to last; a converted model (of text or images) is asked for them."""
    return model.blocks if hasattr(model, "blocks") else model.base_model.layers


def replaced_attention(model: nn.Module) -> dict[int, nn.Module]:
    """Layer -> what stands where its attention was, of each converted layer; {} for a model that has none."""
    return model.slots() if hasattr(model, "slots") else {}


def slots_of(model: nn.Module) -> dict[int, Slot]:
    """Layer -> slot of each converted layer of a language model; {} for a model that has none."""
    return model.slots() if isinstance(model, ConvertedForCausalLM) else {}


def hidden_states(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """The last hidden states [B, T, D], which the output embeddings turn into logits.

    A model with a method `hidden_states` of its own (a converted student) is asked for them."""
    if hasattr(model, "hidden_states"):
        return model.hidden_states(batch.input_ids, position_ids=batch.position_ids)
    return model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state


def first_output(output: Tensor | tuple) -> Tensor:
    """What a decoder layer, or its attention, gives the rest of the model [B, T, D]: some return it in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def layer_outputs(model: PreTrainedModel, wanted: bool = True) -> Iterator[list[Tensor]]:
    """A list that fills with the output [B, T, D] of each decoder layer while the model runs inside the block.

    With `wanted` False it stays empty. (The list that transformers returns itself ends with the final norm's output
    instead of the last layer's.)"""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        seen.append(first_output(output))

    hooks = [block.register_forward_hook(hook) for block in layers_of(model)] if wanted else []
    try:
        yield seen
    finally:
        for one in hooks:
            one.remove()
