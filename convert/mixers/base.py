"""The interface of a mixer: a causal map with a state.

B batch · T time · D width · R rotary dimensions
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from convert.mixers.projections import Projections, Shape

State = tuple[Tensor, ...]  # each with the batch first; sums are in float32


@dataclass(frozen=True)
class StateSize:
    """Of one sequence, by formula: `fixed` bytes, and for each token so far, at most `window` of them, `narrow` numbers
    in the dtype of the model and `wide` bytes more."""

    fixed: int = 0
    narrow: int = 0
    wide: int = 0
    window: int | None = None

    def at(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes after so many tokens."""
        held = tokens if self.window is None else min(tokens, self.window)
        return self.fixed + held * (self.narrow * dtype.itemsize + self.wide)


@dataclass(frozen=True)
class Context:
    """Where the tokens of one call are.

    cos, sin [B, T, R]: the rotary table at their positions. `real` bool [B, T]: False at padding. `document_ids` [B,
    T]: states start anew where the id changes; the first token continues the state it is given."""

    cos: Tensor
    sin: Tensor
    real: Tensor | None = None
    document_ids: Tensor | None = None


class Mixer(nn.Module, ABC):
    """y_BTD, state = mixer(x_BTD, context, state); `state=None` is the start of a sequence.

    A leaf has `Options`, a frozen dataclass, and is built as Leaf(shape, options).
    """

    Options: type
    narrow = 0  # so many of the state's first parts are keys, values or latents, in the dtype of the model
    whole = False  # whether its projections say all that it computes
    decays = False  # whether it forgets at rates of its own (DecayRate)

    shape: Shape

    @staticmethod
    def needs_inputs(options) -> bool:
        """Whether `from_projections` asks for what a calibration saw."""
        return False

    @classmethod
    def fit(cls, layers: Iterable[Projections], options) -> list:
        """The options of each layer, where they depend on what all of these layers hold."""
        return [options for _ in layers]

    @classmethod
    @abstractmethod
    def inexact(cls, projections: Projections, options, tokens: int) -> str | None:
        """Why a start from this layer is another function of so many tokens, and the way out; None where theory says
        that it is the same. `options`: as `fit` leaves them."""

    @classmethod
    @abstractmethod
    def from_projections(cls, projections: Projections, options) -> "Mixer":
        """Start from the weights of the layer it replaces."""

    @abstractmethod
    def projections(self) -> Projections:
        """What the next mixer may start from."""

    @abstractmethod
    def state_size(self) -> StateSize:
        """The formula; a test holds it against the state itself."""

    @abstractmethod
    def forward(self, x_BTD: Tensor, context: Context, state: State | None = None) -> tuple[Tensor, State]: ...
