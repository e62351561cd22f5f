"""Recipes are data: they serialise, shrink, and `--set` reaches every field."""

import dataclasses
import json

import pytest

from convert import recipes
from convert.core.errors import UserError
from convert.models.loading import TEACHERS, read_config, resolve
from convert.objectives import divergences as objectives
from convert.recipes.base import Budget, Swap, Train, describe, tiny
from convert.recipes.language import RECIPES
from convert.recipes.overrides import with_setting
from convert.training import loop as stages

BUDGET = Budget(1_000_000, 256, 4096, 1e-3, 1e-4, objectives.Distill(), 4096)


@pytest.mark.parametrize("target", RECIPES)
def test_every_recipe_serialises_and_spends_its_tokens(target):
    recipe = RECIPES[target](BUDGET)
    assert recipe.target == target
    plain = json.loads(json.dumps([describe(step) for step in recipe.steps]))
    assert len({step["name"] for step in plain}) == len(plain)
    assert recipe.tokens == BUDGET.tokens
    last_swap = max(i for i, step in enumerate(recipe.steps) if isinstance(step, Swap))
    after = sum(step.settings.tokens for step in recipe.steps[last_swap:] if isinstance(step, Train))
    assert after >= recipe.tokens / 2  # at least half of the tokens fall after the last swap
    assert tiny(recipe).tokens == 2 * 384


@pytest.mark.parametrize("target", RECIPES)
def test_set_reaches_every_field(target):
    """Every number, flag and choice that a step shows can be set by the name it shows."""
    recipe = RECIPES[target](BUDGET)
    for step in recipe.steps:
        for holder in _holders(step):
            for field in dataclasses.fields(holder):
                old = getattr(holder, field.name)
                if (
                    field.name in ("name", "mixer")
                    or (callable(old) and field.name == "stage")
                    or dataclasses.is_dataclass(old)
                ):
                    continue
                value = _another(field.name, old)
                changed = with_setting(recipe, f"{step.name}.{field.name}={value}")
                assert describe(changed.steps[recipe.steps.index(step)]) != describe(step), field.name


def _holders(step):
    yield step
    if isinstance(step, Train):
        yield step.settings
        if dataclasses.is_dataclass(step.settings.objective):
            yield step.settings.objective
    if isinstance(step, Swap):
        yield step.options


def _another(name, old):
    choices = {
        "trains": "everything",
        "objective": "cosine_distance" if old is objectives.energy_mse else "energy_mse",
        "schedule": "cosine",
        "precision": "float32",
        "keep": "0,2",
        "dt_rank": "7",
        "gate": "head",
        "shape": "native",
        "start": "random",
    }
    if name in choices:
        return choices[name]
    if isinstance(old, bool):
        return "false" if old else "true"
    if old is None:
        return 0.7 if name == "cache_budget" else 8
    return old + 1 if isinstance(old, int) else old / 2 or 0.5


def test_set_parses_by_the_type_of_the_field():
    recipe = with_setting(RECIPES["mamba"](BUDGET), "distill.tokens=2e5")
    assert recipe.steps[-1].settings.tokens == 200_000
    recipe = with_setting(recipe, "align.objective=energy_mse")
    assert recipe.steps[1].settings.objective is objectives.energy_mse
    recipe = with_setting(recipe, "distill.temperature=2")
    assert recipe.steps[-1].settings.objective.temperature == 2.0
    assert with_setting(recipe, "handover.keep=0,2").steps[2].keep == (0, 2)
    with pytest.raises(UserError, match="whole number; got '2.5'"):
        with_setting(recipe, "handover.conv=2.5")


@pytest.mark.parametrize("name", [name for name in TEACHERS if name != "smollm2-135m"])
def test_defaults_fit_every_teacher(name):
    config = read_config(resolve(name))
    for tokens in (None, 20_000, 12_000_000):
        budget = recipes.budget(name, config, tokens)
        assert budget.seq_len <= config.max_position_embeddings and budget.batch_tokens % budget.seq_len == 0
        assert budget.seq_len <= budget.micro_tokens <= budget.batch_tokens
        assert budget.tokens // budget.batch_tokens >= 50  # enough steps for a schedule


def test_selectors_and_stages_are_found_by_their_names():
    assert (
        stages.SELECTORS["all_but_embeddings"] is stages.all_but_embeddings and stages.STAGES["align"] is stages.align
    )


@pytest.mark.parametrize("setting", [
    "edit.window=nan", "edit.window=inf", "edit.window=1e30", "edit.window=" + "9" * 5000, "edit.window=", "edit.window==1", "edit.window=1_0e", "edit.window=٣e٣",
    "edit.calibration=1e9", "distill.tokens=1e30", "distill.lr=nan", "distill.lr=1e400", "distill.seed=18446744073709551616", "edit.keep=0,,1", "edit.keep=٣",
    "edit.keep=every:0", "edit.keep=every:99999999999999999999", "edit.keep=-1", "edit.keep=", "edit.exact=1", "distill.loss_chunk=1e12", "distill.trains=", ".=", "=", "edit.", "edit.name=x",
    "edit.window=1\0", "\ud800.x=1", "x" * 10_000,
])  # fmt: skip
def test_values_without_sense_are_refused(setting):
    with pytest.raises(UserError, match=r"\.$"):
        with_setting(RECIPES["gate-swa"](BUDGET), setting)


def test_a_seed_is_not_rounded():
    seed = 2**63 - 1
    assert with_setting(RECIPES["mla"](BUDGET), f"distill.seed={seed}").steps[-1].settings.seed == seed
