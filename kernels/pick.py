"""Which implementation of an operator runs: the one asked for, or the first that can."""

import functools
import importlib.util
import os
import sys
from collections.abc import Callable

import torch

Ways = dict[str, Callable[[torch.device], Callable | str]]  # name -> of a device: the implementation, or why there is none


def pick(operator: str, impl: str, device: torch.device, ways: Ways) -> Callable:
    """The implementation called `impl`; "auto": the first of `ways` that runs on this device, named once per process.

    Raises ValueError for a name that is not there, or that cannot run here, with the reason."""
    if impl not in ways and impl != "auto":
        raise ValueError(f"impl is 'auto' or one of {', '.join(map(repr, ways))}; got {impl!r}.")
    reasons = []
    for name in ways if impl == "auto" else (impl,):
        found = ways[name](device)
        if not isinstance(found, str):
            if impl == "auto":
                _say(f"{operator} on {device.type}: {name}{''.join(f'; not {reason}' for reason in reasons)}.")
            return found
        reasons.append(f"{name}, for {found}")
    raise ValueError(f"impl={impl!r} of {operator} cannot run here: {found}.")


def why_not_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on this device; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a GPU (or TRITON_INTERPRET=1)"
    return None


@functools.cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)
