"""Which layers of a model a swap leaves as they are: by number, by pattern, or by measurement; and whether two models
can be compared layer by layer."""

import re
from dataclasses import dataclass
from typing import Annotated

from transformers import PreTrainedConfig

from convert.core.fields import Checked, Range

DEFAULT_N = 5  # one layer in five keeps full attention (Attention Editing, arXiv 2604.05688)

SAME_LAYERS = {  # what layers must share to be compared one by one: in words -> field of a configuration
    "number of layers": "num_hidden_layers",
    "width": "hidden_size",
    "number of heads": "num_attention_heads",
    "rotary positions": "rope_parameters",
}


@dataclass(frozen=True)
class EveryNth(Checked):
    """Every n-th layer, the last of each n; the last layer of a model that has fewer than n."""

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
        return tuple(range(self.n - 1, num_layers, self.n)) or (num_layers - 1,)

    def __str__(self) -> str:
        return f"every:{self.n}"


@dataclass(frozen=True)
class MostSensitive(Checked):
    """One layer in n, and one at least: those whose replacement alone changes the model most, by measurement."""

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
        return EveryNth(self.n).layers(num_layers)

    def __str__(self) -> str:
        return f"auto:{self.n}"


Keep = tuple[Annotated[int, Range(0, 1000)], ...] | EveryNth | MostSensitive


def differing_layers(student: PreTrainedConfig, teacher: PreTrainedConfig) -> str | None:
    """The first of what layers must share that these two do not."""
    for words, field in SAME_LAYERS.items():
        a, b = (getattr(config, field, None) for config in (student, teacher))
        if a != b:
            return words
    return None
