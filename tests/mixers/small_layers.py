"""Attention layers of a few dimensions, the mixers that start from them, and where their tokens are."""

import torch

from convert.mixers import Context, Mixer
from convert.mixers.base import AttentionShape
from convert.mixers.init import STARTS
from convert.mixers.projections import Projections
from tests.conftest import options_of, perturb

SHAPES = {
    "mha": AttentionShape(24, 3, 3, 8, rotary_dim=8, qkv_bias=False, out_bias=False),
    "gqa-norms": AttentionShape(20, 4, 2, 6, rotary_dim=6, qkv_bias=False, out_bias=False, norm_eps=1e-6),
    "partial-rotary-biases": AttentionShape(24, 3, 3, 8, rotary_dim=4, qkv_bias=True, out_bias=True),
}
BATCH, LENGTH = 2, 70  # more than one chunk


def attention(shape: AttentionShape, seed: int = 0) -> Projections:
    """An attention layer's weights."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    H, G, K, D = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.width
    weights = [1.5 * normal(heads, K, D) / D**0.5 for heads in (H, G, G)] + [normal(D, H, K) / (H * K) ** 0.5]
    biases = [0.3 * normal(heads, K) if shape.qkv_bias else None for heads in (H, G, G)]
    norms = [1 + 0.1 * normal(K) if shape.norm_eps is not None else None for _ in range(2)]
    return Projections(shape, *weights, *biases, 0.3 * normal(D) if shape.out_bias else None, *norms, scale=K**-0.5)


def mixer_of(name: str, shape: AttentionShape, **options) -> Mixer:
    """Away from its exact start."""
    return perturb(STARTS[name].from_projections(attention(shape), options_of(name, **options)))


def inputs(shape: AttentionShape, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randn(BATCH, length, shape.width, generator=torch.Generator().manual_seed(seed))


def context(shape: AttentionShape, positions, padding_mask=None, documents=None) -> Context:
    """`positions` and `documents` [B, T], or [T] for every row."""
    positions = torch.as_tensor(positions).expand(BATCH, -1)
    frequencies = 10000.0 ** (-torch.arange(0, shape.rotary_dim, 2) / shape.rotary_dim)
    angles = (positions[..., None] * frequencies).repeat(1, 1, 2)
    documents = None if documents is None else torch.as_tensor(documents).expand(BATCH, -1)
    return Context(angles.cos(), angles.sin(), padding_mask, documents)


def piece(c: Context, s: slice) -> Context:
    return Context(*(None if t is None else t[:, s] for t in (c.cos, c.sin, c.padding_mask, c.document_ids)))


def in_pieces(mixer: Mixer, x, c: Context, sizes) -> tuple[torch.Tensor, tuple]:
    y, state, start = [], None, 0
    for size in sizes:
        s = slice(start, start + size)
        part, state = mixer(x[:, s], piece(c, s), state)
        y.append(part)
        start += size
    assert start == x.shape[1]
    return torch.cat(y, 1), state
