"""Which settings of a recipe matter? Trials are drawn at random, or by W&B's Bayesian search, and ranked by what the
students write.

    python -m experiments.sweep neox-nano --to mamba2 --tokens 100k --trials 6       # here, without network
    python -m experiments.sweep neox-nano --to mamba2 --trials 20 --online           # as a W&B sweep, for many agents
    python -m experiments.sweep neox-nano --to mamba2 --print > sweep.json           # the definition alone

A setting is named as `--set` names it. Every trial is a run folder of its own; what is done is not done again.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from convert.cli import fail_in_words, number_of_tokens, whole_number
from convert.core.console import Console
from convert.core.errors import UserError
from convert.core.files import write_json
from convert.models.catalog import resolve
from convert.models.loading import read_config
from convert.recipes.base import Recipe
from convert.recipes.overrides import with_setting
from convert.recipes.targets import default_recipe
from convert.reports.language import LANGUAGE
from convert.runs.keys import SCORINGS
from convert.runs.wandb_sink import PROJECT, has_key, is_reachable
from experiments.variants import report_of

METRIC = "gap/generation"


def definition(recipe: Recipe) -> dict[str, Any]:
    """Definition of a W&B sweep over the main settings of this recipe: rates within a factor of four, what the whole
    model learns, how long its decays start, and where attention is edited how much of it stays."""
    dials = {
        f"{step.name}.{field}": {"values": list(dial.choices)}
        if dial.choices
        else {"distribution": "log_uniform_values", "min": dial.low, "max": dial.high}
        for step in recipe.steps
        for field, dial in step.dials().items()
    }
    return {
        "name": f"to {recipe.target}",
        "method": "bayes",
        "metric": {"name": METRIC, "goal": "minimize"},
        "parameters": dials,
    }


def draw(parameters: dict[str, dict[str, Any]], rng: np.random.Generator) -> dict[str, str | float]:
    """Draw the settings of one trial at random."""
    chosen = {}
    for name, dial in parameters.items():
        if "values" in dial:
            chosen[name] = dial["values"][rng.integers(len(dial["values"]))]
        else:
            chosen[name] = float(f"{math.exp(rng.uniform(math.log(dial['min']), math.log(dial['max']))):.3g}")
    return chosen


def trial(teacher: str, recipe: Recipe, dials: dict[str, Any], place: Path, data: str | None) -> dict[str, float]:
    """Train a student with these settings: its mean gaps and its final numbers."""
    for name, value in dials.items():
        recipe = with_setting(recipe, f"{name}={value}")
    report = report_of(teacher, recipe, place, data)
    gaps = {f"gap/{scoring}": report.evaluation.mean_gap(scoring) for scoring in SCORINGS}
    return {name: gap for name, gap in gaps.items() if gap is not None} | LANGUAGE.numbers(report)


def folder_of(out: Path, dials: dict[str, Any]) -> Path:
    """Folder of a trial, named after its settings, so that the same trial is found again."""
    return out / "_".join(f"{name.split('.')[-1]}-{value}" for name, value in dials.items()).replace(":", "")


def online(teacher: str, recipe: Recipe, trials: int, out: Path, data: str | None) -> None:
    """Run trials as an agent of a W&B sweep."""
    import wandb

    if not has_key() or not is_reachable():
        raise UserError(
            "--online needs a W&B key (`wandb login`) and a server that answers. Leave the flag out: trials are then"
            " drawn here."
        )

    def one() -> None:
        with wandb.init(project=PROJECT, group=f"sweep to {recipe.target}", job_type="trial") as tracked:
            dials = dict(tracked.config)
            tracked.log(trial(teacher, recipe, dials, folder_of(out, dials), data))

    wandb.agent(wandb.sweep(definition(recipe), project=PROJECT), function=one, project=PROJECT, count=trials)


def show(console: Console, rows: list[tuple[dict[str, Any], dict[str, float]]]) -> None:
    """Print the trials, those with the smallest gap by generation first."""
    table = Table(*rows[0][0], *rows[0][1], title="the best first, by generation", title_justify="left")
    for dials, found in sorted(rows, key=lambda row: row[1][METRIC]):
        table.add_row(*map(str, dials.values()), *(f"{value:.4f}" for value in found.values()))
    console.print(table)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", nargs="?", default="neox-nano")
    parser.add_argument("--to", default="mamba2")
    parser.add_argument("--tokens")
    parser.add_argument("--data")
    parser.add_argument("--trials", type=whole_number(1, 10_000), default=8)
    parser.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0, help="seed of the draws")
    parser.add_argument("--online", action="store_true", help="as a W&B sweep")
    parser.add_argument("--print", action="store_true", help="the definition as JSON, and nothing else")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    source = resolve(args.teacher)
    recipe = default_recipe(
        source.name,
        read_config(source),
        args.to,
        tokens=None if args.tokens is None else number_of_tokens(args.tokens),
    )
    out = args.out or Path(f"runs/sweep-{source.name}-{args.to}-{recipe.units}")
    if args.print:
        print(json.dumps(definition(recipe), indent=1))
    elif args.online:
        online(args.teacher, recipe, args.trials, out, args.data)
    else:
        rng, rows = np.random.default_rng(args.seed), []
        for _ in range(args.trials):
            dials = draw(definition(recipe)["parameters"], rng)
            try:
                rows.append((dials, trial(args.teacher, recipe, dials, folder_of(out, dials), args.data)))
            except UserError as error:  # a rate that is too high is an answer, too
                Console().print(f"{dials}: {error}", markup=False, style="yellow")
                continue
            write_json(out / "trials.json", [{"dials": d} | found for d, found in rows])
        if not rows:
            raise UserError("No trial ended; the lines above say why.")
        show(Console(), rows)


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
