"""Batches of a GPU are made one step ahead by a thread, in order, and fail where they are asked for."""

import threading
from dataclasses import dataclass, field

import pytest
import torch

from convert.core.errors import Interrupted, UserError
from convert.data.augmentation import Augmentation
from convert.data.batches import Batch
from convert.training.fetching import ahead, fetched
from convert.training.image_settings import ImageSettings
from tests.training.stages import SETTINGS, batches

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)
STEPS = 6


@dataclass
class Unpinned:
    """A batch that says in which thread it was pinned."""

    step: int
    pinned_by: list[threading.Thread] = field(default_factory=list)

    def pin_memory(self) -> "Unpinned":
        self.pinned_by.append(threading.current_thread())
        return self


@dataclass
class Making:
    """Makes batches; notes which ones, and fails at one of them."""

    fails_at: int | None = None
    error: Exception = field(default_factory=lambda: UserError("No such text."))
    made: list[int] = field(default_factory=list)
    threads: set[threading.Thread] = field(default_factory=set)
    is_made: dict[int, threading.Event] = field(default_factory=lambda: {i: threading.Event() for i in range(STEPS)})

    def __call__(self, step: int) -> Unpinned:
        self.made.append(step)
        self.threads.add(threading.current_thread())
        self.is_made[step].set()
        if step == self.fails_at:
            raise self.error
        return Unpinned(step)


def test_a_cpu_is_given_the_batches_as_they_are():
    making = Making()
    for by_thread in (True, False):
        with fetched(making, STEPS, CPU, by_thread) as batch_of:
            assert batch_of is making
    assert not making.made


def test_without_a_thread_batches_of_a_gpu_are_pinned_where_they_are_asked_for():
    making = Making()
    with fetched(making, STEPS, CUDA, by_thread=False) as batch_of:
        assert batch_of(2).pinned_by == [threading.current_thread()]
    assert making.made == [2]


def test_one_batch_is_made_ahead_and_none_beyond_the_last():
    """Each once, in order, by one thread that is not the caller's and has begun with what it was told."""
    making, begun = Making(), []
    with ahead(making, STEPS, lambda: begun.append(threading.current_thread())) as batch_of:
        for step in range(2, STEPS):
            assert batch_of(step).step == step
            if step + 1 < STEPS:
                assert making.is_made[step + 1].wait(10)  # while nobody asks for it
            assert making.made == list(range(2, min(step + 2, STEPS)))
    assert making.threads == set(begun) and threading.current_thread() not in making.threads
    assert not begun[0].is_alive()


def test_batches_made_ahead_are_those_of_their_steps():
    ours, settings = batches(), SETTINGS
    with ahead(lambda step: settings.altered(ours(step), step), STEPS, lambda: None) as batch_of:
        found = [batch_of(step) for step in range(STEPS)]
    for step, batch in enumerate(found):
        assert torch.equal(batch.input_ids, ours(step).input_ids) and torch.equal(batch.labels, ours(step).labels)


@pytest.mark.parametrize("error", [UserError("No such text."), MemoryError(), ValueError("odd")])
def test_an_error_is_raised_where_its_batch_is_asked_for(error):
    """Not a step earlier, when the thread met it: that step is trained and may be saved."""
    making = Making(fails_at=3, error=error)
    with pytest.raises(type(error)) as raised, ahead(making, STEPS, lambda: None) as batch_of:
        for step in range(3):
            assert batch_of(step).step == step
        assert making.is_made[3].wait(10)
        batch_of(3)
    assert raised.value is error and making.made == [0, 1, 2, 3]


def fail() -> None:
    raise RuntimeError("no device")


def test_what_the_thread_cannot_begin_is_raised():
    with pytest.raises(RuntimeError, match="no device"), ahead(Making(), STEPS, fail) as batch_of:
        batch_of(0)


@pytest.mark.parametrize("stop", [Interrupted("Stopped."), KeyboardInterrupt()])
def test_a_stop_leaves_no_thread(stop):
    making = Making()
    with pytest.raises(type(stop)), ahead(making, STEPS, lambda: None) as batch_of:
        batch_of(0)
        raise stop
    assert making.made in ([0], [0, 1])
    assert not any(thread.is_alive() for thread in making.threads)


def test_augmentation_is_not_left_to_a_thread():
    """It draws from the generator whose state checkpoints keep. `labels` and the rest augment nothing."""
    sizes = {"images": 8, "batch_images": 4, "micro_images": 4}
    plain = ImageSettings(**sizes, lr=1e-3, objective=SETTINGS.objective, trains="everything")
    assert plain.is_batch_own and SETTINGS.is_batch_own
    for name in Augmentation.__dataclass_fields__:
        value = 3 if isinstance(getattr(plain, name), int) else 0.5
        assert not ImageSettings(**{**vars(plain), name: value}).is_batch_own


def test_places_of_targets_go_with_the_batch():
    ids = torch.arange(8).view(2, 4)
    batch = Batch(ids, torch.tensor([[1, -100, 3, -100], [-100, 5, 6, 7]]), ids, torch.tensor([4, 3]))
    moved = batch.to("meta")
    assert batch.target_places.tolist() == [0, 2, 5, 6, 7]
    assert moved.labels.is_meta and moved.target_places.is_meta and moved.num_targets == batch.num_targets == 5
    assert moved.num_tokens == 7 and moved.unpadded() == batch.unpadded()  # a tensor of no data would not tell them
    assert [part.num_targets for part in batch.to("cpu").split(1)] == [2, 3]
