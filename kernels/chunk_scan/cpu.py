"""The compiled chunk scan as operators of torch, so that autograd, torch.compile and torch.export see them."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from kernels.allocator import allocate
from kernels.cpp_build import lanes, load_library, needs_gradients, register_operators, require_library, why_no_library

SOURCE = Path(__file__).with_name("cpu.cpp")
MIN_TASKS = 64  # tasks of a backward pass, where there are heads enough (ours)
SIZES = (
    "batch",
    "length",
    "heads",
    "groups",
    "groups_of_C",
    "queries",
    "states",
    "channels",
    "slices",
    "threads",
)
POINTERS = (
    "x",
    "B",
    "C",
    "log_decay",
    "document_ids",
    "state",
    "chunk_states",
    "y",
    "dx",
    "dB",
    "dC",
    "dlog_decay",
)


class _Scan(ctypes.Structure):
    """`Scan` of cpu.cpp: all arguments of a call."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, ctypes.c_void_p) for name in POINTERS),
    ]


@functools.cache
def compiled_library() -> ctypes.CDLL | str:
    """Return the compiled library, or why there is none; the first call compiles it."""
    return load_library(SOURCE)


def why_unavailable(device: str, dtype: torch.dtype) -> str | None:
    """Return why the compiled scan cannot run on this device in this dtype, or None; the first call compiles it."""
    return why_no_library(device, dtype, compiled_library)


def _call(name: str, tensors: dict[str, Tensor | None], x: Tensor, B: Tensor, C: Tensor, slices: int = 1) -> None:
    sizes = *x.shape[:3], B.shape[2], *C.shape[2:], x.shape[3], slices, torch.get_num_threads()
    pointers = dict(x=x, B=B, C=C) | tensors
    scan = _Scan(*sizes, **{name: None if t is None else t.data_ptr() for name, t in pointers.items()})
    suffix = "double" if x.dtype == torch.float64 else "float"
    getattr(require_library(compiled_library()), f"{name}_{suffix}")(ctypes.byref(scan))


def _chunk_states_shape(x: Tensor, N: int) -> tuple[int, ...]:
    library = require_library(compiled_library())
    width = lanes(library, x)
    return x.shape[0], x.shape[2], -(-x.shape[1] // library.chunk_steps()), N, -(-x.shape[3] // width) * width


def _output_shape(x: Tensor, C: Tensor) -> tuple[int, ...]:
    return *x.shape[:3], C.shape[3], x.shape[3]


def scan_forward(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, S: Tensor, document_ids: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute chunk_scan_reference, and with `keep` what its backward pass needs.

    Returns:
        y; the last S; the states before each chunk (empty unless `keep`).
    """
    x, B, C, decay = x.contiguous(), B.contiguous(), C.contiguous(), log_decay.double().contiguous()
    last = S.clone(memory_format=torch.contiguous_format)
    y = allocate(_output_shape(x, C), x)
    chunk_states = allocate(_chunk_states_shape(x, B.shape[3]) if keep else (0,), x)
    ids = None if document_ids is None else document_ids.long().contiguous()
    tensors = dict(log_decay=decay, document_ids=ids, state=last, chunk_states=chunk_states if keep else None, y=y)
    _call("forward", tensors, x, B, C)
    return y, last, chunk_states


def _fake_forward(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, S: Tensor, document_ids: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(_output_shape(x, C)),
        torch.empty_like(S, memory_format=torch.contiguous_format),
        x.new_empty(_chunk_states_shape(x, B.shape[3]) if keep else 0),
    )


def scan_backward(
    dy: Tensor,
    dS: Tensor,
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_states: Tensor,
    document_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, log_decay, B, C and S."""
    x, B, C, dy = x.contiguous(), B.contiguous(), C.contiguous(), dy.contiguous()
    decay = log_decay.double().contiguous()
    dS = dS.clone(memory_format=torch.contiguous_format)
    heads, groups = x.shape[2], B.shape[2]
    slices = max(1, min(heads // groups, MIN_TASKS // (x.shape[0] * groups)))
    slices_of_C = slices if C.shape[2] < heads else 1
    dx, ddecay = (allocate(t.shape, t) for t in (x, decay))
    dB, dC = allocate((slices, *B.shape), B), allocate((slices_of_C, *C.shape), C)
    ids = None if document_ids is None else document_ids.long().contiguous()
    tensors = dict(log_decay=decay, document_ids=ids, chunk_states=chunk_states, state=dS, y=dy)
    _call("backward", tensors | dict(dx=dx, dB=dB, dC=dC, dlog_decay=ddecay), x, B, C, slices)
    dB, dC = (t.sum(0) if len(t) > 1 else t[0] for t in (dB, dC))
    return dx, ddecay.to(x.dtype), dB, dC, dS


def _fake_backward(
    dy: Tensor,
    dS: Tensor,
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_states: Tensor,
    document_ids: Tensor | None,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, log_decay, B, C, dS))


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
    *tensors, _, document_ids, keep = inputs
    ctx.has_chunk_states = keep
    ctx.save_for_backward(*tensors, output[2], document_ids)
    ctx.shapes = [each.shape for each in output[:2]]
    ctx.set_materialize_grads(False)  # zeros as large as all chunk states would be made, and not used


def _gradients(ctx: FunctionCtx, dy: Tensor | None, dS: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if not ctx.has_chunk_states:
        raise RuntimeError("This scan ran without gradients in mind (keep=False).")
    saved = ctx.saved_tensors  # once: with activation checkpointing a second look is refused
    dy, dS = (saved[0].new_zeros(shape) if d is None else d for d, shape in zip((dy, dS), ctx.shapes, strict=True))
    return *torch.ops.workbench.chunk_scan_backward(dy, dS, *saved), None, None


def chunk_scan_cpu(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, S: Tensor, document_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute chunk_scan_reference with the compiled operators."""
    keep = needs_gradients("chunk_scan", x, log_decay, B, C, S)
    y, last, _ = torch.ops.workbench.chunk_scan(x, log_decay, B, C, S, document_ids, keep)
    return y, last


if SOURCE.exists():  # an exported copy has no source, and must not define our operators a second time
    register_operators(
        "chunk_scan",
        scan_forward,
        scan_backward,
        fakes=(_fake_forward, _fake_backward),
        gradients=_gradients,
        setup_context=_setup_context,
    )
