"""Launch configurations of the Triton kernels. Which of them a device gets is measured there once per size, and kept on disk by Triton.

The lists beside the kernels hold what `python -m kernels.audit` found to compile without a spill on every target.
"""

import os
from contextlib import nullcontext

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # in a try: transformers then lets a machine without Triton load an export that this file travels with
    raise


def tuned(*choices: tuple[int, int], key: list[str], restore: tuple[str, ...] = ()):
    """A decorator for a kernel: choices of (warps, stages); `key` names the arguments that ask for a choice of their own;
    `restore` names tensors that the kernel both reads and writes. Triton's interpreter, which has no warps, takes the first."""
    configs = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in choices]
    if os.environ.get("TRITON_INTERPRET") == "1":
        configs = configs[:1]
    return triton.autotune(configs, key=key, restore_value=list(restore), cache_results=True)


def bucket(length: int) -> int:
    """Sequences up to the same power of two, from 256 on, share a choice."""
    return max(256, triton.next_power_of_2(length))


def on_device_of(t: Tensor):
    """Triton launches on the current device, so it must be that of t (autograd sets it for a backward pass). torch.compile does that by
    itself, and could not look into torch.cuda.device_of."""
    return nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(t)
