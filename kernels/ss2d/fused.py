"""The scans over images on a GPU: launches of the Triton kernels in fused_kernels.py."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

try:
    import triton
except ImportError:  # in a try block, so that transformers loads an exported copy on a machine without Triton
    raise

from kernels.autotune import PROGRAMS, length_bucket, on_device_of
from kernels.selective_scan.fused import block_channels
from kernels.selective_scan.fused_kernels import FEW_STATES
from kernels.ss2d.fused_kernels import (
    backward_few_states,
    backward_many_states,
    forward_few_states,
    forward_many_states,
    lowrank_backward_high,
    lowrank_backward_low,
    lowrank_forward,
)
from kernels.ss2d.lowrank import CHUNK, at_places, chunk_matrices
from kernels.ss2d.reference import DIRECTIONS

LOW_RANK = 16  # at most; blocks of more ranks have fewer channels and more warps


def _block_sizes(N: int, L: int) -> tuple[int, int]:
    """Return the steps and the states of a block, so that a block of [steps, states] fits in registers: half of the
    selective scan's, because where a step lies takes registers too."""
    few = N <= FEW_STATES
    elements, block_n = (512, triton.next_power_of_2(N)) if few else (256, 32)
    return min(max(2, triton.next_power_of_2(L)), elements // block_n), block_n


def _together(programs: int) -> int:
    """Return the directions of a program: all, or one where those are no PROGRAMS."""
    return DIRECTIONS if programs >= PROGRAMS else 1


class FusedScan(torch.autograd.Function):
    """(x, delta, A, B, C) -> y [batch, D, H, W], with gradients for all."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        batch, D, H, W = x.shape
        N, L = A.shape[2], H * W
        x, delta, A, B, C = (t.contiguous() for t in (x, delta, A, B.movedim(2, -1), C.movedim(2, -1)))
        block_t, block_n = _block_sizes(N, L)
        blocks = triton.cdiv(N, block_n)
        together = _together(batch * D * blocks)
        keep = any(ctx.needs_input_grad)
        y = x.new_empty(DIRECTIONS // together, blocks, *x.shape)
        chunk_states = x.new_empty(batch, DIRECTIONS, D, triton.cdiv(L, block_t), N) if keep else x
        kernel = forward_few_states if N <= FEW_STATES else forward_many_states
        kernel[(batch * D, blocks, DIRECTIONS // together)](
            x, delta, A, B, C, y, chunk_states, batch, D, H, W, N, length_bucket(L),
            TOGETHER=together, KEEP=keep, BLOCK_T=block_t, BLOCK_N=block_n,
        )  # fmt: skip
        ctx.save_for_backward(x, delta, A, B, C, chunk_states)
        return y.sum((0, 1)) if len(y) * blocks > 1 else y[0, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, ...]:
        x, delta, A, B, C, chunk_states = ctx.saved_tensors
        batch, D, H, W = x.shape
        N, L = A.shape[2], H * W
        block_t, block_n = _block_sizes(N, L)
        blocks_n = triton.cdiv(N, block_n)
        block_d = block_channels(batch * DIRECTIONS * blocks_n, D)
        blocks_d = triton.cdiv(D, block_d)
        together = _together(batch * blocks_d * blocks_n)
        dx, ddelta = x.new_empty(DIRECTIONS // together, blocks_n, *x.shape), x.new_empty(blocks_n, *delta.shape)
        dh, dA = (x.new_zeros(batch, *A.shape) for _ in range(2))
        dB, dC = (x.new_empty(blocks_d, *B.shape) for _ in range(2))
        kernel = backward_few_states if N <= FEW_STATES else backward_many_states
        kernel[(batch * blocks_d, blocks_n, DIRECTIONS // together)](
            x, delta, A, B, C, chunk_states, dy.contiguous(), dh, dx, ddelta, dA, dB, dC, batch, D, H, W, N,
            length_bucket(L), TOGETHER=together, BLOCK_D=block_d, BLOCK_T=block_t, BLOCK_N=block_n,
        )  # fmt: skip
        return dx.sum((0, 1)), ddelta.sum(0), dA.sum(0), dB.sum(0).movedim(-1, 2), dC.sum(0).movedim(-1, 2)


def ss2d_triton(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Compute ss2d_reference in Triton, in float32."""
    with on_device_of(x):
        return FusedScan.apply(x, delta, A, B, C)


class FusedLowRank(torch.autograd.Function):
    """(x, delta or None, pairs, seen, left, carry) -> y [batch, D, H, W], with gradients for all."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, delta: Tensor | None, pairs: Tensor, seen: Tensor, left: Tensor, carry: Tensor
    ) -> Tensor:
        batch, D, H, W = x.shape
        r, chunks = carry.shape[-1], pairs.shape[2]
        x, delta = x.movedim(1, -1).contiguous(), None if delta is None else delta.movedim(2, -1).contiguous()
        pairs, seen, left, carry = (t.contiguous() for t in (pairs, seen, left, carry))
        blocks = _lowrank_blocks(D, r)
        blocks_d = triton.cdiv(D, blocks["BLOCK_P"])
        together = _together(batch * blocks_d)
        keep = any(ctx.needs_input_grad)
        y = x.new_empty(DIRECTIONS // together, *x.shape)
        states = x.new_empty(batch, DIRECTIONS, chunks, r, D) if keep else x
        lowrank_forward[(batch, blocks_d, DIRECTIONS // together)](
            x, x if delta is None else delta, pairs, seen, left, carry, y, states, batch, D, H, W, r, chunks,
            length_bucket(H * W), TOGETHER=together, HAS_DELTA=delta is not None, KEEP=keep, **blocks,
        )  # fmt: skip
        ctx.save_for_backward(x, delta, pairs, seen, left, carry, states)
        return (y.sum(0) if len(y) > 1 else y[0]).movedim(-1, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, pairs, seen, left, carry, states = ctx.saved_tensors
        batch, H, W, D = x.shape
        r, chunks = carry.shape[-1], pairs.shape[2]
        blocks = _lowrank_blocks(D, r)
        blocks_d = triton.cdiv(D, blocks["BLOCK_P"])
        together = _together(batch * blocks_d)
        dy = dy.movedim(1, -1).contiguous()
        dx, ddelta = x.new_empty(DIRECTIONS // together, *x.shape), None if delta is None else torch.empty_like(delta)
        dpairs, dseen, dleft = (x.new_empty(blocks_d, *t.shape) for t in (pairs, seen, left))
        dcarry = x.new_zeros(blocks_d, batch, *carry.shape)
        kernel = lowrank_backward_low if r <= LOW_RANK else lowrank_backward_high
        kernel[(batch, blocks_d, DIRECTIONS // together)](
            x, x if delta is None else delta, pairs, seen, left, carry, states, dy, dx, x if ddelta is None else ddelta,
            dpairs, dseen, dleft, dcarry, batch, D, H, W, r, chunks, length_bucket(H * W),
            TOGETHER=together, HAS_DELTA=delta is not None, **blocks,
        )  # fmt: skip
        ddelta = None if ddelta is None else ddelta.movedim(-1, 2)
        return dx.sum(0).movedim(-1, 1), ddelta, dpairs.sum(0), dseen.sum(0), dleft.sum(0), dcarry.sum((0, 1))


def _lowrank_blocks(D: int, r: int) -> dict[str, int]:
    """Return the places, ranks and channels of a block: 16 or more for a product."""
    block_r = max(LOW_RANK, triton.next_power_of_2(r))
    return {"Q": CHUNK, "BLOCK_R": block_r, "BLOCK_P": 32 if r <= LOW_RANK and D > 16 else 16}


def ss2d_lowrank_triton(
    x: Tensor, delta: Tensor | None, U: Tensor, sigma: Tensor, V: Tensor, B: Tensor, C: Tensor
) -> Tensor:
    """Compute ss2d_lowrank_reference in Triton, in float32.

    Raises:
        ValueError: if an image has 2^31 numbers or more.
    """
    if x[0].numel() >= 1 << 31:
        raise ValueError(f"impl='triton' takes images of fewer than 2^31 numbers; got {tuple(x.shape[1:])}.")
    with on_device_of(x):
        matrices = chunk_matrices(*at_places(U, sigma, V, B, C, CHUNK), CHUNK)
        return FusedLowRank.apply(x, delta, *matrices)
