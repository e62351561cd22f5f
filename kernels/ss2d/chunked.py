"""The selective scan over images in PyTorch operators, on any device: one direction after another."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.selective_scan.chunked import selective_scan_chunked
from kernels.ss2d.reference import DIRECTIONS, to_image, to_sequence


def ss2d_chunked(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Compute ss2d_reference. Copies of the image in the order of a direction are made again in the backward pass, so
    that there is one at a time."""
    y = torch.zeros_like(x)
    for k in range(DIRECTIONS):
        of_k = x, delta[:, k], A[k], B[:, k], C[:, k]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y = y + checkpoint(_direction, k, *of_k, use_reentrant=False, preserve_rng_state=False)
        else:
            y = y + _direction(k, *of_k)
    return y


def _direction(k: int, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    u, d, b, c = (to_sequence(t, k) for t in (x, delta, B[:, None], C[:, None]))
    (y,), _ = selective_scan_chunked(u, d, A, b, c, x.new_zeros(1, *x.shape[:2], A.shape[1]))
    return to_image(y, k, *x.shape[2:])
