"""The step Select: give some layers of a student their attention back, those that bring it closest to its teacher."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from rich import box
from rich.table import Table
from transformers import PreTrainedModel

from convert.core.console import console
from convert.core.errors import Interrupted
from convert.core.fields import Checked, Name, Range
from convert.core.processes import gathered
from convert.models.access import layers_of
from convert.steps import selection
from convert.steps.base import Dial, Outline, PlanContext, Session, Step, StepPlan, count
from convert.training.parallel import floats_held

TINY_CALIBRATION = 3 * 128  # tokens
MEASURES = {  # what is measured -> in words for the plan, and with its unit for the table
    "kl": ("the KL from the teacher", "KL from the teacher, nats per token"),
    "recall": ("associative recall", "loss of associative recall, nats per token"),
}


@dataclass(frozen=True)
class Select(Step, Checked):
    """Give one layer in `every`, and one at least, what the teacher has there, once all layers have been replaced and
    aligned. Each layer in turn gets it back alone, and those with the lowest number keep it.

    `by`: the KL between teacher and student over `calibration` tokens of training text (KL-guided selection), or the
    domain's loss of associative recall (the quantity by which When Perplexity Lies, arXiv 2603.26556, chose its layers;
    its exact form is not published, ours is). `greedy`: the layers are chosen one after the other, and the rest is
    ranked anew with those in place."""

    name: Name
    every: Annotated[int, Range(2, 1000)] = 4
    by: Literal["kl", "recall"] = "kl"
    greedy: bool = False
    calibration: Annotated[int, Range(1, 2**20)] = 8192  # tokens (ours)

    def _wanted(self, num_layers: int) -> int:
        """The number of layers that get their attention back: one at least."""
        return max(1, num_layers // self.every)

    # --- before a run

    def problems(self, before: Outline) -> list[str]:
        kept = [i for i, name in enumerate(before.mixers) if name is None]
        if before.host is not before.teacher:
            return [
                f"Step {self.name}: it gives layers what the teacher has there, and this student is none of its layers:"
                " it was built. Leave the step out."
            ]
        if not before.is_student:
            return [
                f"Step {self.name}: it gives layers back that were replaced, and none was. Swap a mixer into all layers"
                " before it."
            ]
        if before.is_measured or kept:
            which = "a measurement" if before.is_measured else f"keep ({', '.join(map(str, kept))})"
            return [
                f"Step {self.name}: it chooses among all layers, and {which} of a step before it has kept some already."
                " Set keep of that swap to none, or leave this step out."
            ]
        if self._wanted(len(before.mixers)) == len(before.mixers):
            return [f"Step {self.name}: a model of one layer has none to choose from. Leave the step out."]
        return []

    def after(self, before: Outline) -> Outline:
        return dataclasses.replace(before, is_measured=True)

    def plan(self, student: PreTrainedModel, context: PlanContext) -> tuple[PreTrainedModel, StepPlan]:
        """Plan with as many layers as will be chosen; which ones, only a measurement tells."""
        num_layers = len(layers_of(student))
        with torch.device("meta"):
            teacher = context.domain.empty_model(context.config)
        wanted = self._wanted(num_layers)
        selection.give_back(student, teacher, range(wanted))
        rounds = wanted if self.greedy else 1
        tokens = self.calibration * (2 + num_layers / 2) * rounds
        words, _ = MEASURES[self.by]
        what = f"give attention back to {wanted} of {num_layers} layers, by measurement of {words}"
        total = count(student)
        peak = 4 * int(context.held_teacher + floats_held(student))
        return student, StepPlan(self.name, what, 0, 0, total, peak, tokens * 2 * context.num_teacher / context.rate)

    # --- in a run

    @torch.no_grad()
    def run(self, student: PreTrainedModel, session: Session) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Rank the layers and give those back that come first. The result has `layers`: which were kept, and the first
        ranking. A greedy choice goes on after the last round that was measured."""
        teacher = session.teacher.model
        num_layers = len(layers_of(student))
        wanted = self._wanted(num_layers)
        rounds: list[list[float]] = (session.folder.load() or {"rounds": []})["rounds"]
        chosen: list[int] = []
        while len(chosen) < wanted:
            left = [layer for layer in range(num_layers) if layer not in chosen]
            at = len(chosen) if self.greedy else 0
            if at == len(rounds):
                rounds.append(self._measured(student, session, left))
                session.folder.save(at + 1, {"rounds": rounds})
                if any(gathered(session.folder.stop_requested())):
                    raise Interrupted(
                        f"Stopped after round {at + 1} of the ranking; it is saved. The same command goes on from"
                        " there."
                    )
            measured = dict(zip(left, rounds[at][:-1], strict=True))  # the last number is that of none
            best = sorted(left, key=lambda layer: measured[layer])[: 1 if self.greedy else wanted]
            student = selection.give_back(student, teacher, best)
            chosen += best
        *alone, none = rounds[0]
        self._show(alone, none, chosen)
        ranking = {"by": self.by, "none": none, "alone": alone, "order": chosen}
        return student, {"layers": {"kept": sorted(chosen), "when_given_back": ranking}}

    def _measured(self, student: PreTrainedModel, session: Session, layers: list[int]) -> list[float]:
        """The number of each layer given back alone, and at the end that of none; lower is better."""
        teacher = session.teacher.model
        parts = selection.copies_of(teacher)
        if self.by == "kl":
            batches = session.sequences(min(self.calibration, session.tokens))
            return selection.kl_when_given_back(student, parts, layers, teacher, batches)
        return selection.score_when_given_back(
            student, parts, layers, lambda model: session.domain.recall_loss(model, session.teacher)
        )

    def _show(self, alone: list[float], none: float, chosen: list[int]) -> None:
        table = Table(box=box.SIMPLE_HEAD)
        for column in ("given back", MEASURES[self.by][1], "kept"):
            table.add_column(column, justify="right")
        table.add_row("none", f"{none:.4f}", "")
        for layer in sorted(range(len(alone)), key=lambda i: alone[i]):
            table.add_row(f"layer {layer}", f"{alone[layer]:.4f}", "yes" if layer in chosen else "")
        console.print(table)

    # --- as data

    def dials(self) -> dict[str, Dial]:
        return {"by": Dial(("kl", "recall"))}

    def tiny(self) -> "Select":
        return dataclasses.replace(self, calibration=min(self.calibration, TINY_CALIBRATION))
