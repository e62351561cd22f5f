"""The selective scan over images as a fixed number of PyTorch operators, for programs that torch.export writes: in step
i each place takes the state of 2^i places ago (Hillis and Steele, 1986). It computes log2(H W) times as much as a
scan."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.ss2d.reference import DIRECTIONS, to_image, to_sequence


def ss2d_doubling(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Compute ss2d_reference."""
    u = torch.stack([to_sequence(x, k) for k in range(DIRECTIONS)], 1)
    d, b, c = (torch.stack([to_sequence(t[:, k], k) for k in range(DIRECTIONS)], 1) for t in (delta, B, C))
    decay, states = torch.exp(d[:, :, :, None] * A[..., None]), (d * u)[:, :, :, None] * b[:, :, None]
    step = 1
    while step == 1 or step < u.shape[-1]:  # [batch, 4, D, N, L]; before the first place there is nothing
        states = states + decay * F.pad(states, (step, -step))
        decay = decay * F.pad(decay, (step, -step))
        step *= 2
    y = (states * c[:, :, None]).sum(3)
    return torch.stack([to_image(y[:, k], k, *x.shape[2:]) for k in range(DIRECTIONS)]).sum(0)
