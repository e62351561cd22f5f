"""Batches on their way to the device: for a GPU each is made while the step before is trained."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

BatchOfStep = Callable[[int], Any]  # the batch of a step, a function of nothing else; its size may change


@contextmanager
def fetched(make: BatchOfStep, num_steps: int, device: torch.device, by_thread: bool) -> Iterator[BatchOfStep]:
    """Return the batches of a stage of `num_steps`, which are asked for in order. For a GPU they lie in pinned memory,
    from which it copies by itself, and with `by_thread` each is made by a thread, one step ahead; elsewhere `make` is
    asked as it is."""
    if device.type != "cuda":
        yield make
        return

    def pinned(step: int) -> Any:
        return make(step).pin_memory()

    if not by_thread:
        yield pinned
        return
    # memory is pinned for a thread's own device, which is the first one until it is told
    with ahead(pinned, num_steps, lambda: torch.cuda.set_device(device)) as batch_of:
        yield batch_of


@contextmanager
def ahead(make: BatchOfStep, num_steps: int, begin: Callable[[], None]) -> Iterator[BatchOfStep]:
    """Return batches that a thread makes, after `begin()`, each while its caller works on the one before. What goes
    wrong with a batch is raised where it is asked for; in the end one that is still being made is waited for."""
    coming: dict[int, Future[Any]] = {}
    with ThreadPoolExecutor(1, "batches") as thread:
        ready = thread.submit(begin)

        def batch_of(step: int) -> Any:
            ready.result()
            for wanted in range(step, min(step + 2, num_steps)):
                if wanted not in coming:
                    coming[wanted] = thread.submit(make, wanted)
            return coming.pop(step).result()

        try:
            yield batch_of
        finally:
            thread.shutdown(wait=False, cancel_futures=True)
