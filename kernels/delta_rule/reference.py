"""The definition of the gated delta rule: one step after another, in the dtype it is given."""

import torch
from torch import Tensor


def delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor, document_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S_t = Diag(exp(g_t)) S_{t-1},  S_t <- S_t + beta_t k_t (v_t - S_t^T k_t)^T,  o_t = S_t^T q_t,  with S set to 0
    where a document starts.

    Args:
        q, k: [batch, T, heads of them, K]; v: [batch, T, heads of it, V]. Their heads divide H, and consecutive heads
            share one.
        g: [batch, T, H, K], or [batch, T, H, 1] for one decay per head.
        beta: [batch, T, H].
        S: the first states, [batch, H, K, V].
        document_ids: [batch, T]; a document starts where the id changes.

    Returns:
        o [batch, T, H, V], and the last S.
    """
    heads, outputs = beta.shape[2], []
    q, k, v = (t.repeat_interleave(heads // t.shape[2], 2) for t in (q, k, v))
    for t in range(beta.shape[1]):
        log = g[:, t, :, :, None]
        if document_ids is not None and t > 0:  # filled, because a product with 0 would keep a NaN
            starts = (document_ids[:, t] != document_ids[:, t - 1])[:, None, None, None]
            log, S = log.masked_fill(starts, 0), S.masked_fill(starts, 0)
        S = torch.exp(log) * S
        # sums, because autocast would change the gradients of matrix products
        surprise = v[:, t] - (S * k[:, t, :, :, None]).sum(2)
        S = S + k[:, t, :, :, None] * (beta[:, t, :, None] * surprise)[:, :, None]
        outputs.append((S * q[:, t, :, :, None]).sum(2))
    return torch.stack(outputs, 1), S
