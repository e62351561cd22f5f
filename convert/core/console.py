"""The console on which everything that a person reads is printed, and how numbers are written there."""

import os
import sys
from typing import Any

import rich.console
from rich.text import Text

LONGEST = 100  # characters of a name in a table, a chart or a sentence


class Console(rich.console.Console):
    """A console on which text is text: names that look like markup or emoji codes stay as they are, and no name moves
    the cursor."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False} | settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(visible(text, keep="\n\t"), **settings)


def visible(text: str, keep: str = "") -> str:
    """The text with control characters, line breaks and half surrogates (of a name that is not UTF-8) as escapes, so
    that it fits a line, a page and any file. Characters in `keep` stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or not _moves(c) else c.encode("unicode_escape").decode() for c in text)


def _moves(c: str) -> bool:
    """Whether the character moves the cursor, turns the direction of writing, or is none that UTF-8 can hold."""
    code = ord(c)
    return (
        code < 32
        or 127 <= code < 160
        or 0xD800 <= code < 0xE000
        or c in "\u2028\u2029\u202a\u202b\u202d\u202e\ufffe\uffff"
    )


def short(text: str, longest: int = LONGEST) -> str:
    """The text in one line of at most `longest` characters."""
    text = visible(text)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def open_streams() -> None:
    """Make standard input, output and errors usable. Streams that were closed (`>&-`) lead nowhere, so that no file
    takes their numbers; characters that the terminal's encoding lacks are shown as escapes."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


open_streams()
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)


def size(num_bytes: float) -> str:
    """A number of bytes in words, as 1.5 GB (powers of 1,000)."""
    return _scaled(num_bytes, (" B", " kB", " MB", " GB", " TB"))


def count(number: float) -> str:
    """A number in three digits, as 1.5M."""
    return _scaled(number, ("", "k", "M", "B", "T"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    """The number in three digits and the unit that leaves less than a thousand of it, or the last unit."""
    for unit in units[:-1]:
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}{units[-1]}"


def duration(seconds: float) -> str:
    """A time in words, as 90 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
