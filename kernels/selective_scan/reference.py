"""The definition of the selective scan: one step after another, in the dtype it is given."""

import torch
from torch import Tensor


def stack_inputs(u: Tensor, inputs: int) -> Tensor:
    """Return the inputs of the recurrence, [K, batch, D, L]: u alone, or u and ones where there are two."""
    return torch.stack([u, torch.ones_like(u)]) if inputs == 2 else u[None]


def selective_scan_reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t,  y_t = C_t . h_t,  with h set to 0 where a document starts.

    Channels are ordered by group, D = G P, and each state has R queries. A value that is not finite reaches what the
    formula
    reaches: nothing before it, and no other document.

    Args:
        u, delta: [batch, D, L].
        A: [D, N].
        B: [batch, G, N, L].
        C: [batch, G R, N, L].
        h: the first states, [K, batch, D, N]. K is 1, or 2: then the same recurrence runs on ones as well.
        starts: whether a token starts a document, bool [batch, L].

    Returns:
        K times y [batch, G R P, L], and the last h.
    """
    u = stack_inputs(u, len(h))
    K, batch, D, L = u.shape
    G = B.shape[1]
    y = []
    for t in range(L):
        log_decay = delta[:, :, t, None] * A
        if starts is not None:  # filled, because a product with 0 would keep a NaN
            fresh = starts[:, t, None, None]
            log_decay, h = log_decay.masked_fill(fresh, 0), h.masked_fill(fresh, 0)
        drive = (delta[:, :, t] * u[..., t]).unflatten(-1, (G, -1))[..., None] * B[:, :, None, :, t]
        h = torch.exp(log_decay) * h + drive.flatten(2, 3)
        grouped = h.unflatten(2, (G, 1, -1)) * C[..., t].unflatten(1, (G, -1, 1))  # [K, batch, G, R, P, N]
        y.append(grouped.sum(-1))  # a sum, because autocast would change the gradients of a matrix product
    return torch.stack(y, -1).flatten(2, 4).unbind(0), h
