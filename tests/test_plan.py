"""Plans from configurations alone: counts that are right, for every alias, without network or weights."""

import io
import socket

import pytest
from rich.console import Console

from convert import plan as planning
from convert import recipes
from convert.console import size
from convert.plan import make_plan
from convert.teachers import TEACHERS, read_config, resolve


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a plan must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def plan_of(name, target, tokens=None, device="cpu"):
    source = resolve(name)
    config = read_config(source)
    return make_plan(name, config, recipes.RECIPES[target](recipes.budget(name, config, tokens)), source.data, device)


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
    assert plan_of("pythia-1b", "linear").parameters_student / 1e6 == pytest.approx(1014 + 14, abs=3)  # feature maps with D_h = 256: 16.8 M
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
    plan = make_plan("x", config, recipes.to_linear(recipes.Budget(1000, 64, 128, 1e-3, 1e-3, recipes.Distill(), 128)), "stdlib", "cpu")
    assert plan.refusals and "'gpt2'" in plan.refusals[0]


@pytest.mark.parametrize("number, shown", [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (5e9, "5 GB"), (2e12, "2 TB")])
def test_sizes(number, shown):
    assert size(number) == shown


def test_the_time_left_goes_by_what_the_steps_before_took():
    plan = plan_of("neox-nano", "mamba2")
    align, distill = (step.seconds for step in plan.steps if step.tokens)
    before = next(i for i, step in enumerate(plan.steps) if step.tokens)
    rows = [{"seconds": 0.1}] * before
    assert planning.time_left(plan, rows) == align + distill
    assert planning.time_left(plan, [*rows, {"seconds": 3 * align}]) == pytest.approx(3 * distill)
    assert planning.time_left(plan, [{"seconds": 1.0}] * len(plan.steps)) == 0
