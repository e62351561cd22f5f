"""Starts of the mixers with Hedgehog heads: linear attention, and the two Mambas that begin as exactly that."""

from typing import Any, ClassVar

import torch

from convert.mixers.base import Mixer
from convert.mixers.hedgehog import HedgehogHeads
from convert.mixers.init.base import NO_MAPS, Start
from convert.mixers.init.qkv import copy_qkv, read_qkv
from convert.mixers.linear import LinearAttention
from convert.mixers.mamba import Mamba
from convert.mixers.mamba2 import Mamba2
from convert.mixers.projections import Projections, weight_of


class LinearStart(Start):
    mixer: ClassVar[type[Mixer]] = LinearAttention
    hands_on_all = True

    @classmethod
    def why_inexact(cls, projections: Projections, options: Any, tokens: int) -> str | None:
        return None if projections.feature_maps is not None else NO_MAPS

    @classmethod
    def from_projections(cls, projections: Projections, options: Any) -> Any:
        mixer = cls.mixer(projections.shape, options)
        _copy(cls.heads(mixer), projections)
        return mixer

    @classmethod
    def projections(cls, mixer: Any) -> Projections:
        return _projections(cls.heads(mixer))

    @classmethod
    def heads(cls, mixer: Any) -> HedgehogHeads:
        """Where the mixer keeps its projections and feature maps."""
        return mixer.heads


class MambaStart(LinearStart):
    """The same, without decay, with an open gate and a convolution that is the identity."""

    mixer: ClassVar[type[Mixer]] = Mamba
    hands_on_all = False  # its convolution, time step, decay and gate stay behind

    @classmethod
    def heads(cls, mixer: Any) -> HedgehogHeads:
        return mixer.block.heads


class Mamba2Start(MambaStart):
    mixer: ClassVar[type[Mixer]] = Mamba2


@torch.no_grad()
def _copy(heads: HedgehogHeads, p: Projections) -> None:
    copy_qkv(heads.qkv, p)
    heads.out.weight.copy_(p.o.flatten(1))
    if p.o_bias is not None:
        heads.out.bias.copy_(p.o_bias)
    if p.feature_maps is not None:
        for feature, (weight, bias) in zip((heads.feature_q, heads.feature_k), p.feature_maps, strict=True):
            feature.weight.copy_(weight)
            feature.bias.copy_(bias)


def _projections(heads: HedgehogHeads) -> Projections:
    """The inverse of `_copy`."""
    o = weight_of(heads.out).unflatten(1, (-1, heads.qkv.shape.head_dim))
    q, k = heads.feature_q, heads.feature_k
    return read_qkv(heads.qkv, o, heads.out.bias, ((q.weight, q.bias), (k.weight, k.bias)))
