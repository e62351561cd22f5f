"""Text read as a value of a type, by pydantic.

The type is that of a dataclass's field, with its bounds (`Annotated[int, Range(1, 64)]`) and choices (`Literal`). Whole
numbers may be written 2e5, `none` stands for None, `true` and `false` for themselves, and several values are separated
by commas. A class with a method `of` reads its own text, as `EveryNth.of("every:6")`;
a function has no text.
"""

import functools
import math
import operator
import re
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, InstanceOf, TypeAdapter, ValidationError

from convert.core.errors import UserError
from convert.core.fields import Range, Written


def value_of(kind: Any, text: str) -> Any:
    """The value of type `kind` that the text says. Raises pydantic's ValidationError where it says none."""
    return TypeAdapter(readable(kind)).validate_python(text)


def rules_of(error: ValidationError, where: str) -> str:
    """What a value must be, by all rules that the text broke. A UserError of the value itself is raised as it is."""
    rules = []
    for found in error.errors():
        cause = found.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            raise UserError(f"{where}: {cause}") from None
        rules.append(str(cause) if cause is not None else found["msg"])
    return " or ".join(dict.fromkeys(rules))


def readable(kind: Any) -> Any:
    """The type with validators that read it from text."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits = [AfterValidator(functools.partial(_limited, limit)) for limit in args[1:]]
        return functools.reduce(lambda made, limit: Annotated[made, limit], limits, readable(args[0]))
    if origin in (Union, types.UnionType):
        kinds = [each for each in args if get_origin(each) is not Callable and each is not Callable]
        # the rule of None comes last in a sentence, but any text would take the word for itself
        kinds.sort(
            key=lambda each: each is type(None),
            reverse=any(str in (each, *get_args(each)) or get_origin(each) is tuple for each in kinds),
        )
        if len(kinds) == 1:
            return readable(kinds[0])
        union: Any = functools.reduce(operator.or_, map(readable, kinds))
        return Annotated[union, Field(union_mode="left_to_right")]
    if origin is tuple:
        return Annotated[tuple[readable(args[0]), ...], BeforeValidator(_parts)]  # type: ignore[misc]
    if origin is Literal:
        return Annotated[kind, BeforeValidator(functools.partial(_choice, {str(each): each for each in args}))]
    if kind in (None, type(None)):
        return Annotated[None, BeforeValidator(_none)]
    if read := READERS.get(kind) or getattr(kind, "of", None):
        return Annotated[InstanceOf[kind], BeforeValidator(read)]  # type: ignore[misc]
    return kind


def _limited(limit: Range | Written, value: Any) -> Any:
    if not limit.holds(value):
        raise ValueError(limit.words)
    return value


def _whole(text: str) -> int:
    if re.fullmatch(r"[+-]?[0-9]{1,30}", text.strip()):
        return int(text)  # a float would round a seed
    number = _real(text, "a whole number")
    if number != int(number):
        raise ValueError("a whole number")
    return int(number)


def _real(text: str, rule: str = "a finite number") -> float:
    try:
        number = float(text if text.isascii() else "digits of another script")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(rule)
    return number


def _truth(text: str) -> bool:
    return _choice({"true": True, "false": False}, text.lower())


def _none(text: str) -> None:
    if text.lower() != "none":
        raise ValueError("none")


def _choice(choices: dict[str, Any], text: str) -> Any:
    if text not in choices:
        raise ValueError(f"one of {', '.join(choices)}")
    return choices[text]


def _parts(text: str) -> tuple[str, ...]:
    """The parts of `4,9`; `none` has none."""
    if text.lower() == "none":
        return ()
    if "," not in text and not text.strip().lstrip("+-").isdigit():
        raise ValueError("none, or values as 4,9")
    return tuple(text.split(","))


READERS: dict[Any, Callable[[str], Any]] = {int: _whole, float: _real, bool: _truth}
