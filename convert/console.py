"""Where everything that a person reads is printed, and how its numbers are said."""

import sys

from rich.console import Console

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
