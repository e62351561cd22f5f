"""The start of Kimi Delta Attention: the teacher's projections, and the decays that an option names.

H query heads · K head size
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from convert.mixers.init.base import Start
from convert.mixers.init.qkv import copy_qkv
from convert.mixers.kda import KDA
from convert.mixers.projections import Projections

OPENING = {"silu": 1.0, "sigmoid": 0.5}  # of the gate, at the start
HALF_LIVES = (8.0, 512.0)  # tokens, of the first and the last head (ours)


class KDAStart(Start):
    mixer = KDA

    @classmethod
    def refits_output(cls, options: KDA.Options) -> bool:
        return options.start == "refitted"

    @classmethod
    def why_inexact(cls, projections: Projections, options: KDA.Options, tokens: int) -> str | None:
        return "a delta rule has no softmax and no positions; align it"

    @classmethod
    @torch.no_grad()
    def from_projections(cls, projections: Projections, options: KDA.Options) -> KDA:
        mixer = KDA(projections.shape, options)
        copy_qkv(mixer.qkv, _without_norms(projections))
        mixer.out.weight.copy_((projections.o / OPENING[options.gate]).flatten(1))
        if projections.o_bias is not None:
            mixer.out.bias.copy_(projections.o_bias)
        rate, step = _decays(options.decay_start, projections.shape.num_heads, projections.shape.head_dim)
        mixer.log_rate.copy_(rate.log())
        mixer.time_step.up.bias.copy_(torch.expm1(step).log().flatten())  # the inverse of softplus
        return mixer

    @classmethod
    def projections(cls, mixer: KDA) -> Projections:
        raise TypeError("What Kimi Delta Attention has learnt is no attention; no other mixer can start from it.")


def _without_norms(p: Projections) -> Projections:
    """Put the weights of norms of q and k into the projections: the rest of a norm is lost where q and k get length
    1."""
    if p.q_norm is None or p.k_norm is None:
        return p
    q_bias, k_bias = (
        None if bias is None else bias * norm for bias, norm in ((p.q_bias, p.q_norm), (p.k_bias, p.k_norm))
    )
    q, k = p.q * p.q_norm[:, None], p.k * p.k_norm[:, None]
    return replace(p, q=q, k=k, q_bias=q_bias, k_bias=k_bias, q_norm=None, k_norm=None)


def _decays(start: str, heads: int, channels: int) -> tuple[Tensor, Tensor]:
    """The rate of each head [H] and the time steps of its channels [H, K], whose product is lost per token, in nats."""
    if start == "mamba":  # rates from 1 to 16, steps from 1e-3 to 1e-1 (Mamba, arXiv 2312.00752; the paper's code)
        low, high = math.log(1e-3), math.log(1e-1)
        return torch.empty(heads).uniform_(1, 16), torch.empty(heads, channels).uniform_(low, high).exp()
    if start == "g6":
        rate = torch.empty(heads).uniform_(math.log(0.03), math.log(0.3)).exp()
        return rate, torch.full((heads, channels), math.log(2))
    first, last = map(math.log, HALF_LIVES)
    half_lives = torch.linspace(first, last, heads).exp()
    return math.log(2) / half_lives, torch.ones(heads, channels)
