"""What the scans of SS2D hold on their way, transitions and states, for training and measuring.

B images · E channels · H height · W width · N state · L places · r rank · 4 directions
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import without_autocast
from kernels.ss2d.reference import DIRECTIONS, to_sequence, transition


def low_rank_states(
    x: Tensor, delta: Tensor, U: Tensor, sigma: Tensor, V: Tensor, B: Tensor, delta_bias: Tensor
) -> Tensor:
    """The states [B, 4, L, E, N] of `LowRankScan` after each place, in the order of each direction. They are summed in
    log L rounds of matrix products, each over twice as many places."""
    states, step = _driven(x, delta, B, delta_bias), 1
    with without_autocast(x.device.type):
        power = transition(U, sigma, V)
        while step < states.shape[2]:
            seen = torch.einsum("bklen,kmn->bklem", states[:, :, :-step], power)
            states = states + F.pad(seen, (0, 0, 0, 0, step, 0))
            power, step = power @ power, 2 * step
    return states


def diagonal_states(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor) -> Tensor:
    """The states [B, 4, L, E, N] of `DiagonalScan`, likewise."""
    states = _driven(x, delta, B, delta_bias)
    steps = _in_order(F.softplus(_wide(delta) + delta_bias[..., None, None]))
    decay, step = torch.exp(steps[..., None] * A[:, None]), 1
    while step < states.shape[2]:
        states = states + F.pad(decay[:, :, step:] * states[:, :, :-step], (0, 0, 0, 0, step, 0))
        decay = torch.cat([decay[:, :, :step], decay[:, :, step:] * decay[:, :, :-step]], 2)
        step *= 2
    return states


def mean_transition(A: Tensor, delta_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [4, N, N], sigma [4, N] and V [4, N, N] of the matrix that is nearest to the transitions of all channels of a
    diagonal scan, exp(delta A) with A [4, E, N], at the steps that `delta_bias` [4, E] alone gives: of their mean,
    which is diagonal, so that its singular values are its entries, from the largest on."""
    mean = torch.exp(F.softplus(_wide(delta_bias))[..., None] * A).mean(1)
    sigma, order = mean.sort(-1, descending=True)
    U = F.one_hot(order, mean.shape[-1]).mT.to(mean.dtype)
    return U, sigma, U


def _driven(x: Tensor, delta: Tensor, B: Tensor, delta_bias: Tensor) -> Tensor:
    """delta x B, in the order of each direction."""
    drive = _in_order(F.softplus(_wide(delta) + delta_bias[..., None, None]) * _wide(x)[:, None])
    return drive[..., None] * _in_order(_wide(B))[..., None, :]


def _in_order(t: Tensor) -> Tensor:
    """t [B, 4, C, H, W] as [B, 4, L, C], the places of each direction in its order."""
    return torch.stack([to_sequence(t[:, k], k) for k in range(DIRECTIONS)], 1).mT


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
