"""The definition of the selective scan over images: four scans over sequences, in the dtype they are given."""

import torch
from torch import Tensor

from kernels.selective_scan.reference import selective_scan_reference

DIRECTIONS = 4  # along rows, along columns, and both of them backwards (VMamba's order)


def to_sequence(t: Tensor, direction: int) -> Tensor:
    """Return t [..., H, W] as the sequence [..., L] of its places in the order of this direction."""
    places = (t.mT if direction % 2 else t).flatten(-2)
    return places.flip(-1) if direction >= 2 else places


def to_image(t: Tensor, direction: int, height: int, width: int) -> Tensor:
    """Return t [..., H, W] of which `to_sequence` makes t [..., L]."""
    places = t.flip(-1) if direction >= 2 else t
    return places.unflatten(-1, (width, height)).mT if direction % 2 else places.unflatten(-1, (height, width))


def rows_of(t: Tensor) -> Tensor:
    """Return t [batch, 4, N, H, W] as [batch, 4, L, N], each direction in its order."""
    return torch.stack([to_sequence(of_k, k) for k, of_k in enumerate(t.unbind(1))], 1).mT.contiguous()


def ss2d_reference(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t,  y_t = C_t . h_t, over the places t of each direction k in turn,
    with delta, A, B and C of k, and h = 0 before the first place. The outputs y of a place are added up.

    Args:
        x: [batch, D, H, W].
        delta: [batch, 4, D, H, W].
        A: [4, D, N].
        B, C: [batch, 4, N, H, W].

    Returns:
        y [batch, D, H, W].
    """
    h, outputs = x.new_zeros(1, *x.shape[:2], A.shape[2]), []
    for k in range(DIRECTIONS):
        u, d, b, c = (to_sequence(t, k) for t in (x, delta[:, k], B[:, k, None], C[:, k, None]))
        (y,), _ = selective_scan_reference(u, d, A[k], b, c, h)
        outputs.append(to_image(y, k, *x.shape[2:]))
    return torch.stack(outputs).sum(0)


def transition(U: Tensor, sigma: Tensor, V: Tensor) -> Tensor:
    """Return U diag(sigma) V^T [4, N, N] of factors [4, N, r], [4, r], [4, N, r]."""
    return (U * sigma[:, None]) @ V.mT


def driven(x: Tensor, delta: Tensor | None) -> Tensor:
    """Return delta x [batch, 4, D, H, W], the inputs of each direction; without a delta, x is not copied."""
    u = x[:, None].expand(-1, DIRECTIONS, -1, -1, -1)
    return u if delta is None else u * delta


def ss2d_lowrank_reference(
    x: Tensor, delta: Tensor | None, U: Tensor, sigma: Tensor, V: Tensor, B: Tensor, C: Tensor
) -> Tensor:
    """h_t = U diag(sigma) V^T h_{t-1} + delta_t x_t B_t,  y_t = C_t . h_t, over the places t of each direction k in
    turn, with factors, delta, B and C of k, and h = 0 before the first place. The outputs y of a place are added up.

    Args:
        x: [batch, D, H, W].
        delta: [batch, 4, D, H, W]; 1 where there is none.
        U, V: [4, N, r].
        sigma: [4, r].
        B, C: [batch, 4, N, H, W].

    Returns:
        y [batch, D, H, W].
    """
    A, inputs, outputs = transition(U, sigma, V), driven(x, delta), []
    for k in range(DIRECTIONS):
        u, b, c = (to_sequence(t[:, k], k) for t in (inputs, B, C))
        h, y = u.new_zeros(*u.shape[:2], A.shape[1]), []  # [batch, D, N]
        for t in range(u.shape[-1]):
            h = torch.einsum("nm,bdm->bdn", A[k], h) + u[..., t, None] * b[:, None, :, t]
            y.append((h * c[:, None, :, t]).sum(-1))
        outputs.append(to_image(torch.stack(y, -1), k, *x.shape[-2:]))
    return torch.stack(outputs).sum(0)
