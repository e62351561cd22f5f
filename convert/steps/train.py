"""The step Train: one stage of training, on the run's data and teacher or on its own."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from convert.core.errors import UserError
from convert.core.fields import Checked, Name, Text
from convert.core.processes import launched
from convert.data.recorded import Recorded, RecordedBatches
from convert.models.access import layers_of, slots_of
from convert.objectives import AttentionTerm, BlockTerm
from convert.steps import recorded
from convert.steps.base import Dial, Outline, PlanContext, Session, Step, StepPlan, count, host_config
from convert.steps.layers import SAME_LAYERS, differing_layers
from convert.training import STAGES
from convert.training.parallel import floats_held, in_parts
from convert.training.selectors import name_of, selected
from convert.training.settings import Settings, check_objective
from convert.training.trial import problem_of_functions

SAMPLING = 8  # times the forward pass of a text that writing it takes, token by token in batches (ours, neox-nano)
TINY: dict[str, Any] = {
    "tokens": 3 * 128,
    "seq_len": 64,
    "batch_tokens": 128,
    "micro_tokens": 128,
    "evaluate_every": 0,
}


@dataclass(frozen=True)
class Train(Step, Checked):
    """Train the student by a stage: `align` (layer by layer) or `distill` (the whole model).

    `data`, `teacher`: as for the command, where this step needs others than the run's; the teacher must have the
    vocabulary of the run's. The data may also be `teacher`: what the step's teacher writes. The teacher may also be
    `cache:FOLDER`: a recording of what the run's teacher says, which is then not in memory (convert.teach)."""

    name: Name
    stage: Literal["align", "distill"]
    settings: Settings
    data: Text | None = None
    teacher: Text | None = None

    @property
    def training(self) -> Settings:
        return self.settings

    @property
    def own_teacher(self) -> str | None:
        return None if self.recorded is not None else self.teacher

    @property
    def recorded(self) -> Path | None:
        return recorded.folder_of(self.teacher)

    @property
    def own_data(self) -> str | None:
        return self.data

    # --- before a run

    def problems(self, before: Outline) -> list[str]:
        s, found = self.settings, []
        host = before.host
        if s.seq_len > host.max_position_embeddings:
            found.append(
                f"Step {self.name}: sequences must fit the teacher's {host.max_position_embeddings:,} positions; got"
                f" --seq-len {s.seq_len:,}. Give a smaller one."
            )
        if s.seq_len < 2 or s.batch_tokens < s.seq_len or s.batch_tokens % s.seq_len:
            found.append(
                f"Step {self.name}: a batch must be whole sequences; {s.batch_tokens:,} tokens are not a multiple of"
                f" --seq-len {s.seq_len:,}. Set --batch-tokens."
            )
        if s.tokens < 1:
            found.append(f"Step {self.name}: every step needs tokens; it has {s.tokens}. Raise --tokens.")
        if not before.is_student:
            found.append(f"Step {self.name}: a stage trains a student; swap a mixer in before it.")
        if s.masking != "all" and self.stage == "align":
            found.append(
                f"Step {self.name}: align compares outputs of every token, so masking={s.masking} would"
                " change nothing. Set masking=all."
            )
        return found + self._bad_objective() + self._bad_teacher(before)

    def _bad_objective(self) -> list[str]:
        try:
            check_objective(self.stage, self.settings.objective, recorded=self.recorded is not None)
            self.settings.objective.check_plain()
        except UserError as error:
            return [f"Step {self.name}: {error}"]
        return []

    def _bad_teacher(self, before: Outline) -> list[str]:
        """Why the step's teacher, its own or the run's, cannot teach the student of that moment."""
        config, name = before.teacher, "the run's teacher"
        if self.recorded is not None:
            return self._bad_recording(self.recorded, config.vocab_size)
        if self.teacher is not None:
            config, name = before.domain.outline(before.teachers[self.teacher])[0], self.teacher
            if reason := before.domain.problem(config) or before.domain.problem_of_pair(before.teacher, config):
                return [f"Step {self.name}: {self.teacher} cannot be its teacher. {reason}"]
            if self.settings.seq_len > config.max_position_embeddings:
                return [
                    f"Step {self.name}: sequences must fit the {config.max_position_embeddings:,} positions of"
                    f" {self.teacher}; they have {self.settings.seq_len:,} tokens. Give a smaller --seq-len."
                ]
        if self.stage == "align" and (differing := differing_layers(before.host, config)):
            return [
                f"Step {self.name}: align compares layer with layer on the same inputs, so student and teacher must be"
                f" alike in {', '.join(SAME_LAYERS)}; {name} has another {differing}. Leave align out."
            ]
        return []

    def _bad_recording(self, folder: Path, vocab_size: int) -> list[str]:
        """Why a recording is none of this step's batches."""
        try:
            found = Recorded(folder)
            found.check("batches", recorded.batches_of(self.settings))
            found.check("kept", {"vocab_size": vocab_size})
        except UserError as error:
            return [f"Step {self.name}: {error}"]
        return []

    def plan(self, student: PreTrainedModel, context: PlanContext) -> tuple[PreTrainedModel, StepPlan]:
        """Count what is trained, and estimate memory and time. Raises UserError where the functions of the settings
        cannot train this student."""
        s, layerwise = self.settings, self.stage == "align"
        config = context.config if self.own_teacher is None else context.teachers[self.own_teacher]
        with torch.device("meta"):
            teacher = context.domain.empty_model(config)
            reason = problem_of_functions(s, student, teacher)
        if reason and (reason := problem_of_functions(s, student, teacher)):  # what needs memory is tried with some
            raise UserError(reason)
        objective = s.objective.build(student, teacher)
        owned = count(objective)
        num_teacher = count(teacher)
        held = context.held_teacher + (context.floats_of_teacher(teacher) if self.own_teacher else 0)
        if self.recorded is not None:  # a teacher that is shared out stays
            num_teacher, held = 0, 0 if context.held_teacher == context.num_teacher else context.held_teacher
        chosen = {id(p): p.numel() for p in selected(student, s.trains)}
        trainable, total = sum(chosen.values()), count(student)
        slots = slots_of(student)
        compared: list[torch.nn.Module] = list(slots.values()) if objective.has(AttentionTerm) else []
        compared += [layers_of(student)[layer] for layer in slots] if objective.has(BlockTerm) else []
        if layerwise and not chosen.keys() & {id(p) for module in compared for p in module.parameters()}:
            raise UserError(
                f"trains of align must choose from what its objective compares; {name_of(s.trains)} has nothing of it."
                " Set trains=mixers."
            )
        passes = len(compared) / max(1, len(slots)) if layerwise else 1  # mixers run for each kind of term
        config = host_config(student)
        layers, width = config.num_hidden_layers, config.hidden_size
        # floats a layer keeps for its backward pass, per token (ours)
        inner = width * 18 + config.intermediate_size * 3
        kept_layers = 1 if layerwise or s.checkpointing else layers
        scans = [slot.mixer.scan_updates() for slot in slots.values()] or [0]
        states = (max(scans) if kept_layers == 1 else sum(scans)) // context.steps_per_state
        activations = 4 * s.micro_tokens * (kept_layers * inner + layers * width + states)
        logits = 4 * 3 * min(s.loss_chunk, s.micro_tokens) * config.vocab_size
        per_token = 2 * num_teacher + (
            6 * sum(map(count, compared)) if layerwise else (8 if s.checkpointing else 6) * total
        )
        updates = passes * sum(slot.mixer.scan_updates() for slot in slots.values())
        operations = 3 * passes * sum(slot.mixer.rule_operations() for slot in slots.values())
        scan = updates / context.scan_rate() if updates else 0.0
        scan += operations / context.rule_rate() if operations else 0.0
        is_sampled = self.data is not None and context.domain.corpus(self.data).is_sampled
        plan = StepPlan(
            self.name,
            self._what(is_sampled),
            s.tokens,
            trainable + owned,
            total - trainable,
            4 * int(held + 3 * owned + floats_held(student, trainable)) + activations + logits,
            s.num_steps * s.batch_tokens * (per_token / context.rate + scan) / launched(),
            s.tokens * SAMPLING * 2 * count(teacher) / context.rate if is_sampled else 0.0,
            is_without_teacher=self.recorded is not None,
        )
        return student, plan

    def _what(self, is_sampled: bool) -> str:
        own = ["targets are completions"] * (self.settings.masking == "completions")
        if is_sampled and self.data is not None:
            _, _, file = self.data.partition(":")
            own.append("on what the teacher writes first" + f" after the prompts of {file}" * bool(file))
        elif self.data is not None:
            own.append(f"on {self.data}")
        if self.recorded is not None:
            own.append(f"from what was recorded in {self.recorded}, without the teacher in memory")
        elif self.teacher is not None:
            own.append(f"from {self.teacher}")
        return ", ".join([f"{self.stage}: {self.settings.objective}", f"trains {name_of(self.settings.trains)}", *own])

    # --- in a run

    def run(self, student: PreTrainedModel, session: Session) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Train. The result is what `Session.trained` says."""
        started, s = time.monotonic(), self.settings
        batches = session.domain.batches(session.data if self.data is None else session.prepare(self), s)
        if self.recorded is not None:
            batches = RecordedBatches(batches, Recorded(self.recorded))
            with session.without_teacher(s):
                student = self._trained(student, None, batches, session, recorded=True)
        else:
            teacher = session.teacher if self.teacher is None else session.load_teacher(self.teacher)
            student = self._trained(student, teacher.model, batches, session)
        return student, session.trained(self.name, started)

    def _trained(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        batches: Callable[[int], Any],
        session: Session,
        **more: Any,
    ) -> PreTrainedModel:
        return in_parts(
            STAGES[self.stage],
            student,
            teacher,
            batches,
            self.settings,
            track=session.track,
            keep=session.folder,
            measure=session.measure,
            **more,
        )

    # --- as data

    def describe(self) -> dict[str, Any]:
        found = {"kind": "Train", "name": self.name, "stage": self.stage, "settings": self.settings.plain()}
        found |= {key: value for key in ("data", "teacher") if (value := getattr(self, key)) is not None}
        return found | ({} if self.recorded is None else {"teacher": f"{recorded.PREFIX}{self.recorded.absolute()}"})

    def dials(self) -> dict[str, Dial]:
        found = {"lr": Dial.around(self.settings.lr)}
        if self.stage == "distill":
            found |= {"noise": Dial((0.0, 0.05, 0.1, 0.2)), "schedule": Dial(("wsd", "cosine"))}
            found |= {"feature_matching": Dial((0.0, 0.05))}
        return found

    def tiny(self) -> "Train":
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **TINY))
