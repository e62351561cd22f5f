"""Weights of an attention layer into the projections of a mixer, and out of them.

D width · H query heads · K head size
"""

from dataclasses import replace

import torch
from torch import Tensor

from convert.mixers.parts import QKV
from convert.mixers.projections import FeatureMaps, Projections, weight_of


@torch.no_grad()
def copy_qkv(qkv: QKV, p: Projections) -> None:
    """Copy weights, biases and norms of queries, keys and values into `qkv`."""
    for linear, weight, bias in ((qkv.q, p.q, p.q_bias), (qkv.k, p.k, p.k_bias), (qkv.v, p.v, p.v_bias)):
        linear.weight.copy_(weight.flatten(0, 1))
        if bias is not None:
            linear.bias.copy_(bias.flatten())
    if p.q_norm is not None:
        qkv.q_norm.weight.copy_(p.q_norm)
        qkv.k_norm.weight.copy_(p.k_norm)


def read_qkv(qkv: QKV, o: Tensor, o_bias: Tensor | None, feature_maps: FeatureMaps | None = None) -> Projections:
    """The inverse of `copy_qkv`, with an output projection o [D, H, K]."""
    linears, heads = (qkv.q, qkv.k, qkv.v), (-1, qkv.shape.head_dim)
    biases = [None if linear.bias is None else linear.bias.unflatten(0, heads) for linear in linears]
    norms = (None, None) if qkv.shape.norm_eps is None else (qkv.q_norm.weight, qkv.k_norm.weight)
    weights = (weight_of(linear).unflatten(0, heads) for linear in linears)
    return Projections(  # type: ignore[misc, call-arg]
        qkv.shape, *weights, o, *biases, o_bias, *norms, scale=qkv.shape.head_dim**-0.5, feature_maps=feature_maps
    )


def without_norms(p: Projections) -> Projections:
    """Put the weights of norms of q and k into the projections: the rest of a norm is lost where q and k get length
    1."""
    if p.q_norm is None or p.k_norm is None:
        return p
    q_bias, k_bias = (
        None if bias is None else bias * norm for bias, norm in ((p.q_bias, p.q_norm), (p.k_bias, p.k_norm))
    )
    q, k = p.q * p.q_norm[:, None], p.k * p.k_norm[:, None]
    return replace(p, q=q, k=k, q_bias=q_bias, k_bias=k_bias, q_norm=None, k_norm=None)
