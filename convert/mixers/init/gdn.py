"""The start of Gated DeltaNet: the teacher's projections with keys and values for every query head, and the decays and
gates that options name.

H query heads · G key/value heads · K head size · D width
"""

import torch
from torch import Tensor

from convert.core.errors import UserError
from convert.mixers.gdn import GDN
from convert.mixers.init.base import Start
from convert.mixers.init.decays import rates_and_steps
from convert.mixers.init.qkv import without_norms
from convert.mixers.parts import SILU_OF_ONE
from convert.mixers.projections import Projections

RIDGE = 1e-4  # of the mean square of the inputs, where a direction is solved for (ours)
GATE_STD = 0.02  # of a random gate's weights (Qwen3.5's initializer_range)


class GDNStart(Start):
    mixer = GDN

    @classmethod
    def needs_stats(cls, options: GDN.Options) -> bool:
        return options.gate_start == "open" or cls.needs_look_back(options)

    @classmethod
    def needs_look_back(cls, options: GDN.Options) -> bool:
        return options.decay_start == "calibrated"

    @classmethod
    def refits_output(cls, options: GDN.Options) -> bool:
        return options.start == "refitted"

    @classmethod
    def why_inexact(cls, projections: Projections, options: GDN.Options, tokens: int) -> str | None:
        return "a delta rule has no softmax and no positions; align it"

    @classmethod
    @torch.no_grad()
    def from_projections(cls, projections: Projections, options: GDN.Options) -> GDN:
        mixer, p = GDN(projections.shape, options), without_norms(projections)
        steady, repeats = _steady(p), p.shape.num_heads // p.shape.num_kv_heads
        q, k, v = (
            weight if bias is None or steady is None else weight + bias[..., None] * steady
            for weight, bias in ((p.q, p.q_bias), (p.k, p.k_bias), (p.v, p.v_bias))
        )
        k, v = (t.repeat_interleave(repeats, 0) for t in (k, v))
        mixer.qkv.weight.copy_(torch.cat([q, k, v]).flatten(0, 1))
        mixer.out.weight.copy_(p.o.flatten(1))
        if options.gate_start == "random":
            mixer.gate.weight.normal_(0, GATE_STD)
        elif steady is not None:
            mixer.gate.weight.copy_((SILU_OF_ONE * steady).expand_as(mixer.gate.weight))
        else:
            raise UserError(
                "gate_start=open needs the layer's inputs, which a calibration tells. Set calibration, or take"
                " gate_start=random."
            )
        rate, step = rates_and_steps(options.decay_start, p, 1)
        mixer.log_rate.copy_(rate.log())
        mixer.time_step_bias.copy_(torch.expm1(step).log().flatten())  # the inverse of softplus
        return mixer

    @classmethod
    def projections(cls, mixer: GDN) -> Projections:
        raise TypeError("What Gated DeltaNet has learnt is no attention; no other mixer can start from it.")


def _steady(p: Projections) -> Tensor | None:
    """The direction [D] in which the layer's inputs x are 1 as nearly as can be, by least squares: what takes the place
    of a bias. None where nothing is known of them."""
    if p.stats is None:
        return None
    if p.q.is_meta:  # a plan, before anything was seen
        return p.q.new_empty(p.shape.width)
    moment = p.stats.moment.to(p.q.device, torch.float64, copy=True)
    moment.diagonal().add_(RIDGE * moment.diagonal().mean())
    return torch.linalg.solve(moment, p.stats.mean.to(moment)).to(p.q.dtype)
