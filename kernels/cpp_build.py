"""Compilation of a kernel's C++ for this machine's CPU: plain g++ or clang++, once, into a cache (trust.py).

The library is written beside its place and then renamed, so a killed build leaves nothing that a later one waits for.
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

from kernels.trust import cache_folder, install, make_folder, remove_write_access, why_untrusted

BUILD_LOCK = threading.RLock()  # held during the first use, which compiles
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-Wno-psabi")


@functools.cache
def load_library(source: Path) -> ctypes.CDLL | str:
    """Return the compiled library of a C++ source, or a sentence that says why there is none."""
    if not source.exists():
        return f"there is no {source.name} beside this copy of the code"
    names = (os.environ.get("CXX"), "g++", "clang++")
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    if compiler is None:
        return "no C++ compiler was found: install g++ or clang++, or set CXX"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    headers = (*sorted(source.parent.glob("*.h")), *sorted(source.parent.parent.glob("*.h")))
    texts = [file.read_bytes() for file in (source, *headers)]
    inputs = repr((texts, compiler, version, torch.__version__, _processor(), FLAGS))
    library = cache_folder() / f"{source.parent.name}-{hashlib.sha256(inputs.encode()).hexdigest()[:16]}.so"
    return _load_or_build(library, lambda: _compile(compiler, source, library))


def _load_or_build(library: Path, build: Callable[[], str | None]) -> ctypes.CDLL | str:
    """Load the library, built again if it is missing or must not be loaded; or return why it cannot be loaded."""
    problem: str | None
    try:
        was_writable = library.parent.exists() and remove_write_access(library.parent)
        if problem := make_folder(library.parent):
            return problem
        problem = "was in a folder that other users could write to" if was_writable else why_untrusted(library)
        for rebuilt in (False, True):
            if problem is None:
                try:
                    return ctypes.CDLL(str(library))
                except OSError as error:
                    problem = f"does not load ({error})"
            if rebuilt:
                break
            if os.path.lexists(library):
                print(f"The compiled library {library} {problem}, so it is not used.", file=sys.stderr)
            if failure := build():
                return failure
            problem = why_untrusted(library)
    except OSError as error:
        problem = f"cannot be read ({error})"
    return f"{library} {problem}; delete it"


def why_no_library(device: str, dtype: torch.dtype, compiled: Callable[[], ctypes.CDLL | str]) -> str | None:
    """Return why a compiled operator cannot run on this device in this dtype, or None if it can.

    `compiled` returns the operator's library or why there is none; its first call compiles.
    """
    if device != "cpu":
        return f"the tensors are on {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"it takes states of float32 or float64, not {dtype}"
    with BUILD_LOCK:
        return library if isinstance(library := compiled(), str) else None


def require_library(library: ctypes.CDLL | str) -> ctypes.CDLL:
    """Return the library, or raise RuntimeError: a loaded torch.export program does not call `why_no_library` first."""
    if isinstance(library, str):
        raise RuntimeError(f"The compiled operators cannot run here: {library}.")
    return library


def register_operators(
    name: str,
    forward: Callable,
    backward: Callable,
    fakes: tuple[Callable, Callable],
    gradients: Callable,
    setup_context: Callable,
) -> None:
    """Make two CPU operators of torch, workbench::NAME and workbench::NAME_backward, tied together for autograd.

    This happens at import, so that a saved torch.export program finds the operators. The first call of one compiles.

    Args:
        forward, backward: the implementations, whose annotations give the schemas.
        fakes: functions that return outputs of the right shapes without computing them, for both.
        gradients, setup_context: the gradients and what they save, as in torch.library.register_autograd.
    """
    operators = []
    for suffix, function, fake in zip(("", "_backward"), (forward, backward), fakes, strict=True):
        operator = torch.library.custom_op(f"workbench::{name}{suffix}", function, mutates_args=(), device_types="cpu")
        operator.register_fake(fake)
        operators.append(operator)
    operators[0].register_autograd(gradients, setup_context=setup_context)


def needs_gradients(operator: str, *tensors: Tensor) -> bool:
    """Return whether a backward pass may follow.

    Raises:
        RuntimeError: where forward-mode gradients would come out as zeros (not inside torch.compile, which hides them).
    """
    forward_mode = not torch.compiler.is_compiling() and any(
        forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )
    if forward_mode:
        raise RuntimeError(f"The compiled {operator} has no forward-mode gradients; impl='reference' has.")
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def lanes(library: ctypes.CDLL, t: Tensor) -> int:
    """Return how many numbers of t's dtype a vector of the library holds."""
    return library.lanes_of_float() // (2 if t.dtype == torch.float64 else 1)


def _compile(compiler: str, source: Path, library: Path) -> str | None:
    """Compile into the place of the library; return None, or why that failed."""
    print(f"Compiling {source.parent.name} for this processor (once, about 10 seconds).", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            for openmp in (["-fopenmp"], []):  # Apple's clang has no OpenMP and then uses one thread
                command = [compiler, *FLAGS, *openmp, str(source), "-o", str(built)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode == 0:
                    install(built, library)
                    return None
                if "omp" not in done.stderr:
                    break
                print(f"{compiler} has no OpenMP: {source.parent.name} will use one thread.", file=sys.stderr)
    except OSError as error:
        return f"the compiled library cannot be written ({error})"
    errors = (
        [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
    )
    return f"{compiler} failed: {errors[0]}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
