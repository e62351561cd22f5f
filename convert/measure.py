"""What a conversion cost in quality: student beside teacher on held-out text, and what each carries while it generates.

python -m convert.evaluate runs/neox-nano-mamba2
"""

import bisect
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convert.data import Batch
from convert.mixers.parts import TimeStep
from convert.model import ConvertedForCausalLM, layer_bytes
from convert.objectives import cross_entropy, forward_kl
from convert.projections import layer_window
from convert.stages import hidden_states

HEAD_CHUNK = 512  # tokens whose logits are held at once
CONTEXT_LENGTHS = (128, 1024, 8192, 32_768)


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
            terms = cross_entropy(t, target), cross_entropy(s, target), (t.argmax(-1) == s.argmax(-1)).float(), forward_kl(s, t)
            sums += torch.stack([term.sum(dtype=torch.float64) for term in terms]).cpu()
        tokens += int(real.sum())
    teacher_nats, student_nats, top1, kl = (sums / tokens).tolist()
    return Comparison(_exp(teacher_nats), _exp(student_nats), top1, kl, tokens)


@dataclass(frozen=True)
class CacheSize:
    """Of one sequence. For each layer: bytes after 16 tokens, growth per token from there, and the window that ends it."""

    layers: tuple[tuple[int, int, int | None], ...]

    def at(self, length: int) -> int:
        """Bytes at this context length."""
        return sum(first + growth * (min(length, window or length) - 16) for first, growth, window in self.layers)


@torch.no_grad()
def cache_size(model: PreTrainedModel, dtype: torch.dtype | None = None) -> CacheSize:
    """Read off the live cache, layer by layer, after 16 and after 32 tokens. Keys and values count as `dtype`: a model that
    is measured in float32 is served as it is shipped."""
    config = model.config.host_config() if isinstance(model, ConvertedForCausalLM) else model.config

    def live(tokens: int) -> list[int]:
        ids = torch.ones(1, tokens, dtype=torch.long, device=model.device)
        return [layer_bytes(layer, dtype) for layer in model(ids, use_cache=True).past_key_values.layers]

    windows = [layer_window(config, layer) for layer in range(config.num_hidden_layers)]
    return CacheSize(tuple((a, (b - a) // 16, window) for a, b, window in zip(live(16), live(32), windows, strict=True)))


def break_even(teacher: CacheSize, student: CacheSize) -> int | None:
    """The context length from which the student's cache is the smaller one, or None if it is not by 16 M tokens."""
    longest = 1 << 24
    if student.at(longest) >= teacher.at(longest):
        return None
    return bisect.bisect_left(range(longest), True, key=lambda length: student.at(length) < teacher.at(length))


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@torch.no_grad()
def half_lives(student: ConvertedForCausalLM, batches: list[Batch]) -> dict[int, dict]:
    """Layer -> quantiles over its decays of the tokens after which half of a state is left, at the mean Delta seen on
    `batches`; null is for ever. Empty where no layer decays."""
    seen: dict[int, list[Tensor]] = {}
    hooks = []
    for layer, slot in student.slots().items():
        for module in slot.modules():
            if isinstance(module, TimeStep):
                seen[layer] = []
                hooks.append(module.register_forward_hook(lambda _, __, dt, layer=layer: seen[layer].append(dt.mean((0, 1)))))
    try:
        for batch in batches if seen else []:
            hidden_states(student, batch.to(student.device))
    finally:
        for hook in hooks:
            hook.remove()
    lives = {}
    for layer, steps in seen.items():
        rate = student.slots()[layer].mixer.rate()
        dt = torch.stack(steps).mean(0)
        per_token = (rate * (dt[:, None] if rate.ndim == 2 else dt)).flatten()
        tokens = math.log(2) / per_token
        quantiles = torch.quantile(tokens.clamp(max=1e9).float(), torch.tensor(QUANTILES, device=tokens.device), interpolation="nearest")
        lives[layer] = {str(q): (None if v >= 1e9 else v) for q, v in zip(QUANTILES, quantiles.tolist(), strict=True)}
    return lives


@torch.no_grad()
def continuations(model: PreTrainedModel, tokenizer, prompts: list[str], new_tokens: int = 48) -> list[str]:
    """Greedy, in one left-padded batch, with the model's own cache."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    ids = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=new_tokens, do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
