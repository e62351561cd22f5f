"""The definition of the selective scan: one step after another, in the dtype it is given."""

import torch
from torch import Tensor


def selective_scan_reference(u, delta, A, B, C, h, starts=None) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t,  y_t = C_t . h_t,  with h set to 0 before a token that starts a document.

    u [K, batch, D, L]: K inputs through the same recurrence; delta [batch, D, L]; A [D, N]; B [batch, G, N, L];
    C [batch, G R, N, L]; h [K, batch, D, N]; starts bool [batch, L]. Channels are ordered by group: D = G P.
    R readings of one state: y [K, batch, G, R, P, L]. Returns y and the last h.
    """
    K, batch, D, L = u.shape
    G = B.shape[1]
    y = []
    for t in range(L):
        decay = torch.exp(delta[:, :, t, None] * A)
        if starts is not None:
            decay = decay.masked_fill(starts[:, t, None, None], 0)
        drive = (delta[:, :, t] * u[..., t]).unflatten(-1, (G, -1))[..., None] * B[:, :, None, :, t]
        h = decay * h + drive.flatten(2, 3)
        y.append(torch.einsum("kbgpn,bgrn->kbgrp", h.unflatten(2, (G, -1)), C[..., t].unflatten(1, (G, -1))))
    return torch.stack(y, -1), h
