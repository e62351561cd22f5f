"""The definition of the selective scan: one step after another, in the dtype it is given."""

import torch
from torch import Tensor


def with_ones(u: Tensor, inputs: int) -> Tensor:
    """The inputs of the recurrence, [K, batch, D, L]: u, and ones where there are two."""
    return torch.stack([u, torch.ones_like(u)]) if inputs == 2 else u[None]


def selective_scan_reference(u, delta, A, B, C, h, starts=None) -> tuple[tuple[Tensor, ...], Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t,  y_t = C_t . h_t,  with h set to 0 before a token that starts a document.

    u, delta [batch, D, L]; A [D, N]; B [batch, G, N, L]; C [batch, G R, N, L]; h [K, batch, D, N]; starts bool [batch, L].
    K is 1, or 2: then the same recurrence runs on ones as well. Channels are ordered by group, D = G P; each state is read
    R times. Returns K times y [batch, G R P, L], and the last h. What is not finite reaches what the formula reaches: nothing before it,
    and no other document.
    """
    u = with_ones(u, len(h))
    K, batch, D, L = u.shape
    G = B.shape[1]
    y = []
    for t in range(L):
        log_decay = delta[:, :, t, None] * A
        if starts is not None:  # not a product with 0, which keeps a NaN
            log_decay, h = log_decay.masked_fill(starts[:, t, None, None], 0), h.masked_fill(starts[:, t, None, None], 0)
        drive = (delta[:, :, t] * u[..., t]).unflatten(-1, (G, -1))[..., None] * B[:, :, None, :, t]
        h = torch.exp(log_decay) * h + drive.flatten(2, 3)
        grouped = h.unflatten(2, (G, 1, -1)) * C[..., t].unflatten(1, (G, -1, 1))  # [K, batch, G, R, P, N]
        y.append(grouped.sum(-1))  # no matrix product: autocast would change its gradients
    return torch.stack(y, -1).flatten(2, 4).unbind(0), h
