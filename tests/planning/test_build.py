"""Plans of students from scratch, and their refusals."""

import dataclasses
import functools

import pytest

from convert import recipes
from convert.domains.language import Language
from convert.models.from_scratch import Sizes
from convert.planning.plan import make_plan as make_plan_in
from tests.planning.test_plan import config_and_recipe, plan_of

make_plan = functools.partial(make_plan_in, Language())


def test_a_student_from_scratch_is_counted():
    plan = plan_of("neox-nano", "scratch")
    build, distill = plan.steps
    assert not plan.refusals and build.what == "build a llama of 4 layers, width 128"
    assert plan.parameters_student == distill.trainable + distill.frozen - projectors(4, 128, 192)
    assert plan.parameters_student < plan.parameters_teacher


def projectors(layers, width, teacher_width):
    return layers * width * teacher_width


@pytest.mark.parametrize(
    "setting, words", [("build.width=130", "width must be its heads"), ("build.kv_heads=3", "share")]
)
def test_sizes_of_a_student_that_do_not_fit_are_refused(setting, words):
    config, recipe = config_and_recipe("scratch")
    (reason,) = make_plan("x", config, recipes.with_setting(recipe, setting), "stdlib", "cpu").refusals
    assert reason.startswith("Step build: ") and words in reason


def test_a_build_comes_first_and_takes_the_sizes_of_its_domain():
    config, scratch = config_and_recipe("scratch")
    build, distill = scratch.steps
    (swap, *_) = config_and_recipe("linear")[1].steps
    for steps, words in [
        ((swap, build, distill), "it makes a student, and a step before it has made one. Build first"),
        ((dataclasses.replace(build, options={"layers": 2}), distill), "The sizes of a student must be a Sizes"),
    ]:
        refusals = make_plan("x", config, dataclasses.replace(scratch, steps=steps), "stdlib", "cpu").refusals
        assert any(words in reason for reason in refusals), refusals


def test_align_refuses_a_student_whose_layers_are_others():
    """The teacher's rotary table and inputs would go into mixers that are not made for them."""
    config, linear = config_and_recipe("linear")
    _, scratch = config_and_recipe("scratch")
    swap, align, distill = linear.steps
    for sizes in (Sizes(layers=6, width=192), Sizes(layers=4, width=192), Sizes(layers=6, width=128)):
        build = dataclasses.replace(scratch.steps[0], options=sizes)
        both = dataclasses.replace(linear, steps=(build, swap, align, distill))
        (reason,) = make_plan("x", config, both, "stdlib", "cpu").refusals
        assert "align compares layer with layer" in reason
