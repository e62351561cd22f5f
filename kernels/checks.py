"""What every operator asks of its tensors, besides shapes."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

MAX_STATES = 1024  # per channel or head: what the kernels are written and checked for
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def has_values(t: Tensor) -> bool:
    """Whether a look at t's values costs nothing: on a CPU (elsewhere it waits for the device), not a fake one, not while compiling."""
    real = type(t) in (Tensor, torch.nn.Parameter)
    return real and t.device.type == "cpu" and not torch.compiler.is_compiling()


def check_plain(required: dict[str, object], optional: dict[str, object] | None = None) -> None:
    """Raises ValueError unless each is a tensor with its numbers in memory, one after another by strides (optional ones may be None), and
    all or none are fake."""
    values = required | {name: t for name, t in (optional or {}).items() if t is not None}
    for name, t in values.items():
        if not isinstance(t, Tensor):
            raise ValueError(f"{name} must be a tensor; got {type(t).__name__}.")
        if t.layout != torch.strided or t.is_nested or t.is_quantized:
            kind = "a nested" if t.is_nested else "a quantized" if t.is_quantized else f"a {t.layout}"
            raise ValueError(f"{name} must be a dense tensor; got {kind} one.")
        if not torch.compiler.is_compiling() and (t.is_neg() or t._is_zerotensor()):
            raise ValueError(f"{name} must have its numbers in memory; got a view that torch negates or fills when it is read: clone it.")
    fakes = [t for t in values.values() if isinstance(t, FakeTensor)] if not torch.compiler.is_compiling() else []
    if fakes and len(fakes) < len(values) and not fakes[0].fake_mode.allow_non_fake_inputs:
        real = next(name for name, t in values.items() if not isinstance(t, FakeTensor))
        raise ValueError(f"All tensors must be fake or none; got {len(fakes)} that are and {real}, which is not.")


def check_flags(**flags: object) -> None:
    """Raises ValueError unless each is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False; got {type(value).__name__}.")


def check_tensors(tensors: dict[str, Tensor | None], states: int) -> None:
    """Raises ValueError unless all are floating-point, not empty, and on one device, with at most MAX_STATES states."""
    (first, reference), *_ = tensors.items()
    for name, t in tensors.items():
        if t is None:
            continue
        if t.dtype not in FLOATS:
            raise ValueError(f"{name} must be floating-point; got {t.dtype} (floats of 16, 32 and 64 bits are taken).")
        if t.device != reference.device:
            raise ValueError(f"All tensors must be on one device; got {first} on {reference.device} and {name} on {t.device}.")
        if t.numel() == 0:
            raise ValueError(f"{name} must not be empty; got {tuple(t.shape)}.")
    if states > MAX_STATES:
        raise ValueError(f"N, the number of states, must be at most {MAX_STATES}; got {states}.")


def check_decay(A: Tensor) -> None:
    """Raises ValueError for what is not finite. On a CPU only: elsewhere looking at a value would wait for the device."""
    if has_values(A) and not bool(A.detach().sum().isfinite()) and not bool(A.isfinite().all()):  # a sum is quick, and may overflow
        raise ValueError(f"A must be finite; got {int(A.isnan().sum())} NaN and {int(A.isinf().sum())} infinities of {A.numel()}.")


def check_documents(document_ids: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    """Raises ValueError unless they are whole numbers of this shape [batch, L] on this device."""
    if document_ids is None:
        return
    if document_ids.shape != shape:
        raise ValueError(f"document_ids must be {shape}; got {tuple(document_ids.shape)}.")
    if document_ids.dtype not in WHOLE or document_ids.device != device:
        raise ValueError(f"document_ids must be whole numbers on {device}; got {document_ids.dtype} on {document_ids.device}.")
