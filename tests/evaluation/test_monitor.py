"""Monitoring while a stage trains, and the rules that end a run."""

import dataclasses
import json

import pytest

from convert import recipes, run_recipe
from convert.core.errors import Interrupted, UserError
from convert.data.batches import held_out_batches
from convert.data.corpus import corpus
from convert.data.text import tokenize
from convert.evaluation.monitor import METRICS, SHOWN, Monitor
from convert.evaluation.rules import Rule
from convert.models.catalog import NANO
from convert.models.loading import load_teacher
from convert.runs.tracking import Track
from tests.e2e.conftest import quiet, text  # noqa: F401  # fixtures
from tests.e2e.conftest import teacher as tiny  # noqa: F401


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(str(NANO))


@pytest.fixture
def batches(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("CONVERT_CACHE", str(tmp_path))
    return held_out_batches(tokenize(corpus("stdlib"), teacher.tokenizer).held_out, 128, 4, 1024)


def test_a_student_that_is_its_teacher_has_no_gap(teacher, batches):
    monitor = Monitor(teacher, batches, [Rule.of("generation_gap>0.05", METRICS), Rule.of("perplexity < 2", METRICS)])
    numbers = monitor(teacher.model)
    assert (
        numbers["held_out/generation_gap"] == 0
        and numbers["held_out/generation"] > 0.2
        and 5 < numbers["held_out/perplexity"] < 40
    )
    assert monitor.stopped_by is None and monitor(teacher.model) == numbers
    assert len(monitor.generations) == 3 * SHOWN and all(
        row["student"] == row["teacher"] for row in monitor.generations
    )


def test_a_rule_that_holds_is_named(teacher, batches):
    monitor = Monitor(teacher, batches, [Rule.of("generation<0.01", METRICS), Rule.of("generation > .01", METRICS)])
    monitor(teacher.model)
    assert monitor.stopped_by.text == "generation > .01"


@pytest.mark.parametrize("rule", ["loss<1", "generation=1", "generation<", "generation<a", ""])
def test_other_rules_are_refused(rule):
    with pytest.raises(UserError, match="--stop-when takes perplexity, generation or generation_gap"):
        Rule.of(rule, METRICS)


def test_a_run_stops_by_its_rule_and_goes_on(tiny, text, quiet, tmp_path, capsys):  # noqa: F811
    budget = recipes.Budget(1024, 64, 256, 1e-2, 1e-3, recipes.Objective.of("forward_kl"), 256, examples=1)
    recipe = recipes.with_setting(recipes.to_linear(budget), "distill.evaluate_every=512")
    recipe = dataclasses.replace(recipe, tasks="names")
    arguments = {"recipe": recipe, "out": tmp_path / "run", "data": text, "wandb": "disabled"}
    with pytest.raises(Interrupted, match="it is saved"):
        run_recipe(tiny, **arguments, stop_when=["generation<1.1"])
    assert "by --stop-when generation<1.1" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "held_out/generation" in rows[-1] and all("held_out/generation" not in row for row in rows[:-1])
    texts = [json.loads(line) for line in (tmp_path / "run" / "generations.jsonl").read_text().splitlines()]
    assert {text["step"] for text in texts} == {rows[-1]["step"]}
    assert {"prompt", "teacher", "student", "reference"} <= set(texts[0])
    assert run_recipe(tiny, **arguments).tokens.total >= 1024


def test_generations_after_a_crash_are_dropped(tmp_path):
    track = Track(tmp_path, mode="disabled", config={}, name="x")
    track.enter("distill", 0, 0)
    for step in (1, 2, 3):
        track.generations([{"prompt": "p", "student": str(step)}])
        track.log(step, step, {"train/loss": 1.0})
        track.log(step, step, {"train/loss": 1.0})
    track.resume(2)
    assert [json.loads(line)["student"] for line in track.texts.read_text().splitlines()] == ["1", "2"]


def test_rules_of_a_recipe_that_never_measures_are_refused(tmp_path):
    recipe = recipes.tiny(
        recipes.to_linear(recipes.Budget(4096, 64, 256, 1e-2, 1e-3, recipes.Objective.of("forward_kl"), 256))
    )
    with pytest.raises(UserError, match="--stop-when is looked at when a stage measures, and none of this recipe does"):
        run_recipe("neox-nano", recipe, tmp_path / "run", wandb="disabled", stop_when=["perplexity>100"])


def test_a_rule_about_perplexity_needs_no_examples(teacher, batches, monkeypatch):
    monkeypatch.setattr(Monitor, "_examples", lambda self: [])
    monitor = Monitor(teacher, batches, [Rule.of("generation<0.9", METRICS), Rule.of("perplexity>1", METRICS)])
    monitor(teacher.model)
    assert monitor.stopped_by.text == "perplexity>1"
