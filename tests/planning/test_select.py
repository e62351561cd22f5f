"""Plans of recipes that choose the layers with attention after alignment, and their refusals."""

import dataclasses
import functools
import re

import pytest

from convert import recipes
from convert.domains.language import Language
from convert.mixers import MIXERS
from convert.models.from_scratch import Sizes
from convert.planning.plan import make_plan as make_plan_in
from convert.recipes import Build, Select, with_setting
from tests.planning.test_plan import config_and_recipe

make_plan = functools.partial(make_plan_in, Language())


def test_a_choice_after_alignment_is_counted_with_the_layers_that_it_gives_back():
    """The plan has the parameters of a student that keeps as many layers by pattern."""
    config, recipe = config_and_recipe("hybrid-kda")
    pattern, chosen = (with_setting(recipe, f"{field}=2") for field in ("edit.conv", "select.every"))
    pattern = with_setting(with_setting(pattern, "edit.conv=4"), "edit.keep=every:2")
    plans = [make_plan("x", config, each, "stdlib", "cpu") for each in (pattern, chosen)]
    assert not plans[1].refusals and plans[0].parameters_student == plans[1].parameters_student
    assert plans[1].steps[2].what == "give attention back to 3 of 6 layers, by measurement of the KL from the teacher"
    assert plans[1].steps[-1].trainable == plans[0].steps[-1].trainable
    greedy = make_plan("x", config, with_setting(chosen, "select.greedy=true"), "stdlib", "cpu")
    assert greedy.steps[2].seconds > 2 * plans[1].steps[2].seconds > 0


@pytest.mark.parametrize(
    "settings, words",
    [
        (["select.every=2", "edit.keep=1"], r"keep .1. of a step before it has kept some already"),
        (["edit.keep=auto:3", "select.every=2"], "a measurement of a step before it has kept some already"),
    ],
)
def test_a_choice_after_alignment_is_the_only_one(settings, words):
    config, recipe = config_and_recipe("hybrid-kda")
    for setting in settings:
        recipe = with_setting(recipe, setting)
    assert re.search(words, make_plan("x", config, recipe, "stdlib", "cpu").refusals[0])


def test_a_choice_needs_layers_that_were_replaced_and_none_is_replaced_after_it():
    config, recipe = config_and_recipe("gate-swa")
    edit, *trainings = recipe.steps
    everywhere, select = dataclasses.replace(edit, keep=()), Select("select")
    reasons = {}
    for name, steps in {
        "first": (select, edit),
        "built": (Build("build", "llama", Sizes()), select),
        "swapped after": (everywhere, select, recipes.Swap("second", "mamba2", MIXERS["mamba2"].Options())),
        "twice": (everywhere, select, dataclasses.replace(select, name="again")),
    }.items():
        found = make_plan("x", config, dataclasses.replace(recipe, steps=(*steps, *trainings)), "stdlib", "cpu")
        reasons[name] = found.refusals[0]
    assert "layers back that were replaced, and none was" in reasons["first"]
    assert "it was built" in reasons["built"]
    assert "chosen by measurement, so it cannot replace the same ones" in reasons["swapped after"]
    assert "Step again" in reasons["twice"] and "a measurement of a step before" in reasons["twice"]
