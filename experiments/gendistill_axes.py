"""Which choices of GenDistill matter, and does likelihood see what generation sees? ("When Perplexity Lies", arXiv
2603.26556, section 5: objective, masking, duration, data, freezing, architecture.)

    python -m experiments.gendistill_axes --teacher neox-nano              # three seeds of 400 k tokens: resumable
    python -m experiments.gendistill_axes --only data,masking --seeds 1    # two axes

Every row changes the default hybrid-kda recipe along one axis, and is a run folder of its own. What is done is not done
again, and the table is written after every run. Both scoring methods see the same examples; intervals and differences
are paired by seed and example. The mean is over the tasks on which the teacher itself has a tenth correct by generation
or more: elsewhere no gap can be seen."""

import argparse
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from convert import load_teacher
from convert.cli import fail_in_words, number_of_tokens, real_number, whole_number
from convert.core.console import console
from convert.core.errors import UserError
from convert.core.files import write_text
from convert.evaluation.pairs import Examples
from convert.models.catalog import resolve
from convert.pipeline import finished
from convert.recipes.base import Recipe
from convert.runs.language_schemas import LanguageReport
from experiments.axes_table import DEFAULT, Result, lines_of, markdown, print_table
from experiments.variants import Variant, folder_of, report_of

TARGET = "hybrid-kda"


@dataclass(frozen=True)
class Row(Variant):
    """One change of the default recipe along one axis."""

    target: str = TARGET
    axis: str = ""
    name: str = ""


def _row(axis: str, name: str, *settings: str, **changes: object) -> Row:
    return dataclasses.replace(Row(axis=axis, name=name, settings=settings), **changes)


# in the order of interest: a grid that is stopped has answered the first questions. The step * is every one that trains
# the whole model.
ROWS = (
    _row("", DEFAULT),
    _row("data", "text all the way", "instruct.data=stdlib", "instruct.masking=all"),
    _row("masking", "loss of all tokens", "instruct.masking=all"),
    _row("frozen", "kept attention trained", "*.trains=all_but_embeddings"),
    _row("architecture", "gdn", target="hybrid-gdn"),
    _row("architecture", "pure, no layer kept", "edit.keep=none"),
    _row("objective", "reverse KL", "*.objective=reverse_kl"),
    _row("objective", "0.01 of cross-entropy", "*.objective=0.99*forward_kl + 0.01*cross_entropy"),
    _row("objective", "0.1 of cross-entropy", "*.objective=0.9*forward_kl + 0.1*cross_entropy"),
    _row("data", "text alone, fewer tokens", without=("instruct",)),
    _row("frozen", "MLPs frozen", "*.trains=all_but_kept_attention - mlps"),
    _row("architecture", "every second layer kept", "edit.keep=every:2"),
    _row("architecture", "layers before alignment, by KL", "edit.keep=auto:4"),
    _row("architecture", "layers after alignment, by KL", "select.by=kl"),
    _row("architecture", "layers after alignment, by recall", "select.by=recall"),
    _row("objective", "Jensen-Shannon", "*.objective=jensen_shannon"),
    _row("objective", "BD-KD", "*.objective=bdkd"),
    _row("objective", "TAID", "*.objective=taid"),
    _row("objective", "skewed forward KL", "*.objective=skewed_forward_kl"),
    _row("objective", "skewed reverse KL", "*.objective=skewed_reverse_kl"),
    _row("objective", "temperature 2", "*.objective=forward_kl(temperature=2)"),
    _row("duration", "a quarter of the tokens", times=0.25),
    _row("frozen", "norms frozen", "*.trains=all_but_kept_attention - norms"),
    _row("frozen", "mixers alone trained", "*.trains=mixers"),
)
AXES = tuple(dict.fromkeys(row.axis for row in ROWS if row.axis))


def chosen(axes: str, times: str) -> list[Row]:
    """The default, the rows of these axes (with commas; "" for all), and one for each of `times`, further factors of
    the tokens."""
    names = [name for name in axes.split(",") if name]
    for name in names:
        if name not in AXES:
            raise UserError(f"--only takes axes with commas between; there is no {name!r} among {', '.join(AXES)}.")
    try:
        factors = [real_number(1e-6, 1e6)(number) for number in times.split(",") if number]
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--times takes factors of the tokens with commas between, as 2,4: each {error}.") from None
    more = [_row("duration", f"{factor:g} times the tokens", times=factor) for factor in factors]
    return [row for row in ROWS if not names or row.axis in ("", *names)] + more


def recipe_of(row: Row, teacher: str, tokens: int | None, seed: int, limit: int) -> Recipe:
    """The recipe of a row; raises UserError, which names the row, for a step or field that is not there."""
    try:
        return row.recipe(teacher, tokens, seed=seed, examples=limit)
    except UserError as error:
        raise UserError(f"Row {row.name!r} of the axis {row.axis!r} cannot be made: {error}") from None


def result_of(row: Row, recipe: Recipe, place: Path, report: LanguageReport, examples: Examples) -> Result:
    """What a finished run found."""
    correct = examples.answered(place, report.evaluation)
    return Result(row.axis, row.name, recipe.seed, recipe.tokens, report.perplexity.ratio, correct, report.evaluation)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="neox-nano")
    parser.add_argument("--tokens", default="400k")
    parser.add_argument("--seeds", type=whole_number(1, 1000), default=3)
    parser.add_argument("--limit", type=whole_number(1, 100_000), default=64, help="examples of each task")
    parser.add_argument("--only", default="", help=f"axes with commas between, of {', '.join(AXES)}")
    parser.add_argument("--times", default="", help="more durations, as factors of the tokens: 2,4")
    parser.add_argument("--data", help="as for convert.run")
    parser.add_argument("--out", type=Path, help="runs/gendistill-axes/TEACHER-TOKENS by default")
    args = parser.parse_args()
    tokens = number_of_tokens(args.tokens)
    out = args.out or Path("runs/gendistill-axes") / f"{resolve(args.teacher).name}-{args.tokens}"
    run_grid(args.teacher, chosen(args.only, args.times), tokens, args.seeds, args.limit, args.data, out)


def run_grid(
    name: str, rows: list[Row], tokens: int, seeds: int, limit: int, data: str | None, out: Path
) -> list[Result]:
    """Run every row with every seed, the first seed of all rows first, and write the table after each run, with the
    finished runs of other rows. A row whose run fails is left out of the table, and named at the end."""

    def places(some: Iterable[Row]) -> Iterator[tuple[Path, Row, int]]:
        for seed, row in itertools.product(range(seeds), some):
            yield folder_of(out, f"{row.axis}-{row.name}".strip("-"), seed), row, seed

    def make(row: Row, seed: int) -> tuple[Row, Recipe]:
        return row, recipe_of(row, name, tokens, seed, limit)

    wanted = {place: make(row, seed) for place, row, seed in places(rows)}
    others = [each for each in places(ROWS) if each[0] not in wanted and (each[0] / "report.json").exists()]
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
            write_text(out / "axes.md", markdown([results[p] for p in known if p in results]))
    finally:
        found = [results[place] for place in known if place in results]
        if found:
            print_table(found, console)
            for line in lines_of(found):
                console.print(line, highlight=False)
            console.print(f"The table is in {out / 'axes.md'}.")
    if failures:
        first = next(iter(failures))
        raise UserError(
            f"{len(failures)} of {len(wanted)} runs failed, {', '.join(failures)}; {first}: {failures[first]}"
        )
    return found


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
