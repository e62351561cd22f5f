"""Text becomes a value of the type of a field, or a sentence says what it must be."""

import dataclasses
from typing import Annotated, Literal

import pytest
from pydantic import ValidationError

from convert.core.errors import UserError
from convert.core.fields import Name, Range
from convert.recipes.values import rules_of, value_of
from convert.steps.layers import EveryNth, MostSensitive

SIZE, SHARE = Annotated[int, Range(1, 64)], Annotated[float, Range(0, 1)]
LAYERS = tuple[Annotated[int, Range(0, 1000)], ...] | EveryNth | MostSensitive

READ = [
    (int, "12", 12), (int, " -3", -3), (int, "2e5", 200_000), (int, str(2**63 - 1), 2**63 - 1), (SIZE, "64", 64),
    (float, "1e-3", 1e-3), (float, "2", 2.0), (SHARE, "0.5", 0.5), (bool, "true", True), (bool, "False", False),
    (SIZE | None, "none", None), (SIZE | None, "3", 3), (Literal["a", "b"], "b", "b"), (Literal[1, 2], "2", 2),
    (Literal["a", "none"] | None, "none", "none"), (LAYERS, "4,9", (4, 9)), (LAYERS, "4", (4,)), (LAYERS, "none", ()),
    (LAYERS, "every:6", EveryNth(6)), (LAYERS, "auto:6", MostSensitive(6)), (LAYERS, "auto", MostSensitive(5)),
    (tuple[Literal["a", "b"], ...], "a,b", ("a", "b")), (Name, "x-1", "x-1"), (str, "4,9", "4,9"),
]  # fmt: skip


@pytest.mark.parametrize("kind, text, value", READ, ids=repr)
def test_text_is_read_by_its_type(kind, text, value):
    found = value_of(kind, text)
    assert found == value and type(found) is type(value)


WRONG = [
    (int, "2.5", "a whole number"),
    (int, "x", "a whole number"),
    (int, "1e400", "a whole number"),
    (int, "\u0663", "a whole number"),
    (SIZE, "65", "within 1 .. 64"),
    (SIZE, "true", "a whole number"),
    (float, "nan", "a finite number"),
    (float, "inf", "a finite number"),
    (SHARE, "1.5", "within 0 .. 1"),
    (SHARE | None, "-1", "within 0 .. 1 or none"),
    (SIZE | None, "", "a whole number or none"),
    (bool, "1", "one of true, false"),
    (Literal["a", "b"], "c", "one of a, b"),
    (Name, "../x", "1 to 64 letters"),
    (LAYERS, "some", "none, or values as 4,9 or every:6 or auto or auto:6"),
    (LAYERS, "0,,1", "a whole number or every:6"),
    (LAYERS, "-1", "within 0 .. 1,000 or every:6"),
]


@pytest.mark.parametrize("kind, text, rule", WRONG, ids=repr)
def test_what_it_must_be_is_said(kind, text, rule):
    with pytest.raises(ValidationError) as caught:
        value_of(kind, text)
    assert rules_of(caught.value, "--set").startswith(rule)


def test_a_class_reads_its_own_text_and_says_its_own_sentence():
    @dataclasses.dataclass(frozen=True)
    class Sum:
        terms: tuple[str, ...]

        @staticmethod
        def of(text: str) -> "Sum":
            if "-" in text:
                raise UserError(f"A sum has no differences; got {text}. Write + instead.")
            return Sum(tuple(text.split("+")))

    assert value_of(Sum, "a+b") == Sum(("a", "b"))
    with pytest.raises(ValidationError) as caught:
        value_of(Sum | None, "a-b")
    with pytest.raises(UserError, match=r"^--set x: A sum has no differences; got a-b\. Write \+ instead\.$"):
        rules_of(caught.value, "--set x")
    with pytest.raises(ValidationError) as caught:
        value_of(LAYERS, "every:1")
    with pytest.raises(UserError, match="EveryNth: n must be within 2"):
        rules_of(caught.value, "--set")


def test_fields_of_one_name_have_their_own_choices():
    @dataclasses.dataclass
    class First:
        shape: Literal["exact", "native"]

    @dataclasses.dataclass
    class Second:
        shape: Literal["round", "square"]

    kinds = [dataclasses.fields(record)[0].type for record in (First, Second)]
    assert [value_of(kinds[0], "exact"), value_of(kinds[1], "round")] == ["exact", "round"]
    with pytest.raises(ValidationError):
        value_of(kinds[0], "round")
