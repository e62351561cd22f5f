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

_free: list[mmap.mmap] = []  # the oldest first


def room(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """As like.new_empty(shape), contiguous, but for a storage that cannot be resized. A fake or meta tensor's has no memory."""
    real = type(like) is Tensor and like.device.type == "cpu"
    if not real or sys.platform != "linux":  # before its size is looked at: that would bind an export to it
        return like.new_empty(shape)
    size = math.prod(shape) * like.element_size()
    if size < LARGE:
        return like.new_empty(shape)
    memory = _kept(size)
    if memory is None:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _advise(memory, mmap.MADV_HUGEPAGE)
    view = memoryview(memory)  # lives as long as the tensor
    weakref.finalize(view, _keep, memory).atexit = False
    return torch.frombuffer(view, dtype=like.dtype).view(shape)


def _kept(size: int) -> mmap.mmap | None:
    for memory in list(_free):
        if len(memory) == size:
            with contextlib.suppress(ValueError):  # another thread took it
                _free.remove(memory)
                return memory
    return None


def _keep(memory: mmap.mmap) -> None:
    """Runs wherever a tensor happens to be freed, so each line is one step for all threads."""
    _advise(memory, mmap.MADV_FREE)
    _free.append(memory)
    while sum(map(len, list(_free))) > MOST:
        with contextlib.suppress(IndexError):
            _free.pop(0)


def _advise(memory: mmap.mmap, wish: int) -> None:
    with contextlib.suppress(OSError):  # a system without
        memory.madvise(wish)
