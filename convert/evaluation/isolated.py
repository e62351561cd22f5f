"""The process in which a program of a model runs: execution.py starts this file, by its path and with nothing of ours.

It reads a word and the program from stdin, and writes the word to stdout when the program has come to its end: neither
exit(0) nor printing can pass for that.
"""

import builtins
import os
import resource
import sys
from typing import Any

READS = (None, "r", "rb", "rt")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# modules with a way around the hook, and events that begin so, but for those that imports need
MODULES = frozenset("ctypes _ctypes _posixsubprocess _socket _multiprocessing _posixshmem _testcapi _ssl".split())
KINDS = frozenset("os shutil subprocess socket ctypes pty signal fcntl resource gc urllib http syslog".split())
HARMLESS = frozenset(("os.listdir", "os.scandir"))


def refuse(library: tuple[str, ...]) -> None:
    """Refuse for the rest of this process what no answer needs: files other than those of the library, other
    processes, the network. Python's audit hooks cannot be taken away again."""

    def hook(event: str, args: tuple[Any, ...], instance=isinstance, text=str, whole=int) -> None:  # type: ignore[no-untyped-def]
        if event == "open":
            path, mode, flags = args
            written = mode not in READS or (instance(flags, whole) and flags & WRITES)
            if written or not (instance(path, text) and path.startswith(library) and ".." not in path):
                raise PermissionError("this program may open no file")
        elif event == "import":
            if args[0].partition(".")[0] in MODULES:
                raise ImportError(f"this program may not import {args[0]}")
        elif event.partition(".")[0] in KINDS and event not in HARMLESS:
            raise PermissionError(f"this program may not call {event}")

    sys.addaudithook(hook)


def limit(seconds: int, memory: int) -> None:
    """Limit processor time (seconds) and memory (bytes); no file may grow, no core be dumped."""
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def main() -> None:
    """Run the program; sys.argv has the limits, then the folders of the standard library."""
    word, _, program = sys.stdin.buffer.read().decode().partition("\n")
    seconds, memory, *library = sys.argv[1:]
    answer, end = os.dup(1), os._exit
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    sys.argv = [""]
    for name in ("exit", "quit", "help", "input"):
        if hasattr(builtins, name):
            delattr(builtins, name)
    write, encoded = os.write, word.encode()
    limit(int(seconds), int(memory))
    refuse(tuple(library))
    try:
        exec(compile(program, "answer.py", "exec"), {"__name__": "answer"})
    except BaseException:  # whatever the program raises, SystemExit too, is no success
        end(1)
    write(answer, encoded)
    end(0)


if __name__ == "__main__":
    main()
