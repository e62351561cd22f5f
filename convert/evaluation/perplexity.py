"""What a conversion cost in quality: student beside teacher on held-out text, and what each carries while it generates.

python -m convert.evaluate runs/neox-nano-mamba2
"""

import bisect
import copy
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from convert.data.batches import Batch
from convert.data.prompts import encode, left_padded
from convert.evaluation.scoring import end_ids, greedily
from convert.mixers.base import StateSize
from convert.mixers.families import layer_window
from convert.mixers.projections import Projections
from convert.models.access import hidden_states, layers_of
from convert.models.cache import CACHE_NAME, layer_bytes
from convert.models.slot import attention_of
from convert.models.student import ConvertedForCausalLM
from convert.objectives.divergences import cross_entropy, forward_kl

HEAD_CHUNK = 512  # tokens whose logits are held at once
CONTEXT_LENGTHS = (128, 1024, 8192, 32_768)
ALWAYS_MEASURED = 1024  # tokens
PREFILL_SECONDS = 15.0  # that measuring a cache at one length may take, by the one before
PREFILL_CHUNK = 2048  # tokens
SHORTEST_BUCKET = 64  # tokens before, when perplexity is told by position
DECODED = 16  # tokens, for a rate


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: list[Batch]) -> float:
    """exp of the mean nats per token; inf where that overflows."""
    total = tokens = 0
    for batch in batches:
        batch = batch.to(model.device)
        targets = batch.labels.flatten()
        real = targets != -100
        hidden, targets = hidden_states(model, batch).flatten(0, 1)[real], targets[real]
        for h, t in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
            total += cross_entropy(model.get_output_embeddings()(h).float(), t).sum().item()
        tokens += len(targets)
    return _exp(total / tokens)


@torch.no_grad()
def perplexity_by_position(model: PreTrainedModel, batches: list[Batch]) -> dict[int, float]:
    """Perplexity of the tokens with so many of their document before them, up to the next key; the keys are 0 and
    powers of two from 64."""
    nats, counts = torch.zeros(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    for batch in batches:
        batch = batch.to(model.device)
        targets, seen = batch.labels.flatten(), batch.position_ids.flatten()
        real = targets != -100
        hidden = hidden_states(model, batch).flatten(0, 1)[real]
        for h, t, at in zip(*(x.split(HEAD_CHUNK) for x in (hidden, targets[real], seen[real])), strict=True):
            found = cross_entropy(model.get_output_embeddings()(h).float(), t).double().cpu()
            bucket = at.clamp(min=SHORTEST_BUCKET // 2).log2().floor().long().cpu()
            nats.index_add_(0, bucket, found)
            counts.index_add_(0, bucket, torch.ones_like(found))
    first = int(math.log2(SHORTEST_BUCKET)) - 1
    return {(1 << b if b > first else 0): _exp((nats[b] / counts[b]).item()) for b in range(first, 64) if counts[b]}


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


@dataclass(frozen=True)
class Comparison:
    """Of two models on the same tokens."""

    perplexity_teacher: float
    perplexity_student: float
    top1: float  # share of positions where both put the same token first
    kl_nats: float  # mean KL(teacher || student)
    tokens: int


@torch.no_grad()
def compare(student: PreTrainedModel, teacher: PreTrainedModel, batches: list[Batch]) -> Comparison:
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    for batch in batches:
        batch = batch.to(student.device)
        targets = batch.labels.flatten()
        real = targets != -100
        rows = [hidden_states(model, batch).flatten(0, 1)[real].split(HEAD_CHUNK) for model in (teacher, student)]
        for t, s, target in zip(*rows, targets[real].split(HEAD_CHUNK), strict=True):
            t, s = teacher.get_output_embeddings()(t).float(), student.get_output_embeddings()(s).float()
            terms = (
                cross_entropy(t, target),
                cross_entropy(s, target),
                (t.argmax(-1) == s.argmax(-1)).float(),
                forward_kl(s, t),
            )
            sums += torch.stack([term.sum(dtype=torch.float64) for term in terms]).cpu()
        tokens += int(real.sum())
    teacher_nats, student_nats, top1, kl = (sums / tokens).tolist()
    return Comparison(_exp(teacher_nats), _exp(student_nats), top1, kl, tokens)


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
    """The logits after the last of these tokens [1, T], and the cache; in pieces, so that a long text needs no more
    memory than its cache."""
    for piece in ids.split(PREFILL_CHUNK, 1):
        out = model(piece, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
        cache = out[CACHE_NAME]
    return out.logits, cache


@dataclass(frozen=True)
class Context:
    """What `length` tokens of context cost one sequence. `bytes`: all tensors of the live cache summed, after a real
    prefill; keys, values and latents count as the model is shipped, not as it is measured."""

    length: int
    bytes: int
    first_token_s: float
    tokens_per_s: float


@torch.no_grad()
def context(model: PreTrainedModel, length: int, dtype: torch.dtype) -> tuple[Context, Tensor, Cache]:
    """And the first token [1, 1] with the cache that it came with, as it was before any decoding."""
    ids = torch.randint(1, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )
    started = _now(model)
    logits, cache = prefill(model, ids)
    first = logits[:, -1:].argmax(-1)
    seconds = _now(model) - started
    size = sum(layer_bytes(layer, dtype) for layer in cache.layers)
    return Context(length, size, seconds, decode(model, first, copy.deepcopy(cache))[1]), first, cache


@torch.no_grad()
def decode(model: PreTrainedModel, token: Tensor, cache: Cache) -> tuple[Tensor, float]:
    """16 tokens, greedily, after two that warm up: the last logits, and tokens per second."""
    for i in range(2 + DECODED):
        if i == 2:
            started = _now(model)
        logits = model(token, use_cache=True, **{CACHE_NAME: cache}).logits
        token = logits[:, -1:].argmax(-1)
    return logits, DECODED / (_now(model) - started)


def _now(model: PreTrainedModel) -> float:
    """Seconds, when all that was asked of the device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def contexts(
    model: PreTrainedModel, dtype: torch.dtype, lengths: tuple[int, ...], seconds: float = math.inf
) -> dict[int, Context]:
    """By length. Those above 1,024 that would take longer than `seconds`, going by the one before, are left out."""
    found, before, took = {}, 1, 0.0
    for length in sorted(lengths):
        if length > ALWAYS_MEASURED and took * (length / before) ** 2 > seconds:
            break
        found[length] = context(model, length, dtype)[0]
        before, took = length, found[length].first_token_s
    return found


def cache_formula(model: PreTrainedModel) -> tuple[StateSize, ...]:
    """Layer by layer, from the configuration."""
    is_student = isinstance(model, ConvertedForCausalLM)
    config = model.config.host_config() if is_student else model.config
    slots, sizes = model.slots() if is_student else {}, []
    for layer, block in enumerate(layers_of(model)):
        if layer in slots:
            sizes.append(slots[layer].mixer.state_size())
            continue
        shape, window = Projections.of(attention_of(block)).shape, layer_window(config, layer)
        # transformers keeps one less than the window: the token that looks is the last of it
        sizes.append(
            StateSize(elements_per_token=2 * shape.num_kv_heads * shape.head_dim, window=window and window - 1)
        )
    return tuple(sizes)


def formula_bytes(layers: tuple[StateSize, ...], length: int, dtype: torch.dtype) -> int:
    return sum(layer.at(length, dtype) for layer in layers)


def break_even(teacher: tuple[StateSize, ...], student: tuple[StateSize, ...], dtype: torch.dtype) -> int | None:
    """The context length from which the student's cache is the smaller one, by formula, or None if it is not by 16 M
    tokens."""
    longest = 1 << 24

    def is_smaller(length: int) -> bool:
        return formula_bytes(student, length, dtype) < formula_bytes(teacher, length, dtype)

    if not is_smaller(longest):
        return None
    return bisect.bisect_left(range(longest), True, key=is_smaller)


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@torch.no_grad()
def half_lives(student: ConvertedForCausalLM, batches: list[Batch]) -> dict[int, dict]:
    """Layer -> quantiles over its decays of the tokens after which half of a state is left, at the mean decay per token
    on `batches`; null is for ever. Empty where no layer decays."""
    decaying = {layer: slot.mixer for layer, slot in student.slots().items() if slot.mixer.decays}
    seen: dict[int, list[Tensor]] = {layer: [] for layer in decaying}
    hooks = [
        mixer.register_forward_pre_hook(lambda m, args, layer=layer: seen[layer].append(m.decay_per_token(*args[:2])))
        for layer, mixer in decaying.items()
    ]
    try:
        for batch in batches if seen else []:
            hidden_states(student, batch.to(student.device))
    finally:
        for hook in hooks:
            hook.remove()
    lives = {}
    for layer, decays in seen.items():
        tokens = math.log(2) / torch.stack(decays).mean(0)
        quantiles = torch.quantile(
            tokens.clamp(max=1e9).float(), torch.tensor(QUANTILES, device=tokens.device), interpolation="nearest"
        )
        lives[layer] = {str(q): None if v >= 1e9 else v for q, v in zip(QUANTILES, quantiles.tolist(), strict=True)}
    return lives


@torch.no_grad()
def continuations(model: PreTrainedModel, tokenizer, prompts: list[str], new_tokens: int = 48) -> list[str]:
    """Greedy, in one left-padded batch, with the model's own cache."""
    ids, mask = left_padded([encode(tokenizer, prompt) for prompt in prompts], tokenizer.pad_token_id, model.device)
    with greedily(model):
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=end_ids(model, tokenizer),
        )
    return tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
