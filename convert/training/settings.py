"""The settings of one stage of training, and which terms of an objective each stage can compute."""

import math
from abc import abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from convert.core.errors import UserError
from convert.core.fields import Checked, Range
from convert.objectives.base import AttentionTerm, BlockTerm, LayerTerm, LogitTerm, Objective, StageTerm, Term
from convert.training.selectors import Trains, name_of

COMPARED: dict[str, tuple[type[Term], ...]] = {
    "align": (AttentionTerm, BlockTerm),
    "distill": (LogitTerm, LayerTerm),
    "supervised": (LogitTerm,),
    "classify": (LogitTerm, StageTerm),
}


@dataclass(frozen=True, kw_only=True)
class StageSettings(Checked):
    """The settings that a stage has whatever it is trained on. Shares are of the stage's steps. A unit is a token or an
    image."""

    unit: ClassVar[str]  # the plural
    abbreviation: ClassVar[str]

    lr: Annotated[float, Range(0, 10)]
    objective: Objective
    trains: Trains
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    schedule: Literal["wsd", "cosine"] = "wsd"
    warmup: Annotated[float, Range(0, 1)] = 0.1  # 10 / 80 / 10: MOHAWK's and GenDistill's
    decay: Annotated[float, Range(0, 1)] = 0.1
    floor: Annotated[float, Range(0, 1)] = 0.02  # of the peak rate, at the end (GenDistill)
    beta1: Annotated[float, Range(0, 0.9999)] = 0.9
    beta2: Annotated[float, Range(0, 0.999999)] = 0.95
    # of the matrices of linear layers (MOHAWK, GenDistill); everything else has none
    weight_decay: Annotated[float, Range(0, 1)] = 0.1
    clip: Annotated[float, Range(0, 1e9)] = 1.0
    # of matrix products; auto: bfloat16 where the device is fast at it
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpointing: bool = False  # recompute each layer in the backward pass: less memory, a third more time
    # units between two measurements on held-out data; 0: none
    evaluate_every: Annotated[int, Range(0, 1e18)] = 0
    save_every: Annotated[float, Range(0, 1e12)] = 60.0  # seconds between two checkpoints

    @property
    @abstractmethod
    def units(self) -> int:
        """Units of the whole stage."""

    @property
    @abstractmethod
    def batch_units(self) -> int:
        """Units of an optimizer step."""

    @property
    @abstractmethod
    def micro_units(self) -> int:
        """Units of one forward and backward pass; the rest of a batch is accumulated."""

    @property
    def longest(self) -> int:
        """Units of the longest sequence; 0 where there are no sequences."""
        return 0

    def altered(self, batch: Any, step: int) -> Any:
        """The batch as a step trains on it."""
        return batch

    @property
    def is_batch_own(self) -> bool:
        """Whether making a batch touches nothing that training uses, so that a thread may do it meanwhile."""
        return True

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return math.ceil(self.units / self.batch_units)

    def plain(self) -> dict[str, Any]:
        """The settings as plain data, functions by their names."""
        found = asdict(replace(self, objective=Objective(())))
        return found | {"objective": self.objective.plain(), "trains": name_of(self.trains)}

    def rate(self, step: int) -> float:
        """The learning rate of one step, counted from 0."""
        at, warmup = (step + 1) / self.num_steps, max(self.warmup, 1 / self.num_steps)
        if at <= warmup:
            return self.lr * at / warmup
        if self.schedule == "cosine":
            return self.lr * (
                self.floor + (1 - self.floor) * (1 + math.cos(math.pi * (at - warmup) / (1 - warmup))) / 2
            )
        return self.lr * min(1.0, max(self.floor, (1 - step / self.num_steps) / self.decay if self.decay else 1.0))


@dataclass(frozen=True, kw_only=True)
class Settings(StageSettings):
    """The settings of one stage on text. Sizes are in tokens."""

    unit, abbreviation = "tokens", "tok"

    tokens: Annotated[int, Range(0, 1e14)]  # more than any text holds (ours)
    seq_len: Annotated[int, Range(2, 2**24)]
    batch_tokens: Annotated[int, Range(2, 2**27)]
    micro_tokens: Annotated[int, Range(1, 2**27)]  # of one forward and backward; the rest of a batch is accumulated
    # which tokens of conversations are targets: all of them, or those that an assistant wrote; of text all are
    masking: Literal["all", "completions"] = "all"
    # share of the input tokens replaced by others of the batch, for teacher and student alike
    noise: Annotated[float, Range(0, 1)] = 0.0
    # tokens whose logits are held at once; they fit a CPU's cache, 1.4 times the speed of 2,048
    loss_chunk: Annotated[int, Range(1, 2**27)] = 512

    @property
    def units(self) -> int:
        return self.tokens

    @property
    def batch_units(self) -> int:
        return self.batch_tokens

    @property
    def micro_units(self) -> int:
        return self.micro_tokens

    @property
    def longest(self) -> int:
        return self.seq_len

    def altered(self, batch: Any, step: int) -> Any:
        """The batch with noise."""
        return batch.with_noise(self.noise, (self.seed, step))

    @property
    def num_sequences(self) -> int:
        """Sequences in a batch."""
        return self.batch_tokens // self.seq_len


def check_objective(stage: str, objective: Objective, has_teacher: bool = True, recorded: bool = False) -> None:
    """Raises UserError if a stage cannot compute a term of the objective, or if there is none. `recorded`: in place of
    a teacher there is what was recorded of one."""
    kinds = COMPARED[stage]
    if not objective.terms:
        raise UserError(f"a loss needs a term; the objective of {stage} has none.")
    for _, term in objective.terms:
        if not isinstance(term, kinds):
            raise UserError(
                f"{stage} compares {' and '.join(kind.compares for kind in kinds)}; its objective cannot be"
                f" {term.name}, which compares {term.compares}."
            )
        if recorded and (reason := term.why_not_recorded()):
            raise UserError(
                f"{stage} has recorded probabilities in place of a teacher; its objective cannot be {term}, {reason}."
                " Leave that term out, or let the teacher itself teach."
            )
        if term.needs_teacher and not has_teacher and not recorded:
            raise UserError(f"{stage} has no teacher to compare with; its objective cannot be {term.name}.")
