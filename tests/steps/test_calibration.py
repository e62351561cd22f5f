"""Look-backs: how far a layer's heads look, against transformers' own attention weights, and as half-lives."""

import copy

import pytest
import torch

from convert.data.batches import Batch
from convert.evaluation.half_lives import half_lives
from convert.mixers import MIXERS
from convert.models.slot import attention_of
from convert.models.swap import swap
from convert.steps.calibration import inputs_of
from tests.conftest import FAMILIES, assert_close, tiny_teacher, token_ids

LENGTH = 65


def batches(count: int = 2, first: int = 0) -> list[Batch]:
    """Two rows each; the first document of a row has `first` tokens."""
    positions = torch.cat([torch.arange(first), torch.arange(LENGTH - first)]).expand(2, -1)
    return [Batch(ids, ids, positions) for ids in (token_ids(2, LENGTH, seed=i) for i in range(count))]


@pytest.mark.parametrize("family, changes", [*((f, {}) for f in FAMILIES), ("mistral", {"sliding_window": 9})])
@torch.no_grad()
def test_a_look_back_is_the_mean_distance_by_attention(family, changes):
    teacher = tiny_teacher(family, attn_implementation="eager", **changes)
    found = [stats.look_back for stats in inputs_of(teacher, batches(), look_back=True)]
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    weights = [teacher(b.input_ids, output_attentions=True, use_cache=False).attentions for b in batches()]
    for layer, look_back in enumerate(found):
        expected = torch.stack([(w[layer] * distance).sum(-1).mean((0, 2)) for w in weights]).mean(0)
        assert_close(look_back, expected, 1e-5)
    assert torch.stack(found).std() > 0.1
    assert all(stats.look_back is None for stats in inputs_of(teacher, batches()))


def uniform(family: str):
    """A teacher whose heads look at all tokens alike."""
    teacher = tiny_teacher(family)
    for block in teacher.base_model.layers:
        attention = attention_of(block)
        torch.nn.init.zeros_(attention.query_key_value.weight if family == "gpt_neox" else attention.q_proj.weight)
        if family == "gpt_neox":
            torch.nn.init.zeros_(attention.query_key_value.bias)
    return teacher


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("mixer", ["kda", "gdn"])
@torch.no_grad()
def test_a_head_with_a_known_look_back_gets_that_half_life(mixer, family):
    """Of two documents of n tokens whose tokens all weigh the same: the mean of 0, 1/2, 1, ... in each."""
    teacher, texts = uniform(family), batches(first=21)
    expected = (21 * 20 / 4 + 44 * 43 / 4) / LENGTH
    stats = inputs_of(teacher, texts, look_back=True)
    student = swap(copy.deepcopy(teacher), mixer, MIXERS[mixer].Options(decay_start="calibrated"), None, stats)
    for quantiles in half_lives(student, texts).values():
        assert list(quantiles.values()) == pytest.approx([expected] * len(quantiles), rel=1e-4)
