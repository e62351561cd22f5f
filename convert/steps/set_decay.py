"""The step SetDecay: start the decays of a student's mixers at a small rate."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from transformers import PreTrainedModel

from convert.core.fields import Checked, Name, Range
from convert.mixers import MIXERS
from convert.models.access import slots_of
from convert.steps.base import Dial, Outline, PlanContext, Session, Step, StepPlan, count


@dataclass(frozen=True)
class SetDecay(Step, Checked):
    """Start the decays at a small rate instead of none, after the hand-over was checked; 0 leaves them at none, of
    mixers that can learn from there."""

    name: Name
    rate: Annotated[float, Range(0, 10)]

    def problems(self, before: Outline) -> list[str]:
        decaying = {name for name in before.mixers if name is not None and MIXERS[name].decays}
        if not decaying:
            return [f"Step {self.name}: it sets decays, and no mixer has one there; swap in mamba or mamba2 before it."]
        return [
            f"Step {self.name}: decays of {name} are learned by their logarithm, so a rate must be at least"
            f" {MIXERS[name].lowest_rate:g}; got {self.rate:g}. Set rate."
            for name in sorted(decaying)
            if self.rate < MIXERS[name].lowest_rate
        ]

    def plan(self, student: PreTrainedModel, context: PlanContext) -> tuple[PreTrainedModel, StepPlan]:
        return student, StepPlan(self.name, f"decay rate {self.rate:g}", 0, 0, count(student), 0, 0.0)

    def dials(self) -> dict[str, Dial]:
        return {"rate": Dial.around(self.rate)}

    @torch.no_grad()
    def run(self, student: PreTrainedModel, session: Session) -> tuple[PreTrainedModel, dict[str, Any]]:
        for slot in slots_of(student).values():
            if slot.mixer.decays:
                slot.mixer.set_decay(self.rate)
        return student, {}
