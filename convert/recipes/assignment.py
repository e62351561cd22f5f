"""The syntax of `--set STEP.FIELD=VALUE`, apart from what it means, so that a wrong one is refused at once."""

from typing import NamedTuple

from convert.core.errors import UserError
from convert.core.fields import TEXT, shown


class Assignment(NamedTuple):
    """One field of one step, and the text of its new value."""

    step: str
    field: str
    value: str

    def __str__(self) -> str:
        return f"{self.step}.{self.field}={self.value}"


def parse_assignment(text: str) -> Assignment:
    """The parts of STEP.FIELD=VALUE; raises UserError where the text is not of that form."""
    path, equals, value = text.partition("=")
    step, dot, field = path.partition(".")
    if not TEXT.holds(text) or not equals or not dot:
        raise UserError(f"--set takes STEP.FIELD=VALUE; got {shown(text)}.")
    return Assignment(step, field, value)
