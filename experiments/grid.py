"""A grid of runs: rows that change one recipe along an axis, each a run folder of its own, and one table of all.

What is done is not done again, and the table is written after every run."""

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from convert import load_teacher
from convert.cli import number_of_tokens, whole_number
from convert.core.console import console
from convert.core.errors import UserError
from convert.core.files import write_text
from convert.data.corpus import corpus
from convert.evaluation.pairs import Examples
from convert.models.catalog import resolve
from convert.pipeline import finished
from convert.recipes.base import Recipe
from convert.runs.language_schemas import LENGTH, LanguageReport
from experiments.grid_table import DEFAULT, Findings, Result, lines_of, markdown, print_table
from experiments.variants import Variant, folder_of, report_of

TABLE = "table.md"


@dataclass(frozen=True)
class Row(Variant):
    """One change of the default recipe along one axis; the default itself has none."""

    axis: str = ""
    name: str = DEFAULT


@dataclass(frozen=True)
class Grid:
    """All rows, the default first, and findings that the table decides."""

    rows: tuple[Row, ...]
    findings: Findings = ()

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes, in the order of their first rows."""
        return tuple(dict.fromkeys(row.axis for row in self.rows if row.axis))

    def chosen(self, axes: str) -> list[Row]:
        """The default and the rows of these axes, with commas; "" for all. Raises UserError for an unknown one."""
        names = [name for name in axes.split(",") if name]
        for name in names:
            if name not in self.axes:
                known = ", ".join(self.axes)
                raise UserError(f"--only takes axes with commas between; there is no {name!r} among {known}.")
        return [row for row in self.rows if not names or row.axis in ("", *names)]


def options(about: str | None, grid: Grid) -> argparse.ArgumentParser:
    """The options that the commands of grids share."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="neox-nano")
    parser.add_argument("--tokens", default="400k")
    parser.add_argument("--seeds", type=whole_number(1, 1000), default=3)
    parser.add_argument("--limit", type=whole_number(1, 100_000), default=64, help="examples of each task")
    parser.add_argument("--tasks", help="with commas: only these; all by default")
    parser.add_argument("--only", default="", help=f"axes with commas between, of {', '.join(grid.axes)}")
    parser.add_argument("--data", help="as for convert.run")
    parser.add_argument("--out", type=Path, help="runs/NAME/TEACHER-TOKENS by default")
    return parser


def run_command(grid: Grid, rows: Sequence[Row], args: argparse.Namespace, folder: str) -> list[Result]:
    """Run the rows as the command says. Raises UserError at once for what would end every run."""
    tokens, source = number_of_tokens(args.tokens), resolve(args.teacher)
    if args.data is not None:
        corpus(args.data)
    out = args.out or Path("runs") / folder / f"{source.name}-{args.tokens}"
    return run_grid(grid, rows, args.teacher, tokens, args.seeds, args.limit, args.data, out, args.tasks)


def recipe_of(row: Row, teacher: str, tokens: int | None, seed: int, limit: int, tasks: str | None = None) -> Recipe:
    """The recipe of a row; raises UserError, which names the row, for a step or field that is not there."""
    try:
        return row.recipe(teacher, tokens, seed=seed, examples=limit, tasks=tasks)
    except UserError as error:
        raise UserError(f"Row {row.name!r} of the axis {row.axis!r} cannot be made: {error}") from None


def result_of(row: Row, recipe: Recipe, place: Path, report: LanguageReport, examples: Examples) -> Result:
    """What a finished run found."""
    correct = examples.answered(place, report.evaluation)
    bytes_of, ratio = report.cache_bytes.formula, report.perplexity.ratio
    cache = bytes_of.student[LENGTH] / bytes_of.teacher[LENGTH]
    return Result(row.axis, row.name, recipe.seed, recipe.units, ratio, cache, correct, report.evaluation)


def run_grid(
    grid: Grid,
    rows: Sequence[Row],
    name: str,
    tokens: int,
    seeds: int,
    limit: int,
    data: str | None,
    out: Path,
    tasks: str | None = None,
) -> list[Result]:
    """Run every row with every seed, the first seed of all rows first, and write the table after each run, with the
    finished runs of other rows and seeds in the folder. A row whose run fails is left out of the table, and named at
    the end."""

    def places(some: Iterable[Row], seeds: int) -> Iterator[tuple[Path, Row, int]]:
        for seed, row in itertools.product(range(seeds), some):
            yield folder_of(out, f"{row.axis}-{row.name}".strip("-"), seed), row, seed

    def make(row: Row, seed: int) -> tuple[Row, Recipe]:
        return row, recipe_of(row, name, tokens, seed, limit, tasks)

    wanted = {place: make(row, seed) for place, row, seed in places(rows, seeds)}
    ends = (report.parent.name.rpartition("-")[2] for report in out.glob("*/report.json"))
    ever = places(grid.rows, 1 + max((int(seed) for seed in ends if seed.isdecimal()), default=-1))
    others = [each for each in ever if each[0] not in wanted and (each[0] / "report.json").exists()]
    known = wanted | {place: make(row, seed) for place, row, seed in others}
    examples, results, failures = Examples(load_teacher(name), limit), {}, {}
    for place, (row, recipe) in known.items():
        if (report := finished(place, name, recipe, data)) is not None:
            results[place] = result_of(row, recipe, place, report, examples)
        elif (place / "report.json").exists():
            raise UserError(
                f"A folder holds one grid; {place} was finished with another teacher, other data or settings."
                " Give another --out."
            )
    try:
        for place, (row, recipe) in wanted.items():
            if place not in results:
                try:
                    results[place] = result_of(row, recipe, place, report_of(name, recipe, place, data), examples)
                except UserError as error:  # a loss that is not finite is an answer, too
                    failures[place.name] = error
                    console.print(f"{place.name}: {error}", style="yellow")
                    continue
            write_text(out / TABLE, markdown([results[p] for p in known if p in results], grid.findings))
    finally:
        found = [results[place] for place in known if place in results]
        if found:
            print_table(found, console)
            for line in lines_of(found, grid.findings):
                console.print(line, highlight=False)
            console.print(f"The table is in {out / TABLE}.")
    if failures:
        first = next(iter(failures))
        raise UserError(
            f"{len(failures)} of {len(wanted)} runs failed, {', '.join(failures)}; {first}: {failures[first]}"
        )
    return found
