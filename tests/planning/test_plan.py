"""Plans from configurations alone: counts that are right, for every alias, without network or weights."""

import copy
import dataclasses
import functools
import io
import re
import socket

import pytest
from rich.console import Console

from convert import recipes
from convert.core.console import size
from convert.core.errors import UserError
from convert.domains.language import Language
from convert.mixers import MIXERS
from convert.models.catalog import TEACHERS, resolve
from convert.models.loading import read_config
from convert.objectives.base import AttentionTerm, LogitTerm, Objective
from convert.planning import plan as planning
from convert.planning.plan import make_plan as make_plan_in

LANGUAGE = Language()
make_plan = functools.partial(make_plan_in, LANGUAGE)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a plan must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def plan_of(name, target, tokens=None, device="cpu"):
    source = resolve(name)
    config = read_config(source)
    return make_plan(
        name, config, recipes.TARGETS[target].recipe(recipes.budget(name, config, tokens)), source.data, device
    )


@pytest.mark.parametrize("name", TEACHERS)
def test_every_alias_has_a_plan(name):
    plan = plan_of(name, "mamba")
    assert not plan.refusals
    assert [step.name for step in plan.steps if step.tokens] == ["align", "distill"]
    assert plan.parameters_student > plan.parameters_teacher
    console = Console(width=160, record=True, file=io.StringIO())
    planning.show(plan, console)
    assert "refused" not in console.export_text()


def test_counts_of_pythia_1b_are_the_papers():
    """1014 M parameters as a Hedgehog student and 1087 M as HedgeMamba, from 1012 M (arXiv 2604.14191)."""
    # feature maps with D_h = 256: 16.8 M
    assert plan_of("pythia-1b", "linear").parameters_student / 1e6 == pytest.approx(1014 + 14, abs=3)
    plan = plan_of("pythia-1b", "mamba")
    assert plan.parameters_teacher == 1_011_781_632
    distill = plan.steps[-1]
    assert distill.trainable + distill.frozen == plan.parameters_student
    assert distill.frozen == 2 * 50304 * 2048  # the embeddings


def test_memory_grows_with_what_is_trained_and_held():
    plan = plan_of("pythia-1b", "mamba2")
    align, distill = (step for step in plan.steps if step.tokens)
    assert distill.peak_bytes > align.peak_bytes > 4 * 2 * 1.0e9
    assert distill.seconds > align.seconds > 0


def test_a_look_at_the_layers_inputs_holds_two_moments_of_each():
    edit = plan_of("smollm2-135m", "mla", 30_000).steps[0]
    assert edit.peak_bytes > 2 * 30 * 576**2 * 4 and edit.seconds > 0
    assert plan_of("smollm2-135m", "gate-swa", 30_000).steps[0].peak_bytes == 0  # it looks at nothing


def test_an_unsupported_family_is_refused_in_a_sentence():
    from transformers import AutoConfig

    config = AutoConfig.for_model("gpt2")
    plan = make_plan(
        "x",
        config,
        recipes.to_linear(recipes.Budget(1000, 64, 128, 1e-3, 1e-3, Objective.of("forward_kl"), 128)),
        "stdlib",
        "cpu",
    )
    assert plan.refusals and "'gpt2'" in plan.refusals[0]


def test_each_reason_of_a_refused_plan_is_said_once():
    plan = planning.Plan("x", "mamba", "stdlib", "cpu", "tokens", refusals=("It is too slow.", "It is too large."))
    console = Console(width=160, record=True, file=io.StringIO())
    with pytest.raises(UserError, match="^It is too slow.$"):
        planning.show(plan, console)
    said = console.export_text()
    assert said.count("refused") == 1 and "refused: It is too large." in said


@pytest.mark.parametrize(
    "number, shown", [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (5e9, "5 GB"), (2e12, "2 TB")]
)
def test_sizes(number, shown):
    assert size(number) == shown


def test_the_time_left_goes_by_what_the_steps_before_took():
    plan = plan_of("neox-nano", "mamba2")
    align, distill = (step.seconds for step in plan.steps if step.tokens)
    before = next(i for i, step in enumerate(plan.steps) if step.tokens)
    rows = [{"seconds": 0.1}] * before
    assert planning.time_left(plan, rows) == align + distill
    assert distill > 10 * align  # too short to go by
    assert planning.time_left(plan, [*rows, {"seconds": 3 * align}]) == pytest.approx(distill)
    longer = dataclasses.replace(
        plan, steps=tuple(dataclasses.replace(s, seconds=distill) if s.name == "align" else s for s in plan.steps)
    )
    assert planning.time_left(longer, [*rows, {"seconds": 3 * distill}]) == pytest.approx(3 * distill)
    assert planning.time_left(plan, [{"seconds": 1.0}] * len(plan.steps)) == 0


def refused(target, *settings, name="neox-nano"):
    config = read_config(resolve(name))
    recipe = recipes.TARGETS[target].recipe(recipes.budget(name, config, 100_000))
    for setting in settings:
        recipe = recipes.with_setting(recipe, setting)
    return make_plan(name, config, recipe, "stdlib", "cpu").refusals


INEXACT = [
    ("mla", [], "rotates 6 of 12 dimensions|latent has"),
    ("mla", ["edit.cache_budget=none", "edit.start=random"], "starts at random"),
    ("mla", ["edit.cache_budget=none", "edit.kv_rank=100"], "latent has 100 of"),
    ("mla", ["edit.cache_budget=none", "edit.rope_dim=6"], "rotates 6 of 12"),
    ("mla", ["edit.cache_budget=none", "edit.q_rank=8"], "queries have the rank 8 of 192"),
    ("gate-swa", [], "sees 68 of 2,048 tokens"),
    ("gate-swa", ["edit.window=1024", "edit.sinks=1023"], "sees 2,047 of 2,048"),
]


@pytest.mark.parametrize("target, settings, words", INEXACT)
def test_an_edit_that_theory_knows_not_to_be_exact_is_refused(target, settings, words):
    (reason,) = refused(target, *settings, "edit.exact=true")
    assert re.search(f"An exact edit must not change the function, and that of layer 0 would: .*({words})", reason)
    assert not refused(target, *settings) or "shorter than the training sequences" in refused(target, *settings)[0]


@pytest.mark.parametrize(
    "target, settings",
    [
        ("mla", ["edit.cache_budget=none"]),
        ("mla", ["edit.cache_budget=1"]),
        ("mla", ["edit.cache_budget=none", "edit.start=svd", "edit.calibration=0"]),
        ("gate-swa", ["edit.window=2048"]),
        ("gate-swa", ["edit.window=1024", "edit.sinks=1024", "edit.gate=head"]),
        ("gate-swa", ["edit.window=4096", "edit.keep=none"]),
    ],
)
def test_an_edit_that_theory_knows_to_be_exact_is_planned(target, settings):
    assert not refused(target, *settings, "edit.exact=true")


def test_the_native_shape_is_never_exact():
    (reason,) = refused("mla", "edit.exact=true", "edit.cache_budget=none", name="llama-3.2-1b")
    assert "one rotary key and its norms are not the teacher's; take shape=exact, or set exact=false" in reason


def test_softmax_is_not_linear_attention_until_that_has_learnt():
    recipe = recipes.to_mamba(recipes.budget("neox-nano", read_config(resolve("neox-nano")), 100_000))
    hasty = dataclasses.replace(recipe, steps=recipe.steps[2:])
    (reason,) = make_plan("x", read_config(resolve("neox-nano")), hasty, "stdlib", "cpu").refusals
    assert "feature maps have yet to learn the softmax" in reason


@pytest.mark.parametrize(
    "keep, words",
    [
        (slice(0, 1), "a step that trains"),
        (slice(1, None), "swap a mixer in before it"),
        (slice(3, None), "no mixer has one there"),
    ],
)
def test_steps_that_do_not_follow_from_each_other_are_refused(keep, words):
    config = read_config(resolve("neox-nano"))
    recipe = recipes.to_mamba(recipes.budget("neox-nano", config, 100_000))
    reasons = make_plan("x", config, dataclasses.replace(recipe, steps=recipe.steps[keep]), "stdlib", "cpu").refusals
    assert any(words in reason for reason in reasons)


def planned(**changes):
    """The plan of neox-nano to linear, with changes to the settings of its first training step."""
    config = read_config(resolve("neox-nano"))
    recipe = recipes.to_linear(recipes.budget("neox-nano", config))
    swap, align, distill = recipe.steps
    align = dataclasses.replace(align, settings=dataclasses.replace(align.settings, **changes))
    return make_plan("neox-nano", config, dataclasses.replace(recipe, steps=(swap, align, distill)), "stdlib", "cpu")


def objective_of(function):
    """An objective whose one term, of the user's own, computes its loss by this function of two outputs."""

    @dataclasses.dataclass(frozen=True)
    class Own(AttentionTerm):
        def loss(self, student, teacher, owned):
            return function(student, teacher)

    return Objective(((1.0, Own()),))


@dataclasses.dataclass(frozen=True)
class OwnOfLogits(LogitTerm):
    def loss(self, student, teacher, targets, owned):
        return student.logsumexp(-1)


SELECTORS = (print, len, list, lambda s: [], lambda s: [s], lambda s: s.state_dict())
LOSSES = (print, len, lambda a, b: a - b, lambda a, b: (a - b).square().mean().detach(), lambda a, b: 1.0)


def test_masks_of_conversations_are_refused_where_every_token_is_compared():
    (reason,) = refused("hybrid-kda", "align.masking=completions")
    assert reason.startswith("Step align: align compares outputs of every token")


@pytest.mark.parametrize("trains", ["mlps", "norms + head"])
def test_what_alignment_does_not_reach_is_no_part_to_train(trains):
    (reason,) = refused("hybrid-kda", f"align.trains={trains}")
    assert reason.startswith("Step align: trains of align must choose from what its objective compares; " + trains)
    config, recipe = config_and_recipe("hybrid-kda")
    blocks = recipes.with_setting(recipe, "align.objective=block_l2_distance")
    found = make_plan("x", config, recipes.with_setting(blocks, f"align.trains={trains}"), "stdlib", "cpu").refusals
    assert not found


@pytest.mark.parametrize("function", SELECTORS)
def test_selectors_that_choose_no_parameters_are_refused(function, capsys):
    (reason,) = planned(trains=function).refusals
    assert re.match(r"Step align: trains .*\.$", reason) and "\n" not in reason


@pytest.mark.parametrize("objective", [*map(objective_of, LOSSES), Objective(((1.0, OwnOfLogits()),))])
def test_terms_that_give_no_loss_are_refused(objective, capsys):
    (reason,) = planned(objective=objective).refusals
    assert re.match(r"Step align: (an objective|align compares) .*\.$", reason) and "\n" not in reason


def test_functions_and_terms_of_the_users_own_are_planned():
    own = objective_of(lambda student, teacher: (student - teacher).abs().mean())
    assert not planned(trains=lambda student: student.parameters(), objective=own).refusals


def test_whole_layers_take_longer_to_align_than_their_mixers():
    attention, block, both = (
        planned(objective=Objective.of(text)).steps[1]
        for text in ("energy_mse", "block_energy_mse", "energy_mse + block_energy_mse")
    )
    assert attention.seconds < block.seconds < both.seconds and attention.peak_bytes == both.peak_bytes


# --- hybrids, data and teachers of a step's own


def config_and_recipe(target, **changes):
    config = read_config(resolve("neox-nano"))
    recipe = recipes.TARGETS[target].recipe(recipes.budget("neox-nano", config, 100_000))
    return config, dataclasses.replace(recipe, **changes)


def test_a_teacher_with_fewer_positions_is_refused():
    config, recipe = config_and_recipe("linear")
    swap, align, distill = recipe.steps
    own = dataclasses.replace(recipe, steps=(swap, align, dataclasses.replace(distill, teacher="other")))
    short = copy.deepcopy(config)
    short.max_position_embeddings = 64
    (reason,) = make_plan("x", config, own, "stdlib", "cpu", {"other": short}).refusals
    assert "must fit the 64 positions of other" in reason


def test_two_swaps_make_a_hybrid():
    config, recipe = config_and_recipe("gate-swa")
    edit, *trainings = recipe.steps
    first = dataclasses.replace(edit, keep=(), layers=(0, 2, 4))
    second = recipes.Swap("second", "mamba2", MIXERS["mamba2"].Options(), layers=(1, 3))
    hybrid = dataclasses.replace(recipe, steps=(first, second, *trainings))
    plan = make_plan("x", config, hybrid, "stdlib", "cpu")
    assert not plan.refusals
    assert [step.what for step in plan.steps[:2]] == [
        "swap in gate-swa in 3 of 6 layers",
        "swap in mamba2 in 2 of 6 layers",
    ]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"layers": (0, 6)}, "within 0 .. 5"),
        ({"layers": ()}, "one or more"),
        ({"layers": (1,), "keep": (1,)}, "not all be kept"),
        ({"layers": (1, 2), "keep": recipes.MostSensitive(3)}, "given or measured, not both"),
    ],
)
def test_layers_that_are_not_there_are_refused(changes, words):
    config, recipe = config_and_recipe("gate-swa")
    edit, *trainings = recipe.steps
    wrong = dataclasses.replace(recipe, steps=(dataclasses.replace(edit, **changes), *trainings))
    (reason,) = make_plan("x", config, wrong, "stdlib", "cpu").refusals
    assert words in reason


def test_a_steps_own_teacher_is_counted_and_must_fit():
    config, recipe = config_and_recipe("linear")
    plain = make_plan("x", config, recipe, "stdlib", "cpu")
    swap, align, distill = recipe.steps
    own = dataclasses.replace(recipe, steps=(swap, align, dataclasses.replace(distill, teacher="other")))
    larger = copy.deepcopy(config)
    larger.num_hidden_layers = 12
    plan = make_plan("x", config, own, "stdlib", "cpu", {"other": larger})
    assert not plan.refusals and plan.steps[2].what.endswith("from other")
    assert plan.steps[2].seconds > plain.steps[2].seconds and plan.steps[2].peak_bytes > plain.steps[2].peak_bytes
    foreign = read_config(resolve("pythia-14m"))
    (reason,) = make_plan("x", config, own, "stdlib", "cpu", {"other": foreign}).refusals
    assert "share one tokenizer; the run's has 4,096 tokens, this one 50,304" in reason
    layerwise = dataclasses.replace(recipe, steps=(swap, dataclasses.replace(align, teacher="other"), distill))
    (reason,) = make_plan("x", config, layerwise, "stdlib", "cpu", {"other": larger}).refusals
    assert "align compares layer with layer" in reason
