"""The step TrainImages: one stage of training of an image classifier, on the run's data and teacher."""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from convert.core.errors import UserError
from convert.core.fields import Checked, Name
from convert.core.processes import launched
from convert.models.vision.features import staged
from convert.models.vision.operations import cost_of_pass
from convert.steps.base import Dial, Outline, PlanContext, Session, Step, StepPlan, count
from convert.training.image_settings import ImageSettings
from convert.training.images import classify
from convert.training.selectors import name_of, selected
from convert.training.settings import check_objective
from convert.training.trial import problem_of_functions

TINY: dict[str, Any] = {"images": 3 * 16, "batch_images": 16, "micro_images": 16, "evaluate_every": 0}


@dataclass(frozen=True)
class TrainImages(Step, Checked):
    """Train the student on labels, and on what the teacher makes of the same images."""

    name: Name
    settings: ImageSettings

    @property
    def training(self) -> ImageSettings:
        return self.settings

    # --- before a run

    def problems(self, before: Outline) -> list[str]:
        s, found = self.settings, []
        if s.images < 1:
            found.append(f"Step {self.name}: every step needs images; it has {s.images}. Raise --images.")
        if s.micro_images > 1 and s.batch_images % s.micro_images == 1:
            found.append(
                f"Step {self.name}: batch norms need two images or more; a batch of {s.batch_images} in parts of"
                f" {s.micro_images} leaves one alone. Set batch_images or micro_images."
            )
        if not before.is_student:
            found.append(f"Step {self.name}: a stage trains a student; build one before it.")
        try:
            check_objective("classify", s.objective)
            s.objective.check_plain()
        except UserError as error:
            found.append(f"Step {self.name}: {error}")
        return found

    def plan(self, student: PreTrainedModel, context: PlanContext) -> tuple[PreTrainedModel, StepPlan]:
        """Count what is trained, and estimate memory and time. Raises UserError where a term cannot compare the two."""
        s = self.settings
        with torch.device("meta"):
            teacher = context.domain.empty_model(context.config)
        if reason := problem_of_functions(s, student, teacher):
            raise UserError(reason)
        objective = s.objective.build(student, teacher, staged)
        owned, total = count(objective), count(student)
        trainable = sum(p.numel() for p in selected(student, s.trains))
        operations, activations = cost_of_pass(student)
        per_image = 3 * operations
        if objective.needs_teacher():
            per_image += cost_of_pass(teacher)[0]
        plan = StepPlan(
            self.name,
            f"train: {s.objective}, trains {name_of(s.trains)}" + f", {s.labels:.0%} of the labels" * (s.labels < 1),
            s.images,
            trainable + owned,
            total - trainable,
            4 * (context.num_teacher + total * (2 if s.ema else 1) + 3 * (trainable + owned))
            + s.micro_images * activations,
            s.num_steps * s.batch_images * per_image / context.rate / launched(),
        )
        return student, plan

    # --- in a run

    def run(self, student: PreTrainedModel, session: Session) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Train. The result is what `Session.trained` says."""
        started = time.monotonic()
        student = classify(
            student,
            session.teacher.model,
            session.domain.batches(session.data, self.settings),
            self.settings,
            track=session.track,
            keep=session.folder,
            measure=session.measure,
        )
        return student, session.trained(self.name, started)

    # --- as data

    def describe(self) -> dict[str, Any]:
        return {"kind": "TrainImages", "name": self.name, "settings": self.settings.plain()}

    def dials(self) -> dict[str, Dial]:
        return {"lr": Dial.around(self.settings.lr)}

    def tiny(self) -> "TrainImages":
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **TINY))
