"""The kinds of terms that objectives are made of.

N tokens or images · V vocabulary · B batch · T tokens of a sequence · D width · K classes
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from convert.core.errors import UserError
from convert.core.fields import Checked
from convert.objectives.stages import Features, StagedModel


@dataclass(frozen=True)
class Term(Checked):
    """One summand of a loss. Subclass LogitTerm, LayerTerm, AttentionTerm, BlockTerm or StageTerm, which say what is
    compared, as a frozen dataclass whose fields are the term's settings; nothing else has to know the new class.

    A term may own parameters and state: `build` returns them as one module, which the stage optimises (with the rate of
    everything else and without weight decay), saves in its checkpoints, and drops at its end. `loss` gets that module
    back as `owned`; `advance` may change its state once per optimizer step."""

    compares: ClassVar[str] = "nothing"  # in words, for messages
    needs_teacher: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The snake_case of the class: ForwardKL is forward_kl."""
        return name_of(type(self))

    def build(self, student: nn.Module, teacher: nn.Module | None) -> nn.Module | None:
        """The parameters and buffers of this term for these two models, on the student's device; None if it has none.

        The models may be on the meta device. Raises UserError if the term cannot compare them."""
        return None

    def why_not_recorded(self) -> str | None:
        """Why the term cannot be computed from what was recorded of a teacher (RecordedTeacher), as the end of a
        sentence; None where it can."""
        return f"which compares {self.compares}" if self.needs_teacher else None

    def advance(self, owned: nn.Module, loss: float, progress: float) -> None:
        """Called after each optimizer step with the term's own loss (unweighted) in that step, and the share of the
        stage's steps that came before it."""

    def __str__(self) -> str:
        """The name, and the fields that differ from their defaults."""
        fields = [
            f"{field.name}={written(value)}"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]
        return self.name + (f"({', '.join(fields)})" if fields else "")


class LogitTerm(Term):
    """A term that compares distributions over the next token, or over the classes of an image."""

    compares = "logits"

    def why_not_recorded(self) -> str | None:
        return "which needs the teacher's probabilities of all tokens" if self.needs_teacher else None

    def loss(self, student: Tensor, teacher: Tensor | None, targets: Tensor, owned: nn.Module | None) -> Tensor:
        """The loss [N] of N tokens, from logits [N, V] of both in float32 and the next tokens [N]; or of N images, from
        logits [N, K] and the probabilities of the classes [N, K], all 0 for an image whose label is not known.

        Called on one chunk of tokens after another. `teacher` is None for a term that needs none, and a RecordedTeacher
        for one that can be computed from that, where the teacher is not there."""
        raise NotImplementedError


class LayerTerm(Term):
    """A term that compares the outputs of decoder layers in a pass of the whole model."""

    compares = "layer outputs"

    def loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor], owned: nn.Module | None) -> Tensor:
        """The loss [], a mean over tokens, from the output [B, T, D] of each layer in float32."""
        raise NotImplementedError


class AttentionTerm(Term):
    """A term that compares the outputs of a mixer and of the attention it replaces, on the same input."""

    compares = "attention outputs"

    def loss(self, student: Tensor, teacher: Tensor, owned: nn.Module | None) -> Tensor:
        """The loss [] of one layer, a mean over sequences, from two outputs [B, T, D] in float32."""
        raise NotImplementedError


class BlockTerm(Term):
    """A term that compares the outputs of a decoder layer with a mixer and of the teacher's decoder layer, on the same
    input: the hidden states behind attention, residuals, norms and MLP."""

    compares = "block outputs on the same input"

    def loss(self, student: Tensor, teacher: Tensor, inputs: Tensor, owned: nn.Module | None) -> Tensor:
        """The loss [] of one layer, a mean over sequences, from two outputs and their common input, [B, T, D] in
        float32."""
        raise NotImplementedError


class StageTerm(Term):
    """A term that compares outputs of stages of two image classifiers, and their logits."""

    compares = "outputs of stages"

    def build_on_stages(self, student: StagedModel, teacher: StagedModel) -> nn.Module | None:
        """What `build` is for other terms, for two classifiers with the shapes of their stages."""
        return None

    def loss(self, student: Features, teacher: Features, targets: Tensor, owned: nn.Module | None) -> Tensor:
        """The loss [], a mean over images, from stages and logits of both in float32, and the probabilities [B, K] of
        the classes, all 0 for an image whose label is not known."""
        raise NotImplementedError


class ScanTerm(StageTerm):
    """A term that compares the scans over places in the blocks of two image classifiers, which must have as many, with
    states of as many numbers: `scans` of both Features are there."""

    compares = "scans over places"

    def build_on_stages(self, student: StagedModel, teacher: StagedModel) -> None:
        """Raises UserError for models whose scans cannot be compared block by block."""
        ours, theirs = ([(s.places, s.channels, s.states) for s in each.scans] for each in (student, teacher))
        if not ours or ours != theirs:
            raise UserError(
                f"{self.name} compares the scans of two VMambas with blocks of one size; the student has {_many(ours)},"
                f" the teacher {_many(theirs)}. Leave it out, or take a student that starts from its teacher."
            )


def _many(scans: Sequence[tuple[int, int, int]]) -> str:
    """Scans in words."""
    if not scans:
        return "none"
    places, channels, states = scans[0]
    return f"{len(scans)} (the first of {places} places, {channels} channels and states of {states})"


def name_of(term: type[Term]) -> str:
    """The name of a class of terms: its snake_case."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", term.__name__).lower()


def written(value: object) -> str:
    """A value as `value_of` reads it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return str(value)
