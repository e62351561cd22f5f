"""Rules of --stop-when: a run ends when one holds at a measurement."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from convert.core.console import console
from convert.core.errors import UserError
from convert.core.fields import Checked, Range, Text, checked, shown


@dataclass(frozen=True)
class Rule(Checked):
    """A rule such as `generation<0.2`: the run stops when it holds at a measurement."""

    text: Text
    name: Text
    sign: Literal["<", ">"]
    bound: Annotated[float, Range(-1e9, 1e9)]

    @staticmethod
    @checked
    def of(text: str, names: Sequence[str]) -> "Rule":
        """Read a rule about one of these metrics; UserError where it is none."""
        found = re.fullmatch(rf"\s*({'|'.join(names)})\s*([<>])\s*(-?[0-9]{{0,9}}\.?[0-9]{{1,9}})\s*", text)
        if not found:
            *some, last = names
            known = f"{', '.join(some)} or {last}" if some else last
            raise UserError(f"--stop-when takes {known}, < or >, and a number, as {names[-1]}<0.2; got {shown(text)}.")
        name, sign, bound = found.groups()
        return Rule(text, name, "<" if sign == "<" else ">", float(bound))

    def holds(self, numbers: Mapping[str, float]) -> bool:
        """Whether the rule holds for these measurements; it does not where its number was not measured."""
        value = numbers.get(f"held_out/{self.name}")
        if value is None:  # no example fits this model
            return False
        return value < self.bound if self.sign == "<" else value > self.bound


def first_that_holds(rules: Sequence[Rule], numbers: Mapping[str, float]) -> Rule | None:
    """The first rule that holds, which is said."""
    found = next((rule for rule in rules if rule.holds(numbers)), None)
    if found:
        console.print(f"The run stops here, by --stop-when {found.text}.", style="yellow")
    return found
