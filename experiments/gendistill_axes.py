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

from convert.cli import fail_in_words, real_number
from convert.core.errors import UserError
from experiments.grid import Grid, Row, options, run_command

# the paper's finding, the row without it, and what the default has that the row has not
FINDINGS = (
    ("Data selection", "text all the way", "a last stage on completions of the teacher, instead of text,"),
    ("Completion-only masking", "loss of all tokens", "a loss of completions alone, instead of all tokens,"),
    ("Frozen attention", "kept attention trained", "kept attention that is frozen, instead of trained,"),
)
DEFAULT_ROW = Row("hybrid-kda")


def _row(axis: str, name: str, *settings: str, **changes: object) -> Row:
    return dataclasses.replace(DEFAULT_ROW, axis=axis, name=name, settings=settings, **changes)


# in the order of interest: a grid that is stopped has answered the first questions. The step * is every one that trains
# the whole model.
ROWS = (
    DEFAULT_ROW,
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
GRID = Grid(ROWS, FINDINGS)


def longer(times: str) -> list[Row]:
    """The rows of further factors of the tokens, with commas."""
    try:
        factors = [real_number(1e-6, 1e6)(number) for number in times.split(",") if number]
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--times takes factors of the tokens with commas between, as 2,4: each {error}.") from None
    return [_row("duration", f"{factor:g} times the tokens", times=factor) for factor in factors]


def main() -> None:
    """The command."""
    parser = options(__doc__, GRID)
    parser.add_argument("--times", default="", help="more durations, as factors of the tokens: 2,4")
    args = parser.parse_args()
    run_command(GRID, [*GRID.chosen(args.only), *longer(args.times)], args, "gendistill-axes")


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
