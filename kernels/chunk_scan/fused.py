"""The chunk scan on a GPU: launches of the Triton kernels in fused_kernels.py."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

try:
    import triton
except ImportError:  # in a try block, so that transformers loads an exported copy on a machine without Triton
    raise

from kernels.autotune import PROGRAMS, length_bucket, on_device_of
from kernels.chunk_scan.fused_kernels import (
    carry_kernel,
    keys_gradient_kernel,
    outputs_kernel,
    values_gradient_kernel,
)
from kernels.products import cumulative_sum

COLUMN_MULTIPLE = 16  # rows are padded to it: those that start at whole vectors need half the registers
MAX_STEPS = 64  # steps of a chunk; an offset inside it, times the numbers of all heads of a step, is counted in 32 bits


class _Decays(NamedTuple):
    """The decays of all steps [batch, H, chunks Q] and chunks, in float32; fused_kernels.py says what they mean."""

    high: Tensor
    low: Tensor
    ids: Tensor  # [batch, chunks Q]
    decay_in: Tensor
    decay_out: Tensor
    chunk_decay: Tensor  # [batch, H, chunks]


def _decays(log_decay: Tensor, document_ids: Tensor | None, Q: int) -> _Decays:
    padding = -log_decay.shape[1] % Q
    log_decay = F.pad(log_decay.mT, (0, padding)).unflatten(2, (-1, Q))  # [batch, H, chunks, Q]
    # one that is not finite becomes NaN at its own step only: in the sum it would reach the chunk's other documents
    finite = log_decay.isfinite()
    summed = cumulative_sum(log_decay.masked_fill(~finite, 0).double()) + (log_decay - log_decay)
    decay_in, decay_out = summed.exp(), (summed[..., -1:] - summed).exp()
    chunk_decay = decay_in[..., -1]
    if document_ids is None:
        ids = log_decay.new_zeros(1, dtype=torch.int32)
    else:
        ids = F.pad(document_ids.double(), (0, padding), mode="replicate").int().unflatten(1, (-1, Q))[:, None]
        previous = torch.cat([ids[:, :, :1, 0], ids[:, :, :-1, -1]], 2)
        decay_in = decay_in.masked_fill(ids != previous[..., None], -1)
        decay_out = decay_out.masked_fill(ids != ids[..., -1:], -1)
        chunk_decay = chunk_decay.masked_fill(ids[..., -1] != previous, -1)
    high = summed.float()
    low = (summed - high).float()
    tensors = high, low, ids, decay_in.float(), decay_out.float(), chunk_decay.float()
    return _Decays(*(t.contiguous() for t in tensors))


def _block_sizes(L: int, N: int, P: int, dtype: torch.dtype) -> dict[str, int]:
    """Return the steps, states and channels of a block: as many as fit in registers, and 16 or more for a product."""
    limits = (32, 32, 16) if dtype == torch.float32 else (64, 64, 32)
    return {
        name: min(limit, max(16, triton.next_power_of_2(size)))
        for name, size, limit in zip(("Q", "BLOCK_N", "BLOCK_P"), (L, N, P), limits, strict=True)
    }


def _heads_of_a_slice(programs: int, per_group: int) -> int:
    """Return the heads whose gradients of B and C a program adds up: all of a group, or fewer where those are no
    PROGRAMS, because every slice of a group has a dB and dC of its own."""
    return triton.cdiv(per_group, min(per_group, triton.cdiv(PROGRAMS, programs)))


def _padded(t: Tensor, *columns: int) -> Tensor:
    """Return t with that many zeros after each of its last dimensions, the last first; torch copies to add none."""
    return F.pad(t, [n for count in columns for n in (0, count)]) if any(columns) else t


class FusedScan(torch.autograd.Function):
    """(x, log_decay, B, C, S, document_ids) -> (y, last S), both float32, with gradients for all but document_ids."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, S: Tensor, document_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch, L, H, P = x.shape
        N, R, blocks = B.shape[3], C.shape[3], _block_sizes(L, B.shape[3], P, x.dtype)
        per_B, per_C = H // B.shape[2], H // C.shape[2]
        x, B, C, S = (t.contiguous() for t in (x, B, C, S))
        decays = _decays(log_decay, document_ids, blocks["Q"])
        chunks = decays.chunk_decay.shape[2]
        blocks_n, blocks_p = triton.cdiv(N, blocks["BLOCK_N"]), triton.cdiv(P, blocks["BLOCK_P"])
        states, last = B.new_empty(batch, H, chunks, N, P), torch.empty_like(S)
        y = S.new_empty(batch, L, H, R, P)
        sizes = N, P, chunks, length_bucket(L)
        documents = document_ids is not None
        carried = B, x, decays.decay_out, decays.chunk_decay, S, states, last
        carry_kernel[(batch * H, blocks_n, blocks_p)](
            *carried, L, H, per_B, *sizes, R=1, REVERSE=False, DOCUMENTS=documents, **blocks
        )
        within = x, B, C, decays.high, decays.low, decays.ids, decays.decay_in, states, y
        outputs_kernel[(batch * H, chunks, blocks_p)](
            *within, L, H, per_B, per_C, *sizes, R=R, DOCUMENTS=documents, **blocks
        )
        ctx.save_for_backward(x, B, C, states, document_ids, log_decay)
        ctx.blocks = blocks
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor, dS: Tensor) -> tuple[Tensor | None, ...]:
        x, B, C, states, document_ids, log_decay = ctx.saved_tensors
        batch, L, H, P = x.shape
        (G, N), R, Q = B.shape[2:], C.shape[3], ctx.blocks["Q"]
        per_B, per_C = H // G, H // C.shape[2]
        dy, dS = dy.to(x.dtype).contiguous(), dS.contiguous()
        decays = _decays(log_decay, document_ids, Q)
        chunks = decays.chunk_decay.shape[2]
        blocks_n, blocks_p = triton.cdiv(N, ctx.blocks["BLOCK_N"]), triton.cdiv(P, ctx.blocks["BLOCK_P"])
        # the sums over a group's heads take registers
        keys_block_n = ctx.blocks["BLOCK_N"] if per_B == 1 else min(32, ctx.blocks["BLOCK_N"])
        keys_blocks_n = triton.cdiv(N, keys_block_n)
        dstates, dS_first = torch.empty_like(states), torch.empty_like(dS)
        heads = _heads_of_a_slice(batch * G * chunks * keys_blocks_n, per_B)
        slices = triton.cdiv(per_B, heads)
        dx, dB, dC = torch.empty_like(x), B.new_empty(slices, *B.shape), C.new_empty(min(slices, per_C), *C.shape)
        dlog_values, dlog_keys = (dS.new_empty(n, batch, H, chunks * Q) for n in (blocks_p, keys_blocks_n))
        sizes = N, P, chunks, length_bucket(L)
        options = dict(R=R, DOCUMENTS=document_ids is not None, **ctx.blocks)
        carried = C, dy, decays.decay_in, decays.chunk_decay, dS, dstates, dS_first
        carry_kernel[(batch * H, blocks_n, blocks_p)](*carried, L, H, per_C, *sizes, REVERSE=True, **options)
        within = x, B, C, dy, decays.high, decays.low, decays.ids
        values = *within, decays.decay_out, decays.chunk_decay, states, dstates, dx, dlog_values
        values_gradient_kernel[(batch * H, chunks, blocks_p)](*values, L, H, per_B, per_C, *sizes, **options)
        keys = *within, decays.decay_in, decays.decay_out, states, dstates, dB, dC, dlog_keys
        options["BLOCK_N"] = keys_block_n
        keys_gradient_kernel[(batch * G * slices, chunks, keys_blocks_n)](
            *keys, L, H, per_B, per_C, heads, *sizes, SHARED=per_C > 1, **options
        )
        dB, dC = (t.sum(0) if len(t) > 1 else t[0] for t in (dB, dC))
        dlog_decay = (dlog_values.sum(0) + dlog_keys.sum(0))[..., :L].mT
        return dx, dlog_decay.to(log_decay.dtype), dB, dC, dS_first, None


def chunk_scan_triton(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, S: Tensor, document_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute chunk_scan_reference in Triton: x, B and C in float32 or bfloat16, all else in float32.

    N and P are padded with zeros to a multiple of COLUMN_MULTIPLE.

    Raises:
        ValueError: if a chunk of all heads has 2^31 numbers or more.
    """
    P, N = x.shape[-1], B.shape[-1]
    if MAX_STEPS * x.shape[2] * C.shape[3] * (max(P, N) + COLUMN_MULTIPLE) >= 1 << 31:
        raise ValueError(
            f"impl='triton' takes rows of at most {(1 << 31) // MAX_STEPS} numbers; "
            f"got H {x.shape[2]}, R {C.shape[3]}, P {P}, N {N}."
        )
    x, B, C = (_padded(t, -t.shape[-1] % COLUMN_MULTIPLE) for t in (x, B, C))
    S = _padded(S, -P % COLUMN_MULTIPLE, -N % COLUMN_MULTIPLE)
    with on_device_of(x):
        y, S = FusedScan.apply(x, log_decay, B, C, S, document_ids)
    return y[..., :P], S[..., :N, :P]
