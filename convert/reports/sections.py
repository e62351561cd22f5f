"""What a domain adds to the reports of a run: functions that make sentences, rows, cards and sections of the page.

`report` and `page` show what every run has, and ask a `Sections` for the rest. They know no domain, and a domain knows
neither Markdown's escapes nor HTML.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from markupsafe import Markup

from convert.core.console import visible
from convert.runs import records
from convert.runs.evaluation_schemas import Evaluation
from convert.runs.language_schemas import Context
from convert.runs.schemas import MetricRow, Report

R = TypeVar("R", bound=Report)


@dataclass(frozen=True)
class Run(Generic[R]):
    """What a run's folder holds, as data."""

    name: str
    report: R
    evaluation: Evaluation
    metrics: tuple[MetricRow, ...]
    context: Context  # what experiments.context found; empty where it was not run

    @staticmethod
    def read(folder: Path) -> "Run[Any]":
        """Read a finished run; damage is a UserError that names file and key."""
        report = records.report(folder)
        return Run(
            visible(folder.name or folder.resolve().name),
            report,
            records.evaluation(folder) or report.evaluation,
            tuple(records.metrics(folder)),
            records.context(folder),
        )


@dataclass(frozen=True)
class Card:
    """A number in large type, with its name above it and a note below."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Chart:
    """A chart, or a picture, with its title. Titles are text, and escaped; the SVG, or the img element, is markup."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Table:
    """A table whose first row is the head. It is left out where it has no other row."""

    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Texts:
    """Texts side by side that go on from one prompt: (writer, the part that all have in common, the rest)."""

    prompt: str
    written: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class PageSection:
    """A section of the page: sentences, charts, tables and texts, in this order. An empty one is left out."""

    title: str
    note: str = ""
    lines: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    texts: Sequence[Texts] = ()


@dataclass(frozen=True)
class Curve:
    """A curve of the training section: a field of MetricRow, its title, and whether its axis is logarithmic."""

    field: str
    title: str
    log: bool


@dataclass(frozen=True)
class Sections(Generic[R]):
    """The functions of one domain. Those that make a sentence or a row return plain text, which is escaped later."""

    summary: Callable[[R], str]  # quality and cost in one or two sentences
    lead: Callable[[Run[R]], str]  # the same in one sentence, for the page
    comparison: Callable[[R], Sequence[tuple[str, str, str, str]]]  # rows: quantity, teacher, student, comparison
    remarks: Callable[[R], Sequence[str]]  # lines below these rows
    facts: Callable[[R], Sequence[str]]  # sentences on what the student became
    tables: Callable[[R], Sequence[str]]  # report.md: Markdown of what it costs, of a report whose texts are escaped
    scores: Callable[[R], Sequence[str]]  # report.md: Markdown of how good it is, likewise
    texts: Callable[[R], Sequence[str]]  # report.md: Markdown of what models wrote, of a report as it is
    usage: Callable[[bool], tuple[str, str]]  # model card: its pipeline_tag, and the code that loads it; True: native
    cards: Callable[[Run[R]], Sequence[Card]]
    curves: Sequence[Curve]
    results: Callable[[Sequence[Run[R]]], Sequence[PageSection]]  # page sections before the training section
    costs: Callable[[Sequence[Run[R]]], Sequence[PageSection]]  # page sections after it
    numbers: Callable[[R], dict[str, float]]  # what the dashboard's table of runs shows
