"""The start of gated sliding-window attention: the teacher's function where the window is long enough.

H query heads · K head size
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from convert.core.errors import UserError
from convert.mixers.gate_swa import GateSWA
from convert.mixers.init.base import NO_SOFTMAX, Start
from convert.mixers.init.qkv import copy_qkv, read_qkv
from convert.mixers.projections import Projections, weight_of


class GateSWAStart(Start):
    mixer = GateSWA

    @classmethod
    def why_inexact(cls, projections: Projections, options: GateSWA.Options, tokens: int) -> str | None:
        if projections.feature_maps is not None:
            return NO_SOFTMAX
        theirs = tokens if projections.window is None else min(projections.window, tokens)
        if theirs == tokens:
            reach = options.window + options.sinks
            return None if reach >= tokens else f"it sees {reach:,} of {tokens:,} tokens; raise the window"
        if options.window < theirs:
            return f"its window of {options.window:,} is shorter than the teacher's of {theirs:,}; raise it"
        return f"the teacher has no sinks behind its window of {theirs:,}; set sinks to 0" if options.sinks else None

    @classmethod
    def from_projections(cls, projections: Projections, options: GateSWA.Options) -> GateSWA:
        if not math.isclose(projections.scale, projections.shape.head_dim**-0.5, rel_tol=1e-6):
            raise UserError(
                f"GateSWA's softmax has the scale 1 / sqrt(head size); this layer's is {projections.scale:g}. Keep it"
                " (edit.keep)."
            )
        if projections.window is not None and projections.window < options.window:
            options = replace(options, window=projections.window)
        mixer = GateSWA(projections.shape, options)
        copy_qkv(mixer.qkv, projections)
        with torch.no_grad():
            mixer.out.weight.copy_((projections.o / _opening(mixer)).flatten(1))
            if projections.o_bias is not None:
                mixer.out.bias.copy_(projections.o_bias)
        return mixer

    @classmethod
    def projections(cls, mixer: GateSWA) -> Projections:
        """The weights with the gate open as far as its bias says, which is its average."""
        o = weight_of(mixer.out).unflatten(1, (-1, mixer.shape.head_dim)) * _opening(mixer)
        return read_qkv(mixer.qkv, o, mixer.out.bias)


def _opening(mixer: GateSWA) -> Tensor:
    """How far the gate is open where its input is 0: sigmoid(bias) [H, K], or [H, 1], or 1."""
    if mixer.gate is None:
        return torch.ones(())
    return torch.sigmoid(mixer.gate.bias).unflatten(0, (mixer.shape.num_heads, -1))
