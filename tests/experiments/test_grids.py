"""Grids of runs: their rows are recipes, runs are read again, flips and findings follow from intervals."""

import copy
import json
import shutil

import numpy as np
import pytest

from convert import recipes
from convert.core.errors import UserError
from convert.domains.language import Language
from convert.models.catalog import resolve
from convert.models.loading import read_config
from convert.planning.plan import make_plan
from convert.runs import records
from convert.runs.evaluation_schemas import tasks_of
from experiments import gendistill_axes, grid_table, hybrids, variants
from experiments.gendistill_axes import FINDINGS, ROWS, longer
from experiments.grid import TABLE, Grid, Row, options, recipe_of, run_command, run_grid
from experiments.grid_table import DEFAULT, Result, flips, lines_of, markdown
from tests.conftest import measure_briefly

BUDGET = recipes.Budget(2048, 64, 256, 1e-2, 1e-3, recipes.Objective.of("forward_kl"), 256, examples=2)


# --- rows


GRIDS = {"gendistill_axes": gendistill_axes.GRID, "hybrids": hybrids.GRID}


def test_the_axes_are_the_six_of_the_paper_and_its_findings_have_rows():
    axes = gendistill_axes.GRID.axes
    assert set(axes) == {"objective", "masking", "duration", "data", "frozen", "architecture"}
    assert {name for _, name, _ in FINDINGS} < {row.name for row in ROWS}


@pytest.mark.parametrize("name", GRIDS)
def test_rows_have_names_of_their_own_and_the_default_comes_first(name):
    rows = GRIDS[name].rows
    assert len({row.name for row in rows}) == len(rows) and (rows[0].name, rows[0].axis) == (DEFAULT, "")


@pytest.mark.parametrize(
    "grid, row", [pytest.param(g, row, id=f"{n}-{row.name}") for n, g in GRIDS.items() for row in g.rows]
)
def test_every_row_is_a_change_that_can_be_planned(grid, row):
    recipe = recipe_of(row, "neox-nano", 400_000, 0, 2)
    config = read_config(resolve("neox-nano"))
    assert not make_plan(Language(), "neox-nano", config, recipe, "stdlib", "cpu").refusals
    default = recipe_of(grid.rows[0], "neox-nano", 400_000, 0, 2)
    assert (recipe == default) == (row.name == DEFAULT)
    same_tokens = row.axis != "duration" and not row.without
    assert (recipe.units == default.units) == same_tokens


def test_a_change_of_the_whole_model_leaves_alignment_as_it_is():
    row = next(row for row in ROWS if row.name == "mixers alone trained")
    recipe, default = (recipe_of(r, "neox-nano", 400_000, 0, 2) for r in (row, ROWS[0]))
    for step, before in zip(recipe.steps, default.steps, strict=True):
        if getattr(step, "stage", None) == "distill":
            assert step.settings.trains == "mixers" != before.settings.trains
        else:
            assert step == before


def test_rows_are_chosen_by_axis_and_durations_are_added():
    grid = gendistill_axes.GRID
    assert [row.name for row in grid.chosen("masking")] == [DEFAULT, "loss of all tokens"]
    more = longer("2,0.5")
    assert [row.times for row in more] == [2, 0.5] and not longer("")
    assert recipe_of(more[0], "neox-nano", 100_000, 0, 2).units == 200_000
    assert grid.chosen("") == list(ROWS)
    with pytest.raises(UserError, match="no 'colour' among data"):
        grid.chosen("colour")
    with pytest.raises(UserError, match="factors of the tokens with commas"):
        longer("2,nan")


# --- a grid


LINEAR = [
    Row("linear", ("distill.evaluate_every=1024",), name=DEFAULT),  # as the finished run was made
    Row("linear", ("*.trains=mixers", "align.tokens=256", "*.tokens=256"), axis="frozen", name="mixers alone trained"),
]


def test_a_step_that_is_not_there_cannot_be_left_out():
    with pytest.raises(UserError, match="steps are linear, align, distill; there is no 'last' to leave out"):
        recipe_of(Row("linear", without=("last",)), "neox-nano", 400_000, 0, 2)


@pytest.mark.parametrize(
    "option, words", [("--data", "There is no data at 'nowhere'"), ("--teacher", "Unknown teacher")]
)
def test_what_would_end_every_run_is_said_once(option, words, tmp_path):
    grid = hybrids.GRID
    args = options("about", grid).parse_args([option, "nowhere", "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match=f"^{words}"):
        run_command(grid, grid.rows, args, "hybrids")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def small(monkeypatch, finished_run, tmp_path):
    """A folder of a grid whose first run is finished, and its recipes small."""
    measure_briefly(monkeypatch)
    monkeypatch.setattr(variants, "budget_of", lambda *_, **__: BUDGET)
    shutil.copytree(finished_run, tmp_path / "default-0")
    return tmp_path


def grid(out, rows=LINEAR, ask=None):
    return run_grid(Grid(tuple(rows), FINDINGS), ask or rows, "neox-nano", 2048, 1, 2, None, out, "names,brackets")


def test_two_rows_end_in_a_table_and_are_not_done_again(small, capsys, monkeypatch):
    first = grid(small)
    assert [(result.name, result.seed) for result in first] == [(DEFAULT, 0), ("mixers alone trained", 0)]
    assert first[1].ratio == records.report(small / "frozen-mixers-alone-trained-0").perplexity.ratio
    assert tasks_of(first[1].evaluation.rows) == ["names", "brackets"]
    table = (small / TABLE).read_text()
    assert "| 2 | frozen | mixers alone trained |" in table and "Frozen attention: not measured yet" in table
    assert "mixers alone trained" in capsys.readouterr().out

    def again(*_, **__):
        raise AssertionError("a finished run is read")

    monkeypatch.setattr(variants, "run_recipe", again)
    assert grid(small) == first and (small / TABLE).read_text() == table
    assert grid(small, ask=LINEAR[:1]) == first  # what is finished stays in the table, also where it is not asked for,
    shutil.copytree(small / "default-0", small / "default-1")
    assert len(grid(small)) == 3  # and of another seed
    shutil.rmtree(small / "default-1")
    with pytest.raises(UserError, match="A folder holds one grid; .*default-0 was finished with another"):
        grid(small, [Row("linear", ("distill.lr=0.002",), name=DEFAULT), LINEAR[1]])
    with pytest.raises(UserError, match="Give the number of examples that the run was made with"):
        run_grid(Grid(tuple(LINEAR)), LINEAR, "neox-nano", 2048, 1, 3, None, small)
    assert (small / TABLE).read_text() == table


def test_a_row_that_names_an_absent_field_is_refused_before_anything_runs(small):
    absent = Row(target="linear", axis="data", name="other", settings=("instruct.data=stdlib",))
    with pytest.raises(UserError, match="Row 'other' of the axis 'data' cannot be made: .* there is no 'instruct'"):
        grid(small, [*LINEAR, absent])
    assert [place.name for place in small.iterdir()] == ["default-0"]


@pytest.mark.parametrize(
    "error, words",
    [(UserError("The loss is not finite."), "1 of 2 runs failed.*not finite"), (KeyboardInterrupt(), None)],
)
def test_a_run_that_fails_or_is_stopped_leaves_the_table_of_what_is_there(small, capsys, monkeypatch, error, words):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(variants, "run_recipe", run)
    with pytest.raises(type(error), match=words):
        grid(small)
    assert "| 1 |  | default |" in (small / TABLE).read_text() and "by likelihood" in capsys.readouterr().out


# --- the table, of made-up scores


@pytest.fixture
def made_up(finished_run):
    """A function of a row's shares of correct answers by likelihood and by generation that makes its results."""
    evaluation = copy.deepcopy(records.report(finished_run).evaluation)
    for row in evaluation.rows:
        object.__setattr__(row, "score", 0.05 if row.task == "keys" else 0.9)

    def results(axis, name, likelihood, generation, seeds=3, examples=200):
        found = []
        for seed in range(seeds):
            correct = {}
            for scoring, share in (("likelihood", likelihood), ("generation", generation)):
                rng = np.random.default_rng(seed)  # the same examples are easy for every row
                values = (rng.random(examples) < share).astype(float)
                correct[scoring] = {row.task: dict(enumerate(values)) for row in evaluation.rows}
            found.append(Result(axis, name, seed, 1000, 1.1 + seed / 100, 0.2, correct, evaluation))
        return found

    return results


def test_flips_are_marked_within_an_axis_alone(made_up):
    results = [
        *made_up("", DEFAULT, 0.6, 0.6),
        *made_up("objective", "ranks", 0.8, 0.3),
        *made_up("objective", "better at both", 0.9, 0.9),
        *made_up("data", "writes", 0.3, 0.8),
    ]
    found = {(f.axis, f.better, f.worse): f for f in flips(results)}
    assert set(found) == {("objective", "ranks", DEFAULT), ("data", DEFAULT, "writes")}
    flip = found["objective", "ranks", DEFAULT]
    assert flip.is_sure and flip.likelihood.low > 0 > flip.generation.high
    cells = {row[2]: row for row in grid_table.table_rows(results)}
    assert [cells[n][-1] for n in (DEFAULT, "ranks", "better at both", "writes")] == ["2!, 4!", "1!", "", "1!"]
    assert cells["ranks"][5] == "1.110 (1.100 to 1.120)" and "keys" not in lines_of(results)[0]
    text = markdown(results)
    assert "Flip, by both intervals: along objective, 'ranks' is better than 'default' by likelihood" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_a_flip_within_the_noise_is_said_to_be_one(made_up):
    results = [*made_up("", DEFAULT, 0.6, 0.6, examples=40), *made_up("data", "other", 0.65, 0.55, examples=40)]
    (flip,) = flips(results)
    assert not flip.is_sure and any(line.startswith("Flip, within the intervals") for line in lines_of(results))


@pytest.mark.parametrize(
    "default, other, verdict",
    [(0.8, 0.5, "holds here"), (0.5, 0.8, "the opposite holds here"), (0.5, 0.5, "not distinguishable here")],
)
def test_findings_are_decided_by_intervals_of_generation(made_up, default, other, verdict):
    results = [*made_up("", DEFAULT, 0.5, default), *made_up("frozen", "kept attention trained", 0.5, other)]
    assert any(line.startswith(f"Frozen attention: {verdict}; ") for line in lines_of(results, FINDINGS))
    assert sum("not measured yet" in line for line in lines_of(results, FINDINGS)) == 2


def test_rows_are_compared_over_the_seeds_that_both_have(made_up):
    results = [*made_up("", DEFAULT, 0.5, 0.6), *made_up("frozen", "kept attention trained", 0.5, 0.5, seeds=1)]
    assert any(line.endswith("(1 seed).") for line in lines_of(results, FINDINGS))
    assert any("interval of a single seed" in line for line in lines_of(results, FINDINGS))


def test_a_teacher_that_writes_nothing_correct_shows_no_gap(made_up):
    results = made_up("", DEFAULT, 0.5, 0.0)
    for row in results[0].evaluation.rows:
        object.__setattr__(row, "score", 0.0)
    assert lines_of(results) == [
        "The teacher has less than 10% correct by generation in every task, so no gap can be seen."
    ]
    assert json.dumps(grid_table.table_rows(results))
