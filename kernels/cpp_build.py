"""Compiling a kernel's C++ for this machine's CPU: plain g++ or clang++, once, into a cache (trust.py).

The library is written beside its place and renamed: a killed build leaves nothing that a later one waits for.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kernels.trust import cache, close_to_others, keep, why_no_folder, why_not_sound

LOCK = threading.RLock()  # around the first use, which compiles
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-Wno-psabi")


@functools.cache
def library(source: Path) -> ctypes.CDLL | str:
    """The compiled source, or a sentence that says why there is none."""
    if not source.exists():
        return f"there is no {source.name} beside this copy of the code"
    compiler = next((found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None)
    if compiler is None:
        return "no C++ compiler was found: install g++ or clang++, or set CXX"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    texts = [file.read_bytes() for file in (source, *sorted(source.parent.parent.glob("*.h")))]
    facts = repr((texts, compiler, version, torch.__version__, _processor(), FLAGS))
    target = cache() / f"{source.parent.name}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.so"
    return _cached(target, lambda: _compile(compiler, source, target))


def _cached(target: Path, make: Callable[[], str | None]) -> ctypes.CDLL | str:
    """The library, made anew if it is not there or must not be loaded; or a sentence that says why there is none."""
    try:
        was_open = target.parent.exists() and close_to_others(target.parent)
        if problem := why_no_folder(target.parent):
            return problem
        problem = "was in a folder that other users could write to" if was_open else why_not_sound(target)
        for again in (False, True):
            if problem is None:
                try:
                    return ctypes.CDLL(str(target))
                except OSError as error:
                    problem = f"does not load ({error})"
            if again:
                break
            if os.path.lexists(target):
                print(f"The compiled library {target} {problem}, so it is not used.", file=sys.stderr)
            if failure := make():
                return failure
            problem = why_not_sound(target)
    except OSError as error:
        problem = f"cannot be read ({error})"
    return f"{target} {problem}; delete it"


def why_not_compiled(device: str, dtype: torch.dtype, native: Callable[[], ctypes.CDLL | str]) -> str | None:
    """Why a compiled operator cannot run on this device in this dtype; None if it can. The first call compiles it."""
    if device != "cpu":
        return f"the tensors are on {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"it takes states of float32 or float64, not {dtype}"
    with LOCK:
        return found if isinstance(found := native(), str) else None


def loaded(found: ctypes.CDLL | str) -> ctypes.CDLL:
    """The library, or a RuntimeError: a loaded torch.export program asks for its operator without `why_not_compiled`."""
    if isinstance(found, str):
        raise RuntimeError(f"The compiled operators cannot run here: {found}.")
    return found


def register(name: str, forward, backward, fakes, gradients, setup) -> None:
    """Two operators of torch for the CPU, `forward` and `backward` (with their fakes), tied together for autograd by `gradients`. At
    import, so that a saved torch.export program finds them; nothing is compiled before one runs."""
    operators = []
    for suffix, function, fake in zip(("", "_backward"), (forward, backward), fakes, strict=True):
        operator = torch.library.custom_op(f"workbench::{name}{suffix}", function, mutates_args=(), device_types="cpu")
        operator.register_fake(fake)
        operators.append(operator)
    operators[0].register_autograd(gradients, setup_context=setup)


def needs_gradients(operator: str, *tensors: Tensor) -> bool:
    """Whether a backward pass will follow. Raises RuntimeError where forward-mode gradients would come out as zeros (not inside
    torch.compile, which does not say)."""
    if not torch.compiler.is_compiling() and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(f"The compiled {operator} has no forward-mode gradients; impl='reference' has.")
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def lanes(found: ctypes.CDLL, t: Tensor) -> int:
    """Of a vector of t's dtype, as the library was compiled."""
    return found.lanes_of_float() // (2 if t.dtype == torch.float64 else 1)


def _compile(compiler: str, source: Path, target: Path) -> str | None:
    print(f"Compiling {source.parent.name} for this processor (once, about 10 seconds).", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as side:
            aside = Path(side) / target.name
            for openmp in (["-fopenmp"], []):  # Apple's clang has none: one thread then
                done = subprocess.run([compiler, *FLAGS, *openmp, str(source), "-o", str(aside)], capture_output=True, text=True)
                if done.returncode == 0:
                    keep(aside, target)
                    return None
                if "omp" not in done.stderr:
                    break
                print(f"{compiler} has no OpenMP: {source.parent.name} will use one thread.", file=sys.stderr)
    except OSError as error:
        return f"the compiled library cannot be written ({error})"
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
    return f"{compiler} failed: {lines[0]}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
