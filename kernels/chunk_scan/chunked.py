"""The chunk scan as matrix products (SSD, arXiv 2405.21060, section 6): chunks of Q steps are Q x Q attention inside, a
state of N x P between. Nothing of size L x L is stored.

batch b · chunk c · t, s time in the chunk · H heads · R readings · N state · P channels
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernels.checks import has_values
from kernels.chunk_scan.products import product, running_sums, scores_of, weighted_sum
from kernels.chunk_scan.reference import chunk_scan_reference

CHUNK = 64  # steps: at N and P about 64 the two parts cost the same (ours)


def chunk_scan_chunked(x, log_decay, B, C, S, document_ids=None) -> tuple[Tensor, Tensor]:
    """As chunk_scan_reference. A value that is not finite reaches what it reaches there; where a look at values costs nothing (on a CPU)
    it is also of the same kind, else infinity may become NaN."""
    if has_values(x) and not all(bool(t.detach().sum().isfinite()) for t in (x, log_decay, B, C, S)):
        return _step_by_step(x, log_decay, B, C, S, document_ids)
    length, readings = x.shape[1], C.shape[3]
    Q = min(CHUNK, length)
    extra = -length % Q

    def chunks(t: Tensor) -> Tensor:  # [batch, L, H, ...] -> [batch, c, H, Q, ...]; the padding adds nothing and does not decay
        t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, extra)) if extra else t
        return t.unflatten(1, (-1, Q)).transpose(2, 3)

    x, B, log_decay = chunks(x).contiguous(), chunks(B).contiguous(), chunks(log_decay[..., None])[..., 0]
    C = chunks(C).transpose(3, 4).flatten(3, 4)  # [b, c, H, R Q, N]
    fall = _fall(log_decay)
    since = (fall[..., :, None] - fall[..., None, :]).to(x.dtype)  # from s to t
    visible = torch.ones(Q, Q, dtype=torch.bool, device=x.device).tril()
    into, out_of = torch.exp(fall).to(x.dtype)[..., None], torch.exp(fall[..., -1:] - fall).to(x.dtype)[..., None]
    keep = into[..., -1:, :]  # [b, c, H, 1, 1]
    reads, kept = C, None
    if document_ids is not None:  # what is not seen is left out, not multiplied by 0, which would keep a NaN
        documents = F.pad(document_ids, (0, extra), mode="replicate") if extra else document_ids
        documents = documents.unflatten(1, (-1, Q))  # [b, c, Q]
        before = torch.cat([documents[:, :1, 0], documents[:, :-1, -1]], 1)[..., None]  # of the state that enters a chunk
        visible = visible & (documents[..., :, None] == documents[..., None, :])[:, :, None]
        unread, unwritten = ((documents != of)[:, :, None, :, None] for of in (before, documents[..., -1:]))  # [b, c, 1, Q, 1]
        kept = (documents[..., -1:] == before)[:, :, None, None]  # [b, c, 1, 1, 1]
        into, out_of, keep = into.masked_fill(unread, 0), out_of.masked_fill(unwritten, 0), keep.masked_fill(~kept, 0)
        reads = C.masked_fill(unread.repeat(1, 1, 1, readings, 1), 0)
    now = torch.eye(Q, dtype=torch.bool, device=x.device)  # exp(0), which has no gradient: sums of the others are far smaller
    since = torch.exp(since.masked_fill(~visible, -torch.inf).masked_fill(now, 0.0))

    seen = visible.repeat(*(1,) * (visible.ndim - 2), readings, 1)  # [..., R Q, Q]
    scores = scores_of(C, B, seen).unflatten(3, (readings, Q)) * since[:, :, :, None]
    y = weighted_sum(scores.flatten(3, 4), x, seen)

    scaled, keys = x * out_of, B
    if kept is not None:
        scaled, keys = scaled.masked_fill(unwritten, 0), B.masked_fill(unwritten, 0)
    added = product(keys.mT, scaled)  # [b, c, H, N, P]
    states = []
    for c in range(x.shape[1]):
        states.append(S)
        S = keep[:, c] * (S if kept is None else S.masked_fill(~kept[:, c], 0)) + added[:, c]
    entered = into[:, :, :, None] * product(reads, torch.stack(states, 1)).unflatten(3, (readings, Q))
    if kept is not None:
        entered = entered.masked_fill(unread[:, :, :, None], 0)
    y = y.unflatten(3, (readings, Q)) + entered
    return y.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)[:, :length], S  # [batch, L, H, R, P]


def _fall(log_decay: Tensor) -> Tensor:
    """Log of the decay from before the chunk to t, [b, c, H, Q]; in double, as its differences cancel. One step's that is not finite is
    NaN at that step alone: summed up it would reach the chunk's other documents."""
    finite = log_decay.isfinite()
    return running_sums(log_decay.masked_fill(~finite, 0).double()) + (log_decay - log_decay)


def _step_by_step(x, log_decay, B, C, S, document_ids) -> tuple[Tensor, Tensor]:
    """The reference, which keeps the states of a chunk at a time for the backward pass, not those of all steps."""
    outputs = []
    for t in range(0, x.shape[1], CHUNK):
        steps = slice(t, t + CHUNK)
        ids = None if document_ids is None else document_ids[:, steps]
        if ids is not None and t > 0:
            S = S.masked_fill((ids[:, 0] != document_ids[:, t - 1])[:, None, None, None], 0)
        part = x[:, steps], log_decay[:, steps], B[:, steps], C[:, steps], S, ids
        y, S = checkpoint(chunk_scan_reference, *part, use_reentrant=False, preserve_rng_state=False)
        outputs.append(y)
    return torch.cat(outputs, 1), S
