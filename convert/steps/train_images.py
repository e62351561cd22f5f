"""The step TrainImages: one stage of training of an image classifier, on the run's data and teacher."""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from convert.core.errors import UserError
from convert.core.fields import Checked, Name
from convert.core.processes import launched
from convert.models.access import layers_of, replaced_attention
from convert.models.vision.features import staged
from convert.models.vision.operations import cost_of_pass
from convert.models.vision.vit_ss2d import ViTSS2DConfig
from convert.objectives import BlockTerm, LiveObjective
from convert.steps.base import Dial, Outline, PlanContext, Session, Step, StepPlan, count
from convert.training.align_images import align_images
from convert.training.image_settings import ImageSettings
from convert.training.images import classify
from convert.training.selectors import name_of, selected
from convert.training.settings import check_objective
from convert.training.trial import problem_of_functions

STAGES = {"classify": classify, "align": align_images}
TINY: dict[str, Any] = {"images": 3 * 16, "batch_images": 16, "micro_images": 16, "evaluate_every": 0}


@dataclass(frozen=True)
class TrainImages(Step, Checked):
    """Train the student by a stage: `classify` (the whole model, on labels and on what the teacher makes of the same
    images) or `align` (a converted student's mixers, layer by layer)."""

    name: Name
    settings: ImageSettings
    stage: Literal["classify", "align"] = "classify"

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
        elif self.stage == "align" and not isinstance(before.host, ViTSS2DConfig):
            found.append(
                f"Step {self.name}: align compares the student's mixers with the attention that they replaced; this"
                f" {before.host.model_type} has none. Leave align out."
            )
        try:
            check_objective(self.stage, s.objective)
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
        if self.stage == "align":
            per_image = 3 * self._compared(student, objective) / total * operations
            activations //= len(replaced_attention(student))
        if objective.needs_teacher():
            per_image += cost_of_pass(teacher)[0]
        plan = StepPlan(
            self.name,
            f"{'align' if self.stage == 'align' else 'train'}: {s.objective}, trains {name_of(s.trains)}"
            + f", {s.labels:.0%} of the labels" * (s.labels < 1 and self.stage == "classify"),
            s.images,
            trainable + owned,
            total - trainable,
            4 * (context.num_teacher + total * (2 if s.ema else 1) + 3 * (trainable + owned))
            + s.micro_images * activations,
            s.num_steps * s.batch_images * per_image / context.rate / launched(),
        )
        return student, plan

    def _compared(self, student: PreTrainedModel, objective: LiveObjective) -> int:
        """The parameters of the layers, or of the mixers in them, that are compared with the teacher's. Raises
        UserError where none of them is trained."""
        compared: list[torch.nn.Module] = list(replaced_attention(student).values())
        if objective.has(BlockTerm):
            compared = [layers_of(student)[layer] for layer in replaced_attention(student)]
        own = {id(p) for module in compared for p in module.parameters()}
        if not own & {id(p) for p in selected(student, self.settings.trains)}:
            raise UserError(
                f"trains of align must choose from what its objective compares; {name_of(self.settings.trains)} has"
                " nothing of it. Set trains=mixers."
            )
        return sum(p.numel() for module in compared for p in module.parameters())

    # --- in a run

    def run(self, student: PreTrainedModel, session: Session) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Train. The result is what `Session.trained` says."""
        started = time.monotonic()
        student = STAGES[self.stage](
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
        found = {"kind": "TrainImages", "name": self.name, "settings": self.settings.plain()}
        return found | ({} if self.stage == "classify" else {"stage": self.stage})

    def dials(self) -> dict[str, Dial]:
        return {"lr": Dial.around(self.settings.lr)}

    def tiny(self) -> "TrainImages":
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **TINY))
