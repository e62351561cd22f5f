"""Choice of the implementation of an operator: the one that the caller names, or the first that can run; on a GPU the
one that was measured to be the fastest there, if it can."""

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from kernels.measured import fastest

# Name of an implementation -> a function of the device type and the dtype of the states that returns why it cannot run
# there, or None if it can. The order is that in which "auto" tries them.
Implementations = dict[str, Callable[[str, torch.dtype], str | None]]
# PyTorch operators: what "auto" takes for a program that torch.export writes, the best first
PORTABLE = ("doubling", "chunked", "reference")
FOR_GPUS = ("triton", "fla")  # "auto" skips them on a CPU, where there is only Triton's interpreter, for tests


def choose(operator: str, impl: str, device: str, dtype: torch.dtype, implementations: Implementations) -> str:
    """Return `impl`, or for "auto" the first implementation that runs on this device in this dtype, where the one that
    `kernels.bench` measured to be the fastest on this GPU comes first.

    The automatic choice for a device is printed to stderr once per process.

    Raises:
        ValueError: if `impl` is not a known name, or cannot run here; the message has the reason.
    """
    if not isinstance(impl, str) or (impl not in implementations and impl != "auto"):
        raise ValueError(f"impl is 'auto' or one of {', '.join(map(repr, implementations))}; got {impl!r}.")
    if impl != "auto":
        if (reason := implementations[impl](device, dtype)) is not None:
            raise ValueError(f"impl={impl!r} of {operator} cannot run here: {reason}.")
        return impl
    if torch.compiler.is_exporting():
        return next(name for name in PORTABLE if name in implementations)
    rejected, reason = "", None
    best = fastest(operator) if device == "cuda" else None
    if best is not None:
        implementations = dict(sorted(implementations.items(), key=lambda item: item[0] != best))
    for name, why_unavailable in implementations.items():
        if name in FOR_GPUS and device == "cpu":
            continue
        if (reason := why_unavailable(device, dtype)) is None:
            if device != "meta":  # where nothing is computed
                _print_once(f"{operator} runs on this {device} by its implementation {name!r}{rejected}.")
            return name
        rejected += f", not {name!r} ({reason})"
    raise ValueError(f"impl={impl!r} of {operator} cannot run here: {reason}.")


def always_available(device: str, dtype: torch.dtype) -> None:
    """Return None: an implementation in PyTorch operators runs on every device in every dtype."""


def why_no_triton(device: str, dtype: torch.dtype) -> str | None:
    """Return why Triton kernels cannot run on this device in this dtype, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device not in ("cpu", "cuda", "xpu"):
        return f"the tensors are on {device}"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a GPU (or TRITON_INTERPRET=1, set before Triton is imported)"
    if dtype == torch.float64:
        return "it computes in float32; for float64 there are 'chunked' and 'reference'"
    return None


def without_autocast(device: str) -> AbstractContextManager:
    """A context in which products keep their dtype; devices without autocast, such as meta, need none."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


@functools.cache
def _print_once(line: str) -> None:
    print(line, file=sys.stderr)
