"""An objective is a weighted sum of terms, as data, like Objective.of("0.9*forward_kl + 0.1*cross_entropy").

N tokens · V vocabulary · B batch · T tokens of a sequence · D width
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from convert.core.errors import UserError
from convert.core.fields import Range, Text, require, shown
from convert.core.processes import summed
from convert.objectives.recorded import RecordedTeacher
from convert.objectives.stages import Features, StagedModel
from convert.objectives.terms import (
    AttentionTerm,
    BlockTerm,
    LayerTerm,
    LogitTerm,
    StageTerm,
    Term,
    name_of,
    written,
)

StagedOf = Callable[[Any], StagedModel]  # of a classifier
Weight = Annotated[float, Range(0, 1e6)]

NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
TERM = re.compile(rf"\s*(?:({NUMBER})\s*\*\s*)?([A-Za-z_][A-Za-z0-9_]*)\s*(?:\(([^()]*)\)\s*)?", re.ASCII)
FIELD = re.compile(rf"\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*([+-]?{NUMBER}|[A-Za-z_][A-Za-z0-9_.-]*)\s*", re.ASCII)
WORDS = {"true": True, "false": False, "none": None}
NOTHING = "0"  # the text of an objective without terms


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms, each there once. `str` gives the line that `Objective.of` reads."""

    terms: tuple[tuple[float, Term], ...]

    def __post_init__(self) -> None:
        require(tuple, self.terms, "Objective: terms")
        for pair in self.terms:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Term)):
                raise UserError(f"Objective: terms must be pairs of a weight and a Term; got {shown(pair)}.")
            require(Weight, pair[0], f"Objective: the weight of {pair[1].name}")
            if not pair[0]:
                raise UserError(f"Objective: a weight must be above 0; that of {pair[1].name} is 0. Leave it out.")
        object.__setattr__(self, "terms", tuple((float(weight), term) for weight, term in self.terms))
        names = [term.name for _, term in self.terms]
        if len(set(names)) < len(names):
            raise UserError(f"Objective: each term must be there once; got {', '.join(names)}.")

    @staticmethod
    def of(text: str) -> "Objective":
        """The objective that one line describes, like "0.9*forward_kl(temperature=2) + 0.1*cross_entropy"."""
        require(Text, text, "Objective.of(): text")
        if text.strip() == NOTHING:
            return Objective(())
        terms, at = [], 0
        while match := TERM.match(text, at):
            weight, name, fields = match.groups()
            kind: Any = _class_of(name)
            terms.append((float(weight or 1), kind(**_fields(name, fields or ""))))
            at = match.end()
            if at == len(text):
                return Objective(tuple(terms))
            if text[at] != "+":
                break
            at += 1
        raise UserError(
            "An objective is written like 0.9*forward_kl(temperature=2) + 0.1*cross_entropy;"
            f" {shown(text)} cannot be read from its character {at + 1} on."
        )

    def __str__(self) -> str:
        return " + ".join(str(t) if w == 1 else f"{written(w)}*{t}" for w, t in self.terms) or NOTHING

    def with_weight(self, name: str, weight: float) -> "Objective":
        """The objective with this weight of a term; 0 removes it, and one that is not there is added with the fields
        that the others share, in the order of TERMS: whichever was given first, the sum is bit for bit the same."""
        require(Weight, weight, name)
        terms = tuple((weight if t.name == name else w, t) for w, t in self.terms)
        if name not in [t.name for _, t in terms]:
            order = list(_built_in())
            terms = tuple(
                sorted(
                    (*terms, (weight, self._with_shared_fields(_class_of(name)()))),
                    key=lambda pair: order.index(pair[1].name) if pair[1].name in order else len(order),
                )
            )
        return Objective(tuple(pair for pair in terms if pair[0]))

    def _with_shared_fields(self, term: Term) -> Term:
        """A new term with the values that fields of its names have in all terms here, such as a temperature."""
        shared = {}
        for name in _field_names(term):
            values = {getattr(other, name) for _, other in self.terms if name in _field_names(other)}
            if len(values) == 1:
                shared[name] = values.pop()
        return dataclasses.replace(term, **shared)

    def with_field(self, name: str, value: Any) -> "Objective":
        """The objective with this value of a field, such as a temperature, in every term that has one."""
        having = [term for _, term in self.terms if name in _field_names(term)]
        if not having:
            known = ", ".join(self.field_names()) or "none"
            raise UserError(f"No term of the objective {self} has a field {name!r}; their fields: {known}.")
        return Objective(
            tuple((w, dataclasses.replace(t, **{name: value}) if t in having else t) for w, t in self.terms)
        )

    def field_names(self) -> list[str]:
        """The fields of all terms."""
        return list(dict.fromkeys(name for _, term in self.terms for name in _field_names(term)))

    def plain(self) -> list[dict]:
        """The terms as plain data: what the ledger compares."""
        return [{"term": term.name, "weight": weight} | _plain_fields(term) for weight, term in self.terms]

    def check_plain(self) -> None:
        """Raise UserError for a term with a field that a file cannot hold: a run goes on by what its ledger says."""
        for fields in self.plain():
            try:
                json.dumps(fields)
            except (TypeError, ValueError):
                raise UserError(
                    f"The fields of a term must be numbers, words, or functions with a name; those of {fields['term']}"
                    f" are {shown(fields)}. Keep other things in the module that build returns."
                ) from None

    def build(
        self, student: nn.Module, teacher: nn.Module | None, staged_of: StagedOf | None = None
    ) -> "LiveObjective":
        """The objective with all that its terms own, for one stage of training. `staged_of(model)`, which terms on the
        stages of image classifiers need, gives the shapes of their outputs."""
        return LiveObjective(self, student, teacher, staged_of)


class LiveObjective(nn.Module):
    """An objective at work in one stage: its parameters and buffers are those that the terms own."""

    def __init__(
        self,
        objective: Objective,
        student: nn.Module,
        teacher: nn.Module | None,
        staged_of: StagedOf | None = None,
    ) -> None:
        super().__init__()
        self.terms = objective.terms
        owned = {term.name: build_term(term, student, teacher, staged_of) for _, term in self.terms}
        self.owned = nn.ModuleDict({_key(name): module for name, module in owned.items() if module is not None})
        self._sums: dict[str, Tensor] = {}  # the losses of this step, of the terms that own something

    def has(self, kind: type[Term]) -> bool:
        """Whether a term is of this kind."""
        return any(isinstance(term, kind) for _, term in self.terms)

    def needs_teacher(self, kind: type[Term] = Term) -> bool:
        """Whether a term of this kind needs the teacher."""
        return any(isinstance(term, kind) and term.needs_teacher for _, term in self.terms)

    def on_logits(
        self, student: Tensor, teacher: Tensor | RecordedTeacher | None, targets: Tensor, scale: float
    ) -> Tensor:
        """The sum of the LogitTerms over a chunk of N tokens or images, times `scale`: one over those of the whole
        batch."""
        total = student.new_zeros(())
        for weight, term, owned in self._of(LogitTerm):
            value = term.loss(student, teacher, targets, owned).sum()
            self._note(term, value, scale)
            total = total + weight * value
        return total * scale

    def on_layers(self, student: Sequence[Tensor], teacher: Sequence[Tensor], scale: float) -> Tensor:
        """The sum of the LayerTerms, times `scale`: the share of the whole batch that these sequences are."""
        return self._on_features(LayerTerm, student[0], (student, teacher), scale)

    def on_attention(self, student: Tensor, teacher: Tensor, scale: float) -> Tensor:
        """The sum of the AttentionTerms for one layer, times `scale`: that layer's and these sequences' share."""
        return self._on_features(AttentionTerm, student, (student, teacher), scale)

    def on_block(self, student: Tensor, teacher: Tensor, inputs: Tensor, scale: float) -> Tensor:
        """The sum of the BlockTerms for one layer, times `scale`: that layer's and these sequences' share."""
        return self._on_features(BlockTerm, student, (student, teacher, inputs), scale)

    def on_stages(self, student: Features, teacher: Features | None, targets: Tensor, scale: float) -> Tensor:
        """The sum of the StageTerms, times `scale`: the share of the whole batch that these images are."""
        return self._on_features(StageTerm, student.logits, (student, teacher, targets), scale)

    def _on_features(self, kind: type[Term], like: Tensor, compared: tuple, scale: float) -> Tensor:
        total = like.new_zeros(())
        for weight, term, owned in self._of(kind):
            value = term.loss(*compared, owned)
            self._note(term, value, scale)
            total = total + weight * value
        return total * scale

    def _of(self, kind: type[Term]) -> list[tuple[float, Any, nn.Module | None]]:
        owned = dict(self.owned.items())
        return [(weight, term, owned.get(_key(term.name))) for weight, term in self.terms if isinstance(term, kind)]

    def _note(self, term: Term, value: Tensor, scale: float) -> None:
        if _key(term.name) in self.owned:
            self._sums[term.name] = self._sums.get(term.name, 0.0) + value.detach() * scale

    @torch.no_grad()
    def advance(self, progress: float) -> None:
        """Let each term that owns something change its state, after an optimizer step."""
        for _, term in self.terms:
            if term.name in self._sums:
                loss = summed(float(self._sums[term.name]))[0]
                term.advance(self.owned[_key(term.name)], loss, progress)
        self.forget()

    def forget(self) -> None:
        """Drop the losses of a step that was not taken."""
        self._sums.clear()


def build_term(
    term: Term, student: nn.Module, teacher: nn.Module | None, staged_of: StagedOf | None = None
) -> nn.Module | None:
    """What a term owns for these models. Raises UserError if it cannot compare them."""
    if not isinstance(term, StageTerm):
        return term.build(student, teacher)
    if teacher is None or staged_of is None:
        raise UserError(f"{term.name} compares stages of two image classifiers; a teacher or its stages are missing.")
    return term.build_on_stages(staged_of(student), staged_of(teacher))


def _plain_fields(term: Term) -> dict[str, Any]:
    """Field -> value, functions by their names."""
    values = {field.name: getattr(term, field.name) for field in dataclasses.fields(term)}
    return {name: getattr(value, "__name__", value) if callable(value) else value for name, value in values.items()}


def _key(name: str) -> str:
    """The name of a term's module among the others, which no method of nn.ModuleDict has."""
    return f"{name}_term"


def _built_in() -> dict[str, type[Term]]:
    from convert.objectives import TERMS  # which imports this module

    return {name_of(term): term for term in TERMS}


def _class_of(name: str) -> type[Term]:
    """A built-in term by its name."""
    known = _built_in()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.3) or list(known)
        raise UserError(f"There is no term {shown(name)}. Nearest: {', '.join(near)}. All: {', '.join(known)}.")
    return known[name]


def _field_names(term: Term | type[Term]) -> list[str]:
    return [field.name for field in dataclasses.fields(term)]


def _fields(name: str, text: str) -> dict[str, Any]:
    """The fields of a term from "temperature=2, start=0.4"."""
    found: dict[str, Any] = {}
    known = _field_names(_class_of(name))
    for part in text.split(",") if text.strip() else ():
        match = FIELD.fullmatch(part)
        if not match:
            raise UserError(f"A field of {name} is written NAME=VALUE; got {shown(part.strip())}.")
        field, value = match.groups()
        if field not in known or field in found:
            near = difflib.get_close_matches(field, known, 3, 0.3) or known
            rule = f"{name} has no field {field!r}" if field not in known else f"{name} has {field!r} twice"
            raise UserError(f"{rule}. Nearest: {', '.join(near) or 'none; it has no fields'}.")
        found[field] = value_of(value)
    return found


def value_of(text: str) -> object:
    """A number, true, false or none, or else the word itself; the field then checks what it gets."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if re.fullmatch(r"[+-]?[0-9]{1,30}", text, re.ASCII):
        return int(text)
    return float(text) if re.fullmatch(rf"[+-]?{NUMBER}", text, re.ASCII) else text
