"""The definition of the chunk scan: one step after another, in the dtype it is given."""

import torch
from torch import Tensor


def chunk_scan_reference(x, log_decay, B, C, S, document_ids=None) -> tuple[Tensor, Tensor]:
    """S_t = exp(log_decay_t) S_{t-1} + B_t x_t^T,  y_t = C_t^T S_t,  with S set to 0 before a token that starts a document.

    x [batch, L, H, P]; log_decay [batch, L, H]; B [batch, L, H, N]; C [batch, L, H, R, N]: R readings of one state;
    S [batch, H, N, P]; document_ids [batch, L]. Returns y [batch, L, H, R, P] and the last S. What is not finite reaches what the
    formula reaches: nothing before it, and no other document.
    """
    y = []
    for t in range(x.shape[1]):
        log = log_decay[:, t, :, None, None]
        if document_ids is not None and t > 0:
            starts = (document_ids[:, t] != document_ids[:, t - 1])[:, None, None, None]
            log, S = log.masked_fill(starts, 0), S.masked_fill(starts, 0)  # not a product with 0, which keeps a NaN
        S = torch.exp(log) * S + B[:, t, :, :, None] * x[:, t, :, None, :]
        y.append((C[:, t, ..., None] * S[:, :, None]).sum(3))  # no matrix product: autocast would change its gradients
    return torch.stack(y, 1), S
