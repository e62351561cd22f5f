"""The compiled selective scan over images as operators of torch, so that autograd, torch.compile and torch.export see
them."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.allocator import allocate
from kernels.cpp_build import lanes, load_library, needs_gradients, register_operators, require_library, why_no_library
from kernels.selective_scan.cpu import LOG2E, MIN_TASKS, Scan, Sizes
from kernels.ss2d.reference import DIRECTIONS, rows_of, to_image

SOURCE = Path(__file__).with_name("cpu.cpp")


class Places(ctypes.Structure):
    """`Places` of image.h."""

    _fields_ = [("height", ctypes.c_int64), ("width", ctypes.c_int64)]


class Image(ctypes.Structure):
    """`Image` of image.h: an address and strides."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "direction", "row", "column")),
    ]


class _Scan2D(ctypes.Structure):
    """`Scan2D` of cpu.cpp: all arguments of a call."""

    _fields_ = [
        ("scan", Scan),
        ("places", Places),
        *((name, Image) for name in ("x", "delta", "y", "dx", "ddelta")),
    ]


@functools.cache
def compiled_library() -> ctypes.CDLL | str:
    """Return the compiled library, or why there is none; the first call compiles it."""
    return load_library(SOURCE)


def why_unavailable(device: str, dtype: torch.dtype) -> str | None:
    """Return why the compiled scan cannot run on this device in this dtype, or None; the first call compiles it."""
    return why_no_library(device, dtype, compiled_library)


def image_of(t: Tensor) -> Image:
    """Describe t [batch, D, H, W] or [batch, 4, D, H, W], whose channels are next to each other."""
    direction = t.stride(1) if t.ndim == 5 else 0
    return Image(t.data_ptr(), t.stride(0), direction, *t.stride()[-2:])


def channels_last(t: Tensor) -> Tensor:
    """Return t [..., D, H, W] with its channels next to each other in memory, copied if they are not."""
    return t if t.stride(-3) == 1 else t.movedim(-3, -1).contiguous().movedim(-1, -3)


def empty_channels_last(t: Tensor) -> Tensor:
    """Return an empty tensor [..., D, H, W] of the shape of t with its channels next to each other."""
    *before, channels, height, width = t.shape
    return allocate((*before, height, width, channels), t).movedim(-1, -3)


def _from_rows(t: Tensor, height: int, width: int) -> Tensor:
    """Return t [batch, 4, L, N] as [batch, 4, N, H, W]."""
    return torch.stack([to_image(t[:, k].mT, k, height, width) for k in range(DIRECTIONS)], 1)


def _make_scan(x: Tensor, delta: Tensor, A: Tensor, slices: int) -> _Scan2D:
    batch, channels, height, width = x.shape
    length, states, threads = height * width, A.shape[2], torch.get_num_threads()
    sizes = Sizes(batch, DIRECTIONS * channels, length, states, DIRECTIONS, 1, 1, slices, threads)
    scan = _Scan2D(Scan(sizes), Places(height, width))
    scan.x, scan.delta = image_of(x), image_of(delta)
    return scan


def _call(name: str, scan: _Scan2D, dtype: torch.dtype) -> None:
    suffix = "double" if dtype == torch.float64 else "float"
    getattr(require_library(compiled_library()), f"{name}_{suffix}")(ctypes.byref(scan))


def _chunk_states_shape(x: Tensor, A: Tensor) -> tuple[int, ...]:
    library = require_library(compiled_library())
    width = lanes(library, x)
    batch, channels, height, rows = x.shape
    return batch, DIRECTIONS * -(-channels // width), -(-(height * rows) // library.chunk_steps()), A.shape[2], width


def scan_forward(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Compute ss2d_reference: y, and with `keep` the states before each chunk (else empty)."""
    x, delta = channels_last(x), channels_last(delta)
    A2, rows_B, rows_C = (A * LOG2E).contiguous(), rows_of(B), rows_of(C)
    scan, y = _make_scan(x, delta, A, 1), empty_channels_last(x)
    chunk_states = allocate(_chunk_states_shape(x, A) if keep else (0,), x)
    scan.y = image_of(y)
    scan.scan.A2, scan.scan.B, scan.scan.C = (t.data_ptr() for t in (A2, rows_B, rows_C))
    scan.scan.chunk_states = chunk_states.data_ptr() if keep else None
    _call("forward", scan, x.dtype)
    return y, chunk_states


def _fake_forward(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return empty_channels_last(x), x.new_empty(_chunk_states_shape(x, A) if keep else 0)


def scan_backward(
    dy: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, delta, A, B and C."""
    dy, x, delta = channels_last(dy), channels_last(x), channels_last(delta)
    A2, rows_B, rows_C = (A * LOG2E).contiguous(), rows_of(B), rows_of(C)
    batch, _, height, width = x.shape
    slices = max(1, min(chunk_states.shape[1] // DIRECTIONS, MIN_TASKS // batch))
    scan, dx, ddelta = _make_scan(x, delta, A, slices), empty_channels_last(x), empty_channels_last(delta)
    dA = x.new_zeros(batch, *A.shape)
    dB, dC = (x.new_zeros(slices, *rows_B.shape) for _ in range(2))
    scan.y, scan.dx, scan.ddelta = image_of(dy), image_of(dx), image_of(ddelta)
    names = "A2", "B", "C", "chunk_states", "dA", "dB", "dC"
    for name, t in zip(names, (A2, rows_B, rows_C, chunk_states, dA, dB, dC), strict=True):
        setattr(scan.scan, name, t.data_ptr())
    _call("backward", scan, x.dtype)
    return dx, ddelta, dA.sum(0), _from_rows(dB.sum(0), height, width), _from_rows(dC.sum(0), height, width)


def _fake_backward(
    dy: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_states: Tensor
) -> tuple[Tensor, ...]:
    rows = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (B, C))
    return empty_channels_last(x), empty_channels_last(delta), A.new_empty(A.shape), *rows


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.has_chunk_states = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # zeros as large as all chunk states would be made, and not used


def _gradients(ctx: FunctionCtx, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if not ctx.has_chunk_states:
        raise RuntimeError("This scan ran without gradients in mind (keep=False).")
    if dy is None:  # nothing depends on y
        return (None,) * 6
    return *torch.ops.workbench.ss2d_backward(dy, *ctx.saved_tensors), None


def ss2d_cpu(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Compute ss2d_reference with the compiled operators."""
    y, _ = torch.ops.workbench.ss2d(x, delta, A, B, C, needs_gradients("ss2d", x, delta, A, B, C))
    return y


if SOURCE.exists():  # an exported copy has no source, and must not define our operators a second time
    register_operators(
        "ss2d",
        scan_forward,
        scan_backward,
        fakes=(_fake_forward, _fake_backward),
        gradients=_gradients,
        setup_context=_setup_context,
    )
