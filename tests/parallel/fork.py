"""Several processes of one run, forked from the test: they have imported everything, and meet by a file."""

import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from convert.core.processes import joined
from convert.run import main

LONGEST = 240.0  # seconds that processes may take where all of the machine is busy: then they hang


def start(folder: Path, size: int, work: Callable[..., Any], *args: Any) -> list[int]:
    """Start `size` processes that each call `work(*args)` among the others; their ids. What a process returns, raises,
    or says is in a file of its own."""
    folder.mkdir(parents=True)
    return [_fork(folder, rank, size, work, args) for rank in range(size)]


def commands(
    folder: Path,
    size: int,
    arguments: list[str],
    before: Callable[[], None] = lambda: None,
    main: Callable[[list[str]], int] = main,
) -> list[int]:
    """The exit codes of the command in `size` processes, which it joins as torchrun's. `before` runs first in each."""
    folder.mkdir(parents=True)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent has it
    environment = {
        "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
    }  # fmt: skip

    def work(rank: int) -> int:
        os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        before()
        return main(arguments)

    return finished([_fork(folder, rank, 1, work, (rank,), by_itself=True) for rank in range(size)])


def _fork(folder: Path, rank: int, size: int, work: Callable[..., Any], args: tuple, by_itself: bool = False) -> int:
    if child := os.fork():
        return child
    code = 1
    try:
        sys.stderr = (folder / f"said-{rank}").open("w", buffering=1)
        os.dup2(sys.stderr.fileno(), 2)
        if by_itself:
            os._exit(work(*args))
        with joined(dist.FileStore(str(folder / "store"), size), rank, size):
            found = work(*args)
        (folder / f"returned-{rank}").write_bytes(pickle.dumps(found))
        code = 0
    except BaseException as error:
        (folder / f"raised-{rank}").write_text(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    os._exit(code)


def finished(children: list[int]) -> list[int]:
    """The exit codes of processes, of one that a signal ended minus its number; all are gone then."""
    codes: dict[int, int] = {}
    until = time.monotonic() + LONGEST
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
            until += LONGEST
        time.sleep(0.02)
    return [codes[child] for child in children]


def together(folder: Path, size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(*args)` returns in each of `size` processes."""
    codes = finished(start(folder, size, work, *args))
    raised = [file.read_text() for file in sorted(folder.glob("raised-*"))]
    assert not any(codes), "\n".join([f"exit codes {codes}", *raised])
    return [pickle.loads((folder / f"returned-{rank}").read_bytes()) for rank in range(size)]
