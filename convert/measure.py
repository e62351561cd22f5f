"""What a conversion cost in quality: student beside teacher on held-out text, and what each carries while it generates.

python -m convert.evaluate runs/neox-nano-mamba2
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convert.data import Batch
from convert.mixers.parts import TimeStep
from convert.model import ConvertedForCausalLM, StudentCache
from convert.objectives import cross_entropy, forward_kl
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


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, lengths: tuple[int, ...] = CONTEXT_LENGTHS) -> dict[int, int]:
    """Bytes a sequence's cache holds at each context length: read off the live cache after 16 and 32 tokens; the growth
    between the two goes on to the length, or to the window where layers have one."""

    def live(tokens: int) -> int:
        ids = torch.ones(1, tokens, dtype=torch.long, device=model.device)
        cache = model(ids, use_cache=True).past_key_values
        if isinstance(cache, StudentCache):
            return cache.num_bytes()
        return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))

    at_16, at_32 = live(16), live(32)
    per_token = (at_32 - at_16) // 16
    return {length: at_16 + per_token * (length - 16) for length in lengths}


def break_even(teacher: dict[int, int], student: dict[int, int]) -> int | None:
    """The context length from which the student's cache is the smaller one, or None if it never is."""
    (a, teacher_a), (b, teacher_b) = list(teacher.items())[:2]
    student_a, student_b = list(student.values())[:2]
    slopes = (teacher_b - teacher_a) / (b - a), (student_b - student_a) / (b - a)
    if slopes[0] <= slopes[1]:
        return None if student_a >= teacher_a else 0
    return max(0, math.ceil(a + (student_a - teacher_a) / (slopes[0] - slopes[1])))


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@torch.no_grad()
def half_lives(student: ConvertedForCausalLM, batches: list[Batch]) -> dict[int, dict]:
    """Layer -> quantiles over its decays of the tokens after which half of a state is left, at the mean Delta seen on
    `batches`; null is for ever. `alive`: the share of decays that moved off 1 at all. Empty where no layer decays."""
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
        quantiles = torch.quantile(tokens.clamp(max=1e9).float(), torch.tensor(QUANTILES, device=tokens.device))
        lives[layer] = {
            "alive": (rate > 0).float().mean().item(),
            "tokens": {str(q): (None if v >= 1e9 else v) for q, v in zip(QUANTILES, quantiles.tolist(), strict=True)},
        }
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
