"""`--set STEP.FIELD=VALUE`: one field of one step of a recipe, changed."""

import dataclasses
from typing import Any

from pydantic import ValidationError

from convert.core.errors import UserError
from convert.core.fields import checked, shown
from convert.objectives import TERMS
from convert.objectives.base import Objective, Weight, name_of
from convert.objectives.base import value_of as word_of
from convert.recipes.assignment import Assignment, parse_assignment
from convert.recipes.base import Recipe
from convert.recipes.values import rules_of, value_of
from convert.steps.base import Step

FIXED = ("name", "mixer", "model", "options", "stage", "settings")  # what makes a step the step it is


@checked
def with_setting(recipe: Recipe, assignment: str) -> Recipe:
    """Return the recipe with `STEP.FIELD=VALUE` applied: a field of the step itself, of its settings or options, or of
    its objective (a term's weight by the term's name, or a field of all terms that have it). A step that is not there
    is added, where the recipe has a variant with it.

    The text is read by the type of the field. Raises UserError where the step or the field does not exist, or the
    value does not fit."""
    found = parse_assignment(assignment)
    names = [step.name for step in recipe.steps]
    if found.step not in names and found.step in recipe.variants:
        recipe = recipe.variants[found.step](recipe)
        names = [step.name for step in recipe.steps]
    if found.step not in names:
        others = [name for name in recipe.variants if name not in names]
        more = f" (and it can have {', '.join(others)})" if others else ""
        raise UserError(f"--set {found}: this recipe's steps are {', '.join(names)}{more}; there is no {found.step!r}.")
    step = recipe.steps[names.index(found.step)]
    changed = _replaced(step, found)
    return dataclasses.replace(recipe, steps=tuple(changed if s is step else s for s in recipe.steps))


def _replaced(step: Step, assignment: Assignment) -> Step:
    """The step with the assignment applied where it belongs: fields of several homes may share a name."""
    homes: dict[str, Any] = {"": step} | {
        home: getattr(step, home) for home in ("settings", "options") if hasattr(step, home)
    }
    known = {home: _types(holder) for home, holder in homes.items()}
    for home, types in known.items():
        if assignment.field in types:
            value = _read(types[assignment.field], assignment)
            new = dataclasses.replace(homes[home], **{assignment.field: value})
            return dataclasses.replace(homes[""], **{home: new}) if home else new
    terms = {}
    if step.training is not None:
        objective, terms = step.training.objective, _of_objective(step.training.objective)
        if assignment.field in terms:
            settings = dataclasses.replace(step.training, objective=_changed(objective, assignment))
            return dataclasses.replace(homes[""], settings=settings)
    fields = [name for types in (*known.values(), terms) for name in types]
    raise UserError(
        f"--set {assignment}: step {step.name!r} has no field {assignment.field!r}; it has {', '.join(fields)}."
    )


def _types(holder: Any) -> dict[str, Any]:
    """Field -> type, of the fields of a dataclass that can be set."""
    return {field.name: field.type for field in dataclasses.fields(holder) if field.name not in FIXED}


def _of_objective(objective: Objective) -> dict[str, Any]:
    """What can be set of an objective by itself: the weights of built-in terms, and the fields of its own terms."""
    return dict.fromkeys([*map(name_of, TERMS), *objective.field_names()])


def _changed(objective: Objective, assignment: Assignment) -> Objective:
    """The objective with another weight of a term, or another value of a field."""
    name = assignment.field
    if name not in objective.field_names():
        return objective.with_weight(name, _read(Weight, assignment))
    try:
        return objective.with_field(name, word_of(assignment.value))
    except UserError as error:
        raise UserError(f"--set {assignment}: {error}") from None


def _read(kind: Any, assignment: Assignment) -> Any:
    """The value of the assignment, as the type of its field."""
    try:
        return value_of(kind, assignment.value)
    except ValidationError as error:
        rules = rules_of(error, f"--set {assignment}")
    raise UserError(f"--set {assignment}: {assignment.field} must be {rules}; got {shown(assignment.value)}.")
