"""The selective scan in PyTorch operators, in chunks: only the states between chunks are kept for the backward pass.

Shapes are those of reference.py, with time first inside: at most [Q, K, batch, D, N] at any moment, Q steps of a chunk.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.dispatch import without_autocast
from kernels.selective_scan.reference import stack_inputs

CHUNK_ELEMENTS = 1 << 24  # size of one [Q, K, batch, D, N] buffer: 64 MiB in float32 (ours)
MAX_CHUNK = 64  # steps


def _chunk_length(K: int, batch: int, D: int, N: int, L: int) -> int:
    return max(1, min(MAX_CHUNK, L, CHUNK_ELEMENTS // (K * batch * D * N)))


class ChunkedScan(torch.autograd.Function):
    """(u, delta, A, B, C, h, starts) -> (y, last h), with gradients for all but starts."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        K, batch, D, L = u.shape
        Q = _chunk_length(K, batch, D, A.shape[1], L)
        chunk_states = []  # the state before each chunk
        y = u.new_empty(L, K, batch, B.shape[1], C.shape[1] // B.shape[1], D // B.shape[1])
        needs_backward = any(ctx.needs_input_grad)
        for t in range(0, L, Q):
            if needs_backward:
                chunk_states.append(h)
            decay, drive = _coefficients(u, delta, A, B, starts, t, Q)
            states = _run_recurrence(decay, drive, h, starts, t)
            grouped = states.unflatten(3, (B.shape[1], -1))
            y[t : t + Q] = torch.einsum("tkbgpn,bgrnt->tkbgrp", grouped, _group_queries(C, B, t, Q))
            h = states[-1].clone()  # a view would keep all states of the chunk
        ctx.save_for_backward(u, delta, A, B, C, starts, *chunk_states)
        ctx.chunk = Q
        return y.permute(1, 2, 3, 4, 5, 0).contiguous(), h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        # autocast belongs to the thread that calls backward(), not to the graph
        with without_autocast(dy.device.type):
            return ChunkedScan.gradients(ctx, dy, dh)

    @staticmethod
    def gradients(ctx: FunctionCtx, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, starts, *chunk_states = ctx.saved_tensors
        L, Q, G = u.shape[-1], ctx.chunk, B.shape[1]
        du, ddelta, dA = torch.empty_like(u), torch.empty_like(delta), torch.zeros_like(A)
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        dh = dh.clone()
        dy = dy.permute(5, 0, 1, 2, 3, 4)
        for t, h in reversed(list(zip(range(0, L, Q), chunk_states, strict=True))):
            s = slice(t, t + Q)
            decay, drive = _coefficients(u, delta, A, B, starts, t, Q)
            states = _run_recurrence(decay, drive, h, starts, t)
            grouped = states.unflatten(3, (G, -1))
            dC[..., s] = torch.einsum("tkbgrp,tkbgpn->bgrnt", dy[s], grouped).flatten(1, 2)
            g = torch.einsum("tkbgrp,bgrnt->tkbgpn", dy[s], _group_queries(C, B, t, Q)).flatten(3, 4).contiguous()
            for i in reversed(range(len(g))):  # g becomes the gradient of each state, with later states' share
                g[i] += dh
                dh = _reset_at_starts(g[i] * decay[i], starts, t + i)
            previous = torch.cat([h[None], states[:-1]])
            dexponent = (g * previous).sum(1) * decay[:, 0]  # gradient of delta A, [Q, batch, D, N]
            if starts is not None:
                dexponent = dexponent.masked_fill(starts[:, s].T[..., None, None], 0)
            d = delta[..., s].permute(2, 0, 1)  # [Q, batch, D]
            dA += torch.einsum("tbdn,tbd->dn", dexponent, d)
            g = g.unflatten(3, (G, -1))
            ddrive = torch.einsum("tkbgpn,bgnt->tkbgp", g, B[..., s]).flatten(3, 4)  # gradient of delta u
            v = u[..., s].permute(3, 0, 1, 2)
            du[..., s] = (ddrive * d[:, None]).permute(1, 2, 3, 0)
            ddelta[..., s] = (torch.einsum("tbdn,dn->tbd", dexponent, A) + (ddrive * v).sum(1)).permute(1, 2, 0)
            dB[..., s] = torch.einsum("tkbgpn,tkbgp->bgnt", g, (v * d[:, None]).unflatten(3, (G, -1)))
        return du, ddelta, dA, dB, dC, dh, None


def _coefficients(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, starts: Tensor | None, t: int, Q: int
) -> tuple[Tensor, Tensor]:
    """Return decay [Q, 1, batch, D, N] and drive [Q, K, batch, D, N] of the steps t .. t + Q."""
    s = slice(t, t + Q)
    d = delta[..., s].permute(2, 0, 1)
    log_decay = d[..., None] * A
    if starts is not None:  # the states before such a step are set to 0
        log_decay = log_decay.masked_fill(starts[:, s].T[..., None, None], 0)
    x = (u[..., s].permute(3, 0, 1, 2) * d[:, None]).unflatten(3, (B.shape[1], -1))
    drive = (x[..., None] * B[..., s].permute(3, 0, 1, 2)[:, None, :, :, None]).flatten(3, 4)
    return torch.exp(log_decay)[:, None], drive


def _run_recurrence(decay: Tensor, drive: Tensor, h: Tensor, starts: Tensor | None, t: int) -> Tensor:
    """Run the recurrence from step t on; the states overwrite `drive`."""
    for i in range(len(drive)):
        drive[i].addcmul_(decay[i], _reset_at_starts(h, starts, t + i))
        h = drive[i]
    return drive


def _reset_at_starts(h: Tensor, starts: Tensor | None, t: int) -> Tensor:
    """Set states or their gradients [K, batch, D, N] to 0 where a document starts at step t, also NaN ones."""
    return h if starts is None else h.masked_fill(starts[:, t, None, None], 0)


def _group_queries(C: Tensor, B: Tensor, t: int, Q: int) -> Tensor:
    """Return C of the steps t .. t + Q as [batch, G, R, N, Q]."""
    return C[..., t : t + Q].unflatten(1, (B.shape[1], -1))


def selective_scan_chunked(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Compute selective_scan_reference in chunks."""
    u, G = stack_inputs(u, len(h)), B.shape[1]
    if u[..., 0].numel() * A.shape[1] * MAX_CHUNK <= CHUNK_ELEMENTS:
        y, h = ChunkedScan.apply(u, delta, A, B, C, h, starts)
        return y.flatten(2, 4).unbind(0), h
    # the layer is too wide for a chunk of that many steps: one batch entry and one group after another
    P, R, parts = u.shape[2] // G, C.shape[1] // G, []
    for b in range(u.shape[1]):
        entry = slice(b, b + 1)
        starts_b = None if starts is None else starts[entry]
        for g in range(G):
            d, r, group = slice(g * P, (g + 1) * P), slice(g * R, (g + 1) * R), slice(g, g + 1)
            part = u[:, entry, d], delta[entry, d], A[d], B[entry, group], C[entry, r], h[:, entry, d], starts_b
            parts.append(ChunkedScan.apply(*part))
    rows = [parts[b * G : (b + 1) * G] for b in range(u.shape[1])]
    y = torch.cat([torch.cat([y.flatten(2, 4) for y, _ in row], 2) for row in rows], 1)
    return y.unbind(0), torch.cat([torch.cat([h for _, h in row], 2) for row in rows], 1)
