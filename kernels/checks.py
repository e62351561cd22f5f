"""Requirements that every operator has on its tensors, besides their shapes."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

MAX_STATES = 1024  # states per channel or head: what the kernels are written for and tested with
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def can_read_values(t: Tensor) -> bool:
    """Return whether reading t's values costs nothing.

    On other devices than a CPU it waits for the device; a fake tensor, or one inside torch.compile, has no values.
    """
    plain = type(t) in (Tensor, torch.nn.Parameter)
    return plain and t.device.type == "cpu" and not torch.compiler.is_compiling()


def check_dense(required: dict[str, object], optional: dict[str, object] | None = None) -> None:
    """Check that all values are dense tensors with their numbers in memory; optional ones may be None.

    Raises:
        ValueError: for another object, a sparse, nested or quantized tensor, or a lazy view; or if only some are fake.
    """
    values = required | {name: t for name, t in (optional or {}).items() if t is not None}
    for name, t in values.items():
        if not isinstance(t, Tensor):
            raise ValueError(f"{name} must be a tensor; got {type(t).__name__}.")
        if t.layout != torch.strided or t.is_nested or t.is_quantized:
            kind = "a nested" if t.is_nested else "a quantized" if t.is_quantized else f"a {t.layout}"
            raise ValueError(f"{name} must be a dense tensor; got {kind} one.")
        if not torch.compiler.is_compiling() and (t.is_neg() or t._is_zerotensor()):
            raise ValueError(
                f"{name} must have its numbers in memory; "
                "got a view that torch negates or fills when it is read: clone it."
            )
    fakes = [t for t in values.values() if isinstance(t, FakeTensor)] if not torch.compiler.is_compiling() else []
    if fakes and len(fakes) < len(values) and not fakes[0].fake_mode.allow_non_fake_inputs:
        real = next(name for name, t in values.items() if not isinstance(t, FakeTensor))
        raise ValueError(f"All tensors must be fake or none; got {len(fakes)} that are and {real}, which is not.")


def check_flags(**flags: object) -> None:
    """Check that all flags are True or False; anything else raises ValueError."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False; got {type(value).__name__}.")


def check_tensors(tensors: dict[str, Tensor | None], states: int) -> None:
    """Check dtypes, devices and sizes; None values are skipped.

    Raises:
        ValueError: unless all are floating-point, not empty and on one device, and `states` is at most MAX_STATES.
    """
    present = {name: t for name, t in tensors.items() if t is not None}
    first = next(iter(present))
    for name, t in present.items():
        if t.dtype not in FLOATS:
            raise ValueError(f"{name} must be floating-point; got {t.dtype} (floats of 16, 32 and 64 bits are taken).")
        if t.device != present[first].device:
            raise ValueError(
                f"All tensors must be on one device; got {first} on {present[first].device} and {name} on {t.device}."
            )
        if t.numel() == 0:
            raise ValueError(f"{name} must not be empty; got {tuple(t.shape)}.")
    if states > MAX_STATES:
        raise ValueError(f"N, the number of states, must be at most {MAX_STATES}; got {states}.")


def check_decay(A: Tensor) -> None:
    """Check on a CPU that A is finite, and raise ValueError otherwise; other devices would have to be waited for."""
    # the sum is quick but may overflow, so it only decides whether to look at each value
    if can_read_values(A) and not bool(A.detach().sum().isfinite()) and not bool(A.isfinite().all()):
        raise ValueError(
            f"A must be finite; got {int(A.isnan().sum())} NaN and {int(A.isinf().sum())} infinities of {A.numel()}."
        )


def check_documents(document_ids: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    """Check that ids, if there are any, are integers [batch, L] on this device; else raise ValueError."""
    if document_ids is None:
        return
    if document_ids.shape != shape:
        raise ValueError(f"document_ids must be {shape}; got {tuple(document_ids.shape)}.")
    if document_ids.dtype not in INTEGERS or document_ids.device != device:
        raise ValueError(
            f"document_ids must be whole numbers on {device}; got {document_ids.dtype} on {document_ids.device}."
        )
