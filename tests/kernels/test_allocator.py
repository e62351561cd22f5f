"""Memory of large results is used again, and never while something looks at it."""

import sys
import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode

from kernels import allocator as module
from kernels.allocator import LARGE, room

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere results are torch's own")
LIKE = torch.empty(0)
SHAPE = (2, LARGE // 8)


@pytest.fixture(autouse=True)
def nothing_kept():
    module._free.clear()
    yield
    module._free.clear()


def test_memory_of_a_freed_tensor_is_used_again():
    first = room(SHAPE, LIKE)
    assert (first.shape, first.dtype, first.is_contiguous()) == (SHAPE, torch.float32, True)
    first.fill_(1)
    place = first.data_ptr()
    second = room(SHAPE, LIKE)
    assert second.data_ptr() != place
    del first
    assert room(SHAPE, LIKE).data_ptr() == place
    assert room((2, LARGE // 4), LIKE).data_ptr() != place  # another size


def test_memory_that_a_view_or_autograd_looks_at_is_not():
    w = torch.ones((), requires_grad=True)
    x = room(SHAPE, LIKE).fill_(3)
    row, product, place = x[1, :5], (x * w).sum(), x.data_ptr()
    del x
    assert room(SHAPE, LIKE).fill_(0).data_ptr() != place
    assert row.tolist() == [3] * 5
    product.backward()
    assert w.grad.item() == pytest.approx(3 * LARGE / 4)


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "MOST", 2 * LARGE)
    some = [room((n * LARGE // 4,), LIKE) for n in (1, 1, 1, 3)]
    while some:
        some.pop()
    assert 0 < sum(map(len, module._free)) <= 2 * LARGE


def test_many_threads_free_and_take():
    errors = []

    def work(seed: int) -> None:
        try:
            for i in range(200):
                t = room((LARGE // 4 * (1 + (seed + i) % 3),), LIKE)
                t[0], t[-1] = seed, i
                assert (t[0].item(), t[-1].item()) == (seed, i)
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_small_and_fake_tensors_are_torchs_own():
    room((10,), LIKE)
    with FakeTensorMode() as mode:
        assert room(SHAPE, mode.from_tensor(LIKE)).shape == SHAPE
    assert room(SHAPE, LIKE.to("meta")).is_meta
    assert not module._free
