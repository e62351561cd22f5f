"""What every operator asks of its tensors, besides shapes."""

import torch
from torch import Tensor

MAX_STATES = 1024  # per channel or head: what the kernels are written and checked for


def has_values(t: Tensor) -> bool:
    """Whether a look at t's values costs nothing: on a CPU (elsewhere it waits for the device), not a fake one, not while compiling."""
    real = type(t) in (Tensor, torch.nn.Parameter)
    return real and t.device.type == "cpu" and not torch.compiler.is_compiling()


def check_types(values: dict[str, object]) -> None:
    """Raises ValueError unless each is a tensor, or None."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor; got {type(value).__name__}.")


def check_tensors(tensors: dict[str, Tensor | None], states: int) -> None:
    """Raises ValueError unless all are floating-point, not empty, and on one device, with at most MAX_STATES states."""
    (first, reference), *_ = tensors.items()
    for name, t in tensors.items():
        if t is None:
            continue
        if not t.is_floating_point():
            raise ValueError(f"{name} must be floating-point; got {t.dtype}.")
        if t.device != reference.device:
            raise ValueError(f"All tensors must be on one device; got {first} on {reference.device} and {name} on {t.device}.")
        if t.numel() == 0:
            raise ValueError(f"{name} must not be empty; got {tuple(t.shape)}.")
    if states > MAX_STATES:
        raise ValueError(f"N, the number of states, must be at most {MAX_STATES}; got {states}.")


def check_decay(A: Tensor) -> None:
    """Raises ValueError for what is not finite. On a CPU only: elsewhere looking at a value would wait for the device."""
    if has_values(A) and not bool(A.detach().sum().isfinite()):
        raise ValueError(f"A must be finite; got {int(A.isnan().sum())} NaN and {int(A.isinf().sum())} infinities of {A.numel()}.")


def check_documents(document_ids: Tensor | None, shape: tuple[int, int], device: torch.device) -> None:
    """Raises ValueError unless they are whole numbers of this shape [batch, L] on this device."""
    if document_ids is None:
        return
    if document_ids.shape != shape:
        raise ValueError(f"document_ids must be {shape}; got {tuple(document_ids.shape)}.")
    if document_ids.is_floating_point() or document_ids.device != device:
        raise ValueError(f"document_ids must be whole numbers on {device}; got {document_ids.dtype} on {document_ids.device}.")
