"""The Triton kernels of the chunk scan; fused.py launches them, README.md derives them and counts bytes and operations.

There are four: `carry_kernel` walks over the chunks and leaves the state at each (backward: its gradient, in reverse);
the others take all chunks at once. Partial sums over blocks, and over some of the heads of a group, go to slices of
their own and are added up afterwards: no atomics, and one order.

B has a group g for per_B heads, C one for per_C heads (1 where there are R > 1 queries).

Q steps of a chunk · N state · P channel · r query · F log of the decay since the chunk's start, as a sum of two float32
decay_in: from the state that enters to t · decay_out: from t to the chunk's end · chunk_decay: from end to end; all
three are -1 where a document starts between

A value that is not finite reaches the outputs that it reaches in the reference, as infinity or NaN; among the
gradients, it reaches those of all of its chunk.
"""

import os

try:
    import triton
    import triton.language as tl
except ImportError:  # in a try block, so that transformers loads an exported copy on a machine without Triton
    raise

from kernels.autotune import autotuned

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b):
    """Multiply matrices of bfloat16 or float32 with sums in float32; NVIDIA's units take float32 as three TF32."""
    if INTERPRETED:  # the interpreter reads the bits of bfloat16 as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee", out_dtype=tl.float32)
    if tl.target_info.is_cuda():
        return tl.dot(a, b, input_precision="tf32x3", out_dtype=tl.float32)
    return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def _load(base, rows, columns, row_stride, row_count, column_count):
    """Load base[rows, columns], with 0 outside. Offsets in a tile fit in 32 bits; `base` is a 64-bit address."""
    return _load_rows(base, rows, columns, row_stride, rows < row_count, column_count)


@triton.jit
def _load_rows(base, rows, columns, row_stride, row_mask, column_count):
    """Load the rows that the mask selects, with 0 in the others."""
    mask = row_mask[:, None] & (columns < column_count)[None, :]
    return tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, rows, columns, row_stride, row_count, column_count, values):
    mask = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    tl.store(base + rows[:, None] * row_stride + columns[None, :], values, mask=mask)


@triton.jit
def _decayed(decay, values, DOCUMENTS: tl.constexpr):
    """Multiply by a decay; where a document starts between (decay < 0) the result is 0, also for a NaN."""
    return tl.where(decay < 0, 0.0, decay * values) if DOCUMENTS else decay * values


@triton.jit
def _decays(high, low, ids, q, DOCUMENTS: tl.constexpr):
    """Return exp(F_t - F_s) [t, s], and the mask of what t sees: no s > t, and no other document."""
    log_decay = tl.load(high + q)[:, None] - tl.load(high + q)[None, :]
    log_decay = log_decay + (tl.load(low + q)[:, None] - tl.load(low + q)[None, :])
    mask = q[:, None] >= q[None, :]
    if DOCUMENTS:
        mask = mask & (tl.load(ids + q)[:, None] == tl.load(ids + q)[None, :])
    return tl.exp(tl.where(mask, log_decay, -float("inf"))), mask


@triton.jit
def _scores(a, a_stride, b, b_stride, q, rows, size, Q: tl.constexpr, BLOCK: tl.constexpr):
    """Return a b^T [Q, Q] of two matrices [rows, size]."""
    scores = tl.zeros((Q, Q), tl.float32)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        a_block = _load(a, q, columns, a_stride, rows, size)
        scores += dot(a_block, tl.trans(_load(b, q, columns, b_stride, rows, size)))
    return scores


@autotuned((8, 2), (8, 3), key=["N", "P", "R", "REVERSE", "DOCUMENTS", "length_bucket"])
@triton.jit
def carry_kernel(
    left, right, scale, chunk_decay, first, states, last, L, H, per_left, N, P, chunks, length_bucket,
    R: tl.constexpr, REVERSE: tl.constexpr, DOCUMENTS: tl.constexpr,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Run state <- chunk_decay state + sum_r left_r^T (scale right_r) over the chunks, and store the state before each.

    left [batch, L, H // per_left, R, N]; right [batch, L, H, R, P]; scale [batch, H, chunks Q];
    chunk_decay [batch, H, chunks]; first, last [batch, H, N, P]; states [batch, H, chunks, N, P], in the dtype of left.
    """
    head, n0, p0 = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_N, tl.program_id(2) * BLOCK_P
    b, h = head // H, head % H
    q, n, p = tl.arange(0, Q), n0 + tl.arange(0, BLOCK_N), p0 + tl.arange(0, BLOCK_P)
    state = _load(first + head * N * P, n, p, P, N, P)
    groups = H // per_left
    for i in range(chunks):
        c = chunks - 1 - i if REVERSE else i
        _store(states + (head * chunks + c) * N * P, n, p, P, N, P, state)
        row_count, step = L - c * Q, b * L + c * Q
        row_left, row = step * groups + h // per_left, step * H + h
        scale_Q, row_mask = tl.load(scale + (head * chunks + c) * Q + q), q < row_count
        if DOCUMENTS:
            row_mask = row_mask & (scale_Q >= 0)
        state = _decayed(tl.load(chunk_decay + head * chunks + c), state, DOCUMENTS)
        for r in tl.range(0, R, num_stages=1):
            left_QN = _load_rows(left + (row_left * R + r) * N, q, n, groups * R * N, row_mask, N)
            right_QP = _load_rows(right + (row * R + r) * P, q, p, H * R * P, row_mask, P)
            state += dot(tl.trans(left_QN), (right_QP * scale_Q[:, None]).to(left_QN.dtype))
    _store(last + head * N * P, n, p, P, N, P, state)


@autotuned((8, 2), key=["N", "P", "R", "DOCUMENTS", "length_bucket"])
@triton.jit
def outputs_kernel(
    x, B, C, high, low, ids, decay_in, states, y, L, H, per_B, per_C, N, P, chunks, length_bucket,
    R: tl.constexpr, DOCUMENTS: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Compute y [batch, L, H, R, P] from x, B, C and the states before each chunk.

    x [batch, L, H, P]; B [batch, L, H // per_B, N]; C [batch, L, H // per_C, R, N].
    """
    head, c, p0 = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BLOCK_P
    b, h = head // H, head % H
    q, p = tl.arange(0, Q), p0 + tl.arange(0, BLOCK_P)
    row_count, row, step = L - c * Q, (b * L + c * Q) * H + h, (head * chunks + c) * Q
    row_B, stride_B = row // per_B, H // per_B * N
    row_C, stride_C = row // per_C * R, H // per_C * R * N
    decay_QQ, mask_QQ = _decays(high + step, low + step, ids + (b * chunks + c) * Q, q, DOCUMENTS)
    decay_QQ = tl.where(mask_QQ, decay_QQ, -1.0)
    x_QP = _load(x + row * P, q, p, H * P, row_count, P)
    finite = tl.abs(x_QP.to(tl.float32)) < float("inf")
    non_finite, x_QP = tl.sum(tl.sum(tl.where(finite, 0, 1), 1), 0), tl.where(finite, x_QP, 0.0).to(x_QP.dtype)
    decay_in_Q = tl.load(decay_in + step + q)
    for r in tl.range(0, R, num_stages=1):
        y_QP, scores_QQ = tl.zeros((Q, BLOCK_P), tl.float32), tl.zeros((Q, Q), tl.float32)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            C_QN = _load(C + (row_C + r) * N, q, n, stride_C, row_count, N)
            scores_QQ += dot(C_QN, tl.trans(_load(B + row_B * N, q, n, stride_B, row_count, N)))
            y_QP += dot(C_QN, _load(states + (head * chunks + c) * N * P, n, p, P, N, P))
        y_QP = _decayed(decay_in_Q[:, None], y_QP, DOCUMENTS)
        y_QP = y_QP + dot(_decayed(decay_QQ, scores_QQ, True).to(x_QP.dtype), x_QP)
        if non_finite > 0:  # a value that is not finite reaches the steps that see it, in its channel
            unmasked_QP = _load(x + row * P, q, p, H * P, row_count, P).to(tl.float32)
            sees_QQ = tl.where(decay_QQ < 0, 0.0, 1.0).to(tl.bfloat16)
            reached = dot(sees_QQ, tl.where(tl.abs(unmasked_QP) < float("inf"), 0.0, 1.0).to(tl.bfloat16))
            y_QP = tl.where(reached > 0, float("nan"), y_QP)
        _store(y + (row * R + r) * P, q, p, H * R * P, row_count, P, y_QP)


@autotuned((8, 1), key=["N", "P", "R", "DOCUMENTS", "length_bucket"])
@triton.jit
def values_gradient_kernel(
    x, B, C, dy, high, low, ids, decay_out, chunk_decay, states, dstates, dx, dlog,
    L, H, per_B, per_C, N, P, chunks, length_bucket,
    R: tl.constexpr, DOCUMENTS: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Compute dx, and this block's share of dlog [blocks of P, batch, H, chunks Q], the gradient of log_decay.

    dstates are the gradients of the states after each chunk. The decay of a step is in every exp(F_t - F_s) with s
    before the step and t not. The gradients of these pairs are added up as they are: a difference of a sum over all t
    and one over all s would lose the digits of a strong decay.
    """
    head, c, p0 = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BLOCK_P
    b, h = head // H, head % H
    q, p = tl.arange(0, Q), p0 + tl.arange(0, BLOCK_P)
    row_count, row = L - c * Q, (b * L + c * Q) * H + h
    row_B, stride_B = row // per_B, H // per_B * N
    row_C, stride_C = row // per_C * R, H // per_C * R * N
    step, state = (head * chunks + c) * Q, (head * chunks + c) * N * P
    slice_P = tl.program_id(2) * tl.num_programs(0).to(tl.int64) * chunks
    x_QP = _load(x + row * P, q, p, H * P, row_count, P)
    dx_QP, dchunk_decay_P = tl.zeros((Q, BLOCK_P), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        dS_NP = _load(dstates + state, n, p, P, N, P)
        dx_QP += dot(_load(B + row_B * N, q, n, stride_B, row_count, N), dS_NP)
        dchunk_decay_P += tl.sum(dS_NP.to(tl.float32) * _load(states + state, n, p, P, N, P).to(tl.float32), 0)
    dx_QP *= tl.maximum(tl.load(decay_out + step + q), 0.0)[:, None]
    dlog_out_Q = tl.sum(x_QP.to(tl.float32) * dx_QP, 1)
    later_QQ = q[:, None] > q[None, :]
    E_QQ = tl.zeros((Q, Q), tl.float32)
    decay_QQ, _ = _decays(high + step, low + step, ids + (b * chunks + c) * Q, q, DOCUMENTS)
    for r in tl.range(0, R, num_stages=1):
        G_QQ = _scores(C + (row_C + r) * N, stride_C, B + row_B * N, stride_B, q, row_count, N, Q, BLOCK_N) * decay_QQ
        dy_QP = _load(dy + (row * R + r) * P, q, p, H * R * P, row_count, P)
        dx_QP += dot(tl.trans(G_QQ).to(dy_QP.dtype), dy_QP)
        E_QQ += G_QQ * dot(dy_QP, tl.trans(x_QP))
    _store(dx + row * P, q, p, H * P, row_count, P, dx_QP)
    dlog_Q = tl.sum(tl.where(later_QQ, tl.cumsum(E_QQ, 0, reverse=True) + dlog_out_Q[None, :], 0.0), 1)
    tl.store(
        dlog + slice_P * Q + step + q,
        dlog_Q + tl.maximum(tl.load(chunk_decay + head * chunks + c), 0.0) * tl.sum(dchunk_decay_P, 0),
    )


@autotuned((8, 1), key=["N", "P", "R", "DOCUMENTS", "SHARED", "length_bucket"])
@triton.jit
def keys_gradient_kernel(
    x, B, C, dy, high, low, ids, decay_in, decay_out, states, dstates, dB, dC, dlog,
    L, H, per_B, per_C, heads, N, P, chunks, length_bucket,
    R: tl.constexpr, DOCUMENTS: tl.constexpr, SHARED: tl.constexpr,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Compute dB, dC, and this block's share of dlog [blocks of N, batch, H, chunks Q], the gradient of log_decay.

    A program adds up the gradients of a slice of `heads` heads of a group of B: dB [slices, *B]. SHARED: these heads
    also share C, and dC is [slices, *C]; else each has its own, and dC is as C.
    """
    slices, G = tl.cdiv(per_B, heads), H // per_B
    pair, part, c = (tl.program_id(0) // slices).to(tl.int64), tl.program_id(0) % slices, tl.program_id(1)
    b, g, first = pair // G, pair % G, part * heads
    q, n = tl.arange(0, Q), tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_count, row_B, stride_B = L - c * Q, (b * L + c * Q) * G + g, G * N
    slice_B = part * (tl.num_programs(0) // slices).to(tl.int64) * L * N
    slice_N = tl.program_id(2) * (tl.num_programs(0) // (slices * G)).to(tl.int64) * H * chunks
    B_QN = _load(B + row_B * N, q, n, stride_B, row_count, N)
    dB_QN, dC_sum_QN = tl.zeros((Q, BLOCK_N), tl.float32), tl.zeros((Q, BLOCK_N), tl.float32)
    # without moving what is the same for all heads out of the loop, where it would take registers
    for i in tl.range(first, tl.minimum(first + heads, per_B), num_stages=1, disable_licm=True):
        h = g * per_B + i
        row, chunk = (b * L + c * Q) * H + h, (b * H + h) * chunks + c
        state = chunk * N * P
        decay_in_Q, decay_out_Q = (
            tl.maximum(tl.load(decay_in + chunk * Q + q), 0.0),
            tl.maximum(tl.load(decay_out + chunk * Q + q), 0.0),
        )
        dB_head_QN = tl.zeros((Q, BLOCK_N), tl.float32)
        for p0 in range(0, P, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            x_QP = _load(x + row * P, q, p, H * P, row_count, P)
            dB_head_QN += dot(x_QP, tl.trans(_load(dstates + state, n, p, P, N, P)))
        dB_QN += dB_head_QN * decay_out_Q[:, None]
        decay_QQ, _ = _decays(high + chunk * Q, low + chunk * Q, ids + (b * chunks + c) * Q, q, DOCUMENTS)
        dlog_in_Q = tl.zeros((Q,), tl.float32)
        for r in tl.range(0, R, num_stages=1):
            dC_QN = tl.zeros((Q, BLOCK_N), tl.float32)
            for p0 in range(0, P, BLOCK_P):
                p = p0 + tl.arange(0, BLOCK_P)
                dy_QP = _load(dy + (row * R + r) * P, q, p, H * R * P, row_count, P)
                dC_QN += dot(dy_QP, tl.trans(_load(states + state, n, p, P, N, P)))
            dC_QN *= decay_in_Q[:, None]
            C_r, stride_C = (row // per_C * R + r) * N, H // per_C * R * N
            C_QN = _load(C + C_r, q, n, stride_C, row_count, N)
            dlog_in_Q += tl.sum(C_QN.to(tl.float32) * dC_QN, 1)
            dy_r, stride_dy = dy + (row * R + r) * P, H * R * P
            H_QQ = _scores(dy_r, stride_dy, x + row * P, H * P, q, row_count, P, Q, BLOCK_P) * decay_QQ
            H_QQ = H_QQ.to(B_QN.dtype)
            dC_QN += dot(H_QQ, B_QN)
            dB_QN += dot(tl.trans(H_QQ), C_QN)
            if SHARED:
                dC_sum_QN += dC_QN
            else:
                _store(dC + C_r, q, n, stride_C, row_count, N, dC_QN)
        tl.store(dlog + (slice_N + chunk) * Q + q, tl.cumsum(dlog_in_Q, 0, reverse=True))
    _store(dB + slice_B + row_B * N, q, n, stride_B, row_count, N, dB_QN)
    if SHARED:
        _store(dC + slice_B + row_B * N, q, n, stride_B, row_count, N, dC_sum_QN)
