"""The Triton kernels of the selective scan and of one step of it; fused.py launches them, README.md derives them.

A program has one batch entry, a block of states and one channel (forward) or a block of channels of one group
(backward). It walks over the sequence in chunks; inside a chunk the recurrence is an associative scan. Partial sums
over blocks (y over states, dB and dC over channels) go to slices of their own and are added up afterwards: no atomics,
and one order.

Suffixes name the dimensions of a block: T time, N states, P channels. A decay of -1 marks the start of a document.
"""

try:
    import triton
    import triton.language as tl
except ImportError:  # in a try block, so that transformers loads an exported copy on a machine without Triton
    raise

from kernels.autotune import autotuned

FEW_STATES = 16  # in a block, at most
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _decayed(a, x):
    """Multiply by the decay of a step; where a document starts (a < 0) the result is 0, also for a NaN."""
    return tl.where(a < 0, 0.0, a * x)


@triton.jit
def combine(a, x, b, y):
    """Combine two steps h -> a h + x of the associative scan: (a, x), then (b, y)."""
    return a * b, x * b + y


@triton.jit
def _combine_ones(a, x, v, b, y, w):
    """Combine two steps of the recurrence on the inputs (x, y) and on ones (v, w)."""
    return a * b, x * b + y, v * b + w


@triton.jit
def _combine_documents(a, x, b, y):
    """Combine two steps where a decay may be -1: if a document starts in either, the state before is dropped."""
    fresh = b < 0  # `_decayed` is spelled out, because calls inside a scan are slow in the interpreter
    return tl.where(fresh | (a < 0), -1.0, a * b), tl.where(fresh, 0.0, x * b) + y


@triton.jit
def _combine_ones_documents(a, x, v, b, y, w):
    """Combine two steps on the inputs and on ones, where a decay may be -1."""
    fresh = b < 0
    return tl.where(fresh | (a < 0), -1.0, a * b), tl.where(fresh, 0.0, x * b) + y, tl.where(fresh, 0.0, v * b) + w


@triton.jit
def _scan(a, x, v, ONES: tl.constexpr, DOCUMENTS: tl.constexpr, REVERSE: tl.constexpr):
    """Scan the recurrence over axis 0, driven by x and, if there are ones, by v.

    Return the product of the decays so far, the state from x, and the state from v.
    """
    if ONES and DOCUMENTS:
        decay, h, ones = tl.associative_scan((a, x, v), 0, _combine_ones_documents, reverse=REVERSE)
    elif ONES:
        decay, h, ones = tl.associative_scan((a, x, v), 0, _combine_ones, reverse=REVERSE)
    elif DOCUMENTS:
        decay, h = tl.associative_scan((a, x), 0, _combine_documents, reverse=REVERSE)
        ones = h
    else:
        decay, h = tl.associative_scan((a, x), 0, combine, reverse=REVERSE)
        ones = h
    return decay, h, ones


@triton.jit
def _states(a_TN, delta_T, u_T, B_TN, h_N, ones_N, ONES: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Return the states after each step of a chunk that starts from h (and from ones): [T, N] each."""
    decay, h, ones = _scan(a_TN, (delta_T * u_T)[:, None] * B_TN, delta_T[:, None] * B_TN, ONES, DOCUMENTS, False)
    return h + _decayed(decay, h_N[None, :]), ones + _decayed(decay, ones_N[None, :])


@triton.jit
def _decayed_states(a_TN, delta_T, u_T, B_TN, h_N, ones_N, first, ONES: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Return a_t h_{t-1} for each step of a chunk, the part of the state before it that the decay leaves.

    It is scanned as a_t (a_{t-1} h_{t-2} + x_{t-1} B_{t-1}), where delta, u and B belong to the step before and the
    `first` step starts from h. A state minus what its step added would lose the digits of a strong decay.
    """
    x = _decayed(a_TN, tl.where(first, h_N[None, :], (delta_T * u_T)[:, None] * B_TN))
    v = _decayed(a_TN, tl.where(first, ones_N[None, :], delta_T[:, None] * B_TN))
    _, decayed, ones = _scan(a_TN, x, v, ONES, DOCUMENTS, False)
    return decayed, ones


@triton.jit
def _decays(delta_ptr, starts_ptr, A_N, t, L, DOCUMENTS: tl.constexpr):
    """Return delta [T] and exp(delta A) [T, N], which is -1 where a document starts and 1 beyond the end."""
    delta = tl.load(delta_ptr + t, mask=t < L, other=0.0)
    a = tl.exp2(delta[:, None] * (A_N * LOG2E)[None, :])
    if DOCUMENTS:
        a = tl.where((tl.load(starts_ptr + t, mask=t < L, other=0) != 0)[:, None], -1.0, a)
    return delta, a


@triton.jit
def forward_kernel(
    u, delta, A, B, C, starts, h, y, chunk_states, last, batch, D, L, N, per_group, length_bucket,
    R: tl.constexpr, ONES: tl.constexpr, DOCUMENTS: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Run the recurrence of one channel and one block of states.

    All tensors are contiguous: u, delta [batch, D, L]; A [D, N]; B [batch, G, L, N]; C [batch, G, R, L, N];
    h, last [K, batch, D, N]; y [blocks of N, K, batch, G, R, per_group, L]; with KEEP, chunk_states
    [K, batch, D, chunks, N], the states before each chunk.
    """
    b, d = (tl.program_id(0) // D).to(tl.int64), (tl.program_id(0) % D).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    G, g, channel = D // per_group, d // per_group, d % per_group
    K = 1 + ONES
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    n_valid = n < N
    A_N = tl.load(A + d * N + n, mask=n_valid, other=0.0)
    state, size = (b * D + d) * N + n, tl.cast(batch, tl.int64) * D * N
    h_N = tl.load(h + state, mask=n_valid, other=0.0)
    ones_N = tl.load(h + size + state, mask=n_valid, other=0.0) if ONES else h_N
    for chunk in range(tl.cdiv(L, BLOCK_T)):
        steps = tl.arange(0, BLOCK_T)
        t = chunk * BLOCK_T + steps
        if KEEP:
            slot = ((b * D + d) * tl.cdiv(L, BLOCK_T) + chunk) * N + n
            tl.store(chunk_states + slot, h_N, mask=n_valid)
            if ONES:
                tl.store(chunk_states + size * tl.cdiv(L, BLOCK_T) + slot, ones_N, mask=n_valid)
        delta_T, a_TN = _decays(delta + (b * D + d) * L, starts + b * L, A_N, t, L, DOCUMENTS)
        u_T = tl.load(u + (b * D + d) * L + t, mask=t < L, other=0.0)
        tile, mask_TN = t.to(tl.int64)[:, None] * N + n[None, :], (t < L)[:, None] & n_valid[None, :]
        B_TN = tl.load(B + (b * G + g) * L * N + tile, mask=mask_TN, other=0.0)
        h_TN, ones_TN = _states(a_TN, delta_T, u_T, B_TN, h_N, ones_N, ONES, DOCUMENTS)
        for r in tl.static_range(R):
            C_TN = tl.load(C + ((b * G + g) * R + r) * L * N + tile, mask=mask_TN, other=0.0)
            y_ptr = y + ((((block * K * batch + b) * G + g) * R + r) * per_group + channel) * L + t
            tl.store(y_ptr, tl.sum(h_TN * C_TN, 1), mask=t < L)
            if ONES:
                tl.store(y_ptr + tl.cast(batch, tl.int64) * D * R * L, tl.sum(ones_TN * C_TN, 1), mask=t < L)
        end = (steps == BLOCK_T - 1)[:, None]  # beyond L the decay is 1 and nothing is added
        h_N = tl.sum(tl.where(end, h_TN, 0.0), 0)
        if ONES:
            ones_N = tl.sum(tl.where(end, ones_TN, 0.0), 0)
    tl.store(last + state, h_N, mask=n_valid)
    if ONES:
        tl.store(last + size + state, ones_N, mask=n_valid)


@triton.jit
def backward_kernel(
    u, delta, A, B, C, starts, chunk_states, dy, dh, du, ddelta, dA, dB, dC, batch, D, L, N, per_group, blocks_d,
    length_bucket, R: tl.constexpr, ONES: tl.constexpr, DOCUMENTS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the gradients for a block of channels of one group and a block of states.

    Beside the tensors of forward_kernel: dy [K, batch, G, R, per_group, L]; du, ddelta [blocks of N, batch, D, L];
    dA [batch, D, N]; dB [blocks_d, batch, G, L, N]; dC [blocks_d, batch, G, R, L, N]; dh [K, batch, D, N], the gradient
    of the last state, and of the first when done. No other program touches its parts of dA and dh.
    """
    G, chunks = D // per_group, tl.cdiv(L, BLOCK_T)
    slice_d, pair, block = (
        (tl.program_id(0) % blocks_d).to(tl.int64),
        (tl.program_id(0) // blocks_d).to(tl.int64),
        tl.program_id(1).to(tl.int64),
    )
    b, g = pair // G, pair % G
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    n_valid = n < N
    size = tl.cast(batch, tl.int64) * D * N
    for step_back in range(chunks):
        chunk = chunks - 1 - step_back
        steps = tl.arange(0, BLOCK_T)
        t = chunk * BLOCK_T + steps
        tile, mask_TN = t.to(tl.int64)[:, None] * N + n[None, :], (t < L)[:, None] & n_valid[None, :]
        first, end = (steps == 0)[:, None], (steps == BLOCK_T - 1)[:, None]
        B_TN = tl.load(B + (b * G + g) * L * N + tile, mask=mask_TN, other=0.0)
        has_previous = (steps > 0) & (t <= L)
        mask_previous_TN = has_previous[:, None] & n_valid[None, :]
        previous_B_TN = tl.load(B + (b * G + g) * L * N + tile - N, mask=mask_previous_TN, other=0.0)
        dB_TN, dC_sum_TN = tl.zeros((BLOCK_T, BLOCK_N), tl.float32), tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for channel in range(slice_d * BLOCK_D, tl.minimum((slice_d + 1) * BLOCK_D, per_group)):
            d = g * per_group + channel
            row, state = (b * D + d) * L, (b * D + d) * N + n
            A_N = tl.load(A + d * N + n, mask=n_valid, other=0.0)
            slot = ((b * D + d) * chunks + chunk) * N + n
            h_N = tl.load(chunk_states + slot, mask=n_valid, other=0.0)
            ones_N = tl.load(chunk_states + size * chunks + slot, mask=n_valid, other=0.0) if ONES else h_N
            delta_T, a_TN = _decays(delta + row, starts + b * L, A_N, t, L, DOCUMENTS)
            u_T = tl.load(u + row + t, mask=t < L, other=0.0)
            previous_delta_T = tl.load(delta + row + t - 1, mask=has_previous, other=0.0)
            previous_u_T = tl.load(u + row + t - 1, mask=has_previous, other=0.0)
            decayed_TN, decayed_ones_TN = _decayed_states(
                a_TN, previous_delta_T, previous_u_T, previous_B_TN, h_N, ones_N, first, ONES, DOCUMENTS
            )
            x_T = delta_T * u_T
            h_TN = decayed_TN + x_T[:, None] * B_TN
            dh_TN = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            dones_TN = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            for r in tl.range(0, R, num_stages=1):  # not unrolled, which would need twice the registers
                C_TN = tl.load(C + ((b * G + g) * R + r) * L * N + tile, mask=mask_TN, other=0.0)
                dy_ptr = dy + (((b * G + g) * R + r) * per_group + channel) * L + t
                dy_T = tl.load(dy_ptr, mask=t < L, other=0.0)
                dh_TN += dy_T[:, None] * C_TN
                dC_TN = dy_T[:, None] * h_TN
                if ONES:
                    dy_ones_T = tl.load(dy_ptr + tl.cast(batch, tl.int64) * D * R * L, mask=t < L, other=0.0)
                    dones_TN += dy_ones_T[:, None] * C_TN
                    dC_TN += dy_ones_T[:, None] * (decayed_ones_TN + delta_T[:, None] * B_TN)
                if R == 1:
                    dC_sum_TN += dC_TN
                else:
                    dC_ptr = dC + (((slice_d * batch + b) * G + g) * R + r) * L * N + tile
                    if channel > slice_d * BLOCK_D:
                        dC_TN += tl.load(dC_ptr, mask=mask_TN, other=0.0)
                    tl.store(dC_ptr, dC_TN, mask=mask_TN)
            # what later steps add to a state's gradient comes back through the decay of the step after it
            _, next_a_TN = _decays(delta + row, starts + b * L, A_N, t + 1, L, DOCUMENTS)
            dh_N = tl.load(dh + state, mask=n_valid, other=0.0)
            dones_N = tl.load(dh + size + state, mask=n_valid, other=0.0) if ONES else dh_N
            tl.debug_barrier()  # all threads have read what some of them overwrite below
            dh_TN += tl.where(end, dh_N[None, :], 0.0)  # of the next chunk or the last state, decayed
            dones_TN += tl.where(end, dones_N[None, :], 0.0)
            _, dh_TN, dones_TN = _scan(tl.where(end, 0.0, next_a_TN), dh_TN, dones_TN, ONES, DOCUMENTS, True)
            dx_T = tl.sum(dh_TN * B_TN, 1)  # gradient of x = delta u
            dB_TN += dh_TN * x_T[:, None]
            dexponent_TN = dh_TN * decayed_TN  # gradient of delta A
            tl.store(dh + state, tl.sum(tl.where(first, _decayed(a_TN, dh_TN), 0.0), 0), mask=n_valid)
            ddelta_T = dx_T * u_T
            if ONES:
                dB_TN += dones_TN * delta_T[:, None]
                dexponent_TN += dones_TN * decayed_ones_TN
                ddelta_T += tl.sum(dones_TN * B_TN, 1)
                tl.store(dh + size + state, tl.sum(tl.where(first, _decayed(a_TN, dones_TN), 0.0), 0), mask=n_valid)
            dexponent_TN = tl.where((t < L)[:, None] & (a_TN >= 0), dexponent_TN, 0.0)
            ddelta_T += tl.sum(dexponent_TN * A_N[None, :], 1)
            slice_t = block * batch * D * L + row + t
            tl.store(du + slice_t, dx_T * delta_T, mask=t < L)
            tl.store(ddelta + slice_t, ddelta_T, mask=t < L)
            dA_N = tl.sum(dexponent_TN * delta_T[:, None], 0)
            tl.store(dA + state, tl.load(dA + state, mask=n_valid, other=0.0) + dA_N, mask=n_valid)
            tl.debug_barrier()  # what this program wrote (dh, dA, dC), its other threads read
        tl.store(dB + ((slice_d * batch + b) * G + g) * L * N + tile, dB_TN, mask=mask_TN)
        if R == 1:
            tl.store(dC + ((slice_d * batch + b) * G + g) * L * N + tile, dC_sum_TN, mask=mask_TN)


_KEY = ["N", "R", "ONES", "DOCUMENTS", "length_bucket"]
# Blocks of few states have many steps, which several warps share. A block of many states is one warp's: a scan and its
# sums then need no barrier, which is worth a factor of 5 (H200, 512 states).
forward_few_states = autotuned((2, 1), key=[*_KEY, "KEEP"])(forward_kernel)
forward_many_states = autotuned((1, 1), key=[*_KEY, "KEEP"])(forward_kernel)
backward_few_states = autotuned((4, 1), key=_KEY, restore=("dh", "dA"))(backward_kernel)
backward_many_states = autotuned((1, 1), key=_KEY, restore=("dh", "dA"))(backward_kernel)


@autotuned((1, 1), key=["heads", "P", "N"], restore=("state",))
@triton.jit
def update_kernel(
    state, x, dt, A, B, C, D, z, dt_bias, y, heads, groups, P, N,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Advance BLOCK_P channels of one head by one step.

    All tensors are contiguous: state [batch, heads, P, N]; x, dt, z, y [batch, heads, P]; A [heads, P, N];
    D, dt_bias [heads, P]; B, C [batch, groups, N].
    """
    row = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    b, head, p_valid = row // heads, row % heads, p < P
    x_P = tl.load(x + row * P + p, mask=p_valid, other=0.0).to(tl.float32)
    dt_P = tl.load(dt + row * P + p, mask=p_valid, other=0.0).to(tl.float32)
    if HAS_BIAS:
        dt_P += tl.load(dt_bias + head * P + p, mask=p_valid, other=0.0).to(tl.float32)
    if SOFTPLUS:
        e_P = tl.exp(tl.minimum(dt_P, 20.0))
        # the series of log(1 + e), where the sum 1 + e would round e away
        series_P = e_P * (1.0 - e_P * (0.5 - e_P * (1.0 / 3.0 - e_P * 0.25)))
        dt_P = tl.where(dt_P > 20.0, dt_P, tl.where(e_P < 0.03, series_P, tl.log(1.0 + e_P)))
    y_P = tl.zeros((BLOCK_P,), tl.float32)
    group = b * groups + head // (heads // groups)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        tile, mask_PN = p[:, None] * N + n[None, :], p_valid[:, None] & (n < N)[None, :]
        A_PN = tl.load(A + head * P * N + tile, mask=mask_PN, other=0.0).to(tl.float32)
        B_N = tl.load(B + group * N + n, mask=n < N, other=0.0).to(tl.float32)
        C_N = tl.load(C + group * N + n, mask=n < N, other=0.0).to(tl.float32)
        h_PN = tl.load(state + row * P * N + tile, mask=mask_PN, other=0.0).to(tl.float32)
        h_PN = tl.exp2(dt_P[:, None] * A_PN * LOG2E) * h_PN + (dt_P * x_P)[:, None] * B_N[None, :]
        tl.store(state + row * P * N + tile, h_PN, mask=mask_PN)
        y_P += tl.sum(h_PN * C_N[None, :], 1)
    if HAS_D:
        y_P += tl.load(D + head * P + p, mask=p_valid, other=0.0).to(tl.float32) * x_P
    if HAS_Z:
        z_P = tl.load(z + row * P + p, mask=p_valid, other=0.0).to(tl.float32)
        y_P *= z_P * tl.sigmoid(z_P)
    tl.store(y + row * P + p, y_P, mask=p_valid)
