"""The two ways a run can end badly, and a command that is stopped before it begins."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user can mend. The message is one sentence: the rule, the facts, the way out. Exit code 2."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived and the work in hand is safe on disk. The message says how to go on."""


@contextmanager
def quick_to_stop(is_command: bool) -> Iterator[None]:
    """Around the imports of a command, which take seconds: Ctrl-C ends it there and then, in a line and with exit code 130."""
    if is_command:
        before = signal.signal(signal.SIGINT, _stop)
    yield
    if is_command:
        signal.signal(signal.SIGINT, before)


def _stop(number, frame) -> None:
    os.write(2, b"Stopped before anything began.\n")
    os._exit(130)  # an exception could come up in any module that is half imported, and be swallowed there
