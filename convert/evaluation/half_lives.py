"""Half-lives: after how many tokens half of a decaying state is left."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convert.data.batches import Batch
from convert.mixers.parts import TimeStep
from convert.models.student import ConvertedForCausalLM
from convert.training.loop import hidden_states

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LONGEST = 1e9  # tokens; a longer half-life is for ever


@torch.no_grad()
def half_lives(student: PreTrainedModel, batches: list[Batch]) -> dict[str, dict[str, float | None]]:
    """Layer -> quantile over the layer's decays -> half-life in tokens, at the mean Delta that the layer has on
    `batches`; None where nothing decays. Empty where no layer decays.

    A state with decay rate a shrinks by exp(-a Delta) per token (Mamba, arXiv 2312.00752), so half of it is left after
    log(2) / (a Delta) tokens."""
    slots = student.slots() if isinstance(student, ConvertedForCausalLM) else {}
    seen: dict[int, list[Tensor]] = {}
    hooks = []

    def recorder(layer: int) -> Callable[[Any, Any, Tensor], None]:
        return lambda module, args, dt: seen[layer].append(dt.mean((0, 1)))

    for layer, slot in slots.items():
        for module in slot.modules():
            if isinstance(module, TimeStep):
                seen[layer] = []
                hooks.append(module.register_forward_hook(recorder(layer)))
    try:
        for batch in batches if seen else []:
            hidden_states(student, batch.to(student.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {str(layer): _quantiles(slots[layer].mixer.rate(), torch.stack(dts).mean(0)) for layer, dts in seen.items()}


def _quantiles(rate: Tensor, dt: Tensor) -> dict[str, float | None]:
    """Quantile -> half-life, of rates [heads] or [channels, N] at the mean time steps [heads] or [channels]."""
    per_token = (rate * (dt[:, None] if rate.ndim == 2 else dt)).flatten()
    tokens = (math.log(2) / per_token).clamp(max=LONGEST).float()
    at = torch.tensor(QUANTILES, device=tokens.device)
    values = torch.quantile(tokens, at, interpolation="nearest").tolist()
    return {str(q): None if value >= LONGEST else value for q, value in zip(QUANTILES, values, strict=True)}
