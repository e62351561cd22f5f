"""The exceptions with which a run ends, and what a disk refuses, in a sentence."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO)  # what another process of ours may end with


class UserError(ValueError):
    """A mistake that the user can mend. The message is one sentence: the rule, the facts, the way out. A command ends
    with exit code 2."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived, and the work so far is safe on disk. The message says how to go on."""


@contextmanager
def files_in_words() -> Iterator[None]:
    """Goes around all work: what a disk refuses (full, read-only, gone) becomes a UserError, whichever library
    wrote."""
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
    """What the operating system said, if the error is that it refused a file, else None. safetensors, torch and other
    processes report that by exceptions of their own, which are known by their messages."""
    if isinstance(error, OSError):
        return str(error) if error.errno is not None else None
    text = (str(error).strip().splitlines() or [""])[-1]
    # torch.save names this file of its own where a disk is full
    if re.search(r"\(os error \d+\)", text) or "inline_container.cc" in str(error):
        return text
    if isinstance(error, RuntimeError) and any(f"[Errno {number}]" in text for number in FULL):
        return text
    if type(error).__module__ == "sqlite3" and re.search("disk|full|readonly|unable to open", text):
        return text
    return None
