"""The ways a run can end badly, what a disk does said in a sentence, and a command that is stopped before it begins."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO)  # what a process of ours may have died of


class UserError(ValueError):
    """Something the user can mend. The message is one sentence: the rule, the facts, the way out. Exit code 2."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived and the work in hand is safe on disk. The message says how to go on."""


@contextmanager
def files_in_words() -> Iterator[None]:
    """Around all work: what a disk refuses (full, read-only, gone) is a UserError, whichever library wrote."""
    try:
        yield
    except (UserError, BrokenPipeError):  # the second: whoever read our output has gone
        raise
    except Exception as error:
        if reason := disk_reason(error):
            raise UserError(
                f"A file cannot be read or written: {reason}. Mend that; the same command goes on from there."
            ) from error
        raise


def disk_reason(error: BaseException) -> str | None:
    """What the operating system said, if it refused a file. safetensors, torch and another process tell it in words of
    their own."""
    if isinstance(error, OSError):
        return str(error) if error.errno is not None else None
    text = (str(error).strip().splitlines() or [""])[-1]
    if re.search(r"\(os error \d+\)", text) or "inline_container.cc" in str(
        error
    ):  # torch.save: "unexpected pos", where a disk is full
        return text
    if isinstance(error, RuntimeError) and any(f"[Errno {number}]" in text for number in FULL):
        return text
    if type(error).__module__ == "sqlite3" and re.search("disk|full|readonly|unable to open", text):
        return text
    return None
