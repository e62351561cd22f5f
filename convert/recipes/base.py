"""A recipe: what is done to a teacher, as frozen data."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from convert.core.errors import UserError
from convert.core.fields import Name, check, checked, require, shown
from convert.mixers import MIXERS
from convert.objectives.divergences import Distill
from convert.training import loop as stages
from convert.training.loop import Settings


@dataclass(frozen=True)
class OneIn:
    """One layer in `every`: the last of each so many, or as many of those whose replacement alone costs most, by
    measurement."""

    every: Annotated[int, (2, 1000)]
    measured: bool = False

    __post_init__ = check

    def count(self, num_layers: int) -> int:
        return num_layers // self.every

    def pattern(self, num_layers: int) -> tuple[int, ...]:
        return tuple(range(self.every - 1, num_layers, self.every))


@dataclass(frozen=True)
class Swap:
    """Replace the token mixers of all layers but those that `keep` names.

    `exact`: theory says that the function stays the same, so the run measures it and stops if it does not.
    `calibration`: tokens of training text over which the inputs of the layers are looked at first, for mixers that
    start from them."""

    name: Name
    mixer: Literal[tuple(MIXERS)]
    options: object
    keep: tuple[Annotated[int, (0, 1000)], ...] | OneIn = ()
    exact: bool = False
    calibration: Annotated[int, (0, 2**20)] = 0  # the windows looked at are held at once (the bound is ours)

    def __post_init__(self):
        check(self)
        require(MIXERS[self.mixer].Options, self.options, f"Swap: options of {self.mixer}")

    @property
    def looks_first(self) -> bool:
        return self.calibration > 0 and MIXERS[self.mixer].needs_inputs(self.options)

    def edited(self, num_layers: int) -> tuple[int, ...]:
        """The layers replaced, as far as no measurement decides."""
        kept = self.keep.pattern(num_layers) if isinstance(self.keep, OneIn) else self.keep
        return tuple(i for i in range(num_layers) if i not in kept)


@dataclass(frozen=True)
class Forget:
    """Start the decays at a small rate instead of none, after the hand-over was checked; 0 leaves them at none."""

    name: Name
    rate: Annotated[float, (0, 10)]

    __post_init__ = check


@dataclass(frozen=True)
class Train:
    name: Name
    stage: Callable
    settings: Settings

    def __post_init__(self):
        check(self)
        if self.stage not in stages.STAGES.values():
            raise UserError(f"Train: stage must be one of {', '.join(stages.STAGES)}; got {shown(self.stage)}.")


Step = Swap | Forget | Train


@dataclass(frozen=True)
class Recipe:
    """`questions`: of each task, that teacher and student answer at the end."""

    target: Name
    steps: tuple[Step, ...]
    questions: Annotated[int, (1, 100_000)]

    def __post_init__(self):
        check(self)
        names = [step.name for step in self.steps]
        if not self.steps or len(set(names)) < len(names):
            raise UserError(
                f"Recipe: steps must be at least one, each with a name of its own; got {', '.join(names) or 'none'}."
            )

    @property
    def tokens(self) -> int:
        return sum(step.settings.tokens for step in self.steps if isinstance(step, Train))


@dataclass(frozen=True)
class Budget:
    """What the defaults depend on. Tokens are the total over all training steps."""

    tokens: Annotated[int, (1, 1e14)]
    seq_len: Annotated[int, (2, 2**24)]
    batch_tokens: Annotated[int, (2, 2**27)]
    align_lr: Annotated[float, (0, 10)]
    distill_lr: Annotated[float, (0, 10)]
    objective: Distill
    micro_tokens: Annotated[int, (1, 2**27)]
    align_batch_tokens: Annotated[int, (2, 2**27)] | None = None  # of the first stage; None: as in the last
    checkpointing: bool = False
    trains: Callable = stages.all_but_embeddings  # in the last stage (the paper's)
    schedule: Literal["wsd", "cosine"] = "wsd"  # of the last stage
    noise: Annotated[float, (0, 1)] = 0.0  # in the last stage
    window: Annotated[int, (1, 1e7)] = 512  # of sliding-window attention (ours)
    latent_shape: Literal["exact", "native"] = (
        "exact"  # of latent attention; native where the teacher's attention has neither biases nor q/k norm
    )
    edit_lr: Annotated[float, (0, 10)] = (
        1e-4  # of both stages of attention editing, whose students start close to their teachers (ours)
    )
    seed: Annotated[int, (0, 2**63 - 1)] = 0
    questions: Annotated[int, (1, 100_000)] = 16  # of each task at the end (ours)
    starts_linear: bool = False  # the teacher is linear attention already: nothing to align

    __post_init__ = check


@checked
def tiny(recipe: Recipe) -> Recipe:
    """The same path in seconds: three small steps of each stage."""

    def shrink(step: Step) -> Step:
        if isinstance(step, Swap):
            options = step.options
            if step.mixer == "gate-swa":
                options = dataclasses.replace(options, window=min(options.window, 64 // 2))
            return dataclasses.replace(step, options=options, calibration=min(step.calibration, 3 * 128))
        if not isinstance(step, Train):
            return step
        small = dataclasses.replace(
            step.settings, tokens=3 * 128, seq_len=64, batch_tokens=128, micro_tokens=128, evaluate_every=0
        )
        return dataclasses.replace(step, settings=small)

    return dataclasses.replace(recipe, steps=tuple(shrink(step) for step in recipe.steps), questions=2)


def describe(step: Step) -> dict:
    """A step as plain data, functions by their names: what the ledger compares and the report prints."""
    plain = dataclasses.asdict(step)
    if isinstance(step, Train):
        plain["stage"] = step.stage.__name__
        plain["settings"] |= {
            "objective": _plain_objective(step.settings.objective),
            "trains": step.settings.trains.__name__,
        }
    return {"kind": type(step).__name__} | plain


def _plain_objective(objective: Callable) -> str | dict:
    return dataclasses.asdict(objective) if dataclasses.is_dataclass(objective) else objective.__name__


def objective_of(step: Train) -> str:
    """In words."""
    plain = describe(step)["settings"]["objective"]
    if isinstance(plain, str):
        return plain
    terms = [f"{value:g} {key}" for key, value in plain.items() if value and key != "temperature"]
    return " + ".join(terms) + (f" (T = {plain['temperature']:g})" if plain["temperature"] != 1 else "")
