"""The start of Kimi Delta Attention: the teacher's projections, and the decays that an option names."""

import torch

from convert.mixers.init.base import Start
from convert.mixers.init.decays import rates_and_steps
from convert.mixers.init.qkv import copy_qkv, without_norms
from convert.mixers.kda import KDA
from convert.mixers.projections import Projections

OPENING = {"silu": 1.0, "sigmoid": 0.5}  # of the gate, at the start


class KDAStart(Start):
    mixer = KDA

    @classmethod
    def needs_stats(cls, options: KDA.Options) -> bool:
        return cls.needs_look_back(options)

    @classmethod
    def needs_look_back(cls, options: KDA.Options) -> bool:
        return options.decay_start == "calibrated"

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
        copy_qkv(mixer.qkv, without_norms(projections))
        mixer.out.weight.copy_((projections.o / OPENING[options.gate]).flatten(1))
        if projections.o_bias is not None:
            mixer.out.bias.copy_(projections.o_bias)
        rate, step = rates_and_steps(options.decay_start, projections, projections.shape.head_dim)
        mixer.log_rate.copy_(rate.log())
        mixer.time_step.up.bias.copy_(torch.expm1(step).log().flatten())  # the inverse of softplus
        return mixer

    @classmethod
    def projections(cls, mixer: KDA) -> Projections:
        raise TypeError("What Kimi Delta Attention has learnt is no attention; no other mixer can start from it.")
