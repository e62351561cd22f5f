"""The Triton kernels of the scans over images; fused.py launches them, README.md derives them.

A program walks over the places of an image in the order of a direction, in chunks of steps, and then in that of the
next direction: it computes where its steps lie, and no copy of an image is made. What belongs to a place and not to a
direction (y and the gradient of x) is stored by the first direction, and the others add to it. Partial sums of other
programs go to slices of their own and are added up afterwards: no atomics, and one order.

Suffixes name the dimensions of a block: T time, N states; of the scan of low rank, Q places of a chunk, R rank, P
channels.
"""

try:
    import triton
    import triton.language as tl
except ImportError:  # in a try block, so that transformers loads an exported copy on a machine without Triton
    raise

from kernels.autotune import autotuned
from kernels.chunk_scan.fused_kernels import dot
from kernels.selective_scan.fused_kernels import LOG2E, combine


@triton.jit
def _places(t, k, H, W):
    """Return where the steps t of direction k lie in an image [H, W]; what steps outside of it get is not used."""
    forward = tl.where(k >= 2, H * W - 1 - t, t)
    return tl.where(k % 2 == 1, forward % H * W + forward // H, forward)


@triton.jit
def forward_kernel(
    x, delta, A, B, C, y, chunk_states, batch, D, H, W, N, length_bucket,
    TOGETHER: tl.constexpr, KEEP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Run TOGETHER directions of one channel and one block of states.

    All tensors are contiguous: x [batch, D, L]; delta [batch, 4, D, L]; A [4, D, N]; B, C [batch, 4, L, N]; y
    [4 / TOGETHER, blocks of N, batch, D, L]; with KEEP, chunk_states [batch, 4, D, chunks, N], the states before each
    chunk. L are the places of the image, row by row.
    """
    b, d = (tl.program_id(0) // D).to(tl.int64), (tl.program_id(0) % D).to(tl.int64)
    block, part = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    L, image = H * W, b * D + d
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    n_valid = n < N
    y += ((part * tl.num_programs(1) + block) * batch * D + image) * L
    for i in range(TOGETHER):
        k = part * TOGETHER + i
        A_N = tl.load(A + (k * D + d) * N + n, mask=n_valid, other=0.0)
        h_N = tl.zeros((BLOCK_N,), tl.float32)
        row = (b * 4 + k) * D + d  # of delta and of the states
        for chunk in range(tl.cdiv(L, BLOCK_T)):
            steps = tl.arange(0, BLOCK_T)
            t = chunk * BLOCK_T + steps
            place = _places(t, k, H, W)
            if KEEP:
                tl.store(chunk_states + (row * tl.cdiv(L, BLOCK_T) + chunk) * N + n, h_N, mask=n_valid)
            delta_T = tl.load(delta + row * L + place, mask=t < L, other=0.0)
            x_T = tl.load(x + image * L + place, mask=t < L, other=0.0)
            tile, mask_TN = place.to(tl.int64)[:, None] * N + n[None, :], (t < L)[:, None] & n_valid[None, :]
            B_TN = tl.load(B + (b * 4 + k) * L * N + tile, mask=mask_TN, other=0.0)
            C_TN = tl.load(C + (b * 4 + k) * L * N + tile, mask=mask_TN, other=0.0)
            a_TN = tl.exp2(delta_T[:, None] * (A_N * LOG2E)[None, :])
            decay_TN, h_TN = tl.associative_scan((a_TN, (delta_T * x_T)[:, None] * B_TN), 0, combine)
            h_TN += decay_TN * h_N[None, :]
            y_T = tl.load(y + place, mask=(t < L) & (i > 0), other=0.0)
            tl.store(y + place, y_T + tl.sum(h_TN * C_TN, 1), mask=t < L)
            # beyond L the decay is 1 and nothing is added
            h_N = tl.sum(tl.where((steps == BLOCK_T - 1)[:, None], h_TN, 0.0), 0)
        tl.debug_barrier()  # what this direction stored, other threads read in the next


@triton.jit
def backward_kernel(
    x, delta, A, B, C, chunk_states, dy, dh, dx, ddelta, dA, dB, dC, batch, D, H, W, N, length_bucket,
    TOGETHER: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of TOGETHER directions for a block of channels and a block of states.

    Beside the tensors of forward_kernel: dy [batch, D, L]; dx [4 / TOGETHER, blocks of N, batch, D, L]; ddelta
    [blocks of N, batch, 4, D, L]; dA [batch, 4, D, N]; dB, dC [blocks of D, batch, 4, L, N]; dh [batch, 4, D, N], at
    first 0: the gradient of the state. No other program touches its parts of dA and dh.
    """
    L, blocks_d = H * W, tl.cdiv(D, BLOCK_D)
    chunks = tl.cdiv(L, BLOCK_T)
    b, slice_d = (tl.program_id(0) // blocks_d).to(tl.int64), (tl.program_id(0) % blocks_d).to(tl.int64)
    block, part = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    n_valid = n < N
    dx += (part * tl.num_programs(1) + block) * batch * D * L
    ddelta += block * batch * 4 * D * L
    for i in range(TOGETHER):
        k = part * TOGETHER + i
        group = b * 4 + k
        for step_back in range(chunks):
            chunk = chunks - 1 - step_back
            steps = tl.arange(0, BLOCK_T)
            t = chunk * BLOCK_T + steps
            place, previous, following = _places(t, k, H, W), _places(t - 1, k, H, W), _places(t + 1, k, H, W)
            first, end = (steps == 0)[:, None], (steps == BLOCK_T - 1)[:, None]
            tile, mask_TN = place.to(tl.int64)[:, None] * N + n[None, :], (t < L)[:, None] & n_valid[None, :]
            B_TN = tl.load(B + group * L * N + tile, mask=mask_TN, other=0.0)
            C_TN = tl.load(C + group * L * N + tile, mask=mask_TN, other=0.0)
            has_previous = (steps > 0) & (t <= L)
            tile_before = previous.to(tl.int64)[:, None] * N + n[None, :]
            mask_before = has_previous[:, None] & n_valid[None, :]
            previous_B_TN = tl.load(B + group * L * N + tile_before, mask=mask_before, other=0.0)
            dB_TN, dC_TN = tl.zeros((BLOCK_T, BLOCK_N), tl.float32), tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            for d in range(slice_d * BLOCK_D, tl.minimum((slice_d + 1) * BLOCK_D, D)):
                image, row = b * D + d, group * D + d
                A_N = tl.load(A + (k * D + d) * N + n, mask=n_valid, other=0.0)
                h_N = tl.load(chunk_states + (row * chunks + chunk) * N + n, mask=n_valid, other=0.0)
                delta_T = tl.load(delta + row * L + place, mask=t < L, other=0.0)
                x_T = tl.load(x + image * L + place, mask=t < L, other=0.0)
                previous_delta_T = tl.load(delta + row * L + previous, mask=has_previous, other=0.0)
                previous_x_T = tl.load(x + image * L + previous, mask=has_previous, other=0.0)
                a_TN = tl.exp2(delta_T[:, None] * (A_N * LOG2E)[None, :])
                # a_t h_{t-1}, scanned as a_t (a_{t-1} h_{t-2} + x_{t-1} B_{t-1}): a state minus what its step added
                # would lose the digits of a strong decay
                added_TN = tl.where(first, h_N[None, :], (previous_delta_T * previous_x_T)[:, None] * previous_B_TN)
                _, decayed_TN = tl.associative_scan((a_TN, a_TN * added_TN), 0, combine)
                u_T = delta_T * x_T
                dy_T = tl.load(dy + image * L + place, mask=t < L, other=0.0)
                dC_TN += dy_T[:, None] * (decayed_TN + u_T[:, None] * B_TN)
                # what later steps add to a state's gradient comes back through the decay of the step after it
                next_delta_T = tl.load(delta + row * L + following, mask=t + 1 < L, other=0.0)
                next_a_TN = tl.where(end, 0.0, tl.exp2(next_delta_T[:, None] * (A_N * LOG2E)[None, :]))
                dh_N = tl.load(dh + row * N + n, mask=n_valid, other=0.0)
                tl.debug_barrier()  # all threads have read what some of them overwrite below
                dh_TN = dy_T[:, None] * C_TN + tl.where(end, dh_N[None, :], 0.0)
                _, dh_TN = tl.associative_scan((next_a_TN, dh_TN), 0, combine, reverse=True)
                tl.store(dh + row * N + n, tl.sum(tl.where(first, a_TN * dh_TN, 0.0), 0), mask=n_valid)
                du_T = tl.sum(dh_TN * B_TN, 1)
                dB_TN += dh_TN * u_T[:, None]
                dexponent_TN = tl.where((t < L)[:, None], dh_TN * decayed_TN, 0.0)  # gradient of delta A
                dx_T = tl.load(dx + image * L + place, mask=(t < L) & (i > 0), other=0.0)
                tl.store(dx + image * L + place, dx_T + du_T * delta_T, mask=t < L)
                ddelta_T = du_T * x_T + tl.sum(dexponent_TN * A_N[None, :], 1)
                tl.store(ddelta + row * L + place, ddelta_T, mask=t < L)
                dA_N = tl.sum(dexponent_TN * delta_T[:, None], 0)
                dA_N += tl.load(dA + row * N + n, mask=n_valid, other=0.0)
                tl.store(dA + row * N + n, dA_N, mask=n_valid)
                tl.debug_barrier()  # what this program wrote (dh, dA, dx), its other threads read
            slice_B = (slice_d * batch * 4 + group) * L * N + tile
            tl.store(dB + slice_B, dB_TN, mask=mask_TN)
            tl.store(dC + slice_B, dC_TN, mask=mask_TN)


# Candidates as in kernels/selective_scan, whose arithmetic this is.
_KEY = ["N", "TOGETHER", "length_bucket"]
forward_few_states = autotuned((2, 1), key=[*_KEY, "KEEP"])(forward_kernel)
forward_many_states = autotuned((1, 1), key=[*_KEY, "KEEP"])(forward_kernel)
backward_few_states = autotuned((4, 1), key=_KEY, restore=("dh", "dA"))(backward_kernel)
backward_many_states = autotuned((1, 1), key=_KEY, restore=("dh", "dA"))(backward_kernel)


@triton.jit
def _load(base, rows, columns, row_stride, row_mask, column_count):
    """Load base[rows, columns], with 0 outside. Offsets in an image fit in 32 bits; `base` is a 64-bit address."""
    mask = row_mask[:, None] & (columns < column_count)[None, :]
    return tl.load(base + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, rows, columns, row_stride, row_mask, column_count, values):
    mask = row_mask[:, None] & (columns < column_count)[None, :]
    tl.store(base + rows[:, None] * row_stride + columns[None, :], values, mask=mask)


@triton.jit
def lowrank_forward_kernel(
    x, delta, pairs, seen, left, carry, y, states, batch, D, H, W, r, chunks, length_bucket,
    TOGETHER: tl.constexpr, HAS_DELTA: tl.constexpr, KEEP: tl.constexpr,
    Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Run TOGETHER directions of a block of channels.

    All tensors are contiguous: x [batch, L, D]; delta [batch, 4, L, D]; pairs [batch, 4, chunks, Q, Q]; seen, left
    [batch, 4, chunks, Q, r]; carry [4, r, r]; y [4 / TOGETHER, batch, L, D]; with KEEP, states [batch, 4, chunks, r,
    D], before each chunk.
    """
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    p, q, i = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, Q), tl.arange(0, BLOCK_R)
    L, every = H * W, q < Q
    x += b * L * D
    y += (part * batch + b) * L * D
    for step in range(TOGETHER):
        k = part * TOGETHER + step
        group = b * 4 + k
        carry_RR = _load(carry + k * r * r, i, i, r, i < r, r)
        s_RP = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)
        for c in range(chunks):
            t = c * Q + q
            place = _places(t, k, H, W)
            if KEEP:
                _store(states + (group * chunks + c) * r * D, i, p, D, i < r, D, s_RP)
            u_QP = _load(x, place, p, D, t < L, D)
            if HAS_DELTA:
                u_QP *= _load(delta + group * L * D, place, p, D, t < L, D)
            rows = (group * chunks + c) * Q
            y_QP = dot(_load(pairs + rows * Q, q, q, Q, every, Q), u_QP)
            y_QP += dot(_load(seen + rows * r, q, i, r, every, r), s_RP)
            y_QP += _load(y, place, p, D, (t < L) & (step > 0), D)
            _store(y, place, p, D, t < L, D, y_QP)
            s_RP = dot(carry_RR, s_RP) + dot(tl.trans(_load(left + rows * r, q, i, r, every, r)), u_QP)
        tl.debug_barrier()  # what this direction stored, other threads read in the next


@triton.jit
def lowrank_backward_kernel(
    x, delta, pairs, seen, left, carry, states, dy, dx, ddelta, dpairs, dseen, dleft, dcarry,
    batch, D, H, W, r, chunks, length_bucket, TOGETHER: tl.constexpr, HAS_DELTA: tl.constexpr,
    Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of TOGETHER directions for a block of channels.

    Beside the tensors of lowrank_forward_kernel: dy [batch, L, D]; dx [4 / TOGETHER, batch, L, D]; ddelta as delta;
    dpairs, dseen, dleft [blocks of D, ...] of what they are the gradients of; dcarry [blocks of D, batch, 4, r, r],
    at first 0.
    """
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    p, q, i = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, Q), tl.arange(0, BLOCK_R)
    L, every = H * W, q < Q
    x += b * L * D
    dy += b * L * D
    dx += (part * batch + b) * L * D
    for step in range(TOGETHER):
        k = part * TOGETHER + step
        group = b * 4 + k
        slot = (block * batch + b) * 4 + k
        g_RP = tl.zeros((BLOCK_R, BLOCK_P), tl.float32)  # gradient of the state after the chunk
        for step_back in range(chunks):
            c = chunks - 1 - step_back
            t = c * Q + q
            place, inside = _places(t, k, H, W), t < L
            x_QP, dy_QP = _load(x, place, p, D, inside, D), _load(dy, place, p, D, inside, D)
            rows, slot_rows = (group * chunks + c) * Q, (slot * chunks + c) * Q
            du_QP = dot(tl.trans(_load(pairs + rows * Q, q, q, Q, every, Q)), dy_QP)
            du_QP += dot(_load(left + rows * r, q, i, r, every, r), g_RP)
            u_QP = x_QP
            if HAS_DELTA:
                delta_QP = _load(delta + group * L * D, place, p, D, inside, D)
                u_QP = x_QP * delta_QP
                _store(ddelta + group * L * D, place, p, D, inside, D, du_QP * x_QP)
                du_QP *= delta_QP
            du_QP += _load(dx, place, p, D, inside & (step > 0), D)
            _store(dx, place, p, D, inside, D, du_QP)
            s_RP = _load(states + (group * chunks + c) * r * D, i, p, D, i < r, D)
            _store(dpairs + slot_rows * Q, q, q, Q, every, Q, dot(dy_QP, tl.trans(u_QP)))
            _store(dseen + slot_rows * r, q, i, r, every, r, dot(dy_QP, tl.trans(s_RP)))
            _store(dleft + slot_rows * r, q, i, r, every, r, dot(u_QP, tl.trans(g_RP)))
            dcarry_RR = _load(dcarry + slot * r * r, i, i, r, i < r, r) + dot(g_RP, tl.trans(s_RP))
            _store(dcarry + slot * r * r, i, i, r, i < r, r, dcarry_RR)
            seen_QR = _load(seen + rows * r, q, i, r, every, r)
            carry_RR = _load(carry + k * r * r, i, i, r, i < r, r)  # again, in place of registers
            g_RP = dot(tl.trans(carry_RR), g_RP) + dot(tl.trans(seen_QR), dy_QP)
            tl.debug_barrier()  # what this program stored (dcarry, dx), its other threads read


_LOWRANK_KEY = ["r", "TOGETHER", "HAS_DELTA", "length_bucket"]
lowrank_forward = autotuned((1, 1), (2, 1), (4, 1), key=[*_LOWRANK_KEY, "KEEP"])(lowrank_forward_kernel)
lowrank_backward_low = autotuned((4, 1), key=_LOWRANK_KEY, restore=("dcarry",))(lowrank_backward_kernel)
lowrank_backward_high = autotuned((8, 1), key=_LOWRANK_KEY, restore=("dcarry",))(lowrank_backward_kernel)
