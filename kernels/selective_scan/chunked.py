"""The selective scan in PyTorch operators, in chunks: only the states between chunks are kept for the backward pass.

Shapes as in reference.py, time first inside: Q steps of a chunk, [Q, K, batch, D, N] at most at any moment.
"""

import torch
from torch import Tensor

from kernels.selective_scan.reference import with_ones

CHUNK_ELEMENTS = 1 << 24  # of one [Q, K, batch, D, N] buffer: 64 MiB in float32 (ours)
MAX_CHUNK = 64


def _chunk_length(K: int, batch: int, D: int, N: int, L: int) -> int:
    return max(1, min(MAX_CHUNK, L, CHUNK_ELEMENTS // (K * batch * D * N)))


class ChunkedScan(torch.autograd.Function):
    """(u, delta, A, B, C, h, starts) -> (y, last h), gradients for all but starts."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, h, starts):
        K, batch, D, L = u.shape
        Q = _chunk_length(K, batch, D, A.shape[1], L)
        begins = []
        y = u.new_empty(L, K, batch, B.shape[1], C.shape[1] // B.shape[1], D // B.shape[1])
        keep = any(ctx.needs_input_grad)
        for t in range(0, L, Q):
            if keep:
                begins.append(h)
            decay, drive = _coefficients(u, delta, A, B, starts, t, Q)
            states = _run(decay, drive, h, starts, t)
            y[t : t + Q] = torch.einsum("tkbgpn,bgrnt->tkbgrp", states.unflatten(3, (B.shape[1], -1)), _grouped(C, B, t, Q))
            h = states[-1].clone()  # a view would keep all the chunk's states
        ctx.save_for_backward(u, delta, A, B, C, starts, *begins)
        ctx.chunk = Q
        return y.permute(1, 2, 3, 4, 5, 0).contiguous(), h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh):
        with torch.autocast(dy.device.type, enabled=False):  # it belongs to the thread that calls backward(), not to the graph
            return ChunkedScan.gradients(ctx, dy, dh)

    @staticmethod
    def gradients(ctx, dy, dh):
        u, delta, A, B, C, starts, *begins = ctx.saved_tensors
        L, Q, G = u.shape[-1], ctx.chunk, B.shape[1]
        du, ddelta, dA = torch.empty_like(u), torch.empty_like(delta), torch.zeros_like(A)
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        dh = dh.clone()
        dy = dy.permute(5, 0, 1, 2, 3, 4)
        for t, h in reversed(list(zip(range(0, L, Q), begins, strict=True))):
            s = slice(t, t + Q)
            decay, drive = _coefficients(u, delta, A, B, starts, t, Q)
            states = _run(decay, drive, h, starts, t)
            grouped = states.unflatten(3, (G, -1))
            dC[..., s] = torch.einsum("tkbgrp,tkbgpn->bgrnt", dy[s], grouped).flatten(1, 2)
            g = torch.einsum("tkbgrp,bgrnt->tkbgpn", dy[s], _grouped(C, B, t, Q)).flatten(3, 4).contiguous()
            for i in reversed(range(len(g))):  # g: gradient of each state, later states' share included
                g[i] += dh
                dh = _before(g[i] * decay[i], starts, t + i)
            previous = torch.cat([h[None], states[:-1]])
            ddecay = (g * previous).sum(1) * decay[:, 0]  # [Q, batch, D, N], of the exponent
            if starts is not None:
                ddecay = ddecay.masked_fill(starts[:, s].T[..., None, None], 0)
            d = delta[..., s].permute(2, 0, 1)  # [Q, batch, D]
            dA += torch.einsum("tbdn,tbd->dn", ddecay, d)
            g = g.unflatten(3, (G, -1))
            through_B = torch.einsum("tkbgpn,bgnt->tkbgp", g, B[..., s]).flatten(3, 4)  # gradient of delta u
            v = u[..., s].permute(3, 0, 1, 2)
            du[..., s] = (through_B * d[:, None]).permute(1, 2, 3, 0)
            ddelta[..., s] = (torch.einsum("tbdn,dn->tbd", ddecay, A) + (through_B * v).sum(1)).permute(1, 2, 0)
            dB[..., s] = torch.einsum("tkbgpn,tkbgp->bgnt", g, (v * d[:, None]).unflatten(3, (G, -1)))
        return du, ddelta, dA, dB, dC, dh, None


def _coefficients(u, delta, A, B, starts, t, Q) -> tuple[Tensor, Tensor]:
    """decay [Q, 1, batch, D, N] and drive [Q, K, batch, D, N] of the steps t .. t + Q."""
    s = slice(t, t + Q)
    d = delta[..., s].permute(2, 0, 1)
    log_decay = d[..., None] * A
    if starts is not None:  # the states before such a step are set to 0
        log_decay = log_decay.masked_fill(starts[:, s].T[..., None, None], 0)
    x = (u[..., s].permute(3, 0, 1, 2) * d[:, None]).unflatten(3, (B.shape[1], -1))
    return torch.exp(log_decay)[:, None], (x[..., None] * B[..., s].permute(3, 0, 1, 2)[:, None, :, :, None]).flatten(3, 4)


def _run(decay, drive, h, starts, t) -> Tensor:
    """The recurrence from step t on; `drive` is overwritten by the states."""
    for i in range(len(drive)):
        drive[i].addcmul_(decay[i], _before(h, starts, t + i))
        h = drive[i]
    return drive


def _before(h, starts, t) -> Tensor:
    """States (or their gradients) [K, batch, D, N] as they enter (or leave) step t: 0 where a document starts, also for NaN."""
    return h if starts is None else h.masked_fill(starts[:, t, None, None], 0)


def _grouped(C, B, t, Q) -> Tensor:
    return C[..., t : t + Q].unflatten(1, (B.shape[1], -1))


def selective_scan_chunked(u, delta, A, B, C, h, starts=None) -> tuple[tuple[Tensor, ...], Tensor]:
    """As selective_scan_reference."""
    u, G = with_ones(u, len(h)), B.shape[1]
    if u[..., 0].numel() * A.shape[1] * MAX_CHUNK <= CHUNK_ELEMENTS:
        y, h = ChunkedScan.apply(u, delta, A, B, C, h, starts)
        return y.flatten(2, 4).unbind(0), h
    # too wide for a chunk of that many steps: one batch entry and one group after another
    P, R, parts = u.shape[2] // G, C.shape[1] // G, []
    for b in range(u.shape[1]):
        own = None if starts is None else starts[b : b + 1]
        for g in range(G):
            d, r = slice(g * P, (g + 1) * P), slice(g * R, (g + 1) * R)
            at = (slice(None), slice(b, b + 1), d)
            parts.append(ChunkedScan.apply(u[at], delta[b : b + 1, d], A[d], B[b : b + 1, g : g + 1], C[b : b + 1, r], h[at], own))
    rows = [parts[b * G : (b + 1) * G] for b in range(u.shape[1])]
    y = torch.cat([torch.cat([y.flatten(2, 4) for y, _ in row], 2) for row in rows], 1)
    return y.unbind(0), torch.cat([torch.cat([h for _, h in row], 2) for row in rows], 1)
