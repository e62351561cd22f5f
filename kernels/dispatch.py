"""Which implementation of an operator runs: the one asked for, or the first that can."""

import functools
import importlib.util
import os
import sys
from collections.abc import Callable

import torch

# implementation -> why it cannot run on a type of device with states of a dtype, or None
Ways = dict[str, Callable[[str, torch.dtype], str | None]]


def pick(operator: str, impl: str, device: str, dtype: torch.dtype, ways: Ways) -> str:
    """`impl`, or for "auto" the first of `ways` that runs on this device in this dtype, which is said once per process.

    Raises ValueError for a name that is not there, or that cannot run here, with the reason."""
    if not isinstance(impl, str) or (impl not in ways and impl != "auto"):
        raise ValueError(f"impl is 'auto' or one of {', '.join(map(repr, ways))}; got {impl!r}.")
    reasons = []
    automatic = [name for name in ways if name != "triton" or device != "cpu"]  # Triton's interpreter only runs when asked for
    for name in automatic if impl == "auto" else (impl,):
        if (reason := ways[name](device, dtype)) is None:
            if impl == "auto":
                _say(f"{operator} runs on this {device} by its implementation {name!r}{''.join(f', not {reason}' for reason in reasons)}.")
            return name
        reasons.append(f"{name!r} ({reason})")
    raise ValueError(f"impl={impl!r} of {operator} cannot run here: {reason}.")


def anywhere(device: str, dtype: torch.dtype) -> None:
    """Of an implementation that always runs."""


def why_not_triton(device: str, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run on this device in this dtype; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device not in ("cpu", "cuda", "xpu"):
        return f"the tensors are on {device}"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a GPU (or TRITON_INTERPRET=1, set before Triton is imported)"
    if dtype == torch.float64:
        return "it computes in float32; for float64 there are 'chunked' and 'reference'"
    return None


@functools.cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)
