"""Which start, and which stages, for attention editing?

    python -m experiments.attention_editing              # neox-nano, 400 k tokens, three seeds
    python -m experiments.attention_editing smollm2-135m --tokens 30k --seq-len 1024 --seeds 1

Every variant is a run of its own under runs/attention-editing, with the same number of tokens; what is done is not done
again. GateSWA here keeps one layer in six and windows of 256 tokens where the teacher is not tiny: a fifth of the cache
at 8 k, windows counted."""

import argparse
import dataclasses
import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from rich.table import Table

from convert.cli import fail_in_words, number_of_tokens, whole_number
from convert.core.console import Console
from convert.recipes.base import Recipe
from convert.runs.language_schemas import LENGTH, LanguageReport
from experiments.variants import Variant, budget_of, folder_of, report_of

MLA, SWA = "mla", "gate-swa"
VARIANTS = {
    "mla": Variant(MLA),
    "mla, by the weights alone (svd)": Variant(MLA, ("edit.start=svd",)),
    "mla, random (the paper's)": Variant(MLA, ("edit.start=random",)),
    "mla, exact shape": Variant(MLA, ("edit.shape=exact",)),
    "mla, without stage 1": Variant(MLA, only="distill"),
    "mla, stage 1 alone": Variant(MLA, only="align"),
    "mla, features matched": Variant(MLA, ("distill.feature_matching=0.05",)),
    "gate-swa": Variant(SWA),
    "gate-swa, layers by measurement": Variant(SWA, ("edit.keep=auto:{every}",)),
    "gate-swa, gate nearly open": Variant(SWA, ("edit.gate_bias=4",)),
    "gate-swa, a gate per head": Variant(SWA, ("edit.gate=head",)),
    "gate-swa, no gate": Variant(SWA, ("edit.gate=none",)),
    "gate-swa, no sinks": Variant(SWA, ("edit.sinks=0",)),
    "gate-swa, without stage 1": Variant(SWA, only="distill"),
    "gate-swa, stage 1 alone": Variant(SWA, only="align"),
    "gate-swa, features matched": Variant(SWA, ("distill.feature_matching=0.05",)),
}


def recipe_of(teacher: str, variant: Variant, tokens: int, seq_len: int | None, seed: int) -> Recipe:
    """Recipe of a variant for this teacher."""
    every, settings = 5, variant.settings
    if variant.target == SWA and budget_of(teacher, SWA, tokens, seq_len).window > 64:
        every, settings = 6, ("edit.keep=every:6", "edit.window=256", *settings)
    settings = tuple(setting.format(every=every) for setting in settings)
    # one example: the table is of perplexity
    return dataclasses.replace(variant, settings=settings).recipe(teacher, tokens, seq_len, seed=seed)


def show(console: Console, reports: dict[str, list[LanguageReport]]) -> None:
    """Print a row for each variant, of its reports with different seeds."""
    table = Table(
        "variant",
        title="perplexity on held-out text: the teacher's, after the swap, after each stage",
        title_justify="left",
    )
    for column in ("teacher", "swap", "align", "distill", "ratio", "spread", "KL", "cache at 8,192"):
        table.add_column(column, justify="right")
    for name, rows in reports.items():
        after = [{step.name: step.headline_after for step in row.steps} for row in rows]
        cells = [_mean(a.get(step) for a in after) for step in ("edit", "align", "distill")]
        ratios = [row.perplexity.ratio for row in rows]
        cache = rows[0].cache_bytes.formula
        table.add_row(
            name, f"{rows[0].perplexity.teacher:.3f}", *cells, f"{statistics.mean(ratios):.4f}",
            f"{max(ratios) - min(ratios):.4f}", _mean(row.kl.mean_nats for row in rows),
            f"{cache.student[LENGTH] / cache.teacher[LENGTH]:.1%}",
        )  # fmt: skip
    console.print(table)


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.3f}" if known else ""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?", default="neox-nano")
    parser.add_argument("--tokens", default="400k")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--seeds", type=whole_number(1, 1000), default=3)
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--only", help="this variant, or those whose names begin so", default="")
    parser.add_argument("--out", default="runs/attention-editing", type=Path)
    args = parser.parse_args()
    console = Console()
    reports: dict[str, list[LanguageReport]] = {}
    chosen = [args.only] if args.only in VARIANTS else [name for name in VARIANTS if name.startswith(args.only)]
    for name in chosen:
        for seed in range(args.seeds):
            place = folder_of(args.out / f"{args.teacher}-{args.tokens}", name, seed)
            make = partial(
                recipe_of, args.teacher, tokens=number_of_tokens(args.tokens), seq_len=args.seq_len, seed=seed
            )
            recipe = make(VARIANTS[name])
            if name not in (MLA, SWA) and recipe == make(VARIANTS[recipe.target]):
                break  # this teacher's default already
            reports.setdefault(name, []).append(report_of(args.teacher, recipe, place, args.data))
    show(console, reports)


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
