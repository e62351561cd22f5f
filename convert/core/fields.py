"""Types, bounds and choices. They stand beside a field or an argument, and are checked where a record is made or a
function is called.

    lr: Annotated[float, Range(0, 10)]      schedule: Literal["wsd", "cosine"]      name: Name

This module travels with exported models, so it needs the standard library alone."""

import dataclasses
import functools
import inspect
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from convert.core.errors import UserError

Function = TypeVar("Function", bound=Callable)


@dataclass(frozen=True)
class Written:
    """A limit of a text, or of the text of a path: a pattern for the whole of it, and the same in words."""

    pattern: str
    words: str

    def holds(self, value: object) -> bool:
        return re.fullmatch(self.pattern, str(value), re.DOTALL) is not None


@dataclass(frozen=True)
class Range:
    """A limit of a number: the lowest and the highest value allowed."""

    low: float
    high: float

    @property
    def words(self) -> str:
        return f"within {_number(self.low)} .. {_number(self.high)}"

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


# Tokenizers and weights are read by names in UTF-8 alone; bytes that are none would be \udc80 to \udcff
PATH = Written(r"[^\0\ud800-\udfff]{1,4096}", "a path of 1 to 4,096 characters in UTF-8, without NUL")
TEXT = Written(r"[^\0\ud800-\udfff]{1,4096}", "1 to 4,096 characters that UTF-8 can hold, and no NUL")
NAME = Written(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}",
    "1 to 64 letters, digits, dots, dashes and underscores, and begin with one of the first two",
)

Text = Annotated[str, TEXT]
Place = Annotated[str | Path, PATH]  # a file, a folder, or what else a teacher's name stands for
Name = Annotated[str, NAME]  # fits the name of a folder

WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "text",
    type(None): "None",
    Path: "a path",
}


def broken(hint: Any, value: Any) -> str | None:
    """The rule of the annotation `hint` that the value breaks, as what it must be; None where it fits."""
    origin, args = get_origin(hint), get_args(hint)
    if hint in (Any, inspect.Parameter.empty):
        return None
    if origin is Annotated:
        return broken(args[0], value) or next((limit.words for limit in args[1:] if not limit.holds(value)), None)
    if origin in (Union, types.UnionType):
        rules = [broken(each, value) for each in args if each is not type(None)]
        fits = None in rules or (value is None and type(None) in args)
        return None if fits else " or ".join(dict.fromkeys(filter(None, rules)))
    if origin is Literal:
        return (
            None
            if any(value is each or (type(value) is str and value == each) for each in args)
            else f"one of {', '.join(map(str, args))}"
        )
    if origin in (tuple, Sequence, list):
        fits = isinstance(value, origin) and not isinstance(value, str | bytes | bytearray)
        rule = f"a {origin.__name__.lower()}, each {words(args[0])}"
        return None if fits and all(broken(args[0], each) is None for each in value) else rule
    if origin in (dict, Mapping):
        fits = isinstance(value, Mapping) and all(
            broken(args[0], k) is None and broken(args[1], v) is None for k, v in value.items()
        )
        return None if fits else f"a dictionary of {words(args[0])} to {words(args[1])}"
    if hint is Callable or origin is Callable:
        return None if callable(value) and hasattr(value, "__name__") else "a function"
    return None if _is_a(hint or type(None), value) else words(hint)


def words(hint: Any) -> str:
    """What a value of this type is called."""
    if get_origin(hint) is Annotated:
        return " ".join([words(get_args(hint)[0]), *(limit.words for limit in get_args(hint)[1:])])
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(words(each) for each in get_args(hint)))
    return WORDS.get(hint or type(None)) or f"a {getattr(hint, '__name__', hint)}"


def _is_a(kind: type, value: Any) -> bool:
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and -math.inf < value < math.inf  # type: ignore[operator]
    return isinstance(value, kind)


def plain(value: Any) -> Any:
    """The value with numbers of other libraries (numpy's) as Python's own, which JSON can hold; also those in lists and
    tuples."""
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if isinstance(value, bool | int | float):
        return value
    return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else value


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) and value < 1e15 else f"{value:g}"


def shown(value: object) -> str:
    """The value for a sentence: short, and never an exception, whatever the value is."""
    try:
        text = ascii(value) if isinstance(value, str) and not TEXT.holds(value) else " ".join(repr(value).split())
    except Exception:  # of an object, or a number of 5,000 digits: its own code
        return f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


def require(hint: Any, value: object, label: str) -> None:
    """Raises UserError where the value does not fit the annotation; `label` is what it is called."""
    if rule := broken(hint, value):
        raise UserError(f"{label} must be {rule}; got {shown(value)}.")


def check(record: Any) -> None:
    """The `__post_init__` of a dataclass: every field must fit its annotation, and then holds Python's own numbers."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        require(field.type, value, f"{type(record).__qualname__}: {field.name}")
        if (own := plain(value)) is not value:
            object.__setattr__(record, field.name, own)  # the record may be frozen


class Checked:
    """A base of dataclasses: every field must fit its annotation (`check`) when a record is made."""

    def __post_init__(self) -> None:
        check(self)


def checked(function: Function) -> Function:
    """Decorates a public function, which then refuses arguments that do not fit its annotations, with UserError."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UserError(f"{function.__name__}() takes {', '.join(signature.parameters)}: {error}.") from None
        for name, value in bound.arguments.items():
            require(signature.parameters[name].annotation, value, f"{function.__name__}(): {name}")
            bound.arguments[name] = plain(value)
        return function(*bound.args, **bound.kwargs)

    return call  # type: ignore[return-value]
