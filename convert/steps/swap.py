"""The step Swap: replace the attention, or the mixers, of a student's layers by another mixer."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from transformers import PreTrainedModel

from convert.core.console import console
from convert.core.errors import UserError
from convert.core.fields import Name, Range, check, require
from convert.mixers import MIXERS
from convert.mixers.init import STARTS
from convert.mixers.projections import CalibrationStats
from convert.models.access import layers_of, slots_of
from convert.models.sharding import is_shared_out
from convert.models.student import ConvertedForCausalLM
from convert.models.swap import projections_of, swap
from convert.steps import handover, selection
from convert.steps.base import Dial, Outline, PlanContext, Session, Step, StepPlan, count, host_config, plain
from convert.steps.calibration import inputs_of
from convert.steps.layers import SAME_LAYERS, Keep, MostSensitive, differing_layers
from convert.steps.refit import refit_outputs
from convert.training.parallel import floats_held

RANKING_TOKENS = 2048  # of training text, for each layer (ours)
TINY_CALIBRATION = 3 * 128  # tokens
TINY_SEQ_LEN = 64  # tokens
# stands for a calibration that is yet to come
SEEN = CalibrationStats(*(torch.empty(0, device="meta") for _ in range(5)))


@dataclass(frozen=True)
class Swap(Step):
    """Replace the token mixers of `layers` (None: all) but those that `keep` names.

    `exact`: theory says that the function stays the same, so the run measures it and stops if it does not.
    `calibration`: tokens of training text over which the layers' inputs are looked at first, for mixers that start
    from them, or at which a mixer's output projection is refitted."""

    name: Name
    mixer: Literal[tuple(MIXERS)]  # type: ignore[valid-type]
    options: Any
    keep: Keep = ()
    exact: bool = False
    calibration: Annotated[int, Range(0, 2**20)] = 0  # the windows looked at are held at once (the bound is ours)
    layers: tuple[Annotated[int, Range(0, 1000)], ...] | None = None

    def __post_init__(self) -> None:
        check(self)
        require(MIXERS[self.mixer].Options, self.options, f"Swap: options of {self.mixer}")

    @property
    def looks_first(self) -> bool:
        """Whether the mixer starts from what the layers see."""
        return self.calibration > 0 and STARTS[self.mixer].needs_stats(self.options)

    @property
    def looks_back(self) -> bool:
        """Whether the mixer starts from how far the layers' heads look back."""
        return STARTS[self.mixer].needs_look_back(self.options)

    @property
    def refits(self) -> bool:
        """Whether output projections are solved for what the teacher's attention gives."""
        return STARTS[self.mixer].refits_output(self.options)

    def kept(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers of the model that stay as they are, as far as no measurement decides."""
        converted = self.converted(num_layers)
        return tuple(i for i in range(num_layers) if i not in converted)

    def converted(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers that are replaced, as far as no measurement decides."""
        kept = self.keep if isinstance(self.keep, tuple) else self.keep.layers(num_layers)
        layers = range(num_layers) if self.layers is None else self.layers
        return tuple(i for i in layers if i not in kept)

    # --- before a run

    def problems(self, before: Outline) -> list[str]:
        num_layers = len(before.mixers)
        if found := self._bad_layers(num_layers):
            return found
        if before.is_measured:
            found.append(
                f"Step {self.name}: the layers that a step before it replaces are chosen by measurement, so it cannot"
                " replace the same ones; give both the same keep, by name or by pattern."
            )
        # a measurement edits every layer once
        touched = range(num_layers) if isinstance(self.keep, MostSensitive) else self.converted(num_layers)
        ends = {name for i in touched if (name := before.mixers[i]) if not _can_be_replaced(name)}
        if ends:
            found.append(
                f"Step {self.name}: a conversion ends with {' and '.join(sorted(ends))}: no other mixer can start from"
                " it. Take the run's own teacher."
            )
        if self.looks_back and (others := {name for i in touched if (name := before.mixers[i])}):
            found.append(
                f"Step {self.name}: how far a layer looks back is measured on attention, and what it would replace is"
                f" {' and '.join(sorted(others))}. Take another decay_start."
            )
        if self.refits and not self.calibration:
            found.append(
                f"Step {self.name}: an output projection is refitted on some text, and calibration is 0 tokens. Set"
                " calibration, or start=copied."
            )
        if self.refits and (differing := differing_layers(before.host, before.teacher)):
            found.append(
                f"Step {self.name}: an output projection is refitted to the teacher's attention, layer by layer, so"
                f" student and teacher must be alike in {', '.join(SAME_LAYERS)}; the run's teacher has another"
                f" {differing}. Set start=copied."
            )
        if not self.exact and (reason := MIXERS[self.mixer].sequence_problem(self.options, before.longest)):
            found.append(f"Step {self.name}: {reason}")
        return found

    def _bad_layers(self, num_layers: int) -> list[str]:
        keep = self.keep
        if isinstance(keep, MostSensitive) and self.exact:
            return [
                f"Step {self.name}: an exact edit costs nothing in any layer, so there is nothing to rank. Set keep to"
                " layers or to none."
            ]
        if isinstance(keep, MostSensitive) and self.layers is not None:
            return [f"Step {self.name}: layers are given or measured, not both. Set keep to layers or to none."]
        named = keep if isinstance(keep, tuple) else ()
        if not all(0 <= i < num_layers for i in named) or len(set(named)) == num_layers:
            got = ", ".join(map(str, named))
            return [
                f"Step {self.name}: kept layers must be within 0 .. {num_layers - 1}, and not be all of them; got"
                f" {got}. Set keep."
            ]
        if not self.converted(num_layers) or max(self.layers or (0,)) >= num_layers:
            got = "none" if not self.layers else ", ".join(map(str, self.layers))
            return [
                f"Step {self.name}: the layers to replace must be within 0 .. {num_layers - 1}, one or more, and not"
                f" all be kept; got {got}. Set keep or layers."
            ]
        return []

    def after(self, before: Outline) -> Outline:
        converted = self.converted(len(before.mixers))
        mixers = [self.mixer if i in converted else name for i, name in enumerate(before.mixers)]
        return dataclasses.replace(
            before,
            mixers=tuple(mixers),
            is_student=True,
            is_measured=before.is_measured or isinstance(self.keep, MostSensitive),
        )

    def plan(self, student: PreTrainedModel, context: PlanContext) -> tuple[PreTrainedModel, StepPlan]:
        """Plan the swap, and what a look at the layers' inputs and a ranking take: two moments of each layer's inputs
        are held, and attention over one text."""
        num_layers = len(layers_of(student))
        student = self._swapped_without_memory(student, num_layers)
        total, config = count(student), host_config(student)
        looks = self.calibration if self.looks_first or self.refits else 0
        ranks = RANKING_TOKENS * num_layers / 2 if isinstance(self.keep, MostSensitive) else 0
        held = 4 * (2 * num_layers * config.hidden_size**2 + 4 * context.longest**2) if looks else 0
        peak = 4 * int(context.held_teacher + floats_held(student)) + held if looks or ranks else 0
        seconds = (looks + ranks) * 2 * context.num_teacher / context.rate
        return student, StepPlan(self.name, self._what(num_layers), 0, 0, total, peak, seconds)

    def _what(self, num_layers: int) -> str:
        if self.layers is not None:
            where = f" in {len(self.converted(num_layers))} of {num_layers} layers"
            return f"swap in {self.mixer}{where}{', must be exact' if self.exact else ''}"
        kept = len(self.kept(num_layers))
        by = ", by measurement" if isinstance(self.keep, MostSensitive) else ""
        keeps = f", keep {kept} of {num_layers} layers{by}" if kept else ""
        return f"swap in {self.mixer}{keeps}{', must be exact' if self.exact else ''}"

    def _swapped_without_memory(self, student: PreTrainedModel, num_layers: int) -> ConvertedForCausalLM:
        """Swap on the meta device. Raises UserError where that cannot be, or where it should be exact and theory says
        that it is not."""
        layers = self.converted(num_layers)
        tokens = min(handover.TOKENS, student.config.max_position_embeddings)
        before = {layer: projections_of(student, layer) for layer in layers}
        partial = {
            layer for layer in slots_of(student) if not STARTS[student.config.mixers[layer]["name"]].hands_on_all
        }
        stats = [SEEN] * num_layers if self.looks_first else None
        student = swap(student, self.mixer, self.options, layers, stats)
        for layer in layers if self.exact else ():
            reason = STARTS[self.mixer].why_inexact(before[layer], student.slots()[layer].mixer.options, tokens)
            if layer in partial:
                reason = (
                    "the mixer it has now computes more than the new one takes over; swap in linear attention and"
                    " align it first"
                )
            if reason:
                raise UserError(
                    f"An exact edit must not change the function, and that of layer {layer} would: {reason}, or set"
                    " exact=false."
                )
        return student

    # --- in a run

    @torch.no_grad()
    def run(self, student: PreTrainedModel, session: Session) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Calibrate, choose layers, swap, and check that an exact swap is exact. The result has `layers` (kept, and
        the KL of each when edited alone) and `handover` (how far logits moved), where there are any."""
        num_layers = len(layers_of(student))
        stats = None
        if self.looks_first:
            stats = inputs_of(student, session.sequences(self.calibration), self.looks_back)
        if isinstance(self.keep, MostSensitive):
            return self._keep_by_measurement(student, session, stats)
        kept = self.kept(num_layers)
        found: dict[str, Any] = {"layers": {"kept": list(kept)}} if kept else {}

        def swapped(model: PreTrainedModel) -> ConvertedForCausalLM:
            return swap(model, self.mixer, self.options, self.converted(num_layers), stats).eval()

        if self.refits:
            student = swapped(student)
            self._refit(student, session, self.converted(num_layers))
            return student, found
        if self.exact:
            student, checked = handover.checked(self.name, self.mixer, swapped, student, session)
            return student, found | {"handover": checked}
        return swapped(student), found

    def _keep_by_measurement(
        self, student: PreTrainedModel, session: Session, stats: list[CalibrationStats] | None
    ) -> tuple[ConvertedForCausalLM, dict[str, Any]]:
        """Edit all layers, put all back, and edit again all but those that cost most when they alone are edited: sizes
        that depend on all edited layers (a cache budget) are then shared out among these."""
        original, before = student, selection.parts_of(student)
        student = swap(student, self.mixer, self.options, stats=stats).eval()
        if self.refits:
            self._refit(student, session, tuple(before))
        batches, is_shared = session.sequences(min(RANKING_TOKENS, session.tokens)), is_shared_out(student)
        sensitivity = selection.sensitivity(student, original if is_shared else before, batches)
        ranked = sorted(before, key=lambda layer: -sensitivity[layer])
        kept = sorted(ranked[: len(self.kept(len(before)))])
        if is_shared:  # then the student is another model, and the original one as it was
            student = original
        else:
            selection.restore_layers(student, before)
        layers = tuple(layer for layer in before if layer not in kept)
        student = swap(student, self.mixer, self.options, layers, stats).eval()
        if self.refits:
            self._refit(student, session, layers)
        chosen = ", ".join(map(str, kept))
        console.print(f"kept layers, those that cost most when edited alone: {chosen}", style="dim")
        return student, {"layers": {"kept": kept, "kl_when_edited_alone": sensitivity}}

    def _refit(self, student: PreTrainedModel, session: Session, layers: Sequence[int]) -> None:
        refit_outputs(student, session.teacher.model, session.sequences(self.calibration), layers)

    # --- as data

    def describe(self) -> dict[str, Any]:
        keep = list(self.keep) if isinstance(self.keep, tuple) else str(self.keep)
        return plain(dataclasses.replace(self, keep=())) | {"keep": keep}

    def dials(self) -> dict[str, Dial]:
        return {field: Dial(choices) for field, choices in MIXERS[self.mixer].dials.items()}

    def tiny(self) -> "Swap":
        return dataclasses.replace(
            self,
            options=MIXERS[self.mixer].tiny(self.options, TINY_SEQ_LEN),
            calibration=min(self.calibration, TINY_CALIBRATION),
        )


def _can_be_replaced(mixer: str | None) -> bool:
    return mixer is None or MIXERS[mixer].can_be_replaced
