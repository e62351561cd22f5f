"""`--set STEP.FIELD=VALUE`: one field of one step of a recipe, changed."""

import dataclasses
import re
from collections.abc import Iterator
from typing import get_args

from convert.core.errors import UserError
from convert.core.fields import TEXT, checked, require, shown
from convert.objectives import divergences as objectives
from convert.recipes.base import OneIn, Recipe, Step, Swap, Train
from convert.recipes.language import FULL
from convert.training import loop as stages


@checked
def with_setting(recipe: Recipe, assignment: str) -> Recipe:
    """`STEP.FIELD=VALUE` applied: the field of the step itself, of its settings, of its objective or of its mixer's
    options."""
    path, equals, value = assignment.partition("=")
    name, dot, field = path.partition(".")
    if not TEXT.holds(assignment) or not equals or not dot:
        raise UserError(f"--set takes STEP.FIELD=VALUE; got {shown(assignment)}.")
    names = [step.name for step in recipe.steps]
    if name not in names:
        raise UserError(f"--set {assignment}: this recipe's steps are {', '.join(names)}; there is no {name!r}.")
    step = recipe.steps[names.index(name)]
    changed = _replace(step, field, value, assignment)
    return dataclasses.replace(recipe, steps=tuple(changed if s is step else s for s in recipe.steps))


FIXED = ("name", "mixer", "options", "stage", "settings")  # what makes a step the step it is


def _replace(step: Step, field: str, value: str, assignment: str) -> Step:
    homes = {"": step}  # where a field may live, nearest first
    if isinstance(step, Train):
        homes["settings"] = step.settings
        if dataclasses.is_dataclass(step.settings.objective):
            homes["objective"] = step.settings.objective
    if isinstance(step, Swap):
        homes["options"] = step.options
    for home, holder in homes.items():
        kinds = {f.name: f.type for f in dataclasses.fields(holder) if f.name not in FIXED}
        if field in kinds:
            parsed = (
                _keep(step.keep, value, assignment)
                if field == "keep"
                else _parse(kinds[field], field, value, assignment)
            )
            new = dataclasses.replace(holder, **{field: parsed})
            if home == "":
                return new
            if home == "objective":
                return dataclasses.replace(step, settings=dataclasses.replace(step.settings, objective=new))
            return dataclasses.replace(step, **{home: new})
    fields = [f.name for h in homes.values() for f in dataclasses.fields(h) if f.name not in FIXED]
    raise UserError(f"--set {assignment}: step {step.name!r} has no field {field!r}; it has {', '.join(fields)}.")


def _parse(kind, field: str, value: str, assignment: str):
    """By the annotation of the field; what it then holds must fit that, too."""
    if field == "trains":
        return _named(stages.SELECTORS, value, assignment)
    if field == "objective":
        return _named({f.__name__: f for f in (objectives.cosine_distance, objectives.energy_mse)}, value, assignment)
    parsed = _literal(kind, value, assignment)
    require(kind, parsed, f"--set {assignment}: {field}")
    return parsed


def _literal(kind, value: str, assignment: str):
    kinds = set(_plain(kind))
    if type(None) in kinds and value.lower() == "none":
        return None
    if bool in kinds:
        return _named({"true": True, "false": False}, value.lower(), assignment)
    if kinds & {int, float}:
        return _number(float if float in kinds else int, value, assignment)
    return value


def _plain(kind) -> Iterator[type]:
    """The types in an annotation."""
    if isinstance(kind, type) and not get_args(kind):
        yield kind
    for part in get_args(kind):
        yield from _plain(part)


def _keep(now: tuple[int, ...] | OneIn, value: str, assignment: str) -> tuple[int, ...] | OneIn:
    """none, layers, or one in so many: every:6 by pattern, auto:6 by measurement, auto as many as by default."""
    kind, _, number = value.partition(":")
    if value == "none":
        return ()
    if kind in ("auto", "every"):
        every = _number(int, number, assignment) if number else now.every if isinstance(now, OneIn) else FULL.every
        return OneIn(every, measured=kind == "auto")
    if not re.fullmatch(r"\s*[0-9]{1,4}\s*(,\s*[0-9]{1,4}\s*)*", value):
        raise UserError(f"--set {assignment}: keep takes none, layers as 4,9, every:6, auto or auto:6; got {value!r}.")
    return tuple(int(part) for part in value.split(","))


def _named(table: dict, value: str, assignment: str):
    if value not in table:
        raise UserError(f"--set {assignment}: the value must be one of {', '.join(table)}; got {value!r}.")
    return table[value]


def _number(kind: type, value: str, assignment: str):
    """A whole number may be written as 2e5."""
    try:
        if kind is int and re.fullmatch(r"[+-]?[0-9]{1,30}", value.strip()):
            return int(value)  # a float would round a seed
        number = float(value if value.isascii() else "digits of another script")
        if kind is int and number != int(number):
            raise ValueError
        return kind(number)
    except (ValueError, OverflowError):
        rule = "a whole number" if kind is int else "a number"
        raise UserError(f"--set {assignment}: the value must be {rule}; got {value!r}.") from None
