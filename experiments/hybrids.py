"""Which hybrid is best at equal tokens: which mixer, from which start, and which layers keep attention?

    python -m experiments.hybrids                             # neox-nano, 400 k tokens, three seeds: resumable
    python -m experiments.hybrids --only mixer --seeds 1      # one of the questions

The default is hybrid-kda. Every row is a run folder of its own; the table has likelihood beside generation."""

import dataclasses

from convert.cli import fail_in_words
from experiments.grid import Grid, Row, options, run_command

KDA, GDN = Row("hybrid-kda"), Row("hybrid-gdn")


def _row(axis: str, name: str, row: Row, *settings: str) -> Row:
    return dataclasses.replace(row, axis=axis, name=name, settings=settings)


GRID = Grid(
    (
        KDA,
        _row("mixer", "hybrid-gdn", GDN),
        _row("mixer", "kda in every layer", KDA, "edit.keep=none"),
        _row("mixer", "gdn in every layer", GDN, "edit.keep=none"),
        _row("mixer", "linear in every layer", Row("linear")),
        _row("mixer", "mamba in every layer", Row("mamba")),
        _row("layers", "every second layer", KDA, "edit.keep=every:2"),
        _row("layers", "every third layer", KDA, "edit.keep=every:3"),
        _row("layers", "by KL before alignment", KDA, "edit.keep=auto:4"),
        _row("layers", "by KL after alignment", KDA, "select.by=kl"),
        _row("layers", "by recall after alignment", KDA, "select.by=recall"),
        _row("start", "kda, decays g6", KDA, "edit.decay_start=g6"),
        _row("start", "kda, half-lives of 8 to 512", KDA, "edit.decay_start=half-lives"),
        _row("start", "kda, look-backs", KDA, "edit.decay_start=calibrated"),
        _row("start", "kda, look-backs, o refitted", KDA, "edit.decay_start=calibrated", "edit.start=refitted"),
        _row("start", "kda, sigmoid gate", KDA, "edit.gate=sigmoid"),
        _row("start", "kda, queries and keys first", KDA, "align_qk.objective=l2_distance"),
        _row("start", "gdn, decays as in Mamba", GDN, "edit.decay_start=mamba"),
        _row("start", "gdn, o refitted, gate open", GDN, "edit.start=refitted", "edit.gate_start=open"),
    )
)


def main() -> None:
    """The command."""
    args = options(__doc__, GRID).parse_args()
    run_command(GRID, GRID.chosen(args.only), args, "hybrids")


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
