"""Memory of large results is reused, and never while a tensor still refers to it."""

import sys
import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode

from kernels import allocator
from kernels.allocator import MIN_BYTES, allocate

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems use torch's allocator")
LIKE = torch.empty(0)
SHAPE = (2, MIN_BYTES // 8)


@pytest.fixture(autouse=True)
def empty_cache():
    allocator._free_blocks.clear()
    yield
    allocator._free_blocks.clear()


def test_memory_of_a_freed_tensor_is_reused():
    first = allocate(SHAPE, LIKE)
    assert (first.shape, first.dtype, first.is_contiguous()) == (SHAPE, torch.float32, True)
    first.fill_(1)
    place = first.data_ptr()
    second = allocate(SHAPE, LIKE)
    assert second.data_ptr() != place
    del first
    assert allocate(SHAPE, LIKE).data_ptr() == place
    assert allocate((2, MIN_BYTES // 4), LIKE).data_ptr() != place  # another size


def test_memory_of_a_view_or_a_saved_tensor_is_not_reused():
    w = torch.ones((), requires_grad=True)
    x = allocate(SHAPE, LIKE).fill_(3)
    row, product, place = x[1, :5], (x * w).sum(), x.data_ptr()
    del x
    assert allocate(SHAPE, LIKE).fill_(0).data_ptr() != place
    assert row.tolist() == [3] * 5
    product.backward()
    assert w.grad.item() == pytest.approx(3 * MIN_BYTES / 4)


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(allocator, "MAX_CACHED_BYTES", 2 * MIN_BYTES)
    some = [allocate((n * MIN_BYTES // 4,), LIKE) for n in (1, 1, 1, 3)]
    while some:
        some.pop()
    assert 0 < sum(map(len, allocator._free_blocks)) <= 2 * MIN_BYTES


def test_many_threads_free_and_allocate():
    errors = []

    def allocate_and_free(seed: int) -> None:
        try:
            for i in range(200):
                t = allocate((MIN_BYTES // 4 * (1 + (seed + i) % 3),), LIKE)
                t[0], t[-1] = seed, i
                assert (t[0].item(), t[-1].item()) == (seed, i)
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=allocate_and_free, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_small_and_fake_tensors_are_allocated_by_torch():
    allocate((10,), LIKE)
    with FakeTensorMode() as mode:
        assert allocate(SHAPE, mode.from_tensor(LIKE)).shape == SHAPE
    assert allocate(SHAPE, LIKE.to("meta")).is_meta
    assert not allocator._free_blocks
