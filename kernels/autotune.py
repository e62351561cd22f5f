"""Launch configurations of the Triton kernels, autotuned once per device and size; Triton keeps the choices on disk.

The candidates beside the kernels are those that compile without a spill on every target (`python -m kernels.audit`).
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # in a try block, so that transformers loads an exported copy on a machine without Triton
    raise

PROGRAMS = 1024  # of a launch, enough for all multiprocessors of a large GPU (ours)


def autotuned(*candidates: tuple[int, int], key: list[str], restore: tuple[str, ...] = ()) -> Callable:
    """Return a decorator that autotunes a kernel.

    Args:
        candidates: launch configurations as (warps, stages). Triton's interpreter has no warps and takes the first.
        key: names of the arguments whose values get a choice of their own.
        restore: names of the tensors that the kernel both reads and writes.
    """
    configs = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in candidates]
    if os.environ.get("TRITON_INTERPRET") == "1":
        configs = configs[:1]
    return triton.autotune(configs, key=key, restore_value=list(restore), cache_results=True)


def length_bucket(length: int) -> int:
    """Return the next power of two, at least 256: lengths of one bucket share a launch configuration."""
    return max(256, triton.next_power_of_2(length))


def on_device_of(t: Tensor) -> AbstractContextManager:
    """Make t's device the current one, on which Triton launches.

    autograd does so for a backward pass, and torch.compile by itself, which cannot trace torch.cuda.device_of.
    """
    return nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(t)
