"""The selective scan in PyTorch operators, in chunks: only the states between chunks are kept for the backward pass.

Shapes as in reference.py, time first inside: Q steps of a chunk, [Q, K, batch, D, N] at most at any moment.
"""

import torch
from torch import Tensor

from kernels.selective_scan.reference import with_ones

CHUNK_ELEMENTS = 1 << 22  # of one [Q, K, batch, D, N] buffer: 16 MiB in float32 (ours)
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
        for t in range(0, L, Q):
            begins.append(h)
            decay, drive = _coefficients(u, delta, A, B, starts, t, Q)
            states = _run(decay, drive, h)
            y[t : t + Q] = torch.einsum("tkbgpn,bgrnt->tkbgrp", states.unflatten(3, (B.shape[1], -1)), _grouped(C, B, t, Q))
            h = states[-1].clone()  # a view would keep all the chunk's states
        ctx.save_for_backward(u, delta, A, B, C, starts, *begins)
        ctx.chunk = Q
        return y.permute(1, 2, 3, 4, 5, 0).contiguous(), h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh):
        u, delta, A, B, C, starts, *begins = ctx.saved_tensors
        L, Q, G = u.shape[-1], ctx.chunk, B.shape[1]
        du, ddelta, dA = torch.empty_like(u), torch.empty_like(delta), torch.zeros_like(A)
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        dh = dh.clone()
        dy = dy.permute(5, 0, 1, 2, 3, 4)
        for t, h in reversed(list(zip(range(0, L, Q), begins, strict=True))):
            s = slice(t, t + Q)
            decay, drive = _coefficients(u, delta, A, B, starts, t, Q)
            states = _run(decay, drive, h)
            grouped = states.unflatten(3, (G, -1))
            dC[..., s] = torch.einsum("tkbgrp,tkbgpn->bgrnt", dy[s], grouped).flatten(1, 2)
            g = torch.einsum("tkbgrp,bgrnt->tkbgpn", dy[s], _grouped(C, B, t, Q)).flatten(3, 4).contiguous()
            for i in reversed(range(len(g))):  # g: gradient of each state, later states' share included
                g[i] += dh
                dh = g[i] * decay[i]
            previous = torch.cat([h[None], states[:-1]])
            ddecay = (g * previous).sum(1) * decay[:, 0]  # [Q, batch, D, N], of the exponent
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
    decay = torch.exp(d[..., None] * A)
    if starts is not None:
        decay = decay.masked_fill(starts[:, s].T[..., None, None], 0)
    x = (u[..., s].permute(3, 0, 1, 2) * d[:, None]).unflatten(3, (B.shape[1], -1))
    return decay[:, None], (x[..., None] * B[..., s].permute(3, 0, 1, 2)[:, None, :, :, None]).flatten(3, 4)


def _run(decay, drive, h) -> Tensor:
    """The recurrence; `drive` is overwritten by the states."""
    for i in range(len(drive)):
        drive[i].addcmul_(decay[i], h)
        h = drive[i]
    return drive


def _grouped(C, B, t, Q) -> Tensor:
    return C[..., t : t + Q].unflatten(1, (B.shape[1], -1))


def selective_scan_chunked(u, delta, A, B, C, h, starts=None) -> tuple[tuple[Tensor, ...], Tensor]:
    """As selective_scan_reference."""
    y, h = ChunkedScan.apply(with_ones(u, len(h)), delta, A, B, C, h, starts)
    return y.flatten(2, 4).unbind(0), h
