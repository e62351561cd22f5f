"""How large the latents and rotary keys of latent attention are: as given, all there is, or what fits a share of the
teacher's cache."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from convert.core.errors import UserError
from convert.mixers.base import AttentionShape
from convert.mixers.init.latents import Metric, unrotated, weighted_rows
from convert.mixers.mla import MLA
from convert.mixers.projections import Projections


def choose_ranks(layers: Iterable[Projections], options: MLA.Options) -> list[MLA.Options]:
    """The options of each layer, with kv_rank and rope_dim as numbers. One layer's weights are looked at at a time.

    Under a cache budget the exact shape shares it out among the layers so that the sum of their relative errors is the
    least; the native shape has one rank for all."""
    chosen: list[MLA.Options] = []
    errors: list[dict[int, float]] = []
    for p in layers:
        _check_teacher(p, options)
        chosen.append(_sizes(p, options))
        if chosen[-1].kv_rank is None:
            errors.append(_errors(p, chosen[-1]))
            room = len(errors) * _rank_in_the_room(p.shape, chosen[-1])
    if not errors:
        return chosen
    return [replace(own, kv_rank=rank) for own, rank in zip(chosen, _by_energy(errors, room), strict=True)]


def _sizes(p: Projections, options: MLA.Options) -> MLA.Options:
    """The options with all sizes as numbers; kv_rank stays None where it depends on what all layers hold."""
    shape = p.shape
    if options.rope_dim is None:
        options = replace(
            options, rope_dim=shape.rotary_dim if options.cache_budget is None else _rope_dim(shape, options)
        )
    _check_sizes(shape, options)
    if options.kv_rank is not None:
        return replace(options, cache_budget=None)  # what is given needs no budget
    if options.cache_budget is None:
        return replace(options, kv_rank=_full_rank(shape, options))
    if options.shape == "native" or options.start == "random" or p.q.is_meta:
        return replace(options, kv_rank=_rank_in_the_room(shape, options))
    return options


def left_out(shape: AttentionShape, options: MLA.Options) -> str | None:
    """What latent attention of these sizes cannot say of a teacher of this shape, and the way out; None: nothing."""
    if options.shape == "native":
        return "its one rotary key and its norms are not the teacher's; take shape=exact"
    if options.start == "random":
        return "it starts at random; take start=svd or start=calibrated"
    if options.rope_dim < shape.rotary_dim:
        return f"it rotates {options.rope_dim} of {shape.rotary_dim} dimensions; set cache_budget=none and no rope_dim"
    if options.kv_rank < _full_rank(shape, options):
        return (
            f"its latent has {options.kv_rank} of {_full_rank(shape, options)} numbers; set cache_budget=none and no"
            " kv_rank"
        )
    full = min(shape.width, shape.num_heads * shape.head_dim)
    if options.q_rank is not None and options.q_rank < full:
        return f"its queries have the rank {options.q_rank} of {full}; set no q_rank"
    return None


def _full_rank(shape: AttentionShape, options: MLA.Options) -> int:
    """Return the rank at which nothing is left out: more latents than inputs would be of no use."""
    nope = shape.head_dim if options.shape == "native" else shape.head_dim - options.rope_dim
    return min(shape.width, shape.num_kv_heads * (nope + shape.head_dim))


def _rope_dim(shape: AttentionShape, options: MLA.Options) -> int:
    """Return the rotary dimensions under a cache budget: at most half of the room in the exact shape, and three
    quarters in the native one, which shares its rotary key among all heads and goes without whole frequencies otherwise
    (ours, measured on smollm2-135m: experiments/LOG.md)."""
    room, pairs = _room(shape, options), shape.rotary_dim // 2
    if options.shape == "native":
        fitting = [2 * n for n in range(1, pairs + 1) if pairs % n == 0 and 2 * n <= room * 3 / 4]
    else:
        fitting = [2 * n for n in range(1, pairs + 1) if 2 * n * shape.num_kv_heads <= room / 2]
    if not fitting:
        raise _too_small(shape, options)
    return fitting[-1]


def _room(shape: AttentionShape, options: MLA.Options) -> int:
    """Numbers per token and layer."""
    return int(options.cache_budget * 2 * shape.num_kv_heads * shape.head_dim)


def _rank_in_the_room(shape: AttentionShape, options: MLA.Options) -> int:
    rank = _room(shape, options) - options.rope_dim * (1 if options.shape == "native" else shape.num_kv_heads)
    if rank < 1:
        raise _too_small(shape, options)
    return min(rank, _full_rank(shape, options))


def _by_energy(errors: list[dict[int, float]], room: int) -> list[int]:
    """The rank of each layer. Lagrange: each takes the one that minimises error + price x rank; the price is the lowest
    that fits the room."""

    def ranks(price: float) -> list[int]:
        return [min((error + price * rank, rank) for rank, error in e.items())[1] for e in errors]

    low, high = 0.0, 1.0
    if sum(ranks(low)) <= room:
        return ranks(low)
    for _ in range(100):
        middle = (low * high) ** 0.5 if low else high / 10
        low, high = (middle, high) if sum(ranks(middle)) > room else (low, middle)
    return ranks(high)


def _errors(p: Projections, options: MLA.Options) -> dict[int, float]:
    """Rank -> relative error, in steps of 8 where there are many (X-EcoMLA's)."""
    m = Metric(p, options.start == "calibrated")
    rows, _ = weighted_rows(*unrotated(m, m.keep(options.rope_dim)))
    energies = torch.linalg.eigvalsh(rows @ m.moment @ rows.mT).flip(0).clamp(min=0)
    full = _full_rank(p.shape, options)
    ranks = sorted({1, *range(8 if full >= 64 else 1, full, 8 if full >= 64 else 1), full})
    return dict(zip(ranks, torch.stack([energies[rank:].sum() for rank in ranks]).tolist(), strict=True))


def _check_teacher(p: Projections, options: MLA.Options) -> None:
    shape = p.shape
    if p.window is not None:
        raise UserError(
            f"Latent attention has no window; this layer's is {p.window}. Edit it with gate-swa, or keep it"
            " (edit.keep)."
        )
    if options.shape == "native" and (shape.norm_eps is not None or shape.qkv_bias or shape.out_bias):
        has = "q/k norm" if shape.norm_eps is not None else "biases"
        raise UserError(
            f"The native shape of MLA has neither q/k norm nor biases; this teacher has {has}. Take edit.shape=exact."
        )
    if options.start == "calibrated" and p.stats is None:
        raise UserError(
            "A calibrated start needs the layers' inputs; there are none. Take edit.start=svd, or calibrate"
            " (Swap.calibration)."
        )


def _check_sizes(shape: AttentionShape, options: MLA.Options) -> None:
    step = shape.rotary_dim / options.rope_dim
    if options.rope_dim % 2 or options.rope_dim > shape.rotary_dim or (options.shape == "native" and step != int(step)):
        rule = "an even divisor of" if options.shape == "native" else "even and at most"
        raise UserError(
            f"rope_dim must be {rule} the {shape.rotary_dim} rotary dimensions of a head; got {options.rope_dim}."
        )
    largest = _full_rank(shape, options)
    if options.kv_rank is not None and options.kv_rank > largest:
        raise UserError(
            f"kv_rank must be at most {largest}, the rank of the keys and values together; got {options.kv_rank}."
        )
    if options.q_rank is not None and options.q_rank > min(shape.width, shape.num_heads * shape.head_dim):
        most = min(shape.width, shape.num_heads * shape.head_dim)
        raise UserError(f"q_rank must be at most {most}, the rank of the queries; got {options.q_rank}.")


def _too_small(shape: AttentionShape, options: MLA.Options) -> UserError:
    whole = 2 * shape.num_kv_heads * shape.head_dim
    return UserError(
        f"A cache must hold rotary keys and a latent; cache_budget={options.cache_budget:g} leaves"
        f" {options.cache_budget * whole:.0f} of {whole} numbers per token. Raise it, or set a smaller rope_dim."
    )
