"""The decays with which delta rules start.

H query heads · C decays of a head
"""

import math

import torch
from torch import Tensor

from convert.core.errors import UserError
from convert.mixers.projections import Projections

HALF_LIVES = (8.0, 512.0)  # tokens, of the first and the last head (ours)
SHORTEST = 1.0  # token, of half-lives by look-back: heads that look at their own token alone (ours)


def rates_and_steps(start: str, p: Projections, channels: int) -> tuple[Tensor, Tensor]:
    """The rate of each head [H] and the time steps of its decays [H, C], whose product is lost per token, in nats."""
    heads = p.shape.num_heads
    if start == "mamba":  # rates from 1 to 16, steps from 1e-3 to 1e-1 (Mamba, arXiv 2312.00752; the paper's code)
        low, high = math.log(1e-3), math.log(1e-1)
        return torch.empty(heads).uniform_(1, 16), torch.empty(heads, channels).uniform_(low, high).exp()
    if start == "g6":
        rate = torch.empty(heads).uniform_(math.log(0.03), math.log(0.3)).exp()
        return rate, torch.full((heads, channels), math.log(2))
    if start == "calibrated":
        return _by_look_back(p, channels)
    first, last = map(math.log, HALF_LIVES)
    half_lives = torch.linspace(first, last, heads).exp()
    return math.log(2) / half_lives, torch.ones(heads, channels)


def _by_look_back(p: Projections, channels: int) -> tuple[Tensor, Tensor]:
    """Half-lives that are the head's mean look-back (Taylor-Calibrate, arXiv 2606.16429), the same in all its channels:
    spread out around it, they fit worse (ours: LOG.md)."""
    if p.stats is None or p.stats.look_back is None:
        raise UserError(
            "decay_start=calibrated needs how far the layer's heads look back, which a calibration of a layer of"
            " attention tells. Set calibration, or take another decay_start."
        )
    steps = torch.ones(p.shape.num_heads, channels)
    if p.q.is_meta:  # a plan, before anything was seen
        return torch.ones(p.shape.num_heads), steps
    return math.log(2) / p.stats.look_back.to(p.q.device, torch.float32).clamp(min=SHORTEST), steps
