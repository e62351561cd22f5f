"""What both Mambas are composed of: a short convolution, input-dependent time steps, decay rates and a gate.

B batch · T time · D width · H query heads · G key/value heads · K head size · F = 2 K features
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.mixers.base import AttentionShape, Context
from convert.mixers.hedgehog import HedgehogHeads
from convert.mixers.parts import wide

SILU_OF_ONE = 1.278464542761  # SiLU of it is 1: a gate that starts open (MOHAWK's official code)


class ShortConv(nn.Module):
    """Causal depthwise convolution over `size` tokens that starts as the identity and sees no other document.

    x [B, T, D], state [B, size - 1, D] or None -> y [B, T, D], the next state."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, size))
        self.bias = nn.Parameter(torch.zeros(width))
        with torch.no_grad():
            self.weight[:, -1] = 1

    def forward(
        self, x: Tensor, padding_mask: Tensor | None, document_ids: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if padding_mask is not None:
            x = x * padding_mask[..., None]
        T, size = x.shape[1], self.weight.shape[1]
        if state is None:
            state = x.new_zeros(x.shape[0], size - 1, x.shape[2])
        seen = torch.cat([state.to(x.dtype), x], 1)
        weight = self.weight.to(x.dtype)
        y = F.conv1d(seen.mT, weight[:, None], self.bias.to(x.dtype), groups=x.shape[2]).mT
        tail = seen[:, T:]
        if document_ids is not None:
            documents = torch.cat([document_ids[:, :1].expand(-1, size - 1), document_ids], 1)
            same = documents.unfold(1, size, 1) == document_ids[..., None]  # [B, T, size]
            at = (~same.all(-1)).nonzero(as_tuple=True)  # the few tokens whose window reaches into another document
            fresh = (seen.unfold(1, size, 1)[at] * same[at][:, None] * weight).sum(-1) + self.bias
            y = y.index_put(at, fresh.to(y.dtype))
            tail = tail * (documents[:, T:] == document_ids[:, -1:])[..., None]
        return y, wide(tail).clone()  # a view would keep the whole text


class TimeStep(nn.Module):
    """Delta = softplus(W_up W_down x) through `rank` dimensions, exactly 1 everywhere at the start. [B, T, D] -> [B, T,
    size]."""

    def __init__(self, width: int, rank: int, size: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, size)
        nn.init.zeros_(self.up.weight)
        nn.init.constant_(self.up.bias, 0.541324854612918)  # softplus of it is 1

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(wide(self.up(self.down(x))))


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


def open_gate(width: int, inner: int) -> nn.Linear:
    """A projection whose SiLU starts at exactly 1."""
    gate = nn.Linear(width, inner)
    nn.init.zeros_(gate.weight)
    nn.init.constant_(gate.bias, SILU_OF_ONE)
    return gate


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
        x, conv_state = self.conv(x_BTD, context.padding_mask, context.document_ids, conv_state)
        q, k, v = self.heads(x, context.cos, context.sin)
        dt = self.time_step(x)
        if context.padding_mask is not None:
            dt = dt * context.padding_mask[..., None]  # padding neither adds to the state nor lets it decay
        return q, k, v, dt, self.skip, conv_state

    def mean_time_step(self, x_BTD: Tensor, context: Context) -> Tensor:
        """The mean of Delta over all tokens, [num_steps]."""
        x, _ = self.conv(x_BTD, context.padding_mask, context.document_ids, None)
        return self.time_step(x).mean((0, 1))
