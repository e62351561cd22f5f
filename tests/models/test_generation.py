"""Every way to generate goes by the student's cache, whose rows are moved, repeated and chosen."""

import pytest
import torch

from convert.models.cache import StateLayer
from tests.conftest import (
    assert_close,
    token_ids,
)
from tests.models.test_student import (
    CACHED,
    MIDDLE,
    decode,
    every_choice,
    every_family,
    every_student,
    left_padded,
    logits_of,
    student_of,
)


@every_family
@every_student((0, 2))
def test_greedy_generation_cached_is_uncached(family, mixer, layers):
    student, (ids, mask) = student_of(family, mixer, layers), left_padded(5, 12)
    with_cache, without = (
        student.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert with_cache.shape == (2, 22)
    assert torch.equal(with_cache, without)
    alone = student.generate(ids[:1, 5:], max_new_tokens=10, do_sample=False)
    assert torch.equal(with_cache[:1, 5:], alone)


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@every_student(None, MIDDLE)
def test_beam_search_cached_is_uncached(family, mixer, layers):
    """Beams reorder, and rows of unequal length keep their own positions."""
    student, (ids, mask) = student_of(family, mixer, layers), left_padded(5, 12)
    settings = dict(num_beams=3, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_scores=True)
    with_cache, without = (
        student.generate(ids, attention_mask=mask, use_cache=use_cache, **settings) for use_cache in (True, False)
    )
    assert torch.equal(with_cache.sequences, without.sequences)
    assert_close(with_cache.sequences_scores, without.sequences_scores, CACHED)
    if layers is None:
        greedy = student.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        assert not torch.equal(with_cache.sequences, greedy), "the beams never reordered anything"


@every_student(None, MIDDLE)
def test_cache_follows_its_rows(mixer, layers):
    """Rows swapped, repeated, selected: each goes on as it would have alone."""
    student, (ids, mask) = student_of("llama", mixer, layers), left_padded(15)
    expected = torch.cat(
        [torch.nn.functional.pad(logits_of(student, ids[:1, 15:]), (0, 0, 15, 0)), logits_of(student, ids[1:])]
    )[:, 40:]
    changes = {
        (1, 0): lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        (0, 0, 1, 1): lambda cache: cache.batch_repeat_interleave(2),
        (1,): lambda cache: cache.batch_select_indices(torch.tensor([1])),
        (0,): lambda cache: cache.batch_select_indices(torch.tensor([0])),
    }
    for rows, change in changes.items():
        _, cache = decode(student, ids[:, :40], sizes=(40,), mask=mask[:, :40])
        change(cache)
        assert all(type(c.state).__name__ == "State" for c in cache.layers if isinstance(c, StateLayer))
        rows = list(rows)
        with torch.no_grad():
            logits = student(ids[rows, 40:], attention_mask=mask[rows], past_key_values=cache).logits
        assert_close(logits, expected[rows], CACHED)


@every_student(MIDDLE, (0, 2))
def test_sampling_several_answers(mixer, layers):
    student, (ids, mask) = student_of("gpt_neox", mixer, layers), left_padded(5, 12)
    out = student.generate(ids, attention_mask=mask, do_sample=True, num_return_sequences=3, max_new_tokens=6)
    assert out.shape == (6, 18)
    assert torch.equal(out[:, :12], ids.repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in out[:, 12:]}) == 6


def test_a_cache_can_be_used_again_after_reset():
    student, ids = student_of("llama", "mamba", (1,)), token_ids()
    logits, cache = decode(student, ids)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.num_bytes() == 0
    with torch.no_grad():
        assert_close(student(ids, past_key_values=cache).logits, logits, CACHED)


@every_choice
def test_cropping_is_refused(layers):
    """By name, and before anything is cropped."""
    student = student_of("llama", "mamba", layers)
    _, cache = decode(student, token_ids())
    before = cache.num_bytes()
    with pytest.raises(ValueError, match="recurrent state cannot be rolled back.*cannot be cropped"):
        cache.crop(-1)
    assert cache.num_bytes() == before


def test_an_assistant_model_is_refused():
    student = student_of("llama", "mamba", (1,))
    with pytest.raises(ValueError, match="assisted generation"):
        student.generate(token_ids(1, 8), assistant_model=student, max_new_tokens=4)
