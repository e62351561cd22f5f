"""What a command's options may be: types for argparse, whose message then says the rule."""

import argparse
import math
import re
from collections.abc import Callable

from convert.core.errors import UserError
from convert.core.fields import shown

SUFFIXES = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A whole number within these bounds."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,20}", text.strip()) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number within {low:,} .. {high:,}; got {shown(text)}")
        return int(text)

    return parse


def real_number(low: float, high: float) -> Callable[[str], float]:
    """A number within these bounds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number within {low:g} .. {high:g}; got {shown(text)}")
        return value

    return parse


def number_of_tokens(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)([kMB]?)", text)
    if not found or float(found[1]) * SUFFIXES[found[2]] < 1:
        raise UserError(f"A number of tokens is written 20000, 500k, 12M or 1B; got {shown(text)}.")
    return int(float(found[1]) * SUFFIXES[found[2]])
