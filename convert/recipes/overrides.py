"""`--set STEP.FIELD=VALUE`: one field of one step of a recipe, changed."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, get_args

from convert.core.errors import UserError
from convert.core.fields import checked, require
from convert.objectives.base import Objective
from convert.recipes.assignment import parse_assignment
from convert.recipes.base import Recipe
from convert.steps.base import Step
from convert.steps.layers import parse_keep

FIXED = ("name", "mixer", "model", "options", "stage", "settings")  # what makes a step the step it is


@checked
def with_setting(recipe: Recipe, assignment: str) -> Recipe:
    name, field, value = parse_assignment(assignment)
    names = [step.name for step in recipe.steps]
    if name not in names:
        raise UserError(f"--set {assignment}: this recipe's steps are {', '.join(names)}; there is no {name!r}.")
    step = recipe.steps[names.index(name)]
    changed = _replace(step, field, value, assignment)
    return dataclasses.replace(recipe, steps=tuple(changed if s is step else s for s in recipe.steps))


def _replace(step: Step, field: str, value: str, assignment: str) -> Step:
    for home in ("", "settings", "options"):
        holder = getattr(step, home, None) if home else step
        if holder is None:
            continue
        kinds = {f.name: f.type for f in dataclasses.fields(holder) if f.name not in FIXED}
        if field in kinds:
            if field == "keep":
                parsed: Any = parse_keep(value, step.keep)
            elif field == "objective":
                parsed = Objective.of(value)
            else:
                parsed = _literal(kinds[field], value, assignment)
                require(kinds[field], parsed, f"--set {assignment}: {field}")
            new = dataclasses.replace(holder, **{field: parsed})
            return new if not home else dataclasses.replace(step, **{home: new})
    objective = step.settings.objective
    new = (
        objective.with_field(field, float(value))
        if field in objective.field_names()
        else objective.with_weight(field, float(value))
    )
    return dataclasses.replace(step, settings=dataclasses.replace(step.settings, objective=new))


def _literal(kind: Any, value: str, assignment: str) -> Any:
    kinds = set(_plain(kind))
    if type(None) in kinds and value.lower() == "none":
        return None
    if bool in kinds:
        return {"true": True, "false": False}[value.lower()]
    if kinds & {int, float}:
        if float not in kinds and re.fullmatch(r"[+-]?[0-9]{1,30}", value.strip()):
            return int(value)
        return float(value) if float in kinds else int(float(value))
    return value


def _plain(kind: Any) -> Iterator[type]:
    if isinstance(kind, type) and not get_args(kind):
        yield kind
    for part in get_args(kind):
        yield from _plain(part)
