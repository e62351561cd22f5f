"""Recipes are data: they serialise, shrink, and `--set` reaches every field."""

import dataclasses
import json

import pytest

from convert import recipes
from convert.core.errors import UserError
from convert.domains.language import Language
from convert.models.catalog import TEACHERS, resolve
from convert.models.loading import read_config
from convert.objectives.base import Objective
from convert.planning.plan import make_plan
from convert.recipes import vision
from convert.recipes.base import tiny
from convert.recipes.language import Budget
from convert.recipes.overrides import with_setting
from convert.recipes.targets import TARGETS
from convert.training import STAGES, selectors

BUDGET = Budget(1_000_000, 256, 4096, 1e-3, 1e-4, Objective.of("forward_kl"), 4096)


IMAGES = vision.Budget(60_000, 64, is_small=True)


def recipe_of(target):
    return TARGETS[target].recipe(BUDGET if TARGETS[target].domain == "language" else IMAGES)


@pytest.mark.parametrize("target", TARGETS)
def test_every_recipe_serialises_and_spends_its_budget(target):
    recipe = recipe_of(target)
    assert recipe.target == target
    plain = json.loads(json.dumps(recipe.describe()))
    assert len({step["name"] for step in plain}) == len(plain)
    is_text = TARGETS[target].domain == "language"
    assert recipe.units == (BUDGET.tokens if is_text else IMAGES.images)
    last = max(i for i, step in enumerate(recipe.steps) if step.training is None)
    after = sum(step.training.units for step in recipe.steps[last + 1 :])
    assert after >= recipe.units / 2  # at least half of the tokens fall after the last step that trains nothing
    assert tiny(recipe).units == (384 if is_text else 48) * len(recipe.trainings)


FIXED = ("name", "mixer", "model", "stage", "options", "settings")


@pytest.mark.parametrize("target", TARGETS)
def test_set_reaches_every_field(target):
    """Every number, flag and choice that a step shows can be set by the name it shows."""
    recipe = recipe_of(target)
    for i, step in enumerate(recipe.steps):
        for holder in _holders(step):
            for field in dataclasses.fields(holder):
                if field.name in FIXED:
                    continue
                value = _another(field.name, getattr(holder, field.name))
                changed = with_setting(recipe, f"{step.name}.{field.name}={value}")
                assert changed.steps[i].describe() != step.describe(), field.name


def _holders(step):
    yield step
    yield from (holder for name in ("settings", "options") if (holder := getattr(step, name, None)) is not None)


def _another(name, old):
    choices = {
        "trains": "mixers" if old == "everything" else "everything",
        "objective": "0.5*reverse_kl",
        "schedule": "wsd" if old == "cosine" else "cosine",
        "precision": "bfloat16" if old == "float32" else "float32",
        "optimizer": "sgd" if old == "adamw" else "adamw",
        "keep": "0,2",
        "layers": "3",
        "data": "stdlib",
        "teacher": "neox-nano",
        "dt_rank": "7",
        "gate": "sigmoid" if old == "silu" else "head",
        "decay_start": "half-lives",
        "gate_start": "open",
        "shape": "native",
        "start": {"copied": "refitted", "refitted": "copied"}.get(old, "random"),
        "masking": "completions" if old == "all" else "all",
    }
    if name in choices:
        return choices[name]
    if isinstance(old, bool):
        return "false" if old else "true"
    if old is None:
        return 0.7 if name == "cache_budget" else 8
    return old + 1 if isinstance(old, int) else old / 2 or 0.5


@pytest.mark.parametrize("target", ["hybrid-kda", "gate-swa"])
def test_a_step_is_added_by_setting_one_of_its_fields(target):
    """The swap then takes all layers, unless the user named some, which the plan refuses."""
    recipe = TARGETS[target].recipe(BUDGET)
    edit, align, *rest = (step.name for step in recipe.steps)
    assert (edit, align) == ("edit", "align") and recipe.steps[0].keep != ()
    chosen = with_setting(with_setting(recipe, "select.by=recall"), "select.every=3")
    assert [step.name for step in chosen.steps] == ["edit", "align", "select", *rest]
    assert chosen.steps[0].keep == () and (chosen.steps[2].by, chosen.steps[2].every) == ("recall", 3)
    named = with_setting(with_setting(recipe, "edit.keep=1"), "select.greedy=true")
    assert named.steps[0].keep == (1,)
    with pytest.raises(UserError, match="edit, align, distill.* .and it can have .*select.; there is no 'selec'"):
        with_setting(recipe, "selec.by=kl")


def test_queries_and_keys_are_aligned_first_on_request():
    recipe = with_setting(TARGETS["hybrid-kda"].recipe(BUDGET), "align_qk.lr=1e-3")
    recipe = with_setting(recipe, "select.every=2")
    assert [step.name for step in recipe.steps] == ["edit", "align_qk", "align", "select", "distill", "instruct"]
    first, second = recipe.steps[1].settings, recipe.steps[2].settings
    assert first.units == second.units and recipe.units == BUDGET.tokens
    assert (first.trains, str(first.objective), second.trains) == ("queries_and_keys", "l2_distance", "mixers")


def test_published_layers_keep_attention_in_hybrids_of_that_model_alone():
    kept = {}
    for name in ("qwen3-0.6b", "qwen3-1.7b", "neox-nano"):
        budget = recipes.budget(name, read_config(resolve(name)))
        kept[name] = TARGETS["hybrid-kda"].recipe(budget).steps[0].keep
    every = recipes.EveryNth(4)
    assert kept == {"qwen3-0.6b": (0, 2, 6, 11, 13, 18, 21), "qwen3-1.7b": every, "neox-nano": every}


def test_set_parses_by_the_type_of_the_field():
    recipe = with_setting(TARGETS["mamba"].recipe(BUDGET), "distill.tokens=2e5")
    assert recipe.steps[-1].settings.tokens == 200_000
    recipe = with_setting(recipe, "align.objective=energy_mse")
    assert str(recipe.steps[1].settings.objective) == "energy_mse"
    recipe = with_setting(recipe, "distill.temperature=2")
    assert str(recipe.steps[-1].settings.objective) == "forward_kl(temperature=2)"
    for setting in ("distill.forward_kl=0.7", "distill.cross_entropy=0.3", "distill.feature_matching=5e-2"):
        recipe = with_setting(recipe, setting)
    assert (
        str(recipe.steps[-1].settings.objective)
        == "0.3*cross_entropy + 0.7*forward_kl(temperature=2) + 0.05*feature_matching"
    )
    orders = ["distill.temperature=2", "distill.reverse_kl=0.5"]
    fresh = TARGETS["mamba"].recipe(BUDGET)
    first, second = (
        with_setting(with_setting(fresh, a), b).steps[-1].settings.objective for a, b in (orders, orders[::-1])
    )
    assert str(first) == str(second) == "forward_kl(temperature=2) + 0.5*reverse_kl(temperature=2)"
    assert with_setting(recipe, "linear.layers=none").steps[0].layers is None
    without = with_setting(recipe, "distill.cross_entropy=0").steps[-1].settings.objective
    assert str(without).startswith("0.7*forward_kl")
    line = "distill.objective=taid(t_start=0.2) + 0.1*hidden_projection"
    assert str(with_setting(recipe, line).steps[-1].settings.objective) == line.partition("=")[2]
    assert with_setting(recipe, "handover.keep=0,2").steps[2].keep == (0, 2)
    with pytest.raises(UserError, match="whole number; got .2.5."):
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
    assert selectors.SELECTORS["all_but_embeddings"] is selectors.all_but_embeddings
    assert list(STAGES) == ["align", "distill", "supervised"]


@pytest.mark.parametrize(
    "setting",
    [
        "edit.window=nan",
        "edit.window=inf",
        "edit.window=1e30",
        "edit.window=" + "9" * 5000,
        "edit.window=",
        "edit.window==1",
        "edit.window=1_0e",
        "edit.window=٣e٣",
        "edit.calibration=1e9",
        "distill.tokens=1e30",
        "distill.lr=nan",
        "distill.lr=1e400",
        "distill.seed=18446744073709551616",
        "edit.keep=0,,1",
        "edit.keep=٣",
        "edit.keep=every:0",
        "edit.keep=every:99999999999999999999",
        "edit.keep=-1",
        "edit.keep=",
        "edit.exact=1",
        "distill.loss_chunk=1e12",
        "distill.trains=",
        ".=",
        "=",
        "edit.",
        "edit.name=x",
        "edit.window=1\0",
        "\ud800.x=1",
        "x" * 10_000,
    ],
)
def test_values_without_sense_are_refused(setting):
    with pytest.raises(UserError, match=r"\.$"):
        with_setting(TARGETS["gate-swa"].recipe(BUDGET), setting)


def test_a_seed_is_not_rounded():
    seed = 2**63 - 1
    assert with_setting(TARGETS["mla"].recipe(BUDGET), f"distill.seed={seed}").steps[-1].settings.seed == seed


@pytest.mark.parametrize(
    "teacher, tokens, seq_len", [("qwen3-0.6b", None, 4096), ("neox-nano", None, 1024), ("neox-nano", 20_000, 256)]
)
def test_a_hybrid_ends_with_instruction_distillation(teacher, tokens, seq_len):
    """A third of what is left after alignment, in longer sequences where the budget has many of them; the plan tells
    that the teacher samples first."""
    config = read_config(resolve(teacher))
    recipe = recipes.default_recipe(teacher, config, "hybrid-kda", tokens=tokens)
    *_, distill, instruct = recipe.steps
    assert instruct.data == "teacher" and instruct.settings.masking == "completions" and instruct.stage == "distill"
    assert instruct.settings.trains == distill.settings.trains == "all_but_kept_attention"
    assert instruct.settings.tokens == pytest.approx(distill.settings.tokens / 2, rel=1e-3)
    assert instruct.settings.seq_len == seq_len and instruct.settings.batch_tokens % seq_len == 0
    assert recipe.measured_by is distill.settings  # text is what perplexity is measured on
    plan = make_plan(Language(), teacher, config, recipe, "stdlib", "cpu")
    assert not plan.refusals and "on what the teacher writes first" in plan.steps[-1].what
    assert plan.steps[-1].sampling_seconds > 0 == plan.steps[-2].sampling_seconds
