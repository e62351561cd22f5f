"""A sweep's definition is W&B's, its dials are fields of the recipe, and trials are told apart by what they write."""

import json
import sys

import numpy as np
import pytest

from convert import recipes
from convert.recipes.overrides import with_setting
from convert.runs import records
from experiments import sweep, variants

BUDGET = recipes.Budget(2048, 64, 256, 1e-2, 1e-3, recipes.Objective.of("forward_kl"), 256, examples=2)


@pytest.mark.parametrize("target", [name for name, one in recipes.TARGETS.items() if one.domain == "language"])
def test_every_dial_is_a_setting_of_the_recipe(target):
    recipe = recipes.TARGETS[target].recipe(BUDGET)
    found = sweep.definition(recipe)
    assert found["method"] == "bayes" and found["metric"]["name"] == sweep.METRIC and len(found["parameters"]) >= 4
    for name, dial in found["parameters"].items():
        for value in dial.get("values", [dial.get("min"), dial.get("max")]):
            with_setting(recipe, f"{name}={value}")


def test_draws_are_within_their_bounds_and_repeat():
    dials = sweep.definition(recipes.to_mamba2(BUDGET))["parameters"]
    first, second = ([sweep.draw(dials, np.random.default_rng(seed)) for _ in range(1)] for seed in (0, 1))
    assert first == [sweep.draw(dials, np.random.default_rng(0))] and first != second
    for drawn in first + second:
        for name, value in drawn.items():
            dial = dials[name]
            assert value in dial["values"] if "values" in dial else 0.99 * dial["min"] <= value <= 1.01 * dial["max"]


def test_trials_end_in_a_table_and_are_not_done_again(finished_run, tmp_path, monkeypatch, capsys):
    done = []

    def run(teacher, recipe, place, *, data, wandb):
        done.append(recipe)
        report = json.loads((finished_run / "report.json").read_text())
        report["settings"] |= {"steps": recipe.describe(), "data": "stdlib"}
        place.mkdir(parents=True)
        (place / "report.json").write_text(json.dumps(report))
        return records.report(place)

    monkeypatch.setattr(variants, "run_recipe", run)
    monkeypatch.setattr(
        "sys.argv", ["sweep", "--to", "linear", "--tokens", "2048", "--trials", "3", "--out", str(tmp_path / "out")]
    )
    sweep.main()
    assert "the best first, by generation" in capsys.readouterr().out
    trials = json.loads((tmp_path / "out" / "trials.json").read_text())
    assert len(trials) == 3 and {sweep.METRIC, "gap/likelihood", "perplexity_ratio", "kl_nats", "dials"} <= set(
        trials[0]
    )
    assert [recipe.steps[-1].settings.lr for recipe in done] == [trial["dials"]["distill.lr"] for trial in trials]
    assert len({recipe.steps[-1].settings.lr for recipe in done}) == 3
    sweep.main()
    assert len(done) == 3 and json.loads((tmp_path / "out" / "trials.json").read_text()) == trials
    monkeypatch.setattr("sys.argv", [*sys.argv, "--data", str(tmp_path)])
    with pytest.raises(FileExistsError):  # of other data it is not taken for done
        sweep.main()
