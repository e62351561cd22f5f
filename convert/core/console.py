"""Where everything that a person reads is printed, and how its numbers are said."""

import os
import sys

import rich.console
from rich.text import Text

LONGEST = 100  # of a name in a table, a chart or a sentence


class Console(rich.console.Console):
    """Text is text: names that look like markup or emoji codes stay as they are, and no name moves the cursor."""

    def __init__(self, **settings):
        super().__init__(**{"markup": False, "emoji": False} | settings)

    def render_str(self, text: str, **settings) -> Text:
        return super().render_str(visible(text, keep="\n\t"), **settings)


def visible(text: str, keep: str = "") -> str:
    """Control characters, line breaks and half surrogates (of a name that is not UTF-8) as escapes: fit for a line, a
    page and any file."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or not _moves(c) else c.encode("unicode_escape").decode() for c in text)


def _moves(c: str) -> bool:
    code = ord(c)
    return (
        code < 32
        or 127 <= code < 160
        or 0xD800 <= code < 0xE000
        or c in "\u2028\u2029\u202a\u202b\u202d\u202e\ufffe\uffff"
    )


def short(text: str, longest: int = LONGEST) -> str:
    text = visible(text)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def open_streams() -> None:
    """At the start of a command: streams that were closed (`>&-`) lead nowhere, so that no file takes their numbers;
    text that the terminal's encoding lacks is shown as escapes."""
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
    return _scaled(num_bytes, (" B", " kB", " MB", " GB", " TB"))


def count(number: float) -> str:
    return _scaled(number, ("", "k", "M", "B", "T"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    """Three digits in the unit that leaves less than a thousand of it, or in the last."""
    for unit in units[:-1]:
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}{units[-1]}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
