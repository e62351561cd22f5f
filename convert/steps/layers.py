"""Which layers of a model a swap leaves as they are: by number, by pattern, or by measurement."""

import re
from dataclasses import dataclass
from typing import Annotated

from convert.core.errors import UserError
from convert.core.fields import check

DEFAULT_N = 5  # one layer in five keeps full attention (Attention Editing, arXiv 2604.05688)


@dataclass(frozen=True)
class EveryNth:
    """Every n-th layer, the last of each n."""

    n: Annotated[int, (2, 1000)]

    __post_init__ = check

    def of(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers of the pattern."""
        return tuple(range(self.n - 1, num_layers, self.n))

    def __str__(self) -> str:
        return f"every:{self.n}"


@dataclass(frozen=True)
class MostSensitive:
    """One layer in n: those whose replacement alone changes the model most, by measurement."""

    n: Annotated[int, (2, 1000)]

    __post_init__ = check

    def of(self, num_layers: int) -> tuple[int, ...]:
        """Return as many layers as will be chosen; which ones, only a measurement tells."""
        return tuple(range(self.n - 1, num_layers, self.n))

    def __str__(self) -> str:
        return f"auto:{self.n}"


Keep = tuple[Annotated[int, (0, 1000)], ...] | EveryNth | MostSensitive


def parse_keep(text: str, now: Keep) -> Keep:
    """Read `none`, layers as `4,9`, `every:6`, or `auto:6` (`auto` alone: as many as now). Raises UserError."""
    kind, _, number = text.partition(":")
    if text == "none":
        return ()
    if kind in ("auto", "every") and re.fullmatch("[0-9]{0,6}", number):
        n = int(number) if number else now.n if isinstance(now, EveryNth | MostSensitive) else DEFAULT_N
        return MostSensitive(n) if kind == "auto" else EveryNth(n)
    if not re.fullmatch(r"\s*[0-9]{1,4}\s*(,\s*[0-9]{1,4}\s*)*", text):
        raise UserError(f"keep takes none, layers as 4,9, every:6, auto or auto:6; got {text!r}.")
    return tuple(int(part) for part in text.split(","))
