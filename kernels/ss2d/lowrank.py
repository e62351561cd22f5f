"""The scan over images whose transition is a matrix of low rank, in chunks of matrix products.

The transition is the same at every place and for every channel, so what a place sees of an earlier one is one number
for all channels. With s = V^T h, M = V^T U diag(sigma), b = V^T B, o = C^T U diag(sigma) and u = delta x:

    s_t = M s_{t-1} + b_t u_t^T        y_t = o_t s_{t-1} + (C_t . B_t) u_t

and over a chunk of Q places, with the state before it:

    y = pairs u + seen s        s <- M^Q s + left^T u

batch · K directions · D channels · N state · r rank · L places · Q places of a chunk · n chunks
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from kernels.ss2d.reference import DIRECTIONS, driven, rows_of, to_image, to_sequence

CHUNK = 16  # places, the least of a matrix unit; each costs Q D + 2 r D + Q r^2 / 2 multiplications


def ss2d_lowrank_chunked(
    x: Tensor, delta: Tensor | None, U: Tensor, sigma: Tensor, V: Tensor, B: Tensor, C: Tensor
) -> Tensor:
    """Compute ss2d_lowrank_reference in PyTorch operators, on any device. Nothing has N x N or N x D numbers."""
    length, last = x.shape[-2] * x.shape[-1], x.shape[-2:]
    Q = min(CHUNK, length)
    pairs, seen, left, carry = chunk_matrices(*at_places(U, sigma, V, B, C, Q), Q)
    inputs = driven(x, delta)
    u = torch.stack([to_sequence(inputs[:, k], k) for k in range(DIRECTIONS)], 1).mT
    u = F.pad(u, (0, 0, 0, -length % Q)).unflatten(2, (-1, Q))  # [batch, K, n, Q, D]
    added, states = left.mT @ u, []
    s = torch.zeros_like(added[:, :, 0])  # [batch, K, r, D]
    for i in range(added.shape[2]):
        states.append(s)
        s = carry @ s + added[:, :, i]
    y = (pairs @ u + seen @ torch.stack(states, 2)).flatten(2, 3)[:, :, :length].mT
    return torch.stack([to_image(y[:, k], k, *last) for k in range(DIRECTIONS)]).sum(0)


def at_places(U: Tensor, sigma: Tensor, V: Tensor, B: Tensor, C: Tensor, Q: int) -> tuple[Tensor, Tensor]:
    """Return M^0 .. M^Q [K, Q + 1, r, r], and b, o and C . B of each place in the order of each direction, as rows
    [batch, K, L, 2 r + 1]."""
    seen = U * sigma[:, None]
    rows = torch.cat([V.mT @ B.flatten(-2), seen.mT @ C.flatten(-2), (B * C).sum(2, keepdim=True).flatten(-2)], 2)
    return _powers(V.mT @ seen, Q + 1), rows_of(rows.unflatten(-1, B.shape[-2:]))


def chunk_matrices(powers: Tensor, rows: Tensor, Q: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the matrices of all chunks of Q places, as if b, o and C . B were 0 beyond the last place: pairs
    [batch, K, n, Q, Q], seen and left [batch, K, n, Q, r], and M^Q [K, r, r]."""
    r = powers.shape[-1]
    rows = F.pad(rows, (0, 0, 0, -rows.shape[2] % Q)).unflatten(2, (-1, Q))
    b, o, direct = rows.split([r, r, 1], -1)
    pairs = _Pairs.apply(powers, b, o) + torch.diag_embed(direct[..., 0])
    seen = torch.einsum("bkntr,ktrs->bknts", o, powers[:, :Q])  # o_t M^t
    left = torch.einsum("bknts,ktrs->bkntr", b, powers[:, :Q].flip(1))  # M^(Q-1-t) b_t
    return pairs, seen, left, powers[:, Q]


class _Pairs(torch.autograd.Function):
    """(powers [K, Q + 1, r, r], b, o [batch, K, n, Q, r]) -> what row t sees of column s < t, o_t M^(t-s-1) b_s.

    One distance t - s after another, also in the backward pass: all of them at once are Q r numbers for each place."""

    @staticmethod
    def forward(ctx: FunctionCtx, powers: Tensor, b: Tensor, o: Tensor) -> Tensor:
        ctx.save_for_backward(powers, b, o)
        lags, by_lag = torch.arange(b.shape[-2], device=b.device), [torch.zeros_like(b[..., 0])]  # of each row t
        for lag in range(1, b.shape[-2]):
            moved = b[..., :-lag, :] @ powers[:, lag - 1, None].mT
            by_lag.append(F.pad((o[..., lag:, :] * moved).sum(-1), (lag, 0)))
        columns = (lags[:, None] - lags).clamp(min=0)  # t - s; at s >= t the zeros of lag 0
        return torch.stack(by_lag, -1).gather(-1, columns.expand(*b.shape[:-1], -1))

    @staticmethod
    def backward(ctx: FunctionCtx, dpairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        powers, b, o = ctx.saved_tensors
        db, do, dpowers = torch.zeros_like(b), torch.zeros_like(o), torch.zeros_like(powers)
        for lag in range(1, b.shape[-2]):
            g, power = dpairs.diagonal(-lag, -2, -1)[..., None], powers[:, lag - 1, None]
            dmoved = g * o[..., lag:, :]
            do[..., lag:, :] += g * (b[..., :-lag, :] @ power.mT)
            db[..., :-lag, :] += dmoved @ power
            dpowers[:, lag - 1] = torch.einsum("bknti,bkntj->kij", dmoved, b[..., :-lag, :])
        return dpowers, db, do


def _powers(M: Tensor, count: int) -> Tensor:
    """Return M^0 .. M^(count - 1) of M [K, r, r] as [K, count, r, r], by doubling."""
    found = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).expand_as(M)[:, None]
    step = M[:, None]
    while found.shape[1] < count:
        found, step = torch.cat([found, found @ step], 1), step @ step
    return found[:, :count]
