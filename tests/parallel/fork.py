"""Several processes of one run, forked from the test: they have imported everything, and meet by a file."""

import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from convert.core.processes import joined

LONGEST = 60.0  # seconds that a test's processes may take


def start(folder: Path, size: int, work: Callable[..., Any], *args: Any) -> list[int]:
    """Start `size` processes that each call `work(*args)` among the others; their ids. What a process returns, or
    raises, is in a file of its own."""
    folder.mkdir(parents=True)
    return [_fork(folder, rank, size, work, args) for rank in range(size)]


def _fork(folder: Path, rank: int, size: int, work: Callable[..., Any], args: tuple) -> int:
    if child := os.fork():
        return child
    code = 1
    try:
        os.dup2(os.open(folder / f"said-{rank}", os.O_CREAT | os.O_WRONLY), 2)
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
