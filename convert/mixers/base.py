"""The interface of a mixer: a causal map with a state.

B batch · T time · D width · R rotary dimensions
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from convert.projections import Projections, Shape

State = tuple[Tensor, ...]  # each with the batch first, in float32; their sizes do not depend on T


@dataclass(frozen=True)
class Context:
    """Where the tokens of one call are.

    cos, sin [B, T, R]: the rotary table at their positions. `real` bool [B, T]: False at padding. `document_ids` [B, T]:
    states start anew where the id changes; the first token continues the state it is given.
    """

    cos: Tensor
    sin: Tensor
    real: Tensor | None = None
    document_ids: Tensor | None = None


class Mixer(nn.Module, ABC):
    """y_BTD, state = mixer(x_BTD, context, state); `state=None` is the start of a sequence.

    A leaf has `Options`, a frozen dataclass, and is built as Leaf(shape, options).
    """

    Options: type

    shape: Shape

    @classmethod
    @abstractmethod
    def from_projections(cls, projections: Projections, options) -> "Mixer":
        """Start from the weights of the layer it replaces."""

    @abstractmethod
    def projections(self) -> Projections:
        """What the next mixer may start from."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, context: Context, state: State | None = None) -> tuple[Tensor, State]: ...
