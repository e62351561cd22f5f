"""How latent attention starts: which rotary frequencies it keeps, and what its latent is made of. In float64.

The part of keys that is not rotated, and the values, come from one low-rank map of the layer's input x. "calibrated"
minimises, over the inputs seen, the error of the scores (keys weighted by the queries that meet them) and of the
layer's output (values weighted by the output projection), each relative to its own energy; "svd" knows the weights
alone (X-EcoMLA's joint SVD, arXiv 2503.11132).

D width · H query heads · G key/value heads · K head size · R rotary dimensions of a teacher's head · P kept ones · J
rotary keys N dimensions of a key that are not rotated · C latent"""

from dataclasses import dataclass

import torch
from torch import Tensor

from convert.mixers.base import AttentionShape
from convert.mixers.mla import MLA
from convert.mixers.projections import Projections

RIDGE = 1e-4  # of the mean energy of an input, added to all: a calibration has not seen everything (ours)
KEYS = 16.0  # what the relative error of the scores counts, beside that of the outputs (ours, measured on smollm2-135m)
STEADY = 30.0  # how much larger than all others together the latent is that steadies their RMS (ours)
WHITEN_FLOOR = 1e-6  # of the largest standard deviation of a latent (ours)


@dataclass(frozen=True)
class LatentStart:
    """q [H, P + N, D or q_rank], latent [C, D], k_rope [J, P, D], k_up [G, N, C], v_up [G, K, C]; norms [P + N];
    frequencies [P / 2]: their places in the teacher's rotary table; latent_norm [C], q_latent_norm [q_rank]: the
    weights of the latents' RMSNorms."""

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
def latent_start(p: Projections, options: MLA.Options) -> LatentStart:
    """`options` as latent_ranks.choose_ranks returns them."""
    if options.start == "random" or p.q.is_meta:
        return _random(p, options)
    return _native(p, options) if options.shape == "native" else _exact(p, options)


class Metric:
    """What errors are measured in: the second moment of the inputs, the queries that meet each key, the output
    projection."""

    def __init__(self, p: Projections, calibrated: bool):
        self.shape, groups = p.shape, p.shape.num_kv_heads
        eye = torch.eye(p.shape.width, dtype=torch.float64, device="cpu" if p.q.device.type == "mps" else p.q.device)
        self.moment = self.of_queries = eye
        self.steady = None  # [D], whose product with an input is nearly 1 whatever the token (least squares)
        if calibrated:
            self.moment, self.of_queries = (
                m.to(eye) + RIDGE * m.trace().to(eye) / len(eye) * eye for m in (p.stats.moment, p.stats.uniform)
            )
            self.steady = torch.linalg.solve(self.moment, p.stats.mean.to(eye))
        self.q, self.k, self.v = (t.to(eye) for t in (p.q, p.k, p.v))
        longer = p.rotary_scale**2  # a product of two rotated pairs
        drift = p.stats.drift.to(eye) if calibrated else eye.new_full((p.shape.rotary_dim // 2,), longer)
        self.changed = 1 - (drift / longer).square() if calibrated else drift
        # of a product that is not rotated
        self.left = torch.cat([drift, drift, eye.new_ones(p.shape.head_dim - p.shape.rotary_dim)])
        plain = torch.eye(p.shape.head_dim).to(eye).expand(groups, -1, -1)
        self.of_keys = self._of_keys(p) if calibrated else plain
        self.of_values = (
            torch.einsum("dhk,dhl->hkl", p.o.to(eye), p.o.to(eye)).unflatten(0, (groups, -1)).sum(1)
            if calibrated
            else plain
        )
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
        # the 2-norm of MHA2MLA (arXiv 2502.14837), times what rotation changes (ours)
        met = (energy * _diagonal(self.of_keys)).sum(0)
        loss = met[: 2 * pairs].unflatten(0, (2, pairs)).sum(0) * self.changed
        return loss.topk(rope_dim // 2).indices.sort().values


def _diagonal(t: Tensor) -> Tensor:
    return torch.diagonal(t, dim1=-2, dim2=-1)


def _root(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of positive matrices [..., N, N], and their inverses."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp(min=1e-8 * values.amax(-1, keepdim=True).clamp(min=1e-300)).sqrt()
    return (vectors * values[..., None, :]) @ vectors.mT, (vectors / values[..., None, :]) @ vectors.mT


def _order(shape: AttentionShape, kept: Tensor) -> Tensor:
    """The order of a head's dimensions: the kept rotary pairs in two halves, then all others."""
    pairs = shape.rotary_dim // 2
    first = torch.cat([kept, kept + pairs])
    others = torch.ones(shape.head_dim, dtype=torch.bool, device=kept.device)
    others[first] = False
    return torch.cat([first, others.nonzero()[:, 0]])


def unrotated(m: Metric, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the latent of the exact shape holds: keys that are not rotated [G, N, D], their metric, values, theirs."""
    rest = _order(m.shape, kept)[2 * len(kept) :]
    left = m.left[rest]
    return m.k[:, rest], m.of_keys[:, rest[:, None], rest] * left[:, None] * left, m.v, m.of_values


def weighted_rows(k: Tensor, of_keys: Tensor, v: Tensor, of_values: Tensor) -> tuple[Tensor, list[Tensor]]:
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
    """rows [M, D] ~ up [M, C] @ down [C, D], the best for inputs of this second moment; the latents have unit variance
    and no correlation, so that their RMS hardly varies from token to token."""
    if rank >= rows.shape[1]:  # nothing is left out: the latents are the inputs
        return rows, torch.eye(rows.shape[1]).to(rows)
    vectors, spread, _ = torch.linalg.svd(rows @ _root(moment)[0], full_matrices=False)
    top, spread = vectors[:, :rank], spread[:rank].clamp(min=WHITEN_FLOOR * spread[0])
    return top * spread, (top / spread).mT @ rows


def _latent(
    m: Metric, rank: int, k: Tensor, of_keys: Tensor, v: Tensor, of_values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """latent [C, D], k_up [G, N, C], v_up [G, K, C]."""
    rows, (back_k, back_v) = weighted_rows(k, of_keys, v, of_values)
    up, down = _factor(rows, m.moment, rank)
    of_k, of_v = up.split([k.shape[0] * k.shape[1], v.shape[0] * v.shape[1]])
    k_up = back_k @ of_k.unflatten(0, k.shape[:2]) if k.shape[1] else of_k.unflatten(0, k.shape[:2])
    return down, k_up, back_v @ of_v.unflatten(0, v.shape[:2])


def _exact(p: Projections, options: MLA.Options) -> LatentStart:
    """The teacher's own keys where they are rotated; at full rank its function."""
    m = Metric(p, options.start == "calibrated")
    kept = m.keep(options.rope_dim)
    order, rope = _order(p.shape, kept), options.rope_dim
    latent, k_up, v_up = _latent(m, options.kv_rank, *unrotated(m, kept))
    # of the queries: what is not rotated counts for less
    left = torch.cat([m.left.new_ones(rope), m.left[order[rope:]]])
    left = left * (p.scale / p.shape.head_dim**-0.5)
    normed = p.q_norm is not None
    q, q_bias = (None if t is None else t.to(left)[:, order] for t in (p.q, p.q_bias))
    if not normed:
        q, q_bias = q * left[:, None], None if q_bias is None else q_bias * left
    k_bias = None if p.k_bias is None else p.k_bias[:, order]
    return LatentStart(
        *_low_rank_queries(m, q, q_bias, options.q_rank),
        latent,
        m.k[:, order[:rope]],
        None if k_bias is None else k_bias[:, :rope],
        k_up,
        None if k_bias is None else k_bias[:, rope:],
        v_up,
        p.q_norm[order] * left if normed else None,
        p.k_norm[order] if normed else None,
        kept,
    )


def _native(p: Projections, options: MLA.Options) -> LatentStart:
    """One rotary key for all heads: for each frequency the direction of most energy among the heads' keys as complex
    numbers, which turning all heads' pairs alike leaves what it is (TransMLA's RoRoPE, arXiv 2502.07864); what is left
    of them goes without rotation."""
    m = Metric(p, options.start == "calibrated")
    pairs, groups = p.shape.rotary_dim // 2, p.shape.num_kv_heads
    kept = torch.arange(0, pairs, 2 * pairs // options.rope_dim, device=p.q.device)
    q, k = (torch.complex(t[:, kept], t[:, kept + pairs]) for t in (m.q, m.k))  # [heads, P / 2, D]
    # [G, P / 2]
    weight = (_diagonal(m.of_keys)[:, kept] + _diagonal(m.of_keys)[:, kept + pairs]).clamp(min=1e-300).sqrt()
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
    return LatentStart(
        q, None, q_down, latent, k_rope, None, k_up, None, v_up, None, None, kept, latent_norm, q_latent_norm
    )


def _steadied(m: Metric, down: Tensor, ups: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Latents whose RMSNorm does nearly nothing, and its weight [C]: one more latent, which nothing reads, is nearly
    the same number for all tokens and larger than all others together, so that it alone decides the RMS (ours). Behind
    the norm it is 1, as the others are on average: a larger one would learn faster than they do."""
    if m.steady is None:
        return down, ups, down.new_ones(len(down))
    rank = len(down) + 1
    down = torch.cat([down, STEADY * rank**0.5 * m.steady[None]])  # the others have unit variance
    weight = torch.cat([down.new_full((rank - 1,), STEADY), down.new_full((1,), rank**-0.5)])
    return down, tuple(torch.cat([up, up.new_zeros(*up.shape[:-1], 1)], -1) for up in ups), weight


def _low_rank_queries(
    m: Metric, q: Tensor, q_bias: Tensor | None, rank: int | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if rank is None:
        return q, q_bias, None
    up, down = _factor(q.flatten(0, 1), m.of_queries, rank)
    return up.unflatten(0, q.shape[:2]), q_bias, down


def _random(p: Projections, options: MLA.Options) -> LatentStart:
    """Everything but the output projection is new (Attention Editing; the deviation is DeepSeek's)."""
    shape, rope = p.shape, options.rope_dim
    native = options.shape == "native"
    nope = shape.head_dim if native else shape.head_dim - rope
    keys, pairs = 1 if native else shape.num_kv_heads, shape.rotary_dim // 2
    new = lambda *size: torch.empty(*size, device=p.q.device).normal_(std=0.02)  # noqa: E731
    kept = (torch.arange(rope // 2, device=p.q.device) * pairs) // (rope // 2)
    down = None if options.q_rank is None else new(options.q_rank, shape.width)
    normed = p.q_norm is not None
    return LatentStart(
        new(shape.num_heads, rope + nope, options.q_rank or shape.width), None, down, new(options.kv_rank, shape.width),
        new(keys, rope, shape.width), None, new(shape.num_kv_heads, nope, options.kv_rank), None,
        new(shape.num_kv_heads, shape.head_dim, options.kv_rank), torch.ones_like(p.q_norm) if normed else None,
        torch.ones_like(p.k_norm) if normed else None, kept,
    )  # fmt: skip
