"""The selective scan on a GPU, in Triton. Derivation, bytes and operations: README.md.

A program has one batch entry, a block of states and one channel (forward) or a block of channels of one group (backward). It
walks over the sequence in chunks; inside a chunk the recurrence is an associative scan. What has to be added up over blocks
(y over states, dB and dC over channels) goes to a slice of its own and is summed afterwards: no atomics, one order.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # in a try: transformers then lets a machine without Triton load an export that this file travels with
    raise

from kernels.autotune import bucket, on_device_of, tuned

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _through(a, x):
    """What a step of decay a lets through: nothing where a document starts (a < 0), not even a NaN."""
    return tl.where(a < 0, 0.0, a * x)


@triton.jit
def _one(a, x, b, y):
    """Step (a, x), h -> a h + x, then step (b, y)."""
    return a * b, x * b + y


@triton.jit
def _two(a, x, v, b, y, w):
    return a * b, x * b + y, v * b + w


@triton.jit
def _one_of_documents(a, x, b, y):
    """The same where a decay may be -1: two steps that a document starts in let nothing through."""
    anew = b < 0  # calls inside a scan would be slow in the interpreter, so `_through` is spelled out
    return tl.where(anew | (a < 0), -1.0, a * b), tl.where(anew, 0.0, x * b) + y


@triton.jit
def _two_of_documents(a, x, v, b, y, w):
    anew = b < 0
    return tl.where(anew | (a < 0), -1.0, a * b), tl.where(anew, 0.0, x * b) + y, tl.where(anew, 0.0, v * b) + w


@triton.jit
def _scan(a, x, v, ONES: tl.constexpr, DOCUMENTS: tl.constexpr, REVERSE: tl.constexpr):
    """The recurrence over axis 0, driven by x and, if there are ones, by v: (decay, from x, from v) of all steps so far."""
    if ONES and DOCUMENTS:
        fall, h, ones = tl.associative_scan((a, x, v), 0, _two_of_documents, reverse=REVERSE)
    elif ONES:
        fall, h, ones = tl.associative_scan((a, x, v), 0, _two, reverse=REVERSE)
    elif DOCUMENTS:
        fall, h = tl.associative_scan((a, x), 0, _one_of_documents, reverse=REVERSE)
        ones = h
    else:
        fall, h = tl.associative_scan((a, x), 0, _one, reverse=REVERSE)
        ones = h
    return fall, h, ones


@triton.jit
def _states(a_TN, delta_T, u_T, B_TN, h_N, ones_N, ONES: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The states after each step of a chunk that starts from h (and from ones): [T, N] each."""
    fall, h, ones = _scan(a_TN, (delta_T * u_T)[:, None] * B_TN, delta_T[:, None] * B_TN, ONES, DOCUMENTS, False)
    return h + _through(fall, h_N[None, :]), ones + _through(fall, ones_N[None, :])


@triton.jit
def _kept(a_TN, delta_T, u_T, B_TN, h_N, ones_N, first, ONES: tl.constexpr, DOCUMENTS: tl.constexpr):
    """What each step of a chunk keeps of the state before it, a_t h_{t-1} = a_t (kept_{t-1} + x_{t-1} B_{t-1}); delta, u and B are of
    the step before, and the `first` one starts from h. A state minus what its step added would lose the digits of a strong decay."""
    x = _through(a_TN, tl.where(first, h_N[None, :], (delta_T * u_T)[:, None] * B_TN))
    v = _through(a_TN, tl.where(first, ones_N[None, :], delta_T[:, None] * B_TN))
    _, kept, ones = _scan(a_TN, x, v, ONES, DOCUMENTS, False)
    return kept, ones


@triton.jit
def _decays(delta_ptr, starts_ptr, A_N, t, L, DOCUMENTS: tl.constexpr):
    """delta [T] and exp(delta A) [T, N], which is -1 where a document starts, and 1 beyond the end."""
    delta = tl.load(delta_ptr + t, mask=t < L, other=0.0)
    a = tl.exp2(delta[:, None] * (A_N * LOG2E)[None, :])
    if DOCUMENTS:
        a = tl.where((tl.load(starts_ptr + t, mask=t < L, other=0) != 0)[:, None], -1.0, a)
    return delta, a


@tuned((2, 1), key=["N", "R", "ONES", "DOCUMENTS", "KEEP", "lengths"])
@triton.jit
def forward_kernel(
    u, delta, A, B, C, starts, h, y, begins, last, batch, D, L, N, per_group, lengths,
    R: tl.constexpr, ONES: tl.constexpr, DOCUMENTS: tl.constexpr, KEEP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """u, delta [batch, D, L]; A [D, N]; B [batch, G, L, N]; C [batch, G, R, L, N]; h, last [K, batch, D, N];
    y [blocks of N, K, batch, G, R, per_group, L]; begins [K, batch, D, chunks, N]. All contiguous."""
    b, d, block = (tl.program_id(0) // D).to(tl.int64), (tl.program_id(0) % D).to(tl.int64), tl.program_id(1).to(tl.int64)
    G, g, within = D // per_group, d // per_group, d % per_group
    K = 1 + ONES
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    real = n < N
    A_N = tl.load(A + d * N + n, mask=real, other=0.0)
    state, size = (b * D + d) * N + n, tl.cast(batch, tl.int64) * D * N
    h_N = tl.load(h + state, mask=real, other=0.0)
    ones_N = tl.load(h + size + state, mask=real, other=0.0) if ONES else h_N
    for chunk in range(tl.cdiv(L, BLOCK_T)):
        steps = tl.arange(0, BLOCK_T)
        t = chunk * BLOCK_T + steps
        if KEEP:
            kept = ((b * D + d) * tl.cdiv(L, BLOCK_T) + chunk) * N + n
            tl.store(begins + kept, h_N, mask=real)
            if ONES:
                tl.store(begins + size * tl.cdiv(L, BLOCK_T) + kept, ones_N, mask=real)
        delta_T, a_TN = _decays(delta + (b * D + d) * L, starts + b * L, A_N, t, L, DOCUMENTS)
        u_T = tl.load(u + (b * D + d) * L + t, mask=t < L, other=0.0)
        tile, inside = t.to(tl.int64)[:, None] * N + n[None, :], (t < L)[:, None] & real[None, :]
        B_TN = tl.load(B + (b * G + g) * L * N + tile, mask=inside, other=0.0)
        h_TN, ones_TN = _states(a_TN, delta_T, u_T, B_TN, h_N, ones_N, ONES, DOCUMENTS)
        for r in tl.static_range(R):
            C_TN = tl.load(C + ((b * G + g) * R + r) * L * N + tile, mask=inside, other=0.0)
            to = y + ((((block * K * batch + b) * G + g) * R + r) * per_group + within) * L + t
            tl.store(to, tl.sum(h_TN * C_TN, 1), mask=t < L)
            if ONES:
                tl.store(to + tl.cast(batch, tl.int64) * D * R * L, tl.sum(ones_TN * C_TN, 1), mask=t < L)
        end = (steps == BLOCK_T - 1)[:, None]  # beyond L the decay is 1 and nothing is added
        h_N = tl.sum(tl.where(end, h_TN, 0.0), 0)
        if ONES:
            ones_N = tl.sum(tl.where(end, ones_TN, 0.0), 0)
    tl.store(last + state, h_N, mask=real)
    if ONES:
        tl.store(last + size + state, ones_N, mask=real)


@tuned((8, 1), key=["N", "R", "ONES", "DOCUMENTS", "lengths"], restore=("dh", "dA"))
@triton.jit
def backward_kernel(
    u, delta, A, B, C, starts, begins, dy, dh, du, ddelta, dA, dB, dC, batch, D, L, N, per_group, blocks_d, lengths,
    R: tl.constexpr, ONES: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As forward_kernel; dy [K, batch, G, R, per_group, L]; du, ddelta [blocks of N, batch, D, L]; dA [batch, D, N];
    dB [blocks_d, batch, G, L, N], dC [blocks_d, batch, G, R, L, N]. dh [K, batch, D, N]: of the last state, then of the first.
    dA and dh are this program's own, read and written chunk after chunk."""
    G, chunks = D // per_group, tl.cdiv(L, BLOCK_T)
    slice_d, pair, block = (
        (tl.program_id(0) % blocks_d).to(tl.int64),
        (tl.program_id(0) // blocks_d).to(tl.int64),
        tl.program_id(1).to(tl.int64),
    )
    b, g = pair // G, pair % G
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    real = n < N
    size = tl.cast(batch, tl.int64) * D * N
    for backwards in range(chunks):
        chunk = chunks - 1 - backwards
        steps = tl.arange(0, BLOCK_T)
        t = chunk * BLOCK_T + steps
        tile, inside = t.to(tl.int64)[:, None] * N + n[None, :], (t < L)[:, None] & real[None, :]
        first, end = (steps == 0)[:, None], (steps == BLOCK_T - 1)[:, None]
        B_TN = tl.load(B + (b * G + g) * L * N + tile, mask=inside, other=0.0)
        before = (steps > 0) & (t <= L)  # of the step before
        before_TN = tl.load(B + (b * G + g) * L * N + tile - N, mask=before[:, None] & real[None, :], other=0.0)
        dB_TN = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for within in range(slice_d * BLOCK_D, tl.minimum((slice_d + 1) * BLOCK_D, per_group)):
            d = g * per_group + within
            row, state = (b * D + d) * L, (b * D + d) * N + n
            A_N = tl.load(A + d * N + n, mask=real, other=0.0)
            kept = ((b * D + d) * chunks + chunk) * N + n
            h_N = tl.load(begins + kept, mask=real, other=0.0)
            ones_N = tl.load(begins + size * chunks + kept, mask=real, other=0.0) if ONES else h_N
            delta_T, a_TN = _decays(delta + row, starts + b * L, A_N, t, L, DOCUMENTS)
            u_T = tl.load(u + row + t, mask=t < L, other=0.0)
            before_delta_T = tl.load(delta + row + t - 1, mask=before, other=0.0)
            before_u_T = tl.load(u + row + t - 1, mask=before, other=0.0)
            kept_TN, kept_ones_TN = _kept(a_TN, before_delta_T, before_u_T, before_TN, h_N, ones_N, first, ONES, DOCUMENTS)
            x_T = delta_T * u_T
            h_TN = kept_TN + x_T[:, None] * B_TN
            g_TN = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            go_TN = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            for r in tl.static_range(R):
                C_TN = tl.load(C + ((b * G + g) * R + r) * L * N + tile, mask=inside, other=0.0)
                of = dy + (((b * G + g) * R + r) * per_group + within) * L + t
                dy_T = tl.load(of, mask=t < L, other=0.0)
                g_TN += dy_T[:, None] * C_TN
                dC_TN = dy_T[:, None] * h_TN
                if ONES:
                    do_T = tl.load(of + tl.cast(batch, tl.int64) * D * R * L, mask=t < L, other=0.0)
                    go_TN += do_T[:, None] * C_TN
                    dC_TN += do_T[:, None] * (kept_ones_TN + delta_T[:, None] * B_TN)
                to = dC + (((slice_d * batch + b) * G + g) * R + r) * L * N + tile
                if within > slice_d * BLOCK_D:
                    dC_TN += tl.load(to, mask=inside, other=0.0)
                tl.store(to, dC_TN, mask=inside)
            # what later steps add to a state's gradient comes back through the decay of the step after it
            _, after_TN = _decays(delta + row, starts + b * L, A_N, t + 1, L, DOCUMENTS)
            g_N = tl.load(dh + state, mask=real, other=0.0)
            go_N = tl.load(dh + size + state, mask=real, other=0.0) if ONES else g_N
            tl.debug_barrier()  # all threads have read what some of them overwrite below
            g_TN += tl.where(end, g_N[None, :], 0.0)  # carried over, or of the last state: its decay is in it
            go_TN += tl.where(end, go_N[None, :], 0.0)
            _, g_TN, go_TN = _scan(tl.where(end, 0.0, after_TN), g_TN, go_TN, ONES, DOCUMENTS, True)
            through_T = tl.sum(g_TN * B_TN, 1)  # gradient of delta u
            dB_TN += g_TN * x_T[:, None]
            e_TN = g_TN * kept_TN
            tl.store(dh + state, tl.sum(tl.where(first, _through(a_TN, g_TN), 0.0), 0), mask=real)
            dd_T = through_T * u_T
            if ONES:
                dB_TN += go_TN * delta_T[:, None]
                e_TN += go_TN * kept_ones_TN
                dd_T += tl.sum(go_TN * B_TN, 1)
                tl.store(dh + size + state, tl.sum(tl.where(first, _through(a_TN, go_TN), 0.0), 0), mask=real)
            e_TN = tl.where((t < L)[:, None] & (a_TN >= 0), e_TN, 0.0)  # of the decays that are used
            dd_T += tl.sum(e_TN * A_N[None, :], 1)
            part = block * batch * D * L + row + t
            tl.store(du + part, through_T * delta_T, mask=t < L)
            tl.store(ddelta + part, dd_T, mask=t < L)
            sum_A = tl.sum(e_TN * delta_T[:, None], 0)
            tl.store(dA + state, tl.load(dA + state, mask=real, other=0.0) + sum_A, mask=real)
            tl.debug_barrier()  # what this program wrote (dh, dA, dC), its other threads read
        tl.store(dB + ((slice_d * batch + b) * G + g) * L * N + tile, dB_TN, mask=inside)


def _blocks(N: int, L: int, inputs: int) -> tuple[int, int]:
    block_n = min(64, triton.next_power_of_2(N))
    return min(max(2, triton.next_power_of_2(L)), max(16, 1024 // inputs // block_n)), block_n


class FusedScan(torch.autograd.Function):
    """(u, delta, A, B, C, h, starts) -> (y [K, batch, G R P, L], last h)"""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, h, starts):
        batch, D, L = u.shape
        K, N, G = len(h), A.shape[1], B.shape[1]
        R = C.shape[1] // G
        u, delta, A, B, C, h = (t.contiguous() for t in (u, delta, A, B.mT, C.mT, h))
        block_t, block_n = _blocks(N, L, K)
        blocks = triton.cdiv(N, block_n)
        keep = any(ctx.needs_input_grad)
        y, last = u.new_empty(blocks, K, batch, D * R, L), torch.empty_like(h)
        begins = u.new_empty(K, batch, D, triton.cdiv(L, block_t), N) if keep else h
        forward_kernel[(batch * D, blocks)](
            u, delta, A, B, C, u if starts is None else starts, h, y, begins, last, batch, D, L, N, D // G, bucket(L),
            R=R, ONES=K == 2, DOCUMENTS=starts is not None, KEEP=keep, BLOCK_T=block_t, BLOCK_N=block_n,
        )  # fmt: skip
        ctx.save_for_backward(u, delta, A, B, C, begins, starts)
        return y.sum(0), last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh):
        u, delta, A, B, C, begins, starts = ctx.saved_tensors
        batch, D, L = u.shape
        N, G = A.shape[1], B.shape[1]
        block_t, block_n = _blocks(N, L, len(dh))
        blocks_n, block_d = triton.cdiv(N, block_n), min(64, D // G)
        blocks_d = triton.cdiv(D // G, block_d)
        dy, dh = dy.contiguous(), dh.clone(memory_format=torch.contiguous_format)
        du, ddelta = (u.new_empty(blocks_n, batch, D, L) for _ in range(2))
        dA = u.new_zeros(batch, D, N)
        dB, dC = (u.new_empty(blocks_d, *t.shape) for t in (B, C))
        backward_kernel[(batch * G * blocks_d, blocks_n)](
            u, delta, A, B, C, u if starts is None else starts, begins, dy, dh, du, ddelta, dA, dB, dC, batch, D, L, N, D // G, blocks_d, bucket(L),
            R=C.shape[1] // G, ONES=len(dh) == 2, DOCUMENTS=starts is not None, BLOCK_D=block_d, BLOCK_T=block_t, BLOCK_N=block_n,
        )  # fmt: skip
        return du.sum(0), ddelta.sum(0), dA.sum(0), dB.sum(0).mT, dC.sum(0).mT, dh, None


def selective_scan_triton(u, delta, A, B, C, h, starts=None) -> tuple[tuple[Tensor, ...], Tensor]:
    """As selective_scan_reference."""
    with on_device_of(u):
        y, last = FusedScan.apply(u, delta, A, B, C, h, starts)
    return y.unbind(0), last
