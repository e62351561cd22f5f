"""Cache sizes: live caches have the size that the formula says, and from some length on the student's is the smaller
one."""

import pytest
import torch

from convert.evaluation import generation, inference
from convert.mixers import MIXERS
from convert.mixers.base import StateSize
from convert.models.swap import swap
from tests.conftest import FAMILIES, options_of, tiny_teacher

KV_BYTES = 2 * 2 * 8 * 4  # keys and values of 2 heads of 8 in float32, per layer and token
LENGTHS = (1, 20, 100)


def cache_bytes(*args, seconds=1e9):
    return {length: found.bytes for length, found in inference.context_costs(*args, seconds=seconds).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [None, (0, 2)], ids=["all", "some"])
@pytest.mark.parametrize("mixer", [None, *MIXERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_live_cache_is_what_the_formula_says(family, mixer, layers, dtype):
    model = tiny_teacher(family)
    if mixer is not None:
        model = swap(model, mixer, options_of(mixer), layers)
    formula = inference.cache_formula(model)
    assert cache_bytes(model, dtype, LENGTHS) == {n: inference.formula_bytes(formula, n, dtype) for n in LENGTHS}


def test_keys_and_values_grow_and_states_do_not():
    teacher, student = tiny_teacher("llama"), swap(tiny_teacher("llama"), "mamba2")
    assert cache_bytes(teacher, torch.float32, LENGTHS) == {n: 3 * KV_BYTES * n for n in LENGTHS}
    assert len(set(cache_bytes(student, torch.float32, LENGTHS).values())) == 1


def test_a_sliding_window_ends_the_growth():
    model = tiny_teacher("mistral", sliding_window=64)
    assert cache_bytes(model, torch.float32, (63, 300)) == {63: 3 * KV_BYTES * 63, 300: 3 * KV_BYTES * 63}
    assert inference.formula_bytes(inference.cache_formula(model), 300, torch.float32) == 3 * KV_BYTES * 63


def test_a_prefill_in_pieces_is_a_prefill(monkeypatch):
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 32)
    for mixer in (None, *MIXERS):
        model = tiny_teacher("llama") if mixer is None else swap(tiny_teacher("llama"), mixer, options_of(mixer))
        ids = torch.arange(3, 90)[None]
        logits, cache = generation.prefill(model, ids)
        assert cache.get_seq_length() == ids.shape[1]
        with torch.no_grad():
            assert (logits - model(ids, use_cache=False).logits[:, -1:]).abs().max() < 1e-4


def test_decoding_for_a_rate_leaves_the_cache_as_it_was():
    model = swap(tiny_teacher("llama"), "gate-swa", options_of("gate-swa"), (0, 2))
    found, logits, cache = inference.context_cost(model, 40, torch.float32)
    assert cache.get_seq_length() == 40 and logits.shape[:2] == (1, 1)
    assert found.length == 40 and found.time_to_first_token_s > 0 and found.tokens_per_s > 0


def test_lengths_that_would_take_too_long_are_left_out():
    assert list(cache_bytes(tiny_teacher("llama"), torch.float32, (8, 1 << 20), seconds=1.0)) == [8]


def test_break_even_is_the_first_length_where_the_student_is_smaller():
    teacher, student = (StateSize(elements_per_token=10),), (StateSize(fixed_bytes=1000),)
    length = inference.break_even(teacher, student, torch.float32)
    assert teacher[0].at(length, torch.float32) > 1000 >= teacher[0].at(length - 1, torch.float32)
    assert inference.break_even(student, teacher, torch.float32) is None
    assert inference.break_even((StateSize(elements_per_token=10, window=20),), student, torch.float32) is None


def test_keys_and_values_count_as_they_are_shipped():
    teacher, student = tiny_teacher("llama"), swap(tiny_teacher("llama"), "mamba2")
    assert 2 * cache_bytes(teacher, torch.bfloat16, (64,))[64] == cache_bytes(teacher, torch.float32, (64,))[64]
    # states are float32 always
    assert cache_bytes(student, torch.bfloat16, (64,)) == cache_bytes(student, torch.float32, (64,))
