"""Where everything that a person reads is printed."""

import sys

from rich.console import Console

console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
