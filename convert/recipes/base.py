"""A recipe: what is done to a teacher, as frozen data."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from convert.core.errors import UserError
from convert.core.fields import Name, Range, Text, check, checked
from convert.steps.base import Step
from convert.training.settings import StageSettings

TINY_EXAMPLES = 2  # of each task


@dataclass(frozen=True)
class Recipe:
    """Steps in their order. `examples`: of each task, that teacher and student answer at the end. `tasks`: the names of
    these tasks, with commas; None: all that can be asked.

    `variants`: name of a step that the recipe can have -> the function that adds it. A setting of such a step
    (`with_setting`) adds it first."""

    target: Name
    steps: tuple[Step, ...]
    examples: Annotated[int, Range(1, 100_000)]
    tasks: Text | None = None
    variants: Mapping[str, Callable] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check(self)
        names = [step.name for step in self.steps]
        if not self.steps or len(set(names)) < len(names):
            raise UserError(
                f"Recipe: steps must be at least one, each with a name of its own; got {', '.join(names) or 'none'}."
            )

    @property
    def trainings(self) -> tuple[StageSettings, ...]:
        """The settings of the steps that train, in their order."""
        return tuple(step.training for step in self.steps if step.training is not None)

    @property
    def measured_by(self) -> StageSettings:
        """The settings whose sequences a run is measured by: those of the last training step on the run's data."""
        on_its_data = [step.training for step in self.steps if step.training is not None and step.own_data is None]
        return (on_its_data or self.trainings)[-1]

    @property
    def units(self) -> int:
        """Tokens, or images, of all training steps together."""
        return sum(settings.units for settings in self.trainings)

    @property
    def seed(self) -> int:
        """The seed of the first training step, by which swaps and builds draw, too."""
        return next((settings.seed for settings in self.trainings), 0)

    def describe(self) -> list[dict[str, Any]]:
        """Return the steps as plain data."""
        return [step.describe() for step in self.steps]


@checked
def tiny(recipe: Recipe) -> Recipe:
    """Return the same path in seconds: three small steps of each stage."""
    return dataclasses.replace(recipe, steps=tuple(step.tiny() for step in recipe.steps), examples=TINY_EXAMPLES)
