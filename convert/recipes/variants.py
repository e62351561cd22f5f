"""Variants of recipes that swap, align and distill: functions that add a step to them."""

import dataclasses
from collections.abc import Callable
from typing import Any

from convert.objectives.base import Objective
from convert.recipes.base import Recipe
from convert.steps.base import Step
from convert.steps.layers import Keep
from convert.steps.select import Select
from convert.steps.train import Train


def selection(swap: str, keep: Keep, every: int) -> Callable[[Recipe], Recipe]:
    """Return the variant that chooses the layers with attention after alignment, one in `every`: the swap then takes
    all layers, unless its `keep` is no longer the target's own, which the step Select refuses."""

    def select(recipe: Recipe) -> Recipe:
        def everywhere(edit: Any) -> tuple[Step, ...]:
            return (dataclasses.replace(edit, keep=()) if edit.keep == keep else edit,)

        recipe = _with(recipe, swap, everywhere)
        added = Select("select", every)
        added = dataclasses.replace(added, calibration=min(added.calibration, recipe.units))
        return _with(recipe, "align", lambda align: (align, added))

    return select


def align_qk(recipe: Recipe) -> Recipe:
    """Return the recipe with GenDistill's stage 1 (arXiv 2603.26556): half of the tokens of `align`, as in the paper,
    first train by the L2 distance what makes queries and keys, and says what is forgotten and written (that part is
    inferred: the paper trains "the q/k side").

    It is no default: on neox-nano the same tokens are worth more in `align` (ours, three seeds)."""

    def split(align: Any) -> tuple[Step, ...]:
        half = align.settings.tokens // 2
        first = dataclasses.replace(
            align.settings, tokens=half, objective=Objective.of("l2_distance"), trains="queries_and_keys"
        )
        rest = dataclasses.replace(align.settings, tokens=align.settings.tokens - half)
        return Train("align_qk", "align", first), dataclasses.replace(align, settings=rest)

    return _with(recipe, "align", split)


def _with(recipe: Recipe, name: str, change: Callable[[Any], tuple[Step, ...]]) -> Recipe:
    """Return the recipe where `change` says what stands in the place of the step of that name."""
    changed = (change(step) if step.name == name else (step,) for step in recipe.steps)
    return dataclasses.replace(recipe, steps=tuple(step for part in changed for step in part))
