"""The compiled selective scan as operators of torch, so that autograd, torch.compile and torch.export see them."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from kernels.cpp_build import lanes, library, loaded, needs_gradients, register, why_not_compiled
from kernels.allocator import room

SLICES = 16  # tasks of a backward pass at least, where there are channels enough
LOG2E = 1.4426950408889634


class _Sizes(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("batch", "channels", "length", "states", "groups", "readings", "inputs", "slices", "threads")]


class _Strided(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("channel", ctypes.c_int64), ("time", ctypes.c_int64)]


class _Scan(ctypes.Structure):
    _fields_ = [
        ("size", _Sizes), *((n, _Strided) for n in ("u", "delta", "y", "y_ones", "du", "ddelta")),
        *((n, ctypes.c_void_p) for n in ("A2", "B", "C", "state", "begins", "dA", "dB", "dC", "starts")),
    ]  # fmt: skip


SOURCE = Path(__file__).with_name("cpu.cpp")


@functools.cache
def native():
    return library(SOURCE)


def _strided(t: Tensor) -> _Strided:
    """Of t [batch, channels, L]."""
    return _Strided(t.data_ptr(), *t.stride())


def _friendly(t: Tensor) -> Tensor:
    """Channels or time contiguous."""
    return t if 1 in t.stride()[1:] else t.contiguous()


def _like(t: Tensor, channels: int) -> Tensor:
    """An empty [batch, channels, L] in the layout of t [batch, some, L]."""
    if t.stride(1) == 1 and t.shape[1] > 1:
        return room((t.shape[0], t.shape[2], channels), t).mT
    return room((t.shape[0], channels, t.shape[2]), t)


def _scan(u, A, B, C, inputs: int, slices: int) -> _Scan:
    batch, channels, length = u.shape
    groups = B.shape[1]
    return _Scan(_Sizes(batch, channels, length, A.shape[1], groups, C.shape[1] // groups, inputs, slices, torch.get_num_threads()))


def _call(name: str, scan: _Scan, dtype: torch.dtype) -> None:
    getattr(loaded(native()), f"{name}_{'double' if dtype == torch.float64 else 'float'}")(ctypes.byref(scan))


def _begins(u, A, B, inputs: int) -> tuple[int, ...]:
    width = lanes(loaded(native()), u)
    batch, channels, length = u.shape
    blocks = B.shape[1] * -(-channels // B.shape[1] // width)
    return batch, blocks, -(-length // loaded(native()).chunk_steps()), inputs, A.shape[1], width


def scan_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, y of ones (empty if there is one input), the last h [K, batch, D, N], the states at the chunks' starts (empty unless `keep`)."""
    u, delta, A2, rows_B, rows_C = _friendly(u), _friendly(delta), (A * LOG2E).contiguous(), B.mT.contiguous(), C.mT.contiguous()
    last = h.clone(memory_format=torch.contiguous_format)
    scan = _scan(u, A, B, C, len(h), 1)
    outputs = [_like(u, u.shape[1] // B.shape[1] * C.shape[1]) for _ in range(len(h))]
    begins = room(_begins(u, A, B, len(h)) if keep else (0,), u)
    scan.u, scan.delta, scan.y = _strided(u), _strided(delta), _strided(outputs[0])
    if len(h) == 2:
        scan.y_ones = _strided(outputs[1])
    scan.A2, scan.B, scan.C, scan.state = (t.data_ptr() for t in (A2, rows_B, rows_C, last))
    scan.begins = begins.data_ptr() if keep else None
    if starts is not None:
        starts = starts.contiguous()
        scan.starts = starts.data_ptr()
    _call("forward", scan, u.dtype)
    return outputs[0], outputs[1] if len(h) == 2 else u.new_empty(0), last, begins


def _fake_forward(u, delta, A, B, C, h, starts, keep):
    outputs = [_like(u, u.shape[1] // B.shape[1] * C.shape[1]) for _ in range(len(h))]
    begins = u.new_empty(_begins(u, A, B, len(h)) if keep else 0)
    return outputs[0], outputs[1] if len(h) == 2 else u.new_empty(0), torch.empty_like(h, memory_format=torch.contiguous_format), begins


def scan_backward(
    dy: Tensor,
    dy_ones: Tensor,
    dh: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    begins: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, delta, A, B, C and h."""
    inputs, groups, readings = len(dh), B.shape[1], C.shape[1] // B.shape[1]
    dy, dy_ones = _friendly(dy), _friendly(dy_ones) if inputs == 2 else dy_ones
    u, delta, A2, rows_B, rows_C = _friendly(u), _friendly(delta), (A * LOG2E).contiguous(), B.mT.contiguous(), C.mT.contiguous()
    dh = dh.clone(memory_format=torch.contiguous_format)
    batch, channels, length = u.shape
    slices = max(1, min(begins.shape[1] // groups, SLICES // (batch * groups)))
    scan = _scan(u, A, B, C, inputs, slices)
    du, ddelta = _like(u, channels), _like(delta, channels)
    dA = u.new_zeros(batch, *A.shape)
    dB, dC = (u.new_zeros(slices, batch, heads, length, A.shape[1]) for heads in (groups, groups * readings))
    scan.u, scan.delta, scan.y, scan.du, scan.ddelta = (_strided(t) for t in (u, delta, dy, du, ddelta))
    if inputs == 2:
        scan.y_ones = _strided(dy_ones)
    scan.A2, scan.B, scan.C, scan.state, scan.begins, scan.dA, scan.dB, scan.dC = (
        t.data_ptr() for t in (A2, rows_B, rows_C, dh, begins, dA, dB, dC)
    )
    if starts is not None:
        starts = starts.contiguous()
        scan.starts = starts.data_ptr()
    _call("backward", scan, u.dtype)
    return du, ddelta, dA.sum(0), dB.sum(0).mT, dC.sum(0).mT, dh


def _fake_backward(dy, dy_ones, dh, u, delta, A, B, C, begins, starts):
    rows = [t.new_empty(t.shape[0], t.shape[1], t.shape[3], t.shape[2]).mT for t in (B, C)]
    return _like(u, u.shape[1]), _like(delta, u.shape[1]), A.new_empty(A.shape), *rows, dh.new_empty(dh.shape)


def _setup(ctx, inputs, output) -> None:
    u, delta, A, B, C, h, starts, keep = inputs
    ctx.has_begins = keep
    ctx.save_for_backward(u, delta, A, B, C, output[3], starts)


def _backward(ctx, dy, dy_ones, dh, _):
    u, delta, A, B, C, begins, starts = ctx.saved_tensors
    if not ctx.has_begins:
        raise RuntimeError("This scan ran without gradients in mind (keep=False).")
    gradients = torch.ops.workbench.selective_scan_backward(dy, dy_ones, dh, u, delta, A, B, C, begins, starts)
    return *gradients, None, None


def selective_scan_cpu(u, delta, A, B, C, h, starts=None) -> tuple[tuple[Tensor, ...], Tensor]:
    """As selective_scan_reference."""
    keep = needs_gradients("selective_scan", u, delta, A, B, C, h)
    y, y_ones, last, _ = torch.ops.workbench.selective_scan(u, delta, A, B, C, h, starts, keep)
    return ((y, y_ones) if len(h) == 2 else (y,)), last


def why_not(device: str, dtype: torch.dtype) -> str | None:
    """Why the compiled scan cannot run on this device in this dtype; None if it can. The first call compiles it."""
    return why_not_compiled(device, dtype, native)


if SOURCE.exists():  # an exported copy has none, and leaves our operators alone
    register("selective_scan", scan_forward, scan_backward, (_fake_forward, _fake_backward), _backward, _setup)
