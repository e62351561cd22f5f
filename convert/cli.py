"""What all commands share: options in words, exit codes, and failures as one sentence."""

import argparse
import functools
import gc
import math
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import NoReturn

from convert.core.console import visible
from convert.core.errors import Interrupted, UserError, files_in_words
from convert.core.fields import shown
from convert.core.places import cache_folder
from convert.core.processes import stopped_with

SUFFIXES = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}


class Parser(argparse.ArgumentParser):
    """A parser of options whose errors are a UserError, so that a wrong option is one sentence like every other
    mistake."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (.*?): ", r"\1 ", message)
        raise UserError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


def main_of(
    parser: Parser,
    work: Callable[[argparse.Namespace], None],
    argv: list[str] | None,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> int:
    """Parse `argv` (None: the command line's) and do the work; returns the exit code. `parser` gets the option
    --debug. `around()` is open meanwhile."""
    parser.add_argument("--debug", action="store_true", help="show where an error was raised")
    argv = sys.argv[1:] if argv is None else argv
    try:
        return fail_in_words(functools.partial(_work, parser, work, argv, around), debug="--debug" in argv)
    finally:
        gc.unfreeze()  # libraries in C++ want to be taken apart when the process ends


def _work(
    parser: Parser,
    work: Callable[[argparse.Namespace], None],
    argv: list[str],
    around: Callable[[], AbstractContextManager[None]],
) -> None:
    with around():
        work(parser.parse_args(argv))


def fail_in_words(work: Callable[[], object], debug: bool) -> int:
    """Run `work`; the exit code is 0, 2 for a mistake of the user, 1 for a defect of this program, 130 when the user
    stopped it, 141 when nobody reads its output any more."""
    try:
        with files_in_words():
            cache_folder()  # a cache that cannot be is refused before anything is done
            work()
        return 0
    except Interrupted as stop:
        if not stopped_with(stop):
            print(stop, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("Stopped at once; the same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python itself complains while it ends
        return 141
    except Exception as error:
        if debug or os.environ.get("CONVERT_DEBUG"):
            traceback.print_exc()
        if isinstance(error, UserError):
            if not stopped_with(error):
                print(f"error: {visible(str(error))}", file=sys.stderr)
            return 2
        what = visible(f"{type(error).__name__}: {error}", keep="\n\t")
        print(
            f"error: This is a defect of ours: {what} (CONVERT_DEBUG=1 before the command shows where)", file=sys.stderr
        )
        return 1


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Goes around imports inside a command, which take seconds. Ctrl-C ends the process there, with one line and exit
    code 130: an exception could come up in any module that is half imported, and be swallowed there. The garbage
    collector waits, and never looks through what was imported: that would take a third of the time of a plan."""
    stops = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else a program that uses us handles it
    stops = stops and threading.current_thread() is threading.main_thread()
    collects = gc.isenabled()
    gc.disable()
    if stops:
        signal.signal(signal.SIGINT, _stop)
    try:
        yield
    finally:
        if stops:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        gc.freeze()
        if collects:
            gc.enable()


def _stop(number: int, frame: FrameType | None) -> None:
    os.write(2, b"Stopped before anything began.\n")
    os._exit(130)


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A type for argparse: a whole number within these bounds."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,20}", text.strip()) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number within {low:,} .. {high:,}; got {shown(text)}")
        return int(text)

    return parse


def real_number(low: float, high: float) -> Callable[[str], float]:
    """A type for argparse: a number within these bounds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number within {low:g} .. {high:g}; got {shown(text)}")
        return value

    return parse


def number_of_tokens(text: str) -> int:
    """A number of tokens, written 20000, 500k, 12M or 1B; raises UserError where the text is none."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)([kMB]?)", text)
    if not found or float(found[1]) * SUFFIXES[found[2]] < 1:
        raise UserError(f"A number of tokens is written 20000, 500k, 12M or 1B; got {shown(text)}.")
    return int(float(found[1]) * SUFFIXES[found[2]])
