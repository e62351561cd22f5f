"""Hedgehog feature maps (arXiv 2402.04347): learned positive features of queries and keys in the place of a softmax.

B batch · T time · D width · H query heads · G key/value heads · K head size · F = 2 K features
"""

import torch
from torch import Tensor, nn

from convert.mixers.base import AttentionShape
from convert.mixers.parts import QKV, wide


class FeatureMap(nn.Module):
    """Hedgehog (arXiv 2402.04347; HedgeMamba, arXiv 2604.14191, Listing 3): phi(x) = softmax([Wx + b, -(Wx + b)]).

    x [B, T, heads, K] -> [B, T, heads, 2 K] in float32, positive, summing to one. W starts as the identity, b at zero
    (ours; the paper does not say)."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        u = wide(x.transpose(1, 2) @ self.weight.mT.to(x.dtype)) + self.bias[:, None]
        return torch.softmax(torch.cat([u, -u], -1), -1).transpose(1, 2)


class HedgehogHeads(nn.Module):
    """The projections of an attention layer with Hedgehog features of its queries and keys, and its output
    projection."""

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.qkv = QKV(shape)
        self.feature_q = FeatureMap(shape.num_heads, shape.head_dim)
        self.feature_k = FeatureMap(shape.num_kv_heads, shape.head_dim)
        self.out = nn.Linear(shape.num_heads * shape.head_dim, shape.width, bias=shape.out_bias)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q) [B, T, H, F], phi(k) [B, T, G, F], v [B, T, G, K], all float32."""
        q, k, v = self.qkv(x_BTD, cos, sin)
        return self.feature_q(q), self.feature_k(k), wide(v)
