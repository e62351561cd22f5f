"""What mixers of every kind are composed of: projections to heads, their norms and rotary positions.

B batch · T time · D width · H query heads · G key/value heads · K head size
"""

import torch
from torch import Tensor, nn

from convert.mixers.base import AttentionShape


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
