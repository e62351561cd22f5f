"""The compiled chunk scan as operators of torch, so that autograd, torch.compile and torch.export see them."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from kernels.cpp_build import lanes, library, loaded, needs_gradients, register, why_not_compiled
from kernels.allocator import room


class _Scan(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("batch", "length", "heads", "readings", "states", "channels", "threads")]
    _fields_ += [
        (n, ctypes.c_void_p) for n in ("x", "B", "C", "log_decay", "document_ids", "state", "begins", "y", "dx", "dB", "dC", "dlog_decay")
    ]


SOURCE = Path(__file__).with_name("cpu.cpp")


@functools.cache
def native():
    return library(SOURCE)


def _call(name: str, x: Tensor, C: Tensor, tensors: dict[str, Tensor | None]) -> None:
    batch, length, heads, channels = x.shape
    sizes = batch, length, heads, C.shape[3], C.shape[4], channels, torch.get_num_threads()
    scan = _Scan(*sizes, **{name: None if t is None else t.data_ptr() for name, t in tensors.items()})
    getattr(loaded(native()), f"{name}_{'double' if x.dtype == torch.float64 else 'float'}")(ctypes.byref(scan))


def _begins(x: Tensor, N: int) -> tuple[int, ...]:
    width = lanes(loaded(native()), x)
    return x.shape[0], x.shape[2], -(-x.shape[1] // loaded(native()).chunk_steps()), N, -(-x.shape[3] // width) * width


def scan_forward(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, S: Tensor, document_ids: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last S, the states at the chunks' starts (empty unless `keep`)."""
    x, B, C, decay = x.contiguous(), B.contiguous(), C.contiguous(), log_decay.double().contiguous()
    last = S.clone(memory_format=torch.contiguous_format)
    y = room((*C.shape[:4], x.shape[3]), x)
    begins = room(_begins(x, B.shape[3]) if keep else (0,), x)
    ids = None if document_ids is None else document_ids.long().contiguous()
    tensors = dict(x=x, B=B, C=C, log_decay=decay, document_ids=ids, state=last, begins=begins if keep else None, y=y)
    _call("forward", x, C, tensors)
    return y, last, begins


def _fake_forward(x, log_decay, B, C, S, document_ids, keep):
    return (
        x.new_empty(*C.shape[:4], x.shape[3]),
        torch.empty_like(S, memory_format=torch.contiguous_format),
        x.new_empty(_begins(x, B.shape[3]) if keep else 0),
    )


def scan_backward(
    dy: Tensor, dS: Tensor, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, begins: Tensor, document_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, log_decay, B, C and S."""
    x, B, C, dy, decay = x.contiguous(), B.contiguous(), C.contiguous(), dy.contiguous(), log_decay.double().contiguous()
    dS = dS.clone(memory_format=torch.contiguous_format)
    dx, dB, dC, ddecay = (room(t.shape, t) for t in (x, B, C, decay))
    ids = None if document_ids is None else document_ids.long().contiguous()
    tensors = dict(x=x, B=B, C=C, log_decay=decay, document_ids=ids, state=dS, begins=begins, y=dy, dx=dx, dB=dB, dC=dC, dlog_decay=ddecay)
    _call("backward", x, C, tensors)
    return dx, ddecay.to(x.dtype), dB, dC, dS


def _fake_backward(dy, dS, x, log_decay, B, C, begins, document_ids):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, log_decay, B, C, dS))


def _setup(ctx, inputs, output) -> None:
    *tensors, _, document_ids, keep = inputs
    ctx.has_begins = keep
    ctx.save_for_backward(*tensors, output[2], document_ids)


def _backward(ctx, dy, dS, _):
    if not ctx.has_begins:
        raise RuntimeError("This scan ran without gradients in mind (keep=False).")
    return *torch.ops.workbench.chunk_scan_backward(dy, dS, *ctx.saved_tensors), None, None


def chunk_scan_cpu(x, log_decay, B, C, S, document_ids=None) -> tuple[Tensor, Tensor]:
    """As chunk_scan_reference."""
    keep = needs_gradients("chunk_scan", x, log_decay, B, C, S)
    y, last, _ = torch.ops.workbench.chunk_scan(x, log_decay, B, C, S, document_ids, keep)
    return y, last


def why_not(device: str, dtype: torch.dtype) -> str | None:
    """Why the compiled scan cannot run on this device in this dtype; None if it can. The first call compiles it."""
    return why_not_compiled(device, dtype, native)


if SOURCE.exists():  # an exported copy has none, and leaves our operators alone
    register("chunk_scan", scan_forward, scan_backward, (_fake_forward, _fake_backward), _backward, _setup)
