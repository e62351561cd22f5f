"""The interface of a start: how a mixer takes over the weights of the layer that it replaces, and hands them on."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from convert.mixers.base import Mixer
from convert.mixers.projections import Projections

# Why a start is not exact
NO_MAPS = "its feature maps have yet to learn the softmax; swap in linear attention and align it first"
NO_SOFTMAX = "the layer is linear attention, which no softmax equals; start from the first teacher"


class Start(ABC):
    """The start of one kind of mixer. It has class methods alone, and is never made."""

    mixer: ClassVar[type[Mixer]]
    hands_on_all: ClassVar[bool] = False  # whether `projections` say all that the mixer computes

    @classmethod
    def needs_stats(cls, options: Any) -> bool:
        """Whether `from_projections` asks for the statistics of a calibration (`Projections.stats`)."""
        return False

    @classmethod
    def needs_look_back(cls, options: Any) -> bool:
        """Whether these statistics must have how far the layer's heads look back, which only attention can tell."""
        return False

    @classmethod
    def refits_output(cls, options: Any) -> bool:
        """Whether the output projection is solved for what the layer's attention gives, once the mixer is in place."""
        return False

    @classmethod
    def fit(cls, layers: Iterable[Projections], options: Any) -> list[Any]:
        """The options of each layer, where they depend on what all of these layers hold. The weights of a layer are
        there until the next one is asked for."""
        return [options for _ in layers]

    @classmethod
    @abstractmethod
    def why_inexact(cls, projections: Projections, options: Any, tokens: int) -> str | None:
        """Why a start from this layer is another function of a text of `tokens` tokens, and the way out; None where
        theory says that it is the same function. `options`: as `fit` leaves them."""

    @classmethod
    @abstractmethod
    def from_projections(cls, projections: Projections, options: Any) -> Mixer:
        """A mixer that starts from the weights of the layer it replaces."""

    @classmethod
    @abstractmethod
    def projections(cls, mixer: Any) -> Projections:
        """What the next mixer may start from: the inverse of `from_projections`."""
