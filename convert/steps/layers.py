"""Which layers of a model a swap leaves as they are: by number, by pattern, or by measurement."""

import re
from dataclasses import dataclass
from typing import Annotated

from convert.core.fields import Checked, Range

DEFAULT_N = 5  # one layer in five keeps full attention (Attention Editing, arXiv 2604.05688)


@dataclass(frozen=True)
class EveryNth(Checked):
    """Every n-th layer, the last of each n."""

    n: Annotated[int, Range(2, 1000)]

    @staticmethod
    def of(text: str) -> "EveryNth":
        """Read `every:6`. Raises ValueError."""
        found = re.fullmatch("every:([0-9]{1,6})", text)
        if not found:
            raise ValueError("every:6")
        return EveryNth(int(found[1]))

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers of the pattern."""
        return tuple(range(self.n - 1, num_layers, self.n))

    def __str__(self) -> str:
        return f"every:{self.n}"


@dataclass(frozen=True)
class MostSensitive(Checked):
    """One layer in n: those whose replacement alone changes the model most, by measurement."""

    n: Annotated[int, Range(2, 1000)]

    @staticmethod
    def of(text: str) -> "MostSensitive":
        """Read `auto:6`, or `auto`, which is auto:5. Raises ValueError."""
        found = re.fullmatch("auto(?::([0-9]{1,6}))?", text)
        if not found:
            raise ValueError("auto or auto:6")
        return MostSensitive(int(found[1] or DEFAULT_N))

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """Return as many layers as will be chosen; which ones, only a measurement tells."""
        return tuple(range(self.n - 1, num_layers, self.n))

    def __str__(self) -> str:
        return f"auto:{self.n}"


Keep = tuple[Annotated[int, Range(0, 1000)], ...] | EveryNth | MostSensitive
