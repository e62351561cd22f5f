"""The chunk scan as matrix products (SSD, arXiv 2405.21060, section 6): chunks of Q steps are Q x Q attention inside, a
state of N x P between. Nothing of size L x L is stored.

batch b · chunk c · t, s time in the chunk · H heads · R readings · N state · P channels
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64  # steps: at N and P about 64 the two parts cost the same (ours)


def chunk_scan_chunked(x, log_decay, B, C, S, document_ids=None) -> tuple[Tensor, Tensor]:
    """As chunk_scan_reference."""
    length = x.shape[1]
    Q = min(CHUNK, length)
    extra = -length % Q

    def chunks(t: Tensor) -> Tensor:  # [batch, L, H, ...] -> [batch, c, H, Q, ...]; the padding adds nothing and does not decay
        t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, extra)) if extra else t
        return t.unflatten(1, (-1, Q)).transpose(2, 3)

    readings = C.shape[3]
    x, B, log_decay = chunks(x).contiguous(), chunks(B).contiguous(), chunks(log_decay[..., None])[..., 0]
    C = chunks(C).transpose(3, 4).flatten(3, 4)  # [b, c, H, R Q, N]
    fall = log_decay.double().cumsum(-1)  # [b, c, H, Q], log of the decay from before the chunk to t; its differences cancel
    since = (fall[..., :, None] - fall[..., None, :]).to(x.dtype)  # from s to t
    visible = torch.ones(Q, Q, dtype=torch.bool, device=x.device).tril()
    if document_ids is not None:
        documents = F.pad(document_ids, (0, extra), mode="replicate") if extra else document_ids
        documents = documents.unflatten(1, (-1, Q))  # [b, c, Q]
        before = torch.cat([documents[:, :1, 0], documents[:, :-1, -1]], 1)[..., None]  # of the state that enters a chunk
        visible = visible & (documents[..., :, None] == documents[..., None, :])[:, :, None]
        reads_state = (documents == before)[:, :, None]  # [b, c, 1, Q]
        writes_state = (documents == documents[..., -1:])[:, :, None]
        keeps_state = (documents[..., -1:] == before)[:, :, None]  # [b, c, 1, 1]
    now = torch.eye(Q, dtype=torch.bool, device=x.device)  # exp(0), which has no gradient: sums of the others are far smaller
    since = torch.exp(since.masked_fill(~visible, -torch.inf).masked_fill(now, 0.0))

    scores = (C @ B.mT).unflatten(3, (readings, Q)) * since[:, :, :, None]
    y = scores.flatten(3, 4) @ x

    into, out_of = torch.exp(fall).to(x.dtype), torch.exp(fall[..., -1:] - fall).to(x.dtype)  # state to t, t to the chunk's end
    keep = into[..., -1:]
    if document_ids is not None:
        into, out_of, keep = into * reads_state, out_of * writes_state, keep * keeps_state
    added = B.mT @ (x * out_of[..., None])  # [b, c, H, N, P]
    states = []
    for c in range(x.shape[1]):
        states.append(S)
        S = keep[:, c, :, :, None] * S + added[:, c]
    y = y.unflatten(3, (readings, Q)) + into[..., None, :, None] * (C @ torch.stack(states, 1)).unflatten(3, (readings, Q))
    return y.permute(0, 1, 4, 2, 3, 5).flatten(1, 2)[:, :length], S  # [batch, L, H, R, P]
