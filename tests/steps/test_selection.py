"""The selector on teachers built so that the right answer is known."""

import math

import pytest
import torch

from convert.data.batches import Batch
from convert.mixers import MIXERS
from convert.models.slot import Slot, attention_of
from convert.models.swap import swap
from convert.steps import selection
from convert.steps.handover import largest_change
from tests.conftest import FAMILIES, options_of, tiny_teacher, token_ids
from tests.training.stages import Reads


def batches(length: int = 64):
    return [
        Batch(ids, ids, torch.arange(length).expand(2, -1)) for ids in (token_ids(2, length, seed=i) for i in range(2))
    ]


def only_one_matters(family: str, layer: int):
    """A teacher whose other layers' attention says nothing: replacing them changes nothing."""
    teacher = tiny_teacher(family)
    for i, block in enumerate(teacher.base_model.layers):
        out = attention_of(block).dense if family == "gpt_neox" else attention_of(block).o_proj
        if i != layer:
            torch.nn.init.zeros_(out.weight)
            if out.bias is not None:
                torch.nn.init.zeros_(out.bias)
    return teacher


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 2])
def test_the_layer_that_matters_comes_first(mixer, family, layer):
    teacher = only_one_matters(family, layer)
    before = selection.parts_of(teacher)
    sensitivity = selection.sensitivity(swap(teacher, mixer, options_of(mixer)), before, batches())
    assert sensitivity[layer] > 1e-3
    assert all(abs(rise) < 1e-6 for i, rise in enumerate(sensitivity) if i != layer)


def test_far_looking_layers_are_found():
    """Windows of 8 tokens hurt the layer that looks back further, and none that looks at its own token."""
    teacher = tiny_teacher("llama")
    # large keys in the direction of nearness would be elaborate; values of the own token alone are not
    for i in (
        0,
        2,
    ):
        attention = attention_of(teacher.model.layers[i])
        torch.nn.init.zeros_(attention.v_proj.weight)
    before = selection.parts_of(teacher)
    sensitivity = selection.sensitivity(
        swap(teacher, "gate-swa", options_of("gate-swa", window=8, sinks=0)), before, batches()
    )
    assert sensitivity[1] > 1e-3 and abs(sensitivity[0]) < 1e-6 and abs(sensitivity[2]) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_recalling_layers_is_running_them(family):
    """The shortcut gives what whole passes give, and leaves the student as it came."""
    teacher = tiny_teacher(family)
    before = selection.parts_of(teacher)
    student = swap(teacher, "linear")
    edited, texts = selection.parts_of(student), batches()
    expected = student(texts[0].input_ids, use_cache=False).logits
    found = selection.sensitivity(student, before, texts)
    assert all(isinstance(attention_of(block), Slot) and "forward" not in vars(block) for block in student.blocks)
    assert torch.equal(student(texts[0].input_ids, use_cache=False).logits, expected)
    for layer in before:
        selection.restore_layers(student, before)
        rows = [student(batch.input_ids, use_cache=False).logits.log_softmax(-1) for batch in texts]
        selection.restore_layers(student, {layer: edited[layer]})
        others = [student(batch.input_ids, use_cache=False).logits.log_softmax(-1) for batch in texts]
        kl = torch.stack([(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(rows, others, strict=True)]).mean().item()
        assert found[layer] == pytest.approx(kl, rel=1e-3)


@torch.no_grad()
def test_a_kept_layer_is_the_teachers_again():
    teacher, ids = tiny_teacher("llama"), token_ids()
    before = selection.parts_of(teacher)
    student = swap(teacher, "mamba2")
    selection.restore_layers(student, {1: before[1]})
    assert list(student.slots()) == [0, 2] and student.config.mixers[1] is None and student.config.keeps_attention
    expected = swap(tiny_teacher("llama"), "mamba2", layers=(0, 2))(ids).logits
    assert (student(ids).logits - expected).abs().max() < 1e-4


def test_a_ranking_is_read_from_the_device_once():
    """However many batches and layers it has; but a model looks in each pass whether rows have documents."""
    student, counts = swap(tiny_teacher("gpt_neox"), "gate-swa", options_of("gate-swa")), []
    for layers in ([0], [0, 1, 2]):
        with Reads() as reads:
            selection.kl_when_given_back(student, selection.parts_of(student), layers, student, batches())
        counts.append(reads.count)
    with torch.no_grad(), Reads() as of_a_pass:
        selection.hidden_states(student, batches()[0])
    assert of_a_pass.count == 1 and counts[1] - counts[0] == 2 * len(batches())


def test_logits_that_are_no_numbers_are_a_change():
    head, before = torch.nn.Identity(), torch.ones(1, 3, 4)
    after = before.clone()
    after[0, 1, 2] = torch.nan
    assert largest_change(head, before, before + 0.5) == (0.5, 1.0)
    assert math.isnan(largest_change(head, before, after)[0])
