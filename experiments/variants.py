"""Variants of recipes, each a run folder of its own: what experiments that compare several recipes share."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from convert import recipes, run_recipe
from convert.core.errors import UserError
from convert.models.catalog import resolve
from convert.models.loading import read_config
from convert.pipeline import finished
from convert.recipes.base import Recipe
from convert.recipes.overrides import with_setting
from convert.runs.language_schemas import LanguageReport
from convert.steps.train import Train

WHOLE_MODEL = "*"


@dataclass(frozen=True)
class Variant:
    """A recipe that differs from its target's default: by settings as `--set` takes them, where the step `*` stands for
    each that trains the whole model; by `only`, the one training step, which then has all tokens; by `without`, steps
    that are left out with their tokens; or by `times`, a factor of the tokens."""

    target: str
    settings: tuple[str, ...] = ()
    only: str = ""
    without: tuple[str, ...] = ()
    times: float = 1.0

    def recipe(
        self,
        teacher: str,
        tokens: int | None,
        seq_len: int | None = None,
        *,
        seed: int = 0,
        examples: int = 1,
        tasks: str | None = None,
    ) -> Recipe:
        """The recipe for this teacher: None are the teacher's defaults, `examples` are those of each of the tasks at
        the end."""
        budget = dataclasses.replace(budget_of(teacher, self.target, tokens, seq_len, seed), examples=examples)
        if self.times != 1:  # of the tokens alone: sequences and batches stay as they are
            budget = dataclasses.replace(budget, tokens=int(self.times * budget.tokens))
        recipe = dataclasses.replace(recipes.TARGETS[self.target].recipe(budget), tasks=tasks)
        for setting in self.settings:
            for each in _for_every_step(recipe, setting):
                recipe = with_setting(recipe, each)
        if self.without:
            names = [step.name for step in recipe.steps]
            for name in self.without:
                if name not in names:
                    raise UserError(f"This recipe's steps are {', '.join(names)}; there is no {name!r} to leave out.")
            recipe = dataclasses.replace(recipe, steps=tuple(s for s in recipe.steps if s.name not in self.without))
        return only(recipe, self.only) if self.only else recipe


def budget_of(
    teacher: str, target: str, tokens: int | None, seq_len: int | None = None, seed: int = 0
) -> recipes.Budget:
    """The target's defaults for a teacher, but for what is given."""
    source = resolve(teacher)
    return recipes.target_named(target).module.budget(source.name, read_config(source), tokens, seq_len, seed=seed)


def _for_every_step(recipe: Recipe, setting: str) -> list[str]:
    """The setting itself, or for the step `*` one for each step that trains the whole model."""
    step, dot, rest = setting.partition(".")
    if step != WHOLE_MODEL:
        return [setting]
    return [f"{s.name}{dot}{rest}" for s in recipe.steps if isinstance(s, Train) and s.stage == "distill"]


def only(recipe: Recipe, name: str) -> Recipe:
    """The recipe with all tokens given to one of its training steps."""
    kept = [step for step in recipe.steps if step.training is None or step.name == name]
    kept[-1] = dataclasses.replace(kept[-1], settings=dataclasses.replace(kept[-1].settings, tokens=recipe.units))
    return dataclasses.replace(recipe, steps=tuple(kept))


def folder_of(out: Path, name: str, seed: int) -> Path:
    """The folder of a variant's run."""
    return out / f"{name.replace(',', '').replace(' ', '-')}-{seed}"


def report_of(teacher: str, recipe: Recipe, place: Path, data: str | None = None) -> LanguageReport:
    """The report of this very run, which is done first where it was not finished."""
    return finished(place, teacher, recipe, data) or run_recipe(teacher, recipe, place, data=data, wandb="disabled")
