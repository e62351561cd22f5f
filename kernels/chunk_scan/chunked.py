"""The chunk scan as matrix products (SSD, arXiv 2405.21060, section 6).

A chunk of Q steps is Q x Q attention inside, and a state of N x P passes from chunk to chunk: nothing is of size L x L.

b batch · c chunk · t, s time in the chunk · H heads · G groups of heads with one B · R queries per state · N state · P
channels
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernels.checks import can_read_values
from kernels.chunk_scan.reference import chunk_scan_reference
from kernels.products import cumulative_sum, masked_scores, product, weighted_sum

CHUNK = 64  # steps: where N and P are about 64, the work inside chunks and between them is the same (ours)


def chunk_scan_chunked(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, S: Tensor, document_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute chunk_scan_reference in chunks.

    A value that is not finite reaches what it reaches in the reference. On a CPU, where values can be read, the result
    is also of the same kind; elsewhere an infinity may become NaN.
    """
    if can_read_values(x) and not all(bool(t.detach().sum().isfinite()) for t in (x, log_decay, B, C, S)):
        return _scan_by_steps(x, log_decay, B, C, S, document_ids)
    length, R = x.shape[1], C.shape[3]
    Q, G, rows = min(CHUNK, length), B.shape[2], C.shape[2] // B.shape[2]  # rows: of C, that see a group of B
    padding = -length % Q

    def chunks(t: Tensor) -> Tensor:
        """[batch, L, H, ...] -> [b, c, H, Q, ...], or G; the padding adds nothing to a state and does not decay it."""
        t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, padding)) if padding else t
        return t.unflatten(1, (-1, Q)).transpose(2, 3)

    x, B, log_decay = chunks(x).contiguous(), chunks(B).contiguous(), chunks(log_decay[..., None])[..., 0]
    C = chunks(C).transpose(3, 4).flatten(3, 4)  # [b, c, G or H, R Q, N]
    summed = _cumulative_log_decay(log_decay)  # [b, c, H, Q]
    log_decays = (summed[..., :, None] - summed[..., None, :]).to(x.dtype)  # from s to t
    mask = torch.ones(Q, Q, dtype=torch.bool, device=x.device).tril()
    # decays from the state that enters the chunk to t, from t to the chunk's end, and from end to end [b, c, H, 1, 1]
    decay_in = torch.exp(summed).to(x.dtype)[..., None]
    decay_out = torch.exp(summed[..., -1:] - summed).to(x.dtype)[..., None]
    chunk_decay = decay_in[..., -1:, :]
    queries, carried = C, None
    if document_ids is not None:  # other documents are masked, because multiplying by 0 would keep a NaN
        documents = F.pad(document_ids, (0, padding), mode="replicate") if padding else document_ids
        documents = documents.unflatten(1, (-1, Q))  # [b, c, Q]
        previous = torch.cat([documents[:, :1, 0], documents[:, :-1, -1]], 1)[..., None]  # of the state that enters
        mask = mask & (documents[..., :, None] == documents[..., None, :])[:, :, None]
        other_before, other_after = (  # whether t is in another document than the chunk's start, end: [b, c, 1, Q, 1]
            (documents != document)[:, :, None, :, None] for document in (previous, documents[..., -1:])
        )
        carried = (documents[..., -1:] == previous)[:, :, None, None]  # one document from end to end: [b, c, 1, 1, 1]
        decay_in, decay_out = decay_in.masked_fill(other_before, 0), decay_out.masked_fill(other_after, 0)
        chunk_decay = chunk_decay.masked_fill(~carried, 0)
        queries = C.masked_fill(other_before.repeat(1, 1, 1, R, 1), 0)
    diagonal = torch.eye(Q, dtype=torch.bool, device=x.device)
    # exp(0) without a gradient on the diagonal: its gradients would be far larger than those of the other decays
    decays = torch.exp(log_decays.masked_fill(~mask, -torch.inf).masked_fill(diagonal, 0.0))

    scores = masked_scores(C.unflatten(2, (G, rows)).flatten(3, 4), B, torch.cat([mask] * rows * R, -2))
    scores = scores.unflatten(3, (rows, R, Q)) * decays.unflatten(2, (G, -1))[:, :, :, :, None]  # of each head
    y = weighted_sum(scores.flatten(2, 3).flatten(3, 4), x, torch.cat([mask] * R, -2))

    values, keys = x * decay_out, B
    if carried is not None:
        values, keys = values.masked_fill(other_after, 0), B.masked_fill(other_after, 0)
    added = _product_by_group(keys.mT, values)  # [b, c, H, N, P]
    states = []
    for c in range(x.shape[1]):
        states.append(S)
        S = chunk_decay[:, c] * (S if carried is None else S.masked_fill(~carried[:, c], 0)) + added[:, c]
    from_states = _product_by_group(queries, torch.stack(states, 1)).unflatten(3, (R, Q))
    from_states = decay_in[:, :, :, None] * from_states
    if carried is not None:
        from_states = from_states.masked_fill(other_before[:, :, :, None], 0)
    y = y.unflatten(3, (R, Q)) + from_states
    return y.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)[:, :length], S  # [batch, L, H, R, P]


def _product_by_group(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a matrix per group [b, c, G, rows, K] with one per head [b, c, H, K, columns]: [b, c, H, rows, columns].

    The columns of a group's heads stand side by side, so neither a matrix nor its gradient is repeated.
    """
    heads = b.shape[2] // a.shape[2]
    if heads == 1:
        return product(a, b)
    side_by_side = b.unflatten(2, (-1, heads)).transpose(3, 4).flatten(4)
    return product(a, side_by_side).unflatten(4, (heads, -1)).transpose(3, 4).flatten(2, 3)


def _cumulative_log_decay(log_decay: Tensor) -> Tensor:
    """Return the log of the decay from before the chunk to t, [b, c, H, Q], in double because its differences cancel.

    One that is not finite becomes NaN at its own step only: in the sum it would reach the other documents of the chunk.
    """
    finite = log_decay.isfinite()
    return cumulative_sum(log_decay.masked_fill(~finite, 0).double()) + (log_decay - log_decay)


def _scan_by_steps(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, S: Tensor, document_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the reference on one chunk after another; for the backward pass it keeps the states between chunks only."""
    outputs = []
    for t in range(0, x.shape[1], CHUNK):
        steps = slice(t, t + CHUNK)
        ids = None if document_ids is None else document_ids[:, steps]
        if document_ids is not None and t > 0:
            S = S.masked_fill((document_ids[:, t] != document_ids[:, t - 1])[:, None, None, None], 0)
        arguments = x[:, steps], log_decay[:, steps], B[:, steps], C[:, steps], S, ids
        y, S = checkpoint(chunk_scan_reference, *arguments, use_reentrant=False, preserve_rng_state=False)
        outputs.append(y)
    return torch.cat(outputs, 1), S
