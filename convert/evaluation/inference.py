"""What generating costs a model: the size of its cache, the time to the first token, and the speed of decoding."""

import bisect
import copy
import math
import time

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from convert.core.processes import gathered
from convert.evaluation.generation import prefill, steps
from convert.mixers.base import StateSize
from convert.mixers.families import layer_window
from convert.mixers.projections import Projections
from convert.models.access import layers_of
from convert.models.cache import layer_bytes
from convert.models.sharding import unsharded
from convert.models.slot import attention_of
from convert.models.student import ConvertedForCausalLM
from convert.runs.language_schemas import ContextCost

CONTEXT_LENGTHS = (128, 1024, 8192, 32_768)  # tokens
ALWAYS_MEASURED = 1024  # tokens
PREFILL_SECONDS = 15.0  # the longest prefill of a report, estimated from the length before
WARM_UP = 2  # tokens decoded before the clock starts
DECODED = 16  # tokens that decoding speed is measured on


@torch.no_grad()
def context_cost(model: PreTrainedModel, length: int, dtype: torch.dtype) -> tuple[ContextCost, Tensor, Cache]:
    """What `length` random tokens of context cost one sequence; and the logits [1, 1, vocabulary] after them, with the
    cache as it was before any decoding.

    The bytes are those of all tensors of the live cache. Keys, values and latents count in `dtype`, the one of the
    export, whatever the model is measured in."""
    ids = torch.randint(1, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )
    started = _now(model)
    logits, cache = prefill(model, ids)
    logits[:, -1].argmax(-1)  # the first token
    seconds = _now(model) - started
    size = sum(layer_bytes(layer, dtype) for layer in cache.layers)
    cost = ContextCost(
        length=length,
        bytes=size,
        time_to_first_token_s=seconds,
        tokens_per_s=decoding_speed(model, logits, copy.deepcopy(cache))[1],
    )
    return cost, logits, cache


@torch.no_grad()
def decoding_speed(model: PreTrainedModel, logits: Tensor, cache: Cache) -> tuple[Tensor, float]:
    """Decode 16 tokens greedily, after two that warm up: the last logits [1, 1, vocabulary], and tokens per second.
    `logits` [1, 1, vocabulary] and `cache` are those of a prefill; the cache goes on."""
    decoded = steps(model, logits, cache)
    for _ in range(WARM_UP + 1):  # the first token follows from the prefill
        next(decoded)
    started = _now(model)
    for _ in range(DECODED):
        _, logits = next(decoded)
    return logits, DECODED / (_now(model) - started)


def _now(model: PreTrainedModel) -> float:
    """Seconds on a clock, after waiting for all work of the device."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def context_costs(
    model: PreTrainedModel, dtype: torch.dtype, lengths: tuple[int, ...], seconds: float = math.inf
) -> dict[int, ContextCost]:
    """Context length -> its cost. Lengths above 1,024 whose prefill would take longer than `seconds`, going by the one
    before, are left out. Of several processes the first one's clock counts; where they share a model out, its layers
    are gathered for each token."""
    found, before, took = {}, 1, 0.0
    for length in sorted(lengths):
        if length > ALWAYS_MEASURED and took * (length / before) ** 2 > seconds:
            break
        found[length] = gathered(context_cost(model, length, dtype)[0])[0]
        before, took = length, found[length].time_to_first_token_s
    return found


def cache_formula(model: PreTrainedModel) -> tuple[StateSize, ...]:
    """Cache size of one sequence, layer by layer, from the configuration of a teacher or a student."""
    slots, config = {}, model.config
    if isinstance(model, ConvertedForCausalLM):
        slots, config = model.slots(), model.config.host_config()
    sizes = []
    for layer, block in enumerate(layers_of(model)):
        if layer in slots:
            sizes.append(slots[layer].mixer.state_size())
            continue
        with unsharded(block):
            shape, window = Projections.of(attention_of(block)).shape, layer_window(config, layer)
        # transformers keeps one less than the window: the token that looks is the last of it
        sizes.append(
            StateSize(elements_per_token=2 * shape.num_kv_heads * shape.head_dim, window=window and window - 1)
        )
    return tuple(sizes)


def formula_bytes(layers: tuple[StateSize, ...], length: int, dtype: torch.dtype) -> int:
    """Cache size of one sequence of `length` tokens, in bytes."""
    return sum(layer.at(length, dtype) for layer in layers)


def break_even(teacher: tuple[StateSize, ...], student: tuple[StateSize, ...], dtype: torch.dtype) -> int | None:
    """The context length in tokens from which the student's cache is the smaller one, by formula; None if it is not by
    16 M tokens."""
    longest = 1 << 24

    def is_smaller(length: int) -> bool:
        return formula_bytes(student, length, dtype) < formula_bytes(teacher, length, dtype)

    if not is_smaller(longest):
        return None
    return bisect.bisect_left(range(longest), True, key=is_smaller)
