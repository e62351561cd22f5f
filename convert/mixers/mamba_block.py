"""What both Mambas are composed of: a short convolution, input-dependent time steps, decay rates and a gate.

B batch · T time · D width · H query heads · G key/value heads · K head size · F = 2 K features
"""

from typing import Any

import torch
from torch import Tensor, nn

from convert.mixers.base import AttentionShape, Context
from convert.mixers.hedgehog import HedgehogHeads
from convert.mixers.parts import ShortConv, TimeStep, open_gate, wide


class _NonNegative(torch.autograd.Function):
    """max(s, 0) with the gradient of the identity: gradients of micro-batches add up, and s = 0 is not dead."""

    @staticmethod
    def forward(ctx: Any, s: Tensor) -> Tensor:
        return s.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class DecayRate(nn.Module):
    """Rates >= 0, [channels, states] or [heads]: the state decays by exp(-Delta rate). s = 0 is no decay, and can
    learn.

    rate = max(s, 0) (1 .. N): Mamba's spread of rates once s moves (ours; Mamba's own log parameter has no gradient at
    0)."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(*size))

    def forward(self) -> Tensor:
        spread = torch.arange(1, self.s.shape[-1] + 1, device=self.s.device)
        return _NonNegative.apply(wide(self.s)) * spread


@torch.no_grad()
def project_gradients(model: nn.Module) -> None:
    """Leave only a gradient that would raise it where a rate is at its bound or below. Called once per step, on the
    gradients of the whole batch: the signs of a micro-batch's gradients are not those of their sum."""
    for module in model.modules():
        if isinstance(module, DecayRate) and module.s.grad is not None:
            module.s.grad.masked_fill_((module.s <= 0) & (module.s.grad >= 0), 0)


class MambaBlock(nn.Module):
    """What both Mambas share: everything but the decay and the scan. `num_steps`: how many Deltas a token has."""

    def __init__(self, shape: AttentionShape, conv: int, dt_rank: int | None, num_steps: int) -> None:
        super().__init__()
        inner = shape.num_heads * shape.head_dim
        self.conv = ShortConv(shape.width, conv)
        self.heads = HedgehogHeads(shape)
        self.time_step = TimeStep(shape.width, dt_rank or max(1, shape.width // 16), num_steps)
        self.skip = nn.Parameter(torch.zeros(inner))  # D
        self.gate = open_gate(shape.width, inner)

    def forward(self, x_BTD: Tensor, context: Context, conv_state: Tensor | None) -> tuple[Tensor, ...]:
        """C = phi(q), B = phi(k), v, Delta [B, T, num_steps], D [H K], the next state of the convolution. D comes along
        because a parameter is read by its own module's forward: what offloads weights puts them there for as long as
        that runs."""
        x, conv_state = self.conv(x_BTD, context, conv_state)
        q, k, v = self.heads(x, context.cos, context.sin)
        dt = self.time_step(x)
        if context.padding_mask is not None:
            dt = dt * context.padding_mask[..., None]  # padding neither adds to the state nor lets it decay
        return q, k, v, dt, self.skip, conv_state

    def mean_time_step(self, x_BTD: Tensor, context: Context) -> Tensor:
        """The mean of Delta over all tokens, [num_steps]."""
        x, _ = self.conv(x_BTD, context, None)
        return self.time_step(x).mean((0, 1))
