"""The compiled scan of low rank as operators of torch, so that autograd, torch.compile and torch.export see them."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.allocator import allocate
from kernels.cpp_build import load_library, needs_gradients, register_operators, require_library, why_no_library
from kernels.selective_scan.cpu import MIN_TASKS
from kernels.ss2d.cpu import Image, Places, channels_last, empty_channels_last, image_of
from kernels.ss2d.lowrank import at_places
from kernels.ss2d.reference import DIRECTIONS

CHUNK, SPAN, CHANNELS = 8, 64, 64  # as in lowrank.cpp
SOURCE = Path(__file__).with_name("lowrank.cpp")


class _LowRank(ctypes.Structure):
    """`LowRank` of lowrank.cpp: all arguments of a call."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "rank", "parts", "threads")),
        ("places", Places),
        *((name, Image) for name in ("x", "delta", "y", "dx", "ddelta")),
        *((name, ctypes.c_void_p) for name in ("powers", "rows", "states", "dpowers", "drows")),
    ]


@functools.cache
def compiled_library() -> ctypes.CDLL | str:
    """Return the compiled library, or why there is none; the first call compiles it."""
    return load_library(SOURCE)


def why_unavailable(device: str, dtype: torch.dtype) -> str | None:
    """Return why the compiled scan cannot run on this device in this dtype, or None; the first call compiles it."""
    return why_no_library(device, dtype, compiled_library)


def _make_scan(x: Tensor, delta: Tensor | None, powers: Tensor, rows: Tensor, parts: int) -> _LowRank:
    batch, channels, height, width = x.shape
    scan = _LowRank(batch, channels, powers.shape[-1], parts, torch.get_num_threads(), Places(height, width))
    scan.x, scan.powers, scan.rows = image_of(x), powers.data_ptr(), rows.data_ptr()
    if delta is not None:
        scan.delta = image_of(delta)
    return scan


def _call(name: str, scan: _LowRank, dtype: torch.dtype) -> None:
    suffix = "double" if dtype == torch.float64 else "float"
    getattr(require_library(compiled_library()), f"{name}_{suffix}")(ctypes.byref(scan))


def _parts(x: Tensor, tasks: int) -> int:
    """Return how many parts the channels of a batch entry are cut into, so that there are as many tasks. Each part
    makes the matrices of all places again."""
    return max(1, min(-(-x.shape[1] // CHANNELS), tasks // x.shape[0]))


def _states_shape(x: Tensor, powers: Tensor) -> tuple[int, ...]:
    batch, channels, height, width = x.shape
    return batch, DIRECTIONS, -(-(height * width) // SPAN), powers.shape[-1], channels


def scan_forward(x: Tensor, delta: Tensor | None, powers: Tensor, rows: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Compute y from what `at_places` returns, and with `keep` the states before each span (else empty)."""
    x, delta = channels_last(x), None if delta is None else channels_last(delta)
    powers, rows = powers.contiguous(), rows.contiguous()
    # no sum here goes over parts, so how many there are may depend on the number of threads
    scan = _make_scan(x, delta, powers, rows, _parts(x, torch.get_num_threads() + x.shape[0] - 1))
    y, states = empty_channels_last(x), allocate(_states_shape(x, powers) if keep else (0,), x)
    scan.y, scan.states = image_of(y), states.data_ptr() if keep else None
    _call("forward", scan, x.dtype)
    return y, states


def _fake_forward(x: Tensor, delta: Tensor | None, powers: Tensor, rows: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return empty_channels_last(x), x.new_empty(_states_shape(x, powers) if keep else 0)


def scan_backward(
    dy: Tensor, x: Tensor, delta: Tensor | None, powers: Tensor, rows: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, delta (empty where there is none), powers and rows."""
    dy, x, delta = channels_last(dy), channels_last(x), None if delta is None else channels_last(delta)
    powers, rows = powers.contiguous(), rows.contiguous()
    scan = _make_scan(x, delta, powers, rows, _parts(x, MIN_TASKS))
    dx, ddelta = empty_channels_last(x), x.new_empty(0) if delta is None else empty_channels_last(delta)
    dpowers = x.new_empty(scan.parts, x.shape[0], *powers.shape)
    drows = x.new_empty(scan.parts, *rows.shape)
    scan.y, scan.dx = image_of(dy), image_of(dx)
    if delta is not None:
        scan.ddelta = image_of(ddelta)
    scan.states, scan.dpowers, scan.drows = states.data_ptr(), dpowers.data_ptr(), drows.data_ptr()
    _call("backward", scan, x.dtype)
    return dx, ddelta, dpowers.sum((0, 1)), drows.sum(0)


def _fake_backward(
    dy: Tensor, x: Tensor, delta: Tensor | None, powers: Tensor, rows: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ddelta = x.new_empty(0) if delta is None else empty_channels_last(delta)
    return empty_channels_last(x), ddelta, powers.new_empty(powers.shape), rows.new_empty(rows.shape)


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.has_states = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # zeros as large as all states would be made, and not used


def _gradients(ctx: FunctionCtx, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if not ctx.has_states:
        raise RuntimeError("This scan ran without gradients in mind (keep=False).")
    if dy is None:  # nothing depends on y
        return (None,) * 5
    x, delta, *others = ctx.saved_tensors
    dx, ddelta, *gradients = torch.ops.workbench.ss2d_lowrank_backward(dy, x, delta, *others)
    return dx, None if delta is None else ddelta, *gradients, None


def ss2d_lowrank_cpu(
    x: Tensor, delta: Tensor | None, U: Tensor, sigma: Tensor, V: Tensor, B: Tensor, C: Tensor
) -> Tensor:
    """Compute ss2d_lowrank_reference with the compiled operators."""
    given = [t for t in (x, delta, U, sigma, V, B, C) if t is not None]
    keep = needs_gradients("ss2d_lowrank", *given)
    powers, rows = at_places(U, sigma, V, B, C, CHUNK)
    y, _ = torch.ops.workbench.ss2d_lowrank(x, delta, powers, rows, keep)
    return y


if SOURCE.exists():  # an exported copy has no source, and must not define our operators a second time
    register_operators(
        "ss2d_lowrank",
        scan_forward,
        scan_backward,
        fakes=(_fake_forward, _fake_backward),
        gradients=_gradients,
        setup_context=_setup_context,
    )
