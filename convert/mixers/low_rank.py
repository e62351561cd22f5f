"""How latent attention starts: which rotary frequencies it keeps, what its latent is made of, and how large that is.

The part of keys that is not rotated, and the values, come from one low-rank map of the layer's input x. "calibrated" minimises, over the
inputs seen, the error of the scores (keys weighted by the queries that meet them) and of the layer's output (values weighted by the
output projection), each relative to its own energy; "svd" knows the weights alone (X-EcoMLA's joint SVD, arXiv 2503.11132).

D width · H query heads · G key/value heads · K head size · R rotary dimensions of a teacher's head · P kept ones · J rotary keys
N dimensions of a key that are not rotated · C latent
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convert.errors import UserError
from convert.projections import Projections, Shape

RIDGE = 1e-4  # of the mean energy of an input, added to all: a calibration has not seen everything (ours)
KEYS = 16.0  # what the relative error of the scores counts, beside that of the outputs (ours, measured on smollm2-135m)
STEADY = 30.0  # how much larger than all others together the latent is that steadies their RMS (ours)
WHITEN_FLOOR = 1e-6  # of the largest standard deviation of a latent (ours)


@dataclass(frozen=True)
class Start:
    """q [H, P + N, D or q_rank], latent [C, D], k_rope [J, P, D], k_up [G, N, C], v_up [G, K, C]; norms [P + N]; frequencies [P / 2]: their
    places in the teacher's rotary table; latent_norm [C], q_latent_norm [q_rank]: the weights of the latents' RMSNorms."""

    q: Tensor
    q_bias: Tensor | None
    q_down: Tensor | None
    latent: Tensor
    k_rope: Tensor
    k_rope_bias: Tensor | None
    k_up: Tensor
    k_up_bias: Tensor | None
    v_up: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    frequencies: Tensor
    latent_norm: Tensor | None = None
    q_latent_norm: Tensor | None = None


@torch.no_grad()
def start(p: Projections, options) -> Start:
    """In float64; `options` as `choose_ranks` returns them."""
    if options.start == "random" or p.q.is_meta:
        return _random(p, options)
    return _native(p, options) if options.shape == "native" else _exact(p, options)


# --- sizes


def choose_ranks(layers: list[Projections], options) -> list:
    """The options of each layer, with kv_rank and rope_dim as numbers.

    Under a cache budget the exact shape shares it out among the layers so that the sum of their relative errors is the least; the native
    shape has one rank for all."""
    _check(layers, options)
    shape = layers[0].shape
    if options.rope_dim is None:
        options = replace(options, rope_dim=shape.rotary_dim if options.cache_budget is None else _rope_dim(shape, options))
    if options.kv_rank is not None:
        return [options] * len(layers)
    if options.cache_budget is None:
        return [replace(options, kv_rank=_full_rank(shape, options))] * len(layers)
    if options.shape == "native" or options.start == "random" or layers[0].q.is_meta:
        return [replace(options, kv_rank=_rank_in_the_room(shape, options))] * len(layers)
    return [replace(options, kv_rank=rank) for rank in _by_energy(layers, options)]


def _full_rank(shape: Shape, options) -> int:
    """Where nothing is left out: more latents than inputs would be of no use."""
    kept = options.rope_dim or shape.rotary_dim
    nope = shape.head_dim if options.shape == "native" else shape.head_dim - kept
    return min(shape.width, shape.num_kv_heads * (nope + shape.head_dim))


def _rope_dim(shape: Shape, options) -> int:
    """Under a cache budget: at most half of the room in the exact shape, and three quarters in the native one, which shares its rotary key
    among all heads and goes without whole frequencies otherwise (ours, measured on smollm2-135m: experiments/LOG.md)."""
    if options.rope_dim is not None:
        return options.rope_dim
    room, pairs = _room(shape, options), shape.rotary_dim // 2
    if options.shape == "native":
        fitting = [2 * n for n in range(1, pairs + 1) if pairs % n == 0 and 2 * n <= room * 3 / 4]
    else:
        fitting = [2 * n for n in range(1, pairs + 1) if 2 * n * shape.num_kv_heads <= room / 2]
    if not fitting:
        raise _too_small(shape, options)
    return fitting[-1]


def _room(shape: Shape, options) -> int:
    """Numbers per token and layer."""
    return int(options.cache_budget * 2 * shape.num_kv_heads * shape.head_dim)


def _rank_in_the_room(shape: Shape, options) -> int:
    rank = _room(shape, options) - options.rope_dim * (1 if options.shape == "native" else shape.num_kv_heads)
    if rank < 1:
        raise _too_small(shape, options)
    return min(rank, _full_rank(shape, options))


def _by_energy(layers: list[Projections], options) -> list[int]:
    """The rank of each layer. Lagrange: each takes the one that minimises error + price x rank; the price is the lowest that fits the room."""
    errors = [_errors(p, options) for p in layers]
    room = sum(_rank_in_the_room(p.shape, options) for p in layers)

    def ranks(price: float) -> list[int]:
        return [min(e, key=lambda rank, e=e: e[rank] + price * rank) for e in errors]

    low, high = 0.0, 1.0
    if sum(ranks(low)) <= room:
        return ranks(low)
    for _ in range(100):
        middle = (low * high) ** 0.5 if low else high / 10
        low, high = (middle, high) if sum(ranks(middle)) > room else (low, middle)
    return ranks(high)


def _errors(p: Projections, options) -> dict[int, float]:
    """Rank -> relative error, in steps of 8 where there are many (X-EcoMLA's)."""
    m = _Metric(p, options.start == "calibrated")
    rows, _ = _weighted(*_stacked(m, m.keep(options.rope_dim)))
    energies = torch.linalg.eigvalsh(rows @ m.moment @ rows.mT).flip(0).clamp(min=0)
    full = _full_rank(p.shape, options)
    return {rank: float(energies[rank:].sum()) for rank in sorted({1, *range(8 if full >= 64 else 1, full, 8 if full >= 64 else 1), full})}


def _check(layers: list[Projections], options) -> None:
    shape = layers[0].shape
    for p in layers:
        if p.window is not None:
            raise UserError(f"Latent attention has no window; this layer's is {p.window}. Edit it with gate-swa, or keep it (edit.keep).")
    if options.shape == "native" and (shape.norm_eps is not None or shape.qkv_bias or shape.out_bias):
        has = "q/k norm" if shape.norm_eps is not None else "biases"
        raise UserError(f"The native shape of MLA has neither q/k norm nor biases; this teacher has {has}. Take edit.shape=exact.")
    if options.start == "calibrated" and layers[0].inputs is None:
        raise UserError(
            "A calibrated start needs the layers' inputs; there are none. Take edit.start=svd, or calibrate (Swap.calibration)."
        )
    if options.rope_dim is not None:
        step = shape.rotary_dim / options.rope_dim
        if options.rope_dim % 2 or options.rope_dim > shape.rotary_dim or (options.shape == "native" and step != int(step)):
            rule = "an even divisor of" if options.shape == "native" else "even and at most"
            raise UserError(f"rope_dim must be {rule} the {shape.rotary_dim} rotary dimensions of a head; got {options.rope_dim}.")
    largest = _full_rank(shape, options)
    if options.kv_rank is not None and options.kv_rank > largest:
        raise UserError(f"kv_rank must be at most {largest}, the rank of the keys and values together; got {options.kv_rank}.")
    if options.q_rank is not None and options.q_rank > min(shape.width, shape.num_heads * shape.head_dim):
        most = min(shape.width, shape.num_heads * shape.head_dim)
        raise UserError(f"q_rank must be at most {most}, the rank of the queries; got {options.q_rank}.")


def _too_small(shape: Shape, options) -> UserError:
    whole = 2 * shape.num_kv_heads * shape.head_dim
    return UserError(
        f"A cache must hold rotary keys and a latent; cache_budget={options.cache_budget:g} leaves {options.cache_budget * whole:.0f} of "
        f"{whole} numbers per token. Raise it, or set a smaller rope_dim."
    )


# --- weights, in float64


class _Metric:
    """What errors are measured in: the second moment of the inputs, the queries that meet each key, the output projection."""

    def __init__(self, p: Projections, calibrated: bool):
        self.shape, groups = p.shape, p.shape.num_kv_heads
        eye = torch.eye(p.shape.width, dtype=torch.float64, device=p.q.device)
        self.moment = self.of_queries = eye
        self.steady = None  # [D], whose product with an input is nearly 1 whatever the token (least squares)
        if calibrated:
            self.moment, self.of_queries = (
                m.to(eye) + RIDGE * m.trace().to(eye) / len(eye) * eye for m in (p.inputs.moment, p.inputs.uniform)
            )
            self.steady = torch.linalg.solve(self.moment, p.inputs.mean.to(eye))
        self.q, self.k, self.v = (t.to(eye) for t in (p.q, p.k, p.v))
        drift = p.inputs.drift.to(eye) if p.inputs is not None else eye.new_ones(p.shape.rotary_dim // 2)
        self.changed = 1 - drift.square() if p.inputs is not None else drift
        self.left = torch.cat([drift, drift, eye.new_ones(p.shape.head_dim - p.shape.rotary_dim)])  # of a product that is not rotated
        plain = torch.eye(p.shape.head_dim).to(eye).expand(groups, -1, -1)
        self.of_keys = self._of_keys(p) if calibrated else plain
        self.of_values = torch.einsum("dhk,dhl->hkl", p.o.to(eye), p.o.to(eye)).unflatten(0, (groups, -1)).sum(1) if calibrated else plain
        self.of_keys = self.of_keys * (KEYS / self._energy(self.k, self.of_keys))
        self.of_values = self.of_values / self._energy(self.v, self.of_values)

    def _of_keys(self, p: Projections) -> Tensor:
        """[G, K, K]: the second moment of the queries of each group. A norm divides by the length that is usual."""
        queries = torch.einsum("hkd,de,hle->hkl", self.q, self.of_queries, self.q)
        if p.q_norm is not None:
            queries = queries / _diagonal(queries).mean(-1)[:, None, None]
            queries = queries * torch.outer(p.q_norm, p.q_norm).to(queries)
        queries = queries.unflatten(0, (len(self.k), -1)).sum(1)
        if p.k_norm is not None:
            lengths = torch.einsum("gkd,de,gke->gk", self.k, self.moment, self.k).mean(-1)
            queries = queries * torch.outer(p.k_norm, p.k_norm).to(queries) / lengths[:, None, None]
        return queries

    def _energy(self, weight: Tensor, metric: Tensor) -> Tensor:
        return torch.einsum("gkl,gkd,de,gle->", metric, weight, self.moment, weight)

    def keep(self, rope_dim: int) -> Tensor:
        """The places [P / 2] of the frequencies that lose most by not being rotated."""
        pairs = self.shape.rotary_dim // 2
        energy = torch.einsum("gkd,de,gke->gk", self.k, self.moment, self.k)
        met = (energy * _diagonal(self.of_keys)).sum(0)  # the 2-norm of MHA2MLA (arXiv 2502.14837), times what rotation changes (ours)
        loss = met[: 2 * pairs].unflatten(0, (2, pairs)).sum(0) * self.changed
        return loss.topk(rope_dim // 2).indices.sort().values


def _diagonal(t: Tensor) -> Tensor:
    return torch.diagonal(t, dim1=-2, dim2=-1)


def _root(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of positive matrices [..., N, N], and their inverses."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp(min=1e-8 * values.amax(-1, keepdim=True).clamp(min=1e-300)).sqrt()
    return (vectors * values[..., None, :]) @ vectors.mT, (vectors / values[..., None, :]) @ vectors.mT


def _order(shape: Shape, kept: Tensor) -> Tensor:
    """Of a head's dimensions: the kept rotary pairs in two halves, then all others."""
    pairs = shape.rotary_dim // 2
    first = torch.cat([kept, kept + pairs])
    others = torch.ones(shape.head_dim, dtype=torch.bool, device=kept.device)
    others[first] = False
    return torch.cat([first, others.nonzero()[:, 0]])


def _stacked(m: _Metric, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the exact shape: keys that are not rotated [G, N, D], their metric, values, theirs."""
    rest = _order(m.shape, kept)[2 * len(kept) :]
    left = m.left[rest]
    return m.k[:, rest], m.of_keys[:, rest[:, None], rest] * left[:, None] * left, m.v, m.of_values


def _weighted(k: Tensor, of_keys: Tensor, v: Tensor, of_values: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Rows of all heads in units of error [G (N + K), D], and what turns each block back."""
    parts, back = [], []
    for weight, metric in ((k, of_keys), (v, of_values)):
        if weight.shape[1]:
            root, inverse = _root(metric)
            parts.append((root @ weight).flatten(0, 1))
            back.append(inverse)
        else:
            back.append(metric)
    return torch.cat(parts), back


def _factor(rows: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """rows [M, D] ~ up [M, C] @ down [C, D], the best for inputs of this second moment; the latents have unit variance and no
    correlation, so that their RMS hardly varies from token to token."""
    if rank >= rows.shape[1]:  # nothing is left out: the latents are the inputs
        return rows, torch.eye(rows.shape[1]).to(rows)
    vectors, spread, _ = torch.linalg.svd(rows @ _root(moment)[0], full_matrices=False)
    top, spread = vectors[:, :rank], spread[:rank].clamp(min=WHITEN_FLOOR * spread[0])
    return top * spread, (top / spread).mT @ rows


def _latent(m: _Metric, rank: int, k: Tensor, of_keys: Tensor, v: Tensor, of_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """latent [C, D], k_up [G, N, C], v_up [G, K, C]."""
    rows, (back_k, back_v) = _weighted(k, of_keys, v, of_values)
    up, down = _factor(rows, m.moment, rank)
    of_k, of_v = up.split([k.shape[0] * k.shape[1], v.shape[0] * v.shape[1]])
    k_up = back_k @ of_k.unflatten(0, k.shape[:2]) if k.shape[1] else of_k.unflatten(0, k.shape[:2])
    return down, k_up, back_v @ of_v.unflatten(0, v.shape[:2])


def _exact(p: Projections, options) -> Start:
    """The teacher's own keys where they are rotated; at full rank its function."""
    m = _Metric(p, options.start == "calibrated")
    kept = m.keep(options.rope_dim)
    order, rope = _order(p.shape, kept), options.rope_dim
    latent, k_up, v_up = _latent(m, options.kv_rank, *_stacked(m, kept))
    left = torch.cat([m.left.new_ones(rope), m.left[order[rope:]]])  # of the queries: what is not rotated counts for less
    left = left * (p.scale / p.shape.head_dim**-0.5)
    normed = p.q_norm is not None
    q, q_bias = (None if t is None else t.to(left)[:, order] for t in (p.q, p.q_bias))
    if not normed:
        q, q_bias = q * left[:, None], None if q_bias is None else q_bias * left
    k_bias = None if p.k_bias is None else p.k_bias[:, order]
    return Start(
        *_low_rank_queries(m, q, q_bias, options.q_rank), latent, m.k[:, order[:rope]], None if k_bias is None else k_bias[:, :rope],
        k_up, None if k_bias is None else k_bias[:, rope:], v_up, p.q_norm[order] * left if normed else None,
        p.k_norm[order] if normed else None, kept,
    )  # fmt: skip


def _native(p: Projections, options) -> Start:
    """One rotary key for all heads: for each frequency the direction of most energy among the heads' keys as complex numbers, which
    turning all heads' pairs alike leaves what it is (TransMLA's RoRoPE, arXiv 2502.07864); what is left of them goes without rotation."""
    m = _Metric(p, options.start == "calibrated")
    pairs, groups = p.shape.rotary_dim // 2, p.shape.num_kv_heads
    kept = torch.arange(0, pairs, 2 * pairs // options.rope_dim, device=p.q.device)
    q, k = (torch.complex(t[:, kept], t[:, kept + pairs]) for t in (m.q, m.k))  # [heads, P / 2, D]
    weight = (_diagonal(m.of_keys)[:, kept] + _diagonal(m.of_keys)[:, kept + pairs]).clamp(min=1e-300).sqrt()  # [G, P / 2]
    weighted = k * weight[..., None]
    among_heads = torch.einsum("gpd,de,hpe->pgh", weighted, m.moment.to(k), weighted.conj())
    direction = torch.linalg.eigh(among_heads).eigenvectors[..., -1].T  # [G, P / 2]
    shared = (direction.conj()[..., None] * weighted).sum(0)  # [P / 2, D]
    part = direction / weight  # of the shared key in each head's
    rest, remaining = k - part[..., None] * shared, m.k.clone()
    remaining[:, kept], remaining[:, kept + pairs] = rest.real, rest.imag
    of_keys = m.of_keys * m.left[:, None] * m.left
    latent, k_up, v_up = _latent(m, options.kv_rank - (m.steady is not None), remaining, of_keys, m.v, m.of_values)
    latent, (k_up, v_up), latent_norm = _steadied(m, latent, (k_up, v_up))
    turned = q * part.conj().repeat_interleave(len(q) // groups, 0)[..., None]
    q = torch.cat([turned.real, turned.imag, m.q * m.left[:, None]], 1)
    q = q * (p.scale / q.shape[1] ** -0.5)
    k_rope, q_down, q_latent_norm = torch.cat([shared.real, shared.imag])[None], None, None
    if options.q_rank is not None:
        q, _, q_down = _low_rank_queries(m, q, None, options.q_rank - (m.steady is not None))
        q_down, (q,), q_latent_norm = _steadied(m, q_down, (q,))
    return Start(q, None, q_down, latent, k_rope, None, k_up, None, v_up, None, None, kept, latent_norm, q_latent_norm)


def _steadied(m: _Metric, down: Tensor, ups: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Latents whose RMSNorm does nearly nothing, and its weight [C]: one more latent, which nothing reads, is nearly the same number for
    all tokens and larger than all others together, so that it alone decides the RMS (ours). Behind the norm it is 1, as the others are on
    average: a larger one would learn faster than they do."""
    if m.steady is None:
        return down, ups, down.new_ones(len(down))
    rank = len(down) + 1
    down = torch.cat([down, STEADY * rank**0.5 * m.steady[None]])  # the others have unit variance
    weight = torch.cat([down.new_full((rank - 1,), STEADY), down.new_full((1,), rank**-0.5)])
    return down, tuple(torch.cat([up, up.new_zeros(*up.shape[:-1], 1)], -1) for up in ups), weight


def _low_rank_queries(m: _Metric, q: Tensor, q_bias: Tensor | None, rank: int | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if rank is None:
        return q, q_bias, None
    up, down = _factor(q.flatten(0, 1), m.of_queries, rank)
    return up.unflatten(0, q.shape[:2]), q_bias, down


def _random(p: Projections, options) -> Start:
    """Everything but the output projection is new (Attention Editing; the deviation is DeepSeek's)."""
    shape, rope = p.shape, options.rope_dim
    native = options.shape == "native"
    nope = shape.head_dim if native else shape.head_dim - rope
    keys, pairs = 1 if native else shape.num_kv_heads, shape.rotary_dim // 2
    new = lambda *size: torch.empty(*size, device=p.q.device).normal_(std=0.02)  # noqa: E731
    kept = (torch.arange(rope // 2, device=p.q.device) * pairs) // (rope // 2)
    down = None if options.q_rank is None else new(options.q_rank, shape.width)
    normed = p.q_norm is not None
    return Start(
        new(shape.num_heads, rope + nope, options.q_rank or shape.width), None, down, new(options.kv_rank, shape.width),
        new(keys, rope, shape.width), None, new(shape.num_kv_heads, nope, options.kv_rank), None,
        new(shape.num_kv_heads, shape.head_dim, options.kv_rank), torch.ones_like(p.q_norm) if normed else None,
        torch.ones_like(p.k_norm) if normed else None, kept,
    )  # fmt: skip
