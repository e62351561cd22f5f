"""The selective scan and one step of it on a GPU: launches of the Triton kernels in fused_kernels.py."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

try:
    import triton
except ImportError:  # in a try block, so that transformers loads an exported copy on a machine without Triton
    raise

from kernels.autotune import PROGRAMS, length_bucket, on_device_of
from kernels.selective_scan.fused_kernels import (
    FEW_STATES,
    backward_few_states,
    backward_many_states,
    forward_few_states,
    forward_many_states,
    update_kernel,
)


def _block_sizes(N: int, L: int, is_plain: bool) -> tuple[int, int]:
    """Return the steps and the states of a block, so that a block of [steps, states] fits in registers.

    `is_plain`: of one query and one document, which needs fewer of them."""
    if N <= FEW_STATES:
        elements, block_n = 1024, triton.next_power_of_2(N)
    else:
        elements = 512 if is_plain else 256
        block_n = min(elements // 8, triton.next_power_of_2(N))
    return min(max(2, triton.next_power_of_2(L)), elements // block_n), block_n


def block_channels(programs: int, per_group: int) -> int:
    """Return the channels of a block in the backward pass: 64, or fewer where those are no PROGRAMS, and 8 at least,
    because every block has slices of dB and dC of its own."""
    block_d = 64
    while block_d > 8 and programs * triton.cdiv(per_group, block_d) < PROGRAMS:
        block_d //= 2
    return min(block_d, per_group)


class FusedScan(torch.autograd.Function):
    """(u, delta, A, B, C, h, starts) -> (y [K, batch, G R P, L], last h), with gradients for all but starts."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch, D, L = u.shape
        K, N, G = len(h), A.shape[1], B.shape[1]
        R = C.shape[1] // G
        u, delta, A, B, C, h = (t.contiguous() for t in (u, delta, A, B.mT, C.mT, h))
        block_t, block_n = _block_sizes(N, L, R == 1 and starts is None)
        blocks = triton.cdiv(N, block_n)
        keep = any(ctx.needs_input_grad)
        y, last = u.new_empty(blocks, K, batch, D * R, L), torch.empty_like(h)
        chunk_states = u.new_empty(K, batch, D, triton.cdiv(L, block_t), N) if keep else h
        sizes = batch, D, L, N, D // G, length_bucket(L)
        kernel = forward_few_states if N <= FEW_STATES else forward_many_states
        kernel[(batch * D, blocks)](
            u, delta, A, B, C, u if starts is None else starts, h, y, chunk_states, last, *sizes,
            R=R, ONES=K == 2, DOCUMENTS=starts is not None, KEEP=keep, BLOCK_T=block_t, BLOCK_N=block_n,
        )  # fmt: skip
        ctx.save_for_backward(u, delta, A, B, C, chunk_states, starts)
        return y.sum(0), last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, chunk_states, starts = ctx.saved_tensors
        batch, D, L = u.shape
        N, G = A.shape[1], B.shape[1]
        block_t, block_n = _block_sizes(N, L, C.shape[1] == G and starts is None)
        blocks_n = triton.cdiv(N, block_n)
        block_d = block_channels(batch * G * blocks_n, D // G)
        blocks_d = triton.cdiv(D // G, block_d)
        dy, dh = dy.contiguous(), dh.clone(memory_format=torch.contiguous_format)
        du, ddelta = (u.new_empty(blocks_n, batch, D, L) for _ in range(2))
        dA = u.new_zeros(batch, D, N)
        dB, dC = (u.new_empty(blocks_d, *t.shape) for t in (B, C))
        sizes = batch, D, L, N, D // G, blocks_d, length_bucket(L)
        kernel = backward_few_states if N <= FEW_STATES else backward_many_states
        kernel[(batch * G * blocks_d, blocks_n)](
            u, delta, A, B, C, u if starts is None else starts, chunk_states, dy, dh, du, ddelta, dA, dB, dC, *sizes,
            R=C.shape[1] // G, ONES=len(dh) == 2, DOCUMENTS=starts is not None,
            BLOCK_D=block_d, BLOCK_T=block_t, BLOCK_N=block_n,
        )  # fmt: skip
        return du.sum(0), ddelta.sum(0), dA.sum(0), dB.sum(0).mT, dC.sum(0).mT, dh, None


def selective_scan_triton(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Compute selective_scan_reference in Triton, in float32."""
    with on_device_of(u):
        y, last = FusedScan.apply(u, delta, A, B, C, h, starts)
    return y.unbind(0), last


def update_triton(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, softplus: bool,
) -> Tensor:  # fmt: skip
    """Compute update_reference in Triton; each state is read and written once."""
    batch, heads, P, N = state.shape
    x, dt, A, B, C, D, z, dt_bias = (t if t is None else t.contiguous() for t in (x, dt, A, B, C, D, z, dt_bias))
    y = x.new_empty(batch, heads, P, dtype=state.dtype)
    block_n = min(64, triton.next_power_of_2(N))
    block_p = max(1, min(triton.next_power_of_2(P), 1024 // block_n))
    optional = (x if t is None else t for t in (D, z, dt_bias))
    with on_device_of(state):
        update_kernel[(batch * heads, triton.cdiv(P, block_p))](
            state, x, dt, A, B, C, *optional, y, heads, B.shape[1], P, N,
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=dt_bias is not None, SOFTPLUS=softplus,
            BLOCK_P=block_p, BLOCK_N=block_n,
        )  # fmt: skip
    return y
