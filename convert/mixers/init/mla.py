"""The start of latent attention: its ranks, and the weights that latents.py computes."""

from collections.abc import Iterable

import torch

from convert.mixers.init.base import NO_SOFTMAX, Start
from convert.mixers.init.latent_ranks import choose_ranks, left_out
from convert.mixers.init.latents import LatentStart, latent_start
from convert.mixers.mla import MLA
from convert.mixers.projections import Projections


class MLAStart(Start):
    mixer = MLA

    @classmethod
    def needs_stats(cls, options: MLA.Options) -> bool:
        return options.start == "calibrated"

    @classmethod
    def fit(cls, layers: Iterable[Projections], options: MLA.Options) -> list[MLA.Options]:
        return choose_ranks(layers, options)

    @classmethod
    def why_inexact(cls, projections: Projections, options: MLA.Options, tokens: int) -> str | None:
        return NO_SOFTMAX if projections.feature_maps is not None else left_out(projections.shape, options)

    @classmethod
    def from_projections(cls, projections: Projections, options: MLA.Options) -> MLA:
        (options,) = choose_ranks([projections], options)
        mixer = MLA(projections.shape, options)
        _copy(mixer, latent_start(projections, options), projections)
        return mixer

    @classmethod
    def projections(cls, mixer: MLA) -> Projections:
        raise TypeError("Latent attention is where a conversion ends: no other mixer can start from it.")


@torch.no_grad()
def _copy(m: MLA, s: LatentStart, p: Projections) -> None:
    for linear, weight, bias in (
        (m.q, s.q, s.q_bias), (m.latent, s.latent, None), (m.k_rope, s.k_rope, s.k_rope_bias),
        (m.k_up, s.k_up, s.k_up_bias), (m.v_up, s.v_up, p.v_bias), (m.out, p.o, p.o_bias),
    ):  # fmt: skip
        if linear is not None:
            linear.weight.copy_(weight.reshape(linear.weight.shape))
            if bias is not None:
                linear.bias.copy_(bias.flatten())
    if m.options.q_rank is not None:
        m.q_down.weight.copy_(s.q_down)
    if s.latent_norm is not None:
        m.latent_norm.weight.copy_(s.latent_norm)
    if s.q_latent_norm is not None:
        m.q_latent_norm.weight.copy_(s.q_latent_norm)
    if m.q_norm is not None:
        m.q_norm.weight.copy_(s.q_norm)
        m.k_norm.weight.copy_(s.k_norm)
    m.frequencies.copy_(s.frequencies)
