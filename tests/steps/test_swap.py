"""The step Swap: which layers it keeps, what it looks at first, and what it refuses."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from convert.domains.language import Language
from convert.mixers import GDN, KDA
from convert.models.swap import swap
from convert.steps import swap as module
from convert.steps.base import Outline
from convert.steps.layers import EveryNth, MostSensitive
from convert.steps.set_decay import SetDecay
from convert.steps.swap import Swap
from tests.conftest import tiny_teacher
from tests.steps.test_refit import batches, seen_by

OPTIONS = {
    "kda": KDA.Options(decay_start="calibrated", start="refitted"),
    "gdn": GDN.Options(decay_start="calibrated", gate_start="open", start="refitted"),
}


def outline(teacher, host=None, mixers=(None,) * 3) -> Outline:
    config = teacher.config
    return Outline(Language(), config, host or config, mixers, mixers != (None,) * 3, False, 64, {})


@pytest.mark.parametrize(
    "mixer, keep, kept", [("gdn", (1,), [1]), ("kda", EveryNth(4), [2]), ("gdn", MostSensitive(4), None)], ids=str
)
def test_a_run_refits_what_it_swaps_in(mixer, keep, kept):
    """The errors of the layers that were replaced are those of a refit, on the text of the calibration; what is kept is
    the teacher's."""
    teacher = tiny_teacher("qwen3")
    asked = []
    session = SimpleNamespace(
        teacher=SimpleNamespace(model=teacher), tokens=512, sequences=lambda n: asked.append(n) or batches()
    )
    step = Swap("edit", mixer, OPTIONS[mixer], keep, calibration=777)
    student, found = step.run(copy.deepcopy(teacher), session)
    assert set(asked) <= {777, 512} and 777 in asked
    kept = found["layers"]["kept"] if kept is None else kept
    assert found["layers"]["kept"] == kept and sorted({0, 1, 2} - set(kept)) == list(student.slots())
    other = swap(copy.deepcopy(teacher), mixer, OPTIONS[mixer], tuple(student.slots()), _stats(teacher)).eval()
    for layer in student.slots():
        errors = []
        for model in (student, other):
            h, y = seen_by(teacher, model, layer)
            out = model.slots()[layer].mixer.out.weight.double()
            errors.append((y - h @ out.T).square().sum() / y.square().sum())
        assert errors[0] < 0.9 * errors[1]
    for layer in kept:
        kept_layer, own = student.blocks[layer], teacher.model.layers[layer]
        assert all(torch.equal(a, b) for a, b in zip(kept_layer.parameters(), own.parameters(), strict=True))


def _stats(teacher):
    return module.inputs_of(teacher, batches(), look_back=True)


@pytest.mark.parametrize(
    "pattern, num_layers, kept",
    [(EveryNth(4), 8, (3, 7)), (EveryNth(4), 6, (3,)), (EveryNth(4), 3, (2,)), (EveryNth(4), 1, (0,)),
     (MostSensitive(5), 3, (2,)), (MostSensitive(5), 12, (4, 9))],
)  # fmt: skip
def test_a_pattern_keeps_one_layer_at_least(pattern, num_layers, kept):
    assert pattern.layers(num_layers) == kept


def problems(step, before) -> str:
    return " ".join(step.problems(before))


def test_what_a_swap_refuses():
    teacher, step = tiny_teacher("llama"), Swap("edit", "gdn", OPTIONS["gdn"], EveryNth(4), calibration=64)
    assert not step.problems(outline(teacher))
    shallow = copy.deepcopy(teacher.config)
    shallow.num_hidden_layers = 2
    assert "another number of layers. Set start=copied" in problems(step, outline(teacher, shallow, (None,) * 2))
    copied = replace(step, options=replace(step.options, start="copied"))
    assert not copied.problems(outline(teacher, shallow, (None,) * 2))
    linear = outline(teacher, mixers=("linear",) * 3)
    assert "what it would replace is linear. Take another decay_start" in problems(step, linear)
    assert not replace(step, options=GDN.Options()).problems(linear)
    assert "not all be kept; got none. Set keep or layers" in problems(step, outline(teacher, mixers=(None,)))


def test_a_rate_from_which_nothing_is_learned_is_refused():
    teacher = tiny_teacher("llama")
    for mixer in ("kda", "gdn"):
        before = outline(teacher, mixers=(mixer, None, "mamba"))
        assert f"decays of {mixer} are learned by their logarithm" in problems(SetDecay("forget", 0), before)
        assert not SetDecay("forget", 1e-3).problems(before)
    assert not SetDecay("forget", 0).problems(outline(teacher, mixers=("mamba",) * 3))
