"""The chunk scan on a GPU, in Triton. Derivation, bytes and operations: README.md.

Four kernels: `carry` walks over the chunks and leaves the state at each (backward: its gradient, in reverse), the others take
all chunks at once. What has to be added up over blocks goes to a slice of its own and is summed afterwards: no atomics, one order.

Q steps of a chunk · N state · P channel · r reading · F log of the decay since the chunk's start, as a sum of two float32
into: state to t · out: t to the chunk's end · keep: state to the chunk's end; all three -1 where a document starts between

A value that is not finite reaches the outputs that it reaches in the reference, as infinity or NaN; the gradients of all of its chunk.
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # in a try: transformers then lets a machine without Triton load an export that this file travels with
    raise

from kernels.chunk_scan.products import running_sums
from kernels.autotune import bucket, on_device_of, tuned

WHOLE = 16  # columns: rows that start at whole vectors need half the registers
MOST_STEPS = 64  # of a chunk; times the numbers of a row, all heads of a step, it is counted in 32 bits
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _dot(a, b):
    """In the dtype of the inputs, bfloat16 or float32, with sums in float32. NVIDIA's matrix units take float32 as three TF32."""
    if INTERPRETED:  # the interpreter takes the bits of bfloat16 for whole numbers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee", out_dtype=tl.float32)
    if tl.target_info.is_cuda():
        return tl.dot(a, b, input_precision="tf32x3", out_dtype=tl.float32)
    return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def _tile(base, rows, columns, row_stride, real_rows, real_columns):
    """base[rows, columns], 0 outside. Within a tile 32 bits are enough; `base` is beyond them."""
    return _rows(base, rows, columns, row_stride, rows < real_rows, real_columns)


@triton.jit
def _rows(base, rows, columns, row_stride, read, real_columns):
    """Those rows that are to be read, 0 in the others."""
    inside = read[:, None] & (columns < real_columns)[None, :]
    return tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, rows, columns, row_stride, real_rows, real_columns, values):
    inside = (rows < real_rows)[:, None] & (columns < real_columns)[None, :]
    tl.store(base + rows[:, None] * row_stride + columns[None, :], values, mask=inside)


@triton.jit
def _through(decay, values, DOCUMENTS: tl.constexpr):
    """decay values; nothing where a document starts between (decay < 0), not even a NaN."""
    return tl.where(decay < 0, 0.0, decay * values) if DOCUMENTS else decay * values


@triton.jit
def _decays(high, low, ids, q, DOCUMENTS: tl.constexpr):
    """exp(F_t - F_s) [t, s], and whether t sees s: not where s > t, or in another document."""
    fall = (tl.load(high + q)[:, None] - tl.load(high + q)[None, :]) + (tl.load(low + q)[:, None] - tl.load(low + q)[None, :])
    seen = q[:, None] >= q[None, :]
    if DOCUMENTS:
        seen = seen & (tl.load(ids + q)[:, None] == tl.load(ids + q)[None, :])
    return tl.exp(tl.where(seen, fall, -float("inf"))), seen


@triton.jit
def _scores(a, a_stride, b, b_stride, q, rows, size, Q: tl.constexpr, BLOCK: tl.constexpr):
    """a b^T [Q, Q], of two [rows, size]."""
    scores = tl.zeros((Q, Q), tl.float32)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        scores += _dot(_tile(a, q, columns, a_stride, rows, size), tl.trans(_tile(b, q, columns, b_stride, rows, size)))
    return scores


@tuned((8, 2), (8, 3), key=["N", "P", "R", "REVERSE", "DOCUMENTS", "lengths"])
@triton.jit
def carry_kernel(
    left, right, scale, keep, first, states, last, L, H, N, P, chunks, lengths,
    R: tl.constexpr, REVERSE: tl.constexpr, DOCUMENTS: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """state <- keep state + sum_r left_r^T (scale right_r), chunk after chunk, and what it was before each.

    left [batch, L, H, R, N]; right [batch, L, H, R, P]; scale [batch, H, chunks Q]; keep [batch, H, chunks];
    first, last [batch, H, N, P]; states [batch, H, chunks, N, P], in the dtype of left."""
    head, n0, p0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N, tl.program_id(2) * BLOCK_P
    b, h = head // H, head % H
    q, n, p = tl.arange(0, Q), n0 + tl.arange(0, BLOCK_N), p0 + tl.arange(0, BLOCK_P)
    state = _tile(first + head * N * P, n, p, P, N, P)
    for i in range(chunks):
        c = chunks - 1 - i if REVERSE else i
        _store(states + (head * chunks + c) * N * P, n, p, P, N, P, state)
        rows, row = L - c * Q, (b * L + c * Q) * H + h
        scale_Q, read = tl.load(scale + (head * chunks + c) * Q + q), q < rows
        if DOCUMENTS:
            read = read & (scale_Q >= 0)
        state = _through(tl.load(keep + head * chunks + c), state, DOCUMENTS)
        for r in tl.range(0, R, num_stages=1):
            left_QN = _rows(left + (row * R + r) * N, q, n, H * R * N, read, N)
            right_QP = _rows(right + (row * R + r) * P, q, p, H * R * P, read, P)
            state += _dot(tl.trans(left_QN), (right_QP * scale_Q[:, None]).to(left_QN.dtype))
    _store(last + head * N * P, n, p, P, N, P, state)


@tuned((8, 2), key=["N", "P", "R", "DOCUMENTS", "lengths"])
@triton.jit
def outputs_kernel(
    x, B, C, high, low, ids, into, states, y, L, H, N, P, chunks, lengths,
    R: tl.constexpr, DOCUMENTS: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y [batch, L, H, R, P] of x [batch, L, H, P], B [batch, L, H, N], C [batch, L, H, R, N] and the states before each chunk."""
    head, c, p0 = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BLOCK_P
    b, h = head // H, head % H
    q, p = tl.arange(0, Q), p0 + tl.arange(0, BLOCK_P)
    rows, row, step = L - c * Q, (b * L + c * Q) * H + h, (head * chunks + c) * Q
    decay_QQ, seen = _decays(high + step, low + step, ids + (b * chunks + c) * Q, q, DOCUMENTS)
    decay_QQ = tl.where(seen, decay_QQ, -1.0)
    x_QP = _tile(x + row * P, q, p, H * P, rows, P)
    finite = tl.abs(x_QP.to(tl.float32)) < float("inf")
    odd, x_QP = tl.sum(tl.sum(tl.where(finite, 0, 1), 1), 0), tl.where(finite, x_QP, 0.0).to(x_QP.dtype)
    into_Q = tl.load(into + step + q)
    for r in tl.range(0, R, num_stages=1):
        y_QP, scores_QQ = tl.zeros((Q, BLOCK_P), tl.float32), tl.zeros((Q, Q), tl.float32)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            C_QN = _tile(C + (row * R + r) * N, q, n, H * R * N, rows, N)
            scores_QQ += _dot(C_QN, tl.trans(_tile(B + row * N, q, n, H * N, rows, N)))
            y_QP += _dot(C_QN, _tile(states + (head * chunks + c) * N * P, n, p, P, N, P))
        y_QP = _through(into_Q[:, None], y_QP, DOCUMENTS) + _dot(_through(decay_QQ, scores_QQ, True).to(x_QP.dtype), x_QP)
        if odd > 0:  # a value that is not finite reaches the steps that see it, in its channel
            again = _tile(x + row * P, q, p, H * P, rows, P).to(tl.float32)
            reached = _dot(
                tl.where(decay_QQ < 0, 0.0, 1.0).to(tl.bfloat16), tl.where(tl.abs(again) < float("inf"), 0.0, 1.0).to(tl.bfloat16)
            )
            y_QP = tl.where(reached > 0, float("nan"), y_QP)
        _store(y + (row * R + r) * P, q, p, H * R * P, rows, P, y_QP)


@tuned((8, 1), key=["N", "P", "R", "DOCUMENTS", "lengths"])
@triton.jit
def values_gradient_kernel(
    x, B, C, dy, high, low, ids, out, keep, states, dstates, dx, dlog, L, H, N, P, chunks, lengths,
    R: tl.constexpr, DOCUMENTS: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx, and this block's share of dlog, the gradient of log_decay [blocks of P, batch, H, chunks Q]; dstates: gradients of the
    states after each chunk. A step's decay is in every exp(F_t - F_s) with s before it and t not: their sum, not a difference of
    two over all t and all s, which would lose the digits of a strong decay."""
    head, c, p0 = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BLOCK_P
    b, h = head // H, head % H
    q, p = tl.arange(0, Q), p0 + tl.arange(0, BLOCK_P)
    rows, row, step, state = L - c * Q, (b * L + c * Q) * H + h, (head * chunks + c) * Q, (head * chunks + c) * N * P
    slice_P = tl.program_id(2) * tl.num_programs(0).to(tl.int64) * chunks
    x_QP = _tile(x + row * P, q, p, H * P, rows, P)
    dx_QP, carried_P = tl.zeros((Q, BLOCK_P), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        dS_NP = _tile(dstates + state, n, p, P, N, P)
        dx_QP += _dot(_tile(B + row * N, q, n, H * N, rows, N), dS_NP)
        carried_P += tl.sum(dS_NP.to(tl.float32) * _tile(states + state, n, p, P, N, P).to(tl.float32), 0)
    dx_QP *= tl.maximum(tl.load(out + step + q), 0.0)[:, None]
    through_Q = tl.sum(x_QP.to(tl.float32) * dx_QP, 1)
    after = q[:, None] > q[None, :]
    E_QQ = tl.zeros((Q, Q), tl.float32)
    decay_QQ, _ = _decays(high + step, low + step, ids + (b * chunks + c) * Q, q, DOCUMENTS)
    for r in tl.range(0, R, num_stages=1):
        G_QQ = _scores(C + (row * R + r) * N, H * R * N, B + row * N, H * N, q, rows, N, Q, BLOCK_N) * decay_QQ
        dy_QP = _tile(dy + (row * R + r) * P, q, p, H * R * P, rows, P)
        dx_QP += _dot(tl.trans(G_QQ).to(dy_QP.dtype), dy_QP)
        E_QQ += G_QQ * _dot(dy_QP, tl.trans(x_QP))
    _store(dx + row * P, q, p, H * P, rows, P, dx_QP)
    dlog_Q = tl.sum(tl.where(after, tl.cumsum(E_QQ, 0, reverse=True) + through_Q[None, :], 0.0), 1)
    tl.store(dlog + slice_P * Q + step + q, dlog_Q + tl.maximum(tl.load(keep + head * chunks + c), 0.0) * tl.sum(carried_P, 0))


@tuned((8, 1), key=["N", "P", "R", "DOCUMENTS", "lengths"])
@triton.jit
def keys_gradient_kernel(
    x, B, C, dy, high, low, ids, into, out, states, dstates, dB, dC, dlog, L, H, N, P, chunks, lengths,
    R: tl.constexpr, DOCUMENTS: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dB, dC, and this block's share of dlog [blocks of N, batch, H, chunks Q]."""
    head, c, n0 = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BLOCK_N
    b, h = head // H, head % H
    q, n = tl.arange(0, Q), n0 + tl.arange(0, BLOCK_N)
    rows, row, step, state = L - c * Q, (b * L + c * Q) * H + h, (head * chunks + c) * Q, (head * chunks + c) * N * P
    into_Q, out_Q = tl.maximum(tl.load(into + step + q), 0.0), tl.maximum(tl.load(out + step + q), 0.0)
    B_QN = _tile(B + row * N, q, n, H * N, rows, N)
    dB_QN = tl.zeros((Q, BLOCK_N), tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        dB_QN += _dot(_tile(x + row * P, q, p, H * P, rows, P), tl.trans(_tile(dstates + state, n, p, P, N, P)))
    dB_QN *= out_Q[:, None]
    decay_QQ, _ = _decays(high + step, low + step, ids + (b * chunks + c) * Q, q, DOCUMENTS)
    of_into_Q = tl.zeros((Q,), tl.float32)
    for r in tl.range(0, R, num_stages=1):
        dC_QN = tl.zeros((Q, BLOCK_N), tl.float32)
        for p0 in range(0, P, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            dC_QN += _dot(_tile(dy + (row * R + r) * P, q, p, H * R * P, rows, P), tl.trans(_tile(states + state, n, p, P, N, P)))
        dC_QN *= into_Q[:, None]
        C_QN = _tile(C + (row * R + r) * N, q, n, H * R * N, rows, N)
        of_into_Q += tl.sum(C_QN.to(tl.float32) * dC_QN, 1)
        H_QQ = (_scores(dy + (row * R + r) * P, H * R * P, x + row * P, H * P, q, rows, P, Q, BLOCK_P) * decay_QQ).to(B_QN.dtype)
        dC_QN += _dot(H_QQ, B_QN)
        dB_QN += _dot(tl.trans(H_QQ), C_QN)
        _store(dC + (row * R + r) * N, q, n, H * R * N, rows, N, dC_QN)
    _store(dB + row * N, q, n, H * N, rows, N, dB_QN)
    slice_N = tl.program_id(2) * tl.num_programs(0).to(tl.int64) * chunks
    tl.store(dlog + slice_N * Q + step + q, tl.cumsum(of_into_Q, 0, reverse=True))


class _Chunks(NamedTuple):
    """What the decays say of every step [batch, H, chunks Q] and chunk; float32. ids [batch, chunks Q]."""

    high: Tensor
    low: Tensor
    ids: Tensor
    into: Tensor
    out: Tensor
    keep: Tensor  # [batch, H, chunks]


def _chunks(log_decay: Tensor, document_ids: Tensor | None, Q: int) -> _Chunks:
    extra = -log_decay.shape[1] % Q
    log_decay = F.pad(log_decay.mT, (0, extra)).unflatten(2, (-1, Q))  # [batch, H, chunks, Q]
    finite = log_decay.isfinite()  # one that is not is NaN at its step alone: in the sum it would reach the chunk's other documents
    fall = running_sums(log_decay.masked_fill(~finite, 0).double()) + (log_decay - log_decay)
    into, out = fall.exp(), (fall[..., -1:] - fall).exp()
    keep = into[..., -1]
    if document_ids is None:
        ids = log_decay.new_zeros(1, dtype=torch.int32)
    else:
        ids = F.pad(document_ids.double(), (0, extra), mode="replicate").int().unflatten(1, (-1, Q))[:, None]
        before = torch.cat([ids[:, :, :1, 0], ids[:, :, :-1, -1]], 2)
        into, out = into.masked_fill(ids != before[..., None], -1), out.masked_fill(ids != ids[..., -1:], -1)
        keep = keep.masked_fill(ids[..., -1] != before, -1)
    high = fall.float()
    return _Chunks(*(t.contiguous() for t in (high, (fall - high).float(), ids, into.float(), out.float(), keep.float())))


def _blocks(L: int, N: int, P: int, dtype: torch.dtype) -> dict[str, int]:
    """Steps, states and channels at a time: what fits in registers (audit.py). A product takes 16 at least."""
    most = (32, 32, 16) if dtype == torch.float32 else (64, 64, 32)
    return {
        name: min(m, max(16, triton.next_power_of_2(n))) for name, n, m in zip(("Q", "BLOCK_N", "BLOCK_P"), (L, N, P), most, strict=True)
    }


class FusedScan(torch.autograd.Function):
    """(x, log_decay, B, C, S, document_ids) -> (y, last S), both float32"""

    @staticmethod
    def forward(ctx, x, log_decay, B, C, S, document_ids):
        batch, L, H, P = x.shape
        N, R, blocks = B.shape[3], C.shape[3], _blocks(L, B.shape[3], P, x.dtype)
        x, B, C, S = (t.contiguous() for t in (x, B, C, S))
        of = _chunks(log_decay, document_ids, blocks["Q"])
        chunks, blocks_n, blocks_p = of.keep.shape[2], triton.cdiv(N, blocks["BLOCK_N"]), triton.cdiv(P, blocks["BLOCK_P"])
        states, last = B.new_empty(batch, H, chunks, N, P), torch.empty_like(S)
        y = S.new_empty(*C.shape[:4], P)
        sizes = L, H, N, P, chunks, bucket(L)
        carry_kernel[(batch * H, blocks_n, blocks_p)](
            B, x, of.out, of.keep, S, states, last, *sizes, R=1, REVERSE=False, DOCUMENTS=document_ids is not None, **blocks
        )
        outputs_kernel[(batch * H, chunks, blocks_p)](
            x, B, C, of.high, of.low, of.ids, of.into, states, y, *sizes, R=R, DOCUMENTS=document_ids is not None, **blocks
        )
        ctx.save_for_backward(x, B, C, states, document_ids, log_decay)
        ctx.blocks = blocks
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dS):
        x, B, C, states, document_ids, log_decay = ctx.saved_tensors
        batch, L, H, P = x.shape
        N, R, Q = B.shape[3], C.shape[3], ctx.blocks["Q"]
        dy, dS = dy.to(x.dtype).contiguous(), dS.contiguous()
        of = _chunks(log_decay, document_ids, Q)
        chunks, blocks_n, blocks_p = of.keep.shape[2], triton.cdiv(N, ctx.blocks["BLOCK_N"]), triton.cdiv(P, ctx.blocks["BLOCK_P"])
        dstates, dS_first = torch.empty_like(states), torch.empty_like(dS)
        dx, dB, dC = (torch.empty_like(t) for t in (x, B, C))
        dlog_values, dlog_keys = (dS.new_empty(n, batch, H, chunks * Q) for n in (blocks_p, blocks_n))
        sizes, options = (L, H, N, P, chunks, bucket(L)), dict(R=R, DOCUMENTS=document_ids is not None, **ctx.blocks)
        carry_kernel[(batch * H, blocks_n, blocks_p)](C, dy, of.into, of.keep, dS, dstates, dS_first, *sizes, REVERSE=True, **options)
        within = x, B, C, dy, of.high, of.low, of.ids
        values = *within, of.out, of.keep, states, dstates, dx, dlog_values
        values_gradient_kernel[(batch * H, chunks, blocks_p)](*values, *sizes, **options)
        keys_gradient_kernel[(batch * H, chunks, blocks_n)](*within, of.into, of.out, states, dstates, dB, dC, dlog_keys, *sizes, **options)
        dlog_decay = (dlog_values.sum(0) + dlog_keys.sum(0))[..., :L].mT
        return dx, dlog_decay.to(log_decay.dtype), dB, dC, dS_first, None


def chunk_scan_triton(x, log_decay, B, C, S, document_ids=None) -> tuple[Tensor, Tensor]:
    """As chunk_scan_reference; x, B and C float32 or bfloat16, the rest float32. N and P are filled up with zeros to whole vectors."""
    P, N = x.shape[-1], B.shape[-1]
    if MOST_STEPS * C.shape[2] * C.shape[3] * (max(P, N) + WHOLE) >= 1 << 31:
        raise ValueError(
            f"impl='triton' takes rows of at most {(1 << 31) // MOST_STEPS} numbers; got H {C.shape[2]}, R {C.shape[3]}, P {P}, N {N}."
        )
    x, B, C = (F.pad(t, (0, -t.shape[-1] % WHOLE)) for t in (x, B, C))
    S = F.pad(S, (0, -P % WHOLE, 0, -N % WHOLE))
    with on_device_of(x):
        y, S = FusedScan.apply(x, log_decay, B, C, S, document_ids)
    return y[..., :P], S[..., :N, :P]
