"""Types of the keys in a run's files: numbers with their bounds, and what docs/REPORT.md says of a key.

The bounds refuse damage (a share of 7, an infinite count), not unusual results. All of them are strict: "1" is no
number.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, Strict
from pydantic_core import CoreSchema, core_schema

VERSION = 2  # of the layout of report.json, evaluation.json, answers.jsonl and context.json

Text = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]
Whole = Annotated[int, Strict()]
Count = Annotated[int, Field(strict=True, ge=0, le=1 << 60)]
Size = Annotated[int, Field(strict=True, gt=0, le=1 << 60)]
Number = Annotated[float, Field(strict=True, ge=-1e30, le=1e30, allow_inf_nan=False)]
Measured = Annotated[float, Strict()]  # may have overflowed to infinity
Rate = Annotated[float, Field(strict=True, gt=0, le=1e30)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Length = Annotated[str, Field(strict=True, pattern=r"^[0-9]{1,12}$")]
Quantile = Annotated[str, Field(strict=True, pattern=r"^0?\.[0-9]{1,6}$")]

ModelName = Literal["teacher", "student"]
Scoring = Literal["generation", "likelihood"]
MODELS: tuple[ModelName, ...] = ("teacher", "student")
SCORINGS: tuple[Scoring, ...] = ("generation", "likelihood")


@dataclass(frozen=True)
class Key:
    """What docs/REPORT.md says of a key: its meaning, and its unit where it has one."""

    meaning: str
    unit: str = ""


@dataclass(frozen=True)
class CheckedAs:
    """The value must be valid as `kind`, and is kept as it was read, with keys that `kind` does not have."""

    kind: Any

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Called by pydantic while it builds a validator."""

        def keep(value: Any, validate: core_schema.ValidatorFunctionWrapHandler) -> Any:
            validate(value)
            return value

        return core_schema.no_info_wrap_validator_function(keep, handler.generate_schema(self.kind))


def require(holds: bool, words: str) -> None:
    """Raises ValueError with a whole clause, such as "ratio is missing", which the reader of a file puts after the
    place where it belongs."""
    if not holds:
        raise ValueError(words)
