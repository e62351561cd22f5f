"""The compiled selective scan as operators of torch, so that autograd, torch.compile and torch.export see them."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.allocator import allocate
from kernels.cpp_build import lanes, load_library, needs_gradients, register_operators, require_library, why_no_library

MIN_TASKS = 16  # tasks of a backward pass, where there are channels enough
LOG2E = 1.4426950408889634
SOURCE = Path(__file__).with_name("cpu.cpp")


class Sizes(ctypes.Structure):
    """`Sizes` of cpu.cpp."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("batch", "channels", "length", "states", "groups", "queries", "inputs", "slices", "threads")
    ]


class _Strided(ctypes.Structure):
    """`Strided` of cpu.cpp: an address and the strides of a tensor [batch, channels, L]."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "channel", "time"))]


class Scan(ctypes.Structure):
    """`Scan` of cpu.cpp: all arguments of a call."""

    _fields_ = [
        ("size", Sizes),
        *((name, _Strided) for name in ("u", "delta", "y", "y_ones", "du", "ddelta")),
        *((name, ctypes.c_void_p) for name in ("A2", "B", "C", "state", "chunk_states", "dA", "dB", "dC", "starts")),
    ]


@functools.cache
def compiled_library() -> ctypes.CDLL | str:
    """Return the compiled library, or why there is none; the first call compiles it."""
    return load_library(SOURCE)


def why_unavailable(device: str, dtype: torch.dtype) -> str | None:
    """Return why the compiled scan cannot run on this device in this dtype, or None; the first call compiles it."""
    return why_no_library(device, dtype, compiled_library)


def _strided(t: Tensor) -> _Strided:
    return _Strided(t.data_ptr(), *t.stride())


def _with_unit_stride(t: Tensor) -> Tensor:
    """Return t [batch, channels, L] with its channels or its times contiguous, copied if neither are."""
    return t if 1 in t.stride()[1:] else t.contiguous()


def _empty_in_layout(t: Tensor, channels: int) -> Tensor:
    """Return an empty [batch, channels, L] in the memory layout of t [batch, another number, L]."""
    if t.stride(1) == 1 and t.shape[1] > 1:
        return allocate((t.shape[0], t.shape[2], channels), t).mT
    return allocate((t.shape[0], channels, t.shape[2]), t)


def _make_scan(u: Tensor, A: Tensor, B: Tensor, C: Tensor, inputs: int, slices: int) -> Scan:
    batch, channels, length = u.shape
    groups = B.shape[1]
    queries = C.shape[1] // groups
    threads = torch.get_num_threads()
    return Scan(Sizes(batch, channels, length, A.shape[1], groups, queries, inputs, slices, threads))


def _call(name: str, scan: Scan, dtype: torch.dtype) -> None:
    suffix = "double" if dtype == torch.float64 else "float"
    getattr(require_library(compiled_library()), f"{name}_{suffix}")(ctypes.byref(scan))


def _chunk_states_shape(u: Tensor, A: Tensor, B: Tensor, inputs: int) -> tuple[int, ...]:
    library = require_library(compiled_library())
    width = lanes(library, u)
    batch, channels, length = u.shape
    blocks = B.shape[1] * -(-channels // B.shape[1] // width)
    return batch, blocks, -(-length // library.chunk_steps()), inputs, A.shape[1], width


def scan_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute selective_scan_reference, and with `keep` what its backward pass needs.

    Returns:
        y; y of the ones (empty if there is one input); the last h [K, batch, D, N]; the states before each chunk (empty
        unless `keep`).
    """
    u, delta = _with_unit_stride(u), _with_unit_stride(delta)
    A2, rows_B, rows_C = (A * LOG2E).contiguous(), B.mT.contiguous(), C.mT.contiguous()
    last = h.clone(memory_format=torch.contiguous_format)
    scan = _make_scan(u, A, B, C, len(h), 1)
    outputs = [_empty_in_layout(u, u.shape[1] // B.shape[1] * C.shape[1]) for _ in range(len(h))]
    chunk_states = allocate(_chunk_states_shape(u, A, B, len(h)) if keep else (0,), u)
    scan.u, scan.delta, scan.y = _strided(u), _strided(delta), _strided(outputs[0])
    if len(h) == 2:
        scan.y_ones = _strided(outputs[1])
    scan.A2, scan.B, scan.C, scan.state = (t.data_ptr() for t in (A2, rows_B, rows_C, last))
    scan.chunk_states = chunk_states.data_ptr() if keep else None
    if starts is not None:
        starts = starts.contiguous()
        scan.starts = starts.data_ptr()
    _call("forward", scan, u.dtype)
    return outputs[0], outputs[1] if len(h) == 2 else u.new_empty(0), last, chunk_states


def _fake_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = [_empty_in_layout(u, u.shape[1] // B.shape[1] * C.shape[1]) for _ in range(len(h))]
    chunk_states = u.new_empty(_chunk_states_shape(u, A, B, len(h)) if keep else 0)
    last = torch.empty_like(h, memory_format=torch.contiguous_format)
    return outputs[0], outputs[1] if len(h) == 2 else u.new_empty(0), last, chunk_states


def scan_backward(
    dy: Tensor,
    dy_ones: Tensor,
    dh: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_states: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, delta, A, B, C and h."""
    inputs, groups, queries = len(dh), B.shape[1], C.shape[1] // B.shape[1]
    dy, dy_ones = _with_unit_stride(dy), _with_unit_stride(dy_ones) if inputs == 2 else dy_ones
    u, delta = _with_unit_stride(u), _with_unit_stride(delta)
    A2, rows_B, rows_C = (A * LOG2E).contiguous(), B.mT.contiguous(), C.mT.contiguous()
    dh = dh.clone(memory_format=torch.contiguous_format)
    batch, channels, length = u.shape
    slices = max(1, min(chunk_states.shape[1] // groups, MIN_TASKS // (batch * groups)))
    scan = _make_scan(u, A, B, C, inputs, slices)
    du, ddelta = _empty_in_layout(u, channels), _empty_in_layout(delta, channels)
    dA = u.new_zeros(batch, *A.shape)
    dB, dC = (u.new_zeros(slices, batch, heads, length, A.shape[1]) for heads in (groups, groups * queries))
    scan.u, scan.delta, scan.y, scan.du, scan.ddelta = (_strided(t) for t in (u, delta, dy, du, ddelta))
    if inputs == 2:
        scan.y_ones = _strided(dy_ones)
    scan.A2, scan.B, scan.C, scan.state, scan.chunk_states, scan.dA, scan.dB, scan.dC = (
        t.data_ptr() for t in (A2, rows_B, rows_C, dh, chunk_states, dA, dB, dC)
    )
    if starts is not None:
        starts = starts.contiguous()
        scan.starts = starts.data_ptr()
    _call("backward", scan, u.dtype)
    return du, ddelta, dA.sum(0), dB.sum(0).mT, dC.sum(0).mT, dh


def _fake_backward(
    dy: Tensor,
    dy_ones: Tensor,
    dh: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_states: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, ...]:
    rows = [t.new_empty(t.shape[0], t.shape[1], t.shape[3], t.shape[2]).mT for t in (B, C)]
    du, ddelta = _empty_in_layout(u, u.shape[1]), _empty_in_layout(delta, u.shape[1])
    return du, ddelta, A.new_empty(A.shape), *rows, dh.new_empty(dh.shape)


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
    u, delta, A, B, C, h, starts, keep = inputs
    ctx.has_chunk_states = keep
    ctx.save_for_backward(u, delta, A, B, C, output[3], starts)
    ctx.shapes = [each.shape for each in output[:3]]
    ctx.set_materialize_grads(False)  # zeros as large as all chunk states would be made, and not used


def _gradients(
    ctx: FunctionCtx, dy: Tensor | None, dy_ones: Tensor | None, dh: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    u, delta, A, B, C, chunk_states, starts = ctx.saved_tensors
    if not ctx.has_chunk_states:
        raise RuntimeError("This scan ran without gradients in mind (keep=False).")
    dy, dy_ones, dh = (
        u.new_zeros(shape) if d is None else d for d, shape in zip((dy, dy_ones, dh), ctx.shapes, strict=True)
    )
    gradients = torch.ops.workbench.selective_scan_backward(dy, dy_ones, dh, u, delta, A, B, C, chunk_states, starts)
    return *gradients, None, None


def selective_scan_cpu(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Compute selective_scan_reference with the compiled operators."""
    keep = needs_gradients("selective_scan", u, delta, A, B, C, h)
    y, y_ones, last, _ = torch.ops.workbench.selective_scan(u, delta, A, B, C, h, starts, keep)
    return ((y, y_ones) if len(h) == 2 else (y,)), last


if SOURCE.exists():  # an exported copy has no source, and must not define our operators a second time
    register_operators(
        "selective_scan",
        scan_forward,
        scan_backward,
        fakes=(_fake_forward, _fake_backward),
        gradients=_gradients,
        setup_context=_setup_context,
    )
