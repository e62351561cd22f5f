"""What the scans of SS2D hold on their way, transitions and states, for training and measuring.

B images · E channels · H height · W width · N state · L places · Q places of a chunk · n chunks ·
r rank · 4 directions
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import without_autocast
from kernels.ss2d.reference import DIRECTIONS, to_sequence, transition


def low_rank_states(
    x: Tensor, delta: Tensor, U: Tensor, sigma: Tensor, V: Tensor, B: Tensor, delta_bias: Tensor
) -> Tensor:
    """The states [B, 4, L, E, N] of `LowRankScan` after each place, in the order of each direction.

    Steps are taken in all chunks at once, then from chunk to chunk; a state is touched twice."""
    drive, b, _ = _in_chunks(x, delta, B, delta_bias)
    chunks, Q, images, channels = drive.shape[1:]
    with without_autocast(x.device.type):
        A = transition(U, sigma, V).mT  # for states as rows
        power, powers, inside = A, [], list[Tensor]()
        for q in range(Q):
            new = (drive[:, :, q, ..., None] * b[:, :, q, :, None]).flatten(1, 3)
            inside.append(torch.baddbmm(new, inside[-1], A) if q else new)
            powers.append(power)
            power = power @ A
        before = [torch.zeros_like(inside[-1].unflatten(1, (chunks, -1))[:, 0])]
        for end in inside[-1].unflatten(1, (chunks, -1)).unbind(1)[:-1]:
            before.append(torch.baddbmm(end, before[-1], powers[-1]))
        carried = torch.cat(before, 1) @ torch.cat(powers, 2)  # [4, n B E, Q N]
    sizes = chunks, images, channels
    states = torch.stack([h.unflatten(1, sizes) for h in inside], 2)  # [4, n, Q, B, E, N]
    states = states + carried.unflatten(2, (Q, -1)).unflatten(1, sizes).movedim(4, 2)
    return states.flatten(1, 2).movedim(2, 0)


def diagonal_states(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor) -> Tensor:
    """The states [B, 4, L, E, N] of `DiagonalScan`, likewise."""
    drive, b, steps = _in_chunks(x, delta, B, delta_bias)
    inside, decays = list[Tensor](), list[Tensor]()
    for q in range(drive.shape[2]):
        decay = torch.exp(steps[:, :, q, ..., None] * A[:, None, None])
        new = drive[:, :, q, ..., None] * b[:, :, q, :, None]
        inside.append(torch.addcmul(new, decay, inside[-1]) if q else new)
        decays.append(decay * decays[-1] if q else decay)
    before = [torch.zeros_like(inside[-1][:, 0])]
    for end, decay in zip(inside[-1].unbind(1)[:-1], decays[-1].unbind(1), strict=False):
        before.append(torch.addcmul(end, decay, before[-1]))
    states = torch.stack(inside, 2) + torch.stack(decays, 2) * torch.stack(before, 1)[:, :, None]
    return states.flatten(1, 2).movedim(2, 0)


def mean_transition(A: Tensor, delta_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [4, N, N], sigma [4, N] and V [4, N, N] of the matrix that is nearest to the transitions of all channels of a
    diagonal scan, exp(delta A) with A [4, E, N], at the steps that `delta_bias` [4, E] alone gives: of their mean,
    which is diagonal, so that its singular values are its entries, from the largest on."""
    mean = torch.exp(F.softplus(_wide(delta_bias))[..., None] * A).mean(1)
    sigma, order = mean.sort(-1, descending=True)
    U = F.one_hot(order, mean.shape[-1]).mT.to(mean.dtype)
    return U, sigma, U


def _in_chunks(x: Tensor, delta: Tensor, B: Tensor, delta_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """delta x and B, whose product drives the states, and delta: [4, n, Q, B, channels], the places of each direction
    in its order, in n chunks of Q; Q is the largest divisor of their number that is at most its root."""
    places = x.shape[2] * x.shape[3]
    Q = max(q for q in range(1, math.isqrt(places) + 1) if places % q == 0)
    steps = F.softplus(_wide(delta) + delta_bias[..., None, None])
    drive, b, steps = (_in_order(t).unflatten(1, (-1, Q)) for t in (steps * _wide(x)[:, None], _wide(B), steps))
    return drive, b, steps


def _in_order(t: Tensor) -> Tensor:
    """t [B, 4, C, H, W] as [4, L, B, C], the places of each direction in its order."""
    return torch.stack([to_sequence(t[:, k], k).permute(2, 0, 1) for k in range(DIRECTIONS)])


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
