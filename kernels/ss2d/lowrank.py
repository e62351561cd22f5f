"""The scan over images whose transition is a matrix of low rank, in chunks of matrix products, on any device.

The transition is the same at every place and for every channel, so what a place sees of an earlier one is one number
for all channels. With s = V^T h, M = V^T U diag(sigma) and b = V^T B:

    s_t = M s_{t-1} + x_t b_t^T        y_t = (C_t^T U diag(sigma)) s_{t-1} + (C_t . B_t) x_t

batch · K directions · D channels · N state · r rank · L places · Q places of a chunk · n chunks
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.ss2d.reference import DIRECTIONS, driven, to_image, to_sequence

CHUNK = 32  # places; each costs Q D + r D + Q r^2 multiplications


def ss2d_lowrank_chunked(
    x: Tensor, delta: Tensor | None, U: Tensor, sigma: Tensor, V: Tensor, B: Tensor, C: Tensor
) -> Tensor:
    """Compute ss2d_lowrank_reference. A step costs what the rank says: nothing has N x N or N x D numbers."""
    length, last = x.shape[-2] * x.shape[-1], x.shape[-2:]
    u, b, c = (
        torch.stack([to_sequence(t[:, k], k) for k in range(DIRECTIONS)], 1).mT for t in (driven(x, delta), B, C)
    )
    Q = min(CHUNK, length)
    u, b, c = (F.pad(t, (0, 0, 0, -length % Q)).unflatten(2, (-1, Q)) for t in (u, b, c))  # [batch, K, n, Q, ...]
    seen = U * sigma[:, None]  # K N r: what y sees of s
    powers = powers_of(V.mT @ seen, Q)  # K Q r r: M^0 .. M^(Q-1)
    into, out = b @ V[:, None], c @ seen[:, None]  # [batch, K, n, Q, r]: b_t, and C_t^T U diag(sigma)
    # how a place t sees s of q places ago, and b of the places then: [batch, K, n, Q, Q, r], the farthest first
    far = torch.einsum("bkntr,kqrs->bkntqs", out, powers.flip(1))  # C_t^T U diag(sigma) M^(Q-1-q)
    before = F.pad(into, (0, 0, Q, -1)).unfold(3, Q, 1).mT  # b_(t-Q+q)
    seen_before = (far * before).sum(-1)
    t = torch.arange(Q, device=x.device)
    lag = t[:, None] - t
    # C_t^T A^(t-s) B_s of row t and column s [batch, K, n, Q, Q]; that of t = s needs no transition
    pairs = seen_before.gather(4, (Q - lag).clamp(0, Q - 1).expand_as(seen_before)) * (lag > 0)
    pairs = pairs + torch.diag_embed((b * c).sum(-1))
    y = pairs @ u
    # states [batch, K, r, D] before each chunk
    left = torch.einsum("kqrs,bknqs->bknqr", powers.flip(1), into)  # M^(Q-1-t) b_t
    added, across = left.mT @ u, V.mT @ seen @ powers[:, -1]  # what a chunk adds to s, and M^Q
    states, s = [], torch.zeros_like(added[:, :, 0])
    for i in range(added.shape[2]):
        states.append(s)
        s = across @ s + added[:, :, i]
    from_start = far.flip(4).diagonal(dim1=3, dim2=4).mT  # C_t^T U diag(sigma) M^t [batch, K, n, Q, r]
    y = (y + from_start @ torch.stack(states, 2)).flatten(2, 3)[:, :, :length].mT
    return torch.stack([to_image(y[:, k], k, *last) for k in range(DIRECTIONS)]).sum(0)


def powers_of(M: Tensor, count: int) -> Tensor:
    """Return M^0 .. M^(count - 1) of M [K, r, r] as [K, count, r, r], by doubling."""
    found = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).expand_as(M)[:, None]
    step = M[:, None]
    while found.shape[1] < count:
        found, step = torch.cat([found, found @ step], 1), step @ step
    return found[:, :count]
