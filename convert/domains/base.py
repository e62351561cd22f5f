"""The interface of a domain: everything that differs between text and images.

A run knows its models, its data and its numbers through this interface alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

if TYPE_CHECKING:  # a plan needs neither reports nor the types of their files
    from convert.reports.sections import Sections
    from convert.runs.evaluation_schemas import Evaluation
    from convert.runs.schemas import Report

Batches = Callable[[int], Any]  # step -> batch; a batch is a function of the seed and the step


class Source(Protocol):
    """What a teacher's name stands for: `name` fits the name of a folder, `data` is the default data set."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def where(self) -> str: ...

    @property
    def data(self) -> str: ...

    @property
    def is_remote(self) -> bool: ...


class Teacher(Protocol):
    """A loaded teacher: frozen, in eval mode. `dtype` is that of the weights on disk."""

    @property
    def source(self) -> Source: ...

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def dtype(self) -> torch.dtype: ...


class Corpus(Protocol):
    """A data set that was found and not read yet."""

    @property
    def spec(self) -> str: ...

    @property
    def is_sampled(self) -> bool:
        """Whether the teacher makes the data before the run."""

    def places(self) -> list[Path]:
        """Return the files and folders of this machine that the data set is made of."""


class Data(Protocol):
    """A data set, ready to make batches of."""

    @property
    def fingerprint(self) -> str: ...


class Monitor(Protocol):
    """What is measured while a step trains: called with the student, it returns numbers to log."""

    generations: list[dict]
    stopped_by: Any

    def __call__(self, student: PreTrainedModel) -> dict[str, float]: ...

    def ask_teacher(self) -> Any:
        """Ask the teacher what is compared with the student, where it is: it may be gone later."""


S = TypeVar("S", bound=Source)
T = TypeVar("T", bound=Teacher)
C = TypeVar("C", bound=Corpus)
D = TypeVar("D", bound=Data)


class Domain(ABC, Generic[S, T, C, D]):
    """One kind of models. The headline metric is what a run reports after each step; lower is better. Several processes
    call the methods of a run together."""

    name: ClassVar[str]
    unit: ClassVar[str]  # what training counts: tokens, images
    headline: ClassVar[str]  # the name of the headline metric
    shares_models: ClassVar[bool] = False  # whether several processes share models out; else each has them whole

    @property
    @abstractmethod
    def report_type(self) -> "type[Report]":
        """What report.json holds: the common keys and those of `final_metrics`."""

    @property
    @abstractmethod
    def sections(self) -> "Sections":
        """How the domain's part of a report is shown."""

    # --- before a run: nothing is loaded

    @abstractmethod
    def resolve(self, teacher: str) -> S:
        """Find out what a teacher's name stands for. Raises UserError for a name that stands for nothing."""

    @abstractmethod
    def read_config(self, source: S, trust_remote_code: bool = False) -> PreTrainedConfig:
        """Read the configuration of a teacher, without its weights."""

    @abstractmethod
    def outline(self, config: PreTrainedConfig) -> tuple[PreTrainedConfig, tuple[str | None, ...]]:
        """Return the configuration of the model around the mixers, and the name of the mixer of each layer (None: what
        the model itself has there)."""

    @abstractmethod
    def problem(self, config: PreTrainedConfig) -> str | None:
        """Say in a sentence why a model of this configuration cannot be a teacher; None where it can."""

    @abstractmethod
    def problem_of_pair(self, run: PreTrainedConfig, step: PreTrainedConfig) -> str | None:
        """Say why a training step cannot learn from the teacher `step` in a run whose teacher is `run`."""

    @abstractmethod
    def empty_model(self, config: PreTrainedConfig) -> PreTrainedModel:
        """Make the model of a configuration, with memory only where the default device has some."""

    @abstractmethod
    def build_config(self, model: str, sizes: Any, teacher: PreTrainedConfig) -> PreTrainedConfig:
        """Make the configuration of a student of a family, with the teacher's inputs and outputs."""

    @abstractmethod
    def describe_student(self, model: str, options: Any, config: PreTrainedConfig) -> str:
        """Say in a few words what `build` makes."""

    @abstractmethod
    def build(self, model: str, options: Any, teacher: T) -> PreTrainedModel:
        """Make a student of a family, on the teacher's device."""

    @abstractmethod
    def keep_start(self, student: PreTrainedModel, teacher: T, batches: Sequence[Any], folder: Path) -> None:
        """Keep in the run's folder what a report tells of a student that was built and not trained."""

    @abstractmethod
    def corpus(self, spec: str) -> C:
        """Find a data set on the disk. Raises UserError where there is none."""

    @abstractmethod
    def whole_data(self, spec: str) -> str:
        """Return the name of data as the settings of a run hold it, from wherever it is repeated."""

    @abstractmethod
    def check_data(self, corpus: C, settings: Any) -> None:
        """Raise UserError for data that a training step of these settings cannot use."""

    @abstractmethod
    def monitor_rules(self, rules: Sequence[str]) -> Sequence[Any]:
        """Read the rules of --stop-when. Raises UserError for a rule that says nothing."""

    # --- models and data of a run

    @abstractmethod
    def problem_of_loaded_pair(self, run: T, step: T) -> str | None:
        """Say why a training step cannot learn from the loaded teacher `step`, as problem_of_pair does."""

    @abstractmethod
    def origins(self, teacher: T, data: D) -> dict[str, str]:
        """Return the fingerprints of what a recording of the teacher's outputs depends on."""

    @abstractmethod
    def load_teacher(self, source: S, device: str, trust_remote_code: bool, shared: bool = False) -> T:
        """Load a teacher, refusing what cannot be one before its weights are read. `shared`: the processes share it out
        among them."""

    @abstractmethod
    def copy(self, model: PreTrainedModel) -> PreTrainedModel:
        """Make a model of its own with the same weights: a student that starts as its teacher."""

    @abstractmethod
    def load_student(self, folder: Path, teacher: PreTrainedModel) -> PreTrainedModel:
        """Read the student of a finished step back, frozen, on the teacher's device."""

    @abstractmethod
    def prepare(self, corpus: C, teacher: T, limit: int, settings: Any) -> D:
        """Make the data set into what batches are made of, for steps of these settings; `limit` in units."""

    @abstractmethod
    def batches(self, data: D, settings: Any) -> Batches:
        """Return the training batches of a stage. Raises UserError where the data have too little for it."""

    @abstractmethod
    def held_out(self, data: D, budget: int, settings: Any) -> list[Any]:
        """Return the batches that the headline metric of a run is measured on, always the same ones; `budget` in
        units."""

    @abstractmethod
    def probe(self, data: D, length: int) -> Any:
        """Return one held-out batch of at most `length` units, for comparing outputs before and after a swap."""

    @abstractmethod
    def check(self, teacher: T, tasks: str | None) -> None:
        """Raise UserError where the final evaluation could not ask this teacher these tasks (names with commas; None:
        all that can be asked)."""

    # --- measurements

    @abstractmethod
    def measure(self, model: PreTrainedModel, batches: Sequence[Any]) -> float:
        """Return the headline metric of a model on these batches."""

    @abstractmethod
    def recall_loss(self, model: PreTrainedModel, teacher: T) -> float:
        """Return how badly a model recalls which value belongs to which key, in nats; lower is better."""

    @abstractmethod
    def monitor(self, teacher: T, batches: Sequence[Any], rules: Sequence[Any]) -> Monitor:
        """Return what is called whenever a training step measures, on all or some of these held-out batches."""

    @abstractmethod
    def final_metrics(self, student: PreTrainedModel, teacher: T, data: D, batches: Sequence[Any], folder: Path) -> Any:
        """Measure the finished student beside its teacher: a dataclass with the domain's keys of the report. `folder`
        is the run's."""

    @abstractmethod
    def evaluate(
        self, models: Mapping[str, PreTrainedModel], teacher: T, tasks: str | None, examples: int, folder: Path
    ) -> "Evaluation":
        """Evaluate these models on tasks, as `check` has them; answers and results go into `folder`."""

    @abstractmethod
    def try_it(self, run: Path) -> str:
        """Return a command with which a person tries the student of a finished run."""

    @abstractmethod
    def export(
        self, student: PreTrainedModel, teacher: T, folder: Path, cards: tuple[str, str], data: D
    ) -> dict[str, Any]:
        """Write the student as a folder that loads without this project, and read it back in a clean process.

        `cards`: the model card of a folder that brings code of ours along, and of one that does not."""
