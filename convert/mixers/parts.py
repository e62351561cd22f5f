"""What mixers of several kinds are composed of: projections to heads, rotary positions, short convolutions, time steps
and gates.

B batch · T time · D width · H query heads · G key/value heads · K head size
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convert.mixers.base import AttentionShape, Context

SILU_OF_ONE = 1.278464542761  # SiLU of it is 1: a gate that starts open (MOHAWK's official code)


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: half precision is for matrix products."""
    return x if x.dtype == torch.float64 else x.float()


class HeadNorm(nn.RMSNorm):
    """An RMSNorm in the dtype of its weight, whatever dtype the projections have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class QKV(nn.Module):
    """x [B, T, D] -> q [B, T, H, K], k, v [B, T, G, K]: projected, normed where the teacher does, rotated."""

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.shape = shape
        inner, kv_inner = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q = nn.Linear(shape.width, inner, bias=shape.qkv_bias)
        self.k = nn.Linear(shape.width, kv_inner, bias=shape.qkv_bias)
        self.v = nn.Linear(shape.width, kv_inner, bias=shape.qkv_bias)
        self.q_norm = HeadNorm(shape.head_dim, eps=shape.norm_eps) if shape.norm_eps is not None else nn.Identity()
        self.k_norm = HeadNorm(shape.head_dim, eps=shape.norm_eps) if shape.norm_eps is not None else nn.Identity()

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (p(x_BTD).unflatten(-1, (-1, self.shape.head_dim)) for p in (self.q, self.k, self.v))
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first R dimensions of x [B, T, heads, K]; cos, sin [B, T, R], two-halves layout."""
    rotary_dim = cos.shape[-1]
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turned.chunk(2, -1)
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


class ShortConv(nn.Module):
    """Causal depthwise convolution over `size` tokens that starts as the identity and sees no other document.

    x [B, T, D], state [B, size - 1, D] or None -> y [B, T, D], the next state."""

    def __init__(self, width: int, size: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, size))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        with torch.no_grad():
            self.weight[:, -1] = 1

    def forward(self, x: Tensor, context: Context, state: Tensor | None) -> tuple[Tensor, Tensor]:
        document_ids = context.document_ids
        if context.padding_mask is not None:
            x = x * context.padding_mask[..., None]
        T, size = x.shape[1], self.weight.shape[1]
        if state is None:
            state = x.new_zeros(x.shape[0], size - 1, x.shape[2])
        seen = torch.cat([state.to(x.dtype), x], 1)
        weight = self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.conv1d(seen.mT, weight[:, None], bias, groups=x.shape[2]).mT
        tail = seen[:, T:]
        if document_ids is not None:
            documents = torch.cat([document_ids[:, :1].expand(-1, size - 1), document_ids], 1)
            same = documents.unfold(1, size, 1) == document_ids[..., None]  # [B, T, size]
            # the few tokens whose window reaches into another document
            at = context.once(("other documents", size), lambda: (~same.all(-1)).nonzero(as_tuple=True))
            fresh = (seen.unfold(1, size, 1)[at] * same[at][:, None] * weight).sum(-1)
            fresh = fresh if self.bias is None else fresh + self.bias
            y = y.index_put(at, fresh.to(y.dtype))
            tail = tail * (documents[:, T:] == document_ids[:, -1:])[..., None]
        return y, wide(tail).clone()  # a view would keep the whole text


class TimeStep(nn.Module):
    """Delta = softplus(W_up W_down x + b) through `rank` dimensions, exactly 1 everywhere at the start. [B, T, D] ->
    [B, T, size]."""

    def __init__(self, width: int, rank: int, size: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, size)
        nn.init.zeros_(self.up.weight)
        nn.init.constant_(self.up.bias, 0.541324854612918)  # softplus of it is 1

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(wide(self.up(self.down(x))))


def open_gate(width: int, inner: int) -> nn.Linear:
    """A projection whose SiLU starts at exactly 1."""
    gate = nn.Linear(width, inner)
    nn.init.zeros_(gate.weight)
    nn.init.constant_(gate.bias, SILU_OF_ONE)
    return gate
