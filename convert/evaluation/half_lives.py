"""Half-lives: after how many tokens half of a decaying state is left."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from convert.data.batches import Batch
from convert.models.access import hidden_states, slots_of

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LONGEST = 1e9  # tokens; a longer half-life is for ever


@torch.no_grad()
def half_lives(student: PreTrainedModel, batches: list[Batch]) -> dict[str, dict[str, float | None]]:
    """Return layer -> quantile over the layer's decays -> half-life in tokens, at the mean decay per token on
    `batches`; None where nothing decays. Empty where no layer decays.

    A state that loses a nats per token has half of it left after log(2) / a tokens."""
    decaying = {layer: slot.mixer for layer, slot in slots_of(student).items() if slot.mixer.decays}
    seen: dict[int, list[Tensor]] = {layer: [] for layer in decaying}

    def recorder(layer: int) -> Callable[[Any, tuple], None]:
        return lambda mixer, args: seen[layer].append(mixer.decay_per_token(*args[:2]))

    hooks = [mixer.register_forward_pre_hook(recorder(layer)) for layer, mixer in decaying.items()]
    try:
        for batch in batches if seen else []:
            hidden_states(student, batch.to(student.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {str(layer): _quantiles(torch.stack(decays).mean(0)) for layer, decays in seen.items()}


def _quantiles(decays: Tensor) -> dict[str, float | None]:
    """Quantile -> half-life, of decays in nats per token [decays]."""
    tokens = (math.log(2) / decays).clamp(max=LONGEST).float()
    at = torch.tensor(QUANTILES, device=tokens.device)
    values = torch.quantile(tokens, at, interpolation="nearest").tolist()
    return {str(q): None if value >= LONGEST else value for q, value in zip(QUANTILES, values, strict=True)}
