"""The definition of the chunk scan: one step after another, in the dtype it is given."""

import torch
from torch import Tensor


def chunk_scan_reference(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, S: Tensor, document_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S_t = exp(log_decay_t) S_{t-1} + B_t x_t^T,  y_t = C_t^T S_t,  with S set to 0 where a document starts.

    A value that is not finite reaches what the formula reaches: nothing before it, and no other document.

    Args:
        x: [batch, L, H, P].
        log_decay: [batch, L, H].
        B: [batch, L, G, N]; a group is of H // G heads that follow each other.
        C: [batch, L, G, 1, N], or [batch, L, H, R, N] for R queries per state.
        S: the first states, [batch, H, N, P].
        document_ids: [batch, L]; a document starts where the id changes.

    Returns:
        y [batch, L, H, R, P], and the last S.
    """
    heads = x.shape[2]
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    y = []
    for t in range(x.shape[1]):
        log = log_decay[:, t, :, None, None]
        if document_ids is not None and t > 0:  # filled, because a product with 0 would keep a NaN
            starts = (document_ids[:, t] != document_ids[:, t - 1])[:, None, None, None]
            log, S = log.masked_fill(starts, 0), S.masked_fill(starts, 0)
        S = torch.exp(log) * S + B[:, t, :, :, None] * x[:, t, :, None, :]
        # a sum, because autocast would change the gradients of a matrix product
        y.append((C[:, t, ..., None] * S[:, :, None]).sum(3))
    return torch.stack(y, 1), S
