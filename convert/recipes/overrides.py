"""`--set STEP.FIELD=VALUE`: one field of one step of a recipe, changed."""

import dataclasses
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from convert.core.errors import UserError
from convert.core.fields import checked, shown
from convert.objectives import divergences as objectives
from convert.recipes.assignment import Assignment, parse_assignment
from convert.recipes.base import Recipe, Step, Swap, Train
from convert.recipes.values import rules_of, value_of
from convert.training import loop as stages

FIXED = ("name", "mixer", "options", "stage", "settings")  # what makes a step the step it is
FUNCTIONS: dict[str, dict[str, Callable]] = {  # fields that hold a function, which is given by its name
    "trains": stages.SELECTORS,
    "objective": {f.__name__: f for f in (objectives.cosine_distance, objectives.energy_mse)},
}


@checked
def with_setting(recipe: Recipe, assignment: str) -> Recipe:
    """The recipe with `STEP.FIELD=VALUE` applied: the field of the step itself, of its settings, of its objective or of
    its mixer's options. The text is read by the type of the field. Raises UserError where the step or the field does
    not exist, or the value does not fit."""
    found = parse_assignment(assignment)
    names = [step.name for step in recipe.steps]
    if found.step not in names:
        raise UserError(f"--set {found}: this recipe's steps are {', '.join(names)}; there is no {found.step!r}.")
    step = recipe.steps[names.index(found.step)]
    changed = _replace(step, found)
    return dataclasses.replace(recipe, steps=tuple(changed if s is step else s for s in recipe.steps))


def _replace(step: Step, assignment: Assignment) -> Step:
    """The step with the assignment applied where it belongs: fields of several homes may share a name."""
    homes: dict[str, Any] = {"": step}  # where a field may live, nearest first
    if isinstance(step, Train):
        homes["settings"] = step.settings
        if dataclasses.is_dataclass(step.settings.objective):
            homes["objective"] = step.settings.objective
    if isinstance(step, Swap):
        homes["options"] = step.options
    for home, holder in homes.items():
        kinds = {f.name: f.type for f in dataclasses.fields(holder) if f.name not in FIXED}
        if assignment.field in kinds:
            new = dataclasses.replace(holder, **{assignment.field: _read(kinds[assignment.field], assignment)})
            if home == "objective":
                home, new = "settings", dataclasses.replace(homes["settings"], objective=new)
            return dataclasses.replace(step, **{home: new}) if home else new
    fields = [f.name for h in homes.values() for f in dataclasses.fields(h) if f.name not in FIXED]
    raise UserError(
        f"--set {assignment}: step {step.name!r} has no field {assignment.field!r}; it has {', '.join(fields)}."
    )


def _read(kind: Any, assignment: Assignment) -> Any:
    """The value of the assignment, as the type of its field."""
    if functions := FUNCTIONS.get(assignment.field):
        if assignment.value in functions:
            return functions[assignment.value]
        rules = f"one of {', '.join(functions)}"
    else:
        try:
            return value_of(kind, assignment.value)
        except ValidationError as error:
            rules = rules_of(error, f"--set {assignment}")
    raise UserError(f"--set {assignment}: {assignment.field} must be {rules}; got {shown(assignment.value)}.")
