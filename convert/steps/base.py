"""What every step of a recipe does: it plans, checks and runs itself.

A step is a frozen dataclass with a `name` and the methods of `Step`. A new kind of step is a new file of this folder.
"""

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedModel

from convert.core.errors import UserError
from convert.core.processes import on_first
from convert.domains.base import Data, Domain, Monitor, Teacher
from convert.models.absent import out_of_memory
from convert.training.settings import StageSettings

if TYPE_CHECKING:
    from convert.runs.checkpoint import StepFolder
    from convert.runs.tracking import Unwritten


@dataclass(frozen=True)
class Session:
    """What a run hands to each of its steps.

    `training` are the settings of the last training step on the run's data, by whose sequences a run measures; `tokens`
    are those of all training steps together. `start()` makes the student from before the step once more. `load_teacher`
    gives the teacher of a name, and `prepare` the data of a training step, for one that does not use the run's.
    `load_run_teacher` gives the run's once more, for a step that does not want it in memory."""

    domain: Domain
    teacher: Teacher
    data: Data
    training: Any
    tokens: int
    held_out: Sequence[Any]
    monitor: Monitor
    track: "Unwritten"
    folder: "StepFolder"
    start: Callable[[], PreTrainedModel]
    load_teacher: Callable[[str], Teacher]
    prepare: "Callable[[Step], Data]"
    load_run_teacher: Callable[[], Teacher]

    def sequences(self, tokens: int) -> list[Any]:
        """Return so many tokens of the run's training data, one sequence a batch."""
        one_by_one = dataclasses.replace(self.training, batch_tokens=self.training.seq_len, masking="all")
        batches = self.domain.batches(self.data, one_by_one)
        return [batches(i) for i in range(max(1, tokens // self.training.seq_len))]

    @contextmanager
    def without_teacher(self, settings: StageSettings) -> Iterator[None]:
        """The run's teacher has no memory while this is open. What a stage of these settings measures of it is measured
        before."""
        if settings.evaluate_every:
            self.monitor.ask_teacher()
        with out_of_memory(self.teacher.model, lambda: self.load_run_teacher().model):
            yield

    def measure(self, student: PreTrainedModel) -> dict[str, float]:
        """Measure the student while a step trains; the numbers are logged."""
        numbers = self.monitor(student)
        self.track.generations(self.monitor.generations)
        if self.monitor.stopped_by is not None and self.folder.stop is not None:
            self.folder.stop.requested = True
        return numbers

    def trained(self, name: str, started: float) -> dict[str, Any]:
        """Return what the ledger says of a training step that began at `started` (time.monotonic) in this process: its
        `tokens`, `loss_first` and `loss_last` (means over a twentieth of the steps), `skipped` steps, and `seconds` of
        training before a crash. Raises UserError where its lines are gone."""
        return on_first(self._trained, name, started)

    def _trained(self, name: str, started: float) -> dict[str, Any]:
        rows = self.track.rows(name)
        if not rows:
            raise UserError(
                f"{self.track.file} has no line of step {name}, which was trained. Put back a copy, or start again with"
                " --fresh."
            )
        losses = [row["train/loss"] for row in rows]
        few = max(1, len(losses) // 20)
        return {
            "tokens": rows[-1]["tokens"] - self.track.tokens_before,
            "loss_first": sum(losses[:few]) / few,
            "loss_last": sum(losses[-few:]) / few,
            "skipped": rows[-1]["train/skipped"],
            "seconds": max(0.0, rows[-1]["train/seconds"] - (time.monotonic() - started)),
        }


@dataclass(frozen=True)
class StepPlan:
    """What a step will cost: a row of the plan. Sizes are in parameters, tokens, bytes and seconds. `sampling_seconds`:
    what the teacher takes to make the step's data, before the first step. `is_without_teacher`: the teacher is not in
    memory meanwhile."""

    name: str
    what: str
    tokens: int
    trainable: int
    frozen: int
    peak_bytes: int
    seconds: float
    sampling_seconds: float = 0.0
    is_without_teacher: bool = False


@dataclass(frozen=True)
class PlanContext:
    """What a step needs to plan itself. `held_teacher` are the floats that a process holds of the run's teacher, and
    `floats_of_teacher` tells it of any. `rate` is floating-point operations per second in training, `scan_rate()` state
    updates per second, `rule_rate()` operations per second of delta rules; `teachers` has the configuration of each
    teacher that a training step names. Models are made on the meta device."""

    domain: Domain
    config: PreTrainedConfig
    num_teacher: int
    held_teacher: float
    floats_of_teacher: Callable[[PreTrainedModel], float]
    teachers: Mapping[str, PreTrainedConfig]
    longest: int  # training sequence of the recipe, in tokens
    rate: float
    scan_rate: Callable[[], float]
    rule_rate: Callable[[], float]
    steps_per_state: int  # of an elementwise scan, whose backward pass keeps a state of so many steps


@dataclass(frozen=True)
class Outline:
    """What is known of the student before a step, from configurations alone.

    `teacher` is the configuration of the run's teacher, `host` that of the student around its mixers. `mixers` is the
    name of what stands in each layer (None: attention). `is_measured`: a step before chooses its layers by
    measurement, so `mixers` says what may stand there."""

    domain: Domain
    teacher: PreTrainedConfig
    host: PreTrainedConfig
    mixers: tuple[str | None, ...]
    is_student: bool
    is_measured: bool
    longest: int
    teachers: Mapping[str, PreTrainedConfig]


@dataclass(frozen=True)
class Dial:
    """What a sweep may turn: `choices` of a field, or rates from `low` to `high`, drawn by their logarithm."""

    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @staticmethod
    def around(value: float) -> "Dial":
        """Return rates within a factor of four of this one."""
        return Dial(low=value / 4, high=value * 4)


class Step(ABC):
    """The interface of a step. Its subclasses are frozen dataclasses."""

    name: str

    @property
    def training(self) -> StageSettings | None:
        """The settings of a step that trains; None for the others."""
        return None

    @property
    def own_teacher(self) -> str | None:
        """The name of the step's own teacher, where it does not use the run's."""
        return None

    @property
    def own_data(self) -> str | None:
        """The name of the step's own data, where it does not use the run's."""
        return None

    @property
    def recorded(self) -> Path | None:
        """The folder of what was recorded of the run's teacher, where the step learns from that alone."""
        return None

    @abstractmethod
    def problems(self, before: Outline) -> list[str]:
        """Say in sentences what cannot work, from configurations alone."""

    def after(self, before: Outline) -> Outline:
        """Return what is known of the student after the step."""
        return before

    @abstractmethod
    def plan(self, student: PreTrainedModel, context: PlanContext) -> tuple[PreTrainedModel, StepPlan]:
        """Return the student after the step, without memory, and what the step costs.

        Raises UserError for what only the modules themselves show."""

    @abstractmethod
    def run(self, student: PreTrainedModel, session: Session) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Do the step; return the new student and what the ledger says of the step. Consumes the old student."""

    def describe(self) -> dict[str, Any]:
        """Return the step as plain data, functions by their names: what the ledger compares and the report prints."""
        return plain(self)

    def dials(self) -> dict[str, Dial]:
        """Return the fields that are worth a sweep, each with its choices, or a range around what it is."""
        return {}

    def tiny(self) -> "Step":
        """Return the same step shrunk to seconds."""
        return self


def plain(step: Any) -> dict[str, Any]:
    """Return the fields of a step as plain data, with the kind of step."""
    return {"kind": type(step).__name__} | dataclasses.asdict(step)


def host_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the configuration of the model around the mixers, of a converted model or any other."""
    return getattr(model.config, "host", model.config)


def count(model: PreTrainedModel) -> int:
    """Return the number of parameters of a model."""
    return sum(p.numel() for p in model.parameters())
