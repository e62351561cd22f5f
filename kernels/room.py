"""Room for large results on a CPU: the memory of freed tensors, used again.

glibc takes what is larger than 32 MB from the system each time, and the first write to each new page costs more than the arithmetic of
a scan. The system may take kept memory back whenever it needs some.
"""

import contextlib
import math
import mmap
import sys
import weakref

import torch
from torch import Tensor

LARGE = 1 << 23  # bytes from which a result has room of its own (ours)
MOST = 1 << 29  # bytes kept for later (ours)

_free: dict[int, list[mmap.mmap]] = {}  # by size


def room(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """As like.new_empty(shape), contiguous; a fake tensor's has no memory."""
    size = math.prod(shape) * like.element_size()
    if size < LARGE or sys.platform != "linux" or type(like) is not Tensor:
        return like.new_empty(shape)
    try:
        memory = _free[size].pop()
    except (KeyError, IndexError):
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _advise(memory, mmap.MADV_HUGEPAGE)
    view = memoryview(memory)  # lives as long as the tensor
    weakref.finalize(view, _keep, memory).atexit = False
    return torch.frombuffer(view, dtype=like.dtype).view(shape)


def _keep(memory: mmap.mmap) -> None:
    if sum(size * len(some) for size, some in _free.items()) + len(memory) > MOST:
        _free.clear()
    if len(memory) <= MOST:
        _advise(memory, mmap.MADV_FREE)
        _free.setdefault(len(memory), []).append(memory)


def _advise(memory: mmap.mmap, wish: int) -> None:
    with contextlib.suppress(OSError):  # a system without
        memory.madvise(wish)
