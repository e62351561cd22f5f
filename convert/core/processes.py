"""The processes of one run, which torchrun starts. Without torchrun there is one, and every function here is the
identity.

The first process alone keeps the run's folder; the others hear from it what it read there. What all processes compute
alike, they compute alike: each gets the same numbers and takes the same branches, or they would wait for each other
forever.
"""

import contextlib
import datetime
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from convert.core.errors import Interrupted, UserError

Result = TypeVar("Result")
Item = TypeVar("Item")

FOREVER = datetime.timedelta(days=30)  # while the first process evaluates or downloads, the others wait
CITED = 200  # characters of what a library says when a process is gone
HEARD = 10.0  # seconds that a process which fails waits to hear whether the first one fails alike (ours)
OTHER_ENDED = re.compile(r"\bgloo/|NCCL|TCPStore|Connection closed by peer")


@dataclass
class _Joined:
    """This process among the others. `waiting`: the group for what may take days. `alone`: the others wait now."""

    rank: int
    size: int
    waiting: Any
    alone: bool = False


_joined: _Joined | None = None


def rank() -> int:
    """The number of this process, from 0; 0 also while the first works alone."""
    return 0 if _joined is None or _joined.alone else _joined.rank


def world() -> int:
    """How many processes work together; 1 while the first works alone."""
    return 1 if _joined is None or _joined.alone else _joined.size


def launched() -> int:
    """How many processes work together, also while the first works alone."""
    return 1 if _joined is None else _joined.size


def is_launched() -> bool:
    """Whether torchrun started this process, with others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(store: Any = None, rank: int | None = None, size: int | None = None) -> Iterator[None]:
    """Work with the other processes that torchrun started while this is open; there may be none. Standard output of
    all but the first leads nowhere.

    `store`, `rank` and `size` are those of processes that something else started. A process that fails says why unless
    the first fails with the same words. Raises UserError where another process ended first."""
    global _joined
    if _joined is not None or (store is None and not is_launched()):
        yield
        return
    if store is None and int(os.environ["RANK"]):
        os.environ["TQDM_DISABLE"] = "1"  # is read when tqdm is imported
    import torch
    import torch.distributed as dist

    if store is None:
        store, rank, size = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # one node: its store outlives a restart, with the old addresses
            store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # a process that hangs is noticed after half an hour, which no step of a stage takes (ours)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        timeout=datetime.timedelta(minutes=30),
        store=store,
        rank=rank,
        world_size=size,
    )
    _joined = _Joined(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=FOREVER))
    try:
        with contextlib.ExitStack() as quiet:
            if _joined.rank:
                nowhere = quiet.enter_context(open(os.devnull, "w", encoding="utf-8"))
                quiet.enter_context(contextlib.redirect_stdout(nowhere))
            yield
    except Exception as error:
        if _was_left_alone(error):
            raise UserError(
                "The processes of a run go on together, and another one ended; what it said is above or below this"
                f" line ({' '.join(str(error).split())[:CITED]}). The same command goes on from the last checkpoint."
            ) from error
        _say_once(error, _joined.rank)
        raise
    finally:
        _joined = None
        with contextlib.suppress(Exception):  # of a group whose other processes are gone
            dist.destroy_process_group()


def _was_left_alone(error: BaseException | None) -> bool:
    """Whether the error, or what it came from, is that another process is gone."""
    while error is not None:
        if not isinstance(error, UserError) and OTHER_ENDED.search(str(error)):
            return True
        error = error.__cause__
    return False


def _say_once(error: Exception, rank: int) -> None:
    """Mark the error of a process as said where the first process ends with the same words."""
    from torch.distributed import distributed_c10d

    store, words = distributed_c10d._get_default_store(), str(error)
    with contextlib.suppress(Exception):  # a store that is gone with the first process
        if rank == 0:
            store.set("ended/0", words)
        elif not stopped_with(error):
            store.wait(["ended/0"], datetime.timedelta(seconds=HEARD))
            error.said_by_first = store.get("ended/0").decode() == words  # type: ignore[attr-defined]
    if rank and stopped_with(error):
        time.sleep(1.0)  # torchrun ends all processes when one ends: the first has to say it before


def on_first(work: Callable[..., Result], *args: Any) -> Result:
    """Let the first process do the work alone while the others wait, however long; all return its result, which must
    be plain data, or raise its exception. Models that are shared out must not run in there."""
    if world() == 1:
        return work(*args)
    assert _joined is not None
    told: list[Any] = [None, None]
    failure: BaseException | None = None
    if _joined.rank == 0:
        _joined.alone = True
        try:
            told[0] = work(*args)
        except BaseException as error:
            failure = error
            known = isinstance(error, (UserError, Interrupted, KeyboardInterrupt))
            told[1] = error if known else UserError(f"The first process of this run failed: {error!r}.")
        finally:
            _joined.alone = False
    _broadcast(told)
    if failure is not None:
        raise failure
    if told[1] is not None:
        told[1].said_by_first = True
        raise told[1]
    result: Result = told[0]
    return result


def first_says(value: bool) -> bool:
    """The first process's value: a decision that follows from numbers which each rounds by itself."""
    if world() == 1:
        return value
    import torch
    import torch.distributed as dist

    told = torch.tensor([value], device="cpu")
    dist.broadcast(told, src=0, group=waiting_group())
    return bool(told)


def is_restart() -> bool:
    """Whether torchrun or Slurm started the same command again by itself."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(int(count) > 0 for count in counts if count.isdecimal())


def raise_first(errors: Sequence[Exception]) -> None:
    """Raise the first error, if there is one: by `on_first`, so that no process goes on without the others."""
    if errors:
        raise errors[0]


def in_turn(work: Callable[[], Result]) -> Result:
    """Let the first process do the work, then all others: what it put into a cache is there for them. Each returns its
    own result, which need not be plain."""
    if world() == 1:
        return work()
    own: list[Result] = []
    on_first(lambda: own.append(work()))
    return own[0] if own else work()


def _broadcast(told: list[Any]) -> None:
    import torch.distributed as dist

    assert _joined is not None
    dist.broadcast_object_list(told, src=0, group=_joined.waiting)


def waiting_group() -> Any:
    """The group of all processes whose messages may be late by days; None where there is one process."""
    return None if world() == 1 or _joined is None else _joined.waiting


def summed(*numbers: float) -> list[float]:
    """The numbers, each summed over the processes, in float64."""
    if world() == 1:
        return list(numbers)
    import torch

    total = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    sum_in_place(total)
    found: list[float] = total.tolist()
    return found


def sum_in_place(*tensors: Any) -> None:
    """Sum plain tensors over the processes."""
    if world() > 1:
        import torch.distributed as dist

        for tensor in tensors:
            dist.all_reduce(tensor)


def gathered(value: Item) -> list[Item]:
    """The plain data of each process, in the order of their numbers."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value, group=waiting_group())
    return found


def share(items: Sequence[Item]) -> list[tuple[int, Item, bool]]:
    """This process's part of the items: the place of each, the item, and whether it counts. All processes get equally
    many: where items are missing, the first one comes again and does not count."""
    found = [(i, items[i], True) for i in range(rank(), len(items), world())]
    return [*found, (0, items[0], False)] if len(found) * world() < len(items) else found


def stopped_with(error: BaseException) -> bool:
    """Whether the first process says what this error says."""
    return bool(getattr(error, "said_by_first", False))
