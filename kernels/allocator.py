"""Caching allocator for large results on a CPU: it reuses the memory of freed tensors.

glibc maps a block of more than 32 MB anew each time, and the first write to each new page costs more than the
arithmetic of a scan. Cached blocks are marked as free (MADV_FREE), so the system may take their pages back.
"""

import contextlib
import math
import mmap
import sys
import weakref

import torch
from torch import Tensor

MIN_BYTES = 1 << 21  # smaller results are allocated by torch (ours)
MAX_CACHED_BYTES = 1 << 29  # total size of the blocks that are kept (ours)

_free_blocks: list[mmap.mmap] = []  # the oldest first


def allocate(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return an uninitialized contiguous tensor of this shape, in the dtype and on the device of `like`.

    It equals like.new_empty(shape), except that the storage of a large one cannot be resized. The result is a fake or
    meta tensor, without memory, where `like` is one.
    """
    on_cpu = type(like) is Tensor and like.device.type == "cpu"
    # decided before the size is read, which would bind an export to this size
    if not on_cpu or sys.platform != "linux":
        return like.new_empty(shape)
    size = math.prod(shape) * like.element_size()
    if size < MIN_BYTES:
        return like.new_empty(shape)
    block = _take_free_block(size)
    if block is None:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _advise(block, mmap.MADV_HUGEPAGE)
    view = memoryview(block)  # it lives as long as the tensor's storage
    weakref.finalize(view, _free, block).atexit = False
    return torch.frombuffer(view, dtype=like.dtype).view(shape)


def _take_free_block(size: int) -> mmap.mmap | None:
    for block in list(_free_blocks):
        if len(block) == size:
            with contextlib.suppress(ValueError):  # another thread took it
                _free_blocks.remove(block)
                return block
    return None


def _free(block: mmap.mmap) -> None:
    """Put a block back, and drop the oldest ones beyond MAX_CACHED_BYTES.

    It runs in whichever thread frees the tensor, so each line is one atomic step.
    """
    _advise(block, mmap.MADV_FREE)
    _free_blocks.append(block)
    while sum(map(len, list(_free_blocks))) > MAX_CACHED_BYTES:
        with contextlib.suppress(IndexError):
            _free_blocks.pop(0)


def _advise(block: mmap.mmap, advice: int) -> None:
    with contextlib.suppress(OSError):  # a kernel without this advice
        block.madvise(advice)
