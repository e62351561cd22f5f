"""A hybrid of two mixers, with one layer that keeps its attention: its start, its cache by formula, its plan.

What every student promises is tested with hybrids, too, beside the students of one mixer."""

import pytest
import torch

from convert import recipes
from convert.domains.language import Language
from convert.evaluation.inference import cache_formula, formula_bytes
from convert.mixers import MIXERS
from convert.mixers.init import STARTS
from convert.models.cache import check_cache
from convert.models.swap import projections_of, swap
from convert.planning.plan import make_plan
from tests.conftest import FAMILIES, assert_close, options_of, perturb, tiny_teacher, token_ids
from tests.models.test_student import CACHED, EXACT, HYBRIDS, decode, logits_of, student_of

every_hybrid = pytest.mark.parametrize("mixer", HYBRIDS)


def names_of(student) -> list[str]:
    return [mixer["name"] if mixer else "attention" for mixer in student.config.mixers]


def test_swaps_of_different_layers_make_a_hybrid():
    student = student_of("llama", "mamba2+gate-swa", (0, 2))
    assert names_of(student) == ["mamba2", "attention", "gate-swa"]
    assert {layer: type(slot.mixer) for layer, slot in student.slots().items()} == {
        0: MIXERS["mamba2"],
        2: MIXERS["gate-swa"],
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_hand_over_to_two_mixers_is_exact(family):
    """Where theory says so for each layer: linear attention -> Mamba in one, Mamba-2 in another, a window that is long
    enough in a third."""
    student, ids = swap(tiny_teacher(family), "linear", layers=(0, 2)), token_ids(1, 300)
    for slot in student.slots().values():
        perturb(slot.mixer)
    before = logits_of(student, ids)
    student = swap(swap(student, "mamba", layers=(0,)), "mamba2", layers=(2,))
    student = swap(student, "gate-swa", options_of("gate-swa", window=300), (1,))
    assert names_of(student) == ["mamba", "gate-swa", "mamba2"]
    assert_close(logits_of(student, ids), before, EXACT)


@every_hybrid
@pytest.mark.parametrize("layers", [None, (0, 2)], ids=["all", "outer"])
@torch.no_grad()
def test_the_formula_is_the_live_cache(mixer, layers):
    student = student_of("llama", mixer, layers)
    for length in (5, 40, 70):
        cache = decode(student, token_ids(1, length), sizes=(length,))[1]
        assert cache.num_bytes() == formula_bytes(cache_formula(student), length, torch.float32)
        assert cache.num_bytes() == sum(size.at(length, torch.float32) for size in cache_formula(student))


@every_hybrid
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_checked(family, mixer):
    check_cache(student_of(family, mixer, (0, 2)))


@every_hybrid
def test_each_layer_is_read_by_its_own_start(mixer):
    student = student_of("llama", mixer, (0, 2))
    for layer, name in enumerate(names_of(student)):
        if name != "attention" and not MIXERS[name].can_be_replaced:
            with pytest.raises(TypeError, match="no other mixer can start from it"):
                projections_of(student, layer)
            continue
        found = projections_of(student, layer)
        assert (found.feature_maps is not None) == (name in ("linear", "mamba", "mamba2"))
        if name != "attention":
            again = STARTS[name].from_projections(found, student.slots()[layer].mixer.options)
            assert torch.equal(STARTS[name].projections(again).q, found.q)


def test_a_hybrid_is_a_teacher():
    """Every layer starts from what it has; the plan refuses only what cannot be replaced."""
    student, ids = student_of("llama", "mamba2+gate-swa", (0, 2)), token_ids()
    budget = recipes.budget("hybrid", student.config, 4096, 64, 256)
    plan = make_plan(Language(), "hybrid", student.config, recipes.to_linear(budget), "text", "cpu")
    assert not plan.refusals and len(plan.steps) == 3
    assert names_of(student) == ["mamba2", "attention", "gate-swa"]  # a plan changes nothing that it is given
    mla = student_of("llama", "mla+mamba", (0, 2))
    (reason,) = make_plan(Language(), "hybrid", mla.config, recipes.to_linear(budget), "text", "cpu").refusals
    assert "no other mixer can start from it" in reason
    second = swap(swap(tiny_teacher("llama"), "mamba2", layers=(0,)), "gate-swa", options_of("gate-swa"), (2,))
    second = swap(second, "linear")
    assert names_of(second) == ["linear"] * 3
    assert_close(decode(second, ids)[0], logits_of(second, ids), CACHED)
