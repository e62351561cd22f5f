"""The gated delta rule as matrix products: the WY form of a chunk (Gated DeltaNet, arXiv 2412.06464, section 3.3; Kimi
Linear, arXiv 2510.26692, section 4), with the decays of pairs of steps that README.md derives.

b batch · c chunk · Q steps of a chunk · H heads · K keys · V values · n heads of q, of k or of v, each for H / n heads
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernels.checks import can_read_values
from kernels.delta_rule.reference import delta_rule_reference
from kernels.products import cumulative_sum, product, solve_unit_lower

CHUNK = 64  # steps (ours, as flash-linear-attention's and transformers')
SMALL = 4  # pairs of halves of so many steps and fewer are sums, which are quicker than products of matrices (ours)


def delta_rule_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor, document_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute delta_rule_reference in chunks.

    A value that is not finite reaches what it reaches in the reference, where values can be read (on a CPU)."""
    if beta.shape[1] == 1:
        return delta_rule_reference(q, k, v, g, beta, S, document_ids)
    if can_read_values(q) and not all(bool(t.detach().sum().isfinite()) for t in (q, k, v, g, beta, S)):
        return _by_steps(q, k, v, g, beta, S, document_ids)
    length = beta.shape[1]
    Q = min(CHUNK, 1 << (length - 1).bit_length())

    def chunks(t: Tensor) -> Tensor:
        """[batch, T, heads, X] -> [b, c, heads, Q, X]; the padding adds nothing to a state and does not decay it."""
        return F.pad(t, (0, 0, 0, 0, 0, -length % Q)).unflatten(1, (-1, Q)).transpose(2, 3)

    q, k, v, g, beta = (chunks(t) for t in (q, k, v, g, beta[..., None]))
    into, out = _decay_into(g), _decay_out(g)
    chunk_decay = into[..., -1:, :].mT  # [b, c, H, K or 1, 1]
    scores = _pair_scores(q, k, g)  # [b, c, H, 2 Q, Q]: of k, then of q
    mask = torch.ones(Q, Q, dtype=torch.bool, device=q.device).tril()
    if document_ids is not None:
        documents = F.pad(document_ids, (0, -length % Q), mode="replicate").unflatten(1, (-1, Q))  # [b, c, Q]
        previous = torch.cat([documents[:, :1, 0], documents[:, :-1, -1]], 1)[..., None]  # of the state that enters
        mask = mask & (documents[..., :, None] == documents[..., None, :])[:, :, None]
        into = into.masked_fill((documents != previous)[:, :, None, :, None], 0)
        out = out.masked_fill((documents != documents[..., -1:])[:, :, None, :, None], 0)
        chunk_decay = chunk_decay.masked_fill((documents[..., -1:] != previous)[:, :, None, :, None], 0)
    of_k, of_q = scores[..., :Q, :].masked_fill(~mask.tril(-1), 0), scores[..., Q:, :].masked_fill(~mask, 0)

    # what each step writes: (I + beta of_k) U = beta (V - decayed k S)
    right = torch.cat([_times(v, beta), _times(k, beta * into)], -1)
    written, erased = solve_unit_lower(beta * of_k, right).split([v.shape[-1], k.shape[-1]], -1)
    keys = _times(k, out).mT
    states, updates = [], []
    for c in range(v.shape[1]):
        states.append(S)
        updates.append(written[:, c] - product(erased[:, c], S))
        S = chunk_decay[:, c] * S + product(keys[:, c], updates[-1])
    o = product(_times(q, into), torch.stack(states, 1)) + product(of_q, torch.stack(updates, 1))
    return o.transpose(2, 3).flatten(1, 2)[:, :length], S


def _times(t: Tensor, factor: Tensor) -> Tensor:
    """Return t [b, c, n, ..., X] times a factor of every head [b, c, H, ..., X or 1]."""
    return (t[:, :, :, None] * factor.unflatten(2, (t.shape[2], -1))).flatten(2, 3)


def _decay_into(g: Tensor) -> Tensor:
    """Return the decay from before the first step to each, of steps in dimension -2."""
    return cumulative_sum(g, -2).exp()


def _decay_out(g: Tensor) -> Tensor:
    """Return the decay from each step to the last. The exponent is a sum of what lies between, and not a difference of
    two sums, which would lose the digits of a strong decay."""
    to_end = cumulative_sum(g.flip(-2), -2).flip(-2)
    return F.pad(to_end[..., 1:, :], (0, 0, 0, 1)).exp()


def _pair_scores(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """Return sum_K exp(g_{s+1} + ... + g_t) k_t k_s of steps s <= t, and below it that of q_t: [b, c, H, 2 Q, Q]."""
    return _of_one_decay(q, k, g) if g.shape[-1] == 1 else _of_many_decays(q, k, g)


def _of_one_decay(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """Compute them with one decay per head: products need none, and heads that share q and k share them."""
    if q.shape[2] != k.shape[2]:
        q, k = (t.repeat_interleave(g.shape[2] // t.shape[2], 2) for t in (q, k))
    Q = g.shape[-2]
    later = torch.ones(Q, Q, dtype=torch.bool, device=g.device).tril(-1)
    # sums of what lies between s and t, [b, c, H, t, s]
    between = cumulative_sum(g.expand(*g.shape[:-1], Q).masked_fill(~later, 0), -2)
    decays = between.masked_fill(later.mT, -torch.inf).exp()
    return _times(product(torch.cat([k, q], -2), k.mT).unflatten(-2, (2, Q)), decays[..., None, :, :]).flatten(3, 4)


def _of_many_decays(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """Compute them with a decay per channel, by the block of 2, 4, ... Q steps in whose halves two steps lie.

    Their decay is that from s to the middle of the block, times that from there to t: a matrix product, of factors of
    which none exceeds 1."""
    Q, ones = g.shape[-2], torch.ones_like(g)
    # of blocks of one step: [b, c, H, Q, 2, 1, 1]
    found = torch.stack([_sum(_times(t, ones), _times(k, ones)) for t in (k, q)], -1)[..., None, None]
    size = 1
    while size < Q:
        halves = g.unflatten(3, (-1, 2, size))  # [b, c, H, blocks, 2, size, K or 1]
        into, out = _decay_into(halves[..., 1, :, :]), _decay_out(halves[..., 0, :, :])
        early_k, late_k = k.unflatten(3, (-1, 2, size)).unbind(4)
        late = torch.stack([_times(late_k, into), _times(q.unflatten(3, (-1, 2, size))[..., 1, :, :], into)], 4)
        early = _times(early_k, out)[..., None, :, :]
        if size <= SMALL:
            across = _sum(late[..., :, None, :], early[..., None, :, :])
        else:
            across = product(late.flatten(-3, -2), early[..., 0, :, :].mT).unflatten(-2, (2, size))
        first, second = found.unflatten(3, (-1, 2)).unbind(4)
        upper = torch.cat([first, torch.zeros_like(across)], -1)
        found = torch.cat([upper, torch.cat([across, second], -1)], -2)
        size *= 2
    return found[:, :, :, 0].flatten(3, 4)


def _sum(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _by_steps(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor, document_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the reference on one chunk after another; for the backward pass it keeps the states between chunks only."""
    outputs = []
    for t in range(0, beta.shape[1], CHUNK):
        steps = slice(t, t + CHUNK)
        ids = None if document_ids is None else document_ids[:, steps]
        if document_ids is not None and t > 0:
            S = S.masked_fill((document_ids[:, t] != document_ids[:, t - 1])[:, None, None, None], 0)
        arguments = *(x[:, steps] for x in (q, k, v, g, beta)), S, ids
        o, S = checkpoint(delta_rule_reference, *arguments, use_reentrant=False, preserve_rng_state=False)
        outputs.append(o)
    return torch.cat(outputs, 1), S
