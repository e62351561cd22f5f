"""Cache sizes at lengths that were not measured, and where the student's pays."""

import torch

from convert.measure import CacheSize, break_even, cache_size
from convert.model import swap
from tests.conftest import tiny_teacher, token_ids

KV_BYTES = 2 * 2 * 8 * 4  # keys and values of 2 heads of 8 in float32, per layer and token


def test_keys_and_values_grow_and_states_do_not():
    teacher, student = cache_size(tiny_teacher("llama")), cache_size(swap(tiny_teacher("llama"), "mamba2"))
    assert [teacher.at(n) for n in (1, 100, 1000)] == [3 * KV_BYTES * n for n in (1, 100, 1000)]
    assert student.at(1) == student.at(10**6) > 0
    hybrid = cache_size(swap(tiny_teacher("llama"), "mamba2", layers=(0, 2)))
    assert hybrid.at(1000) - hybrid.at(999) == KV_BYTES


def test_a_sliding_window_ends_the_growth():
    model = tiny_teacher("mistral", sliding_window=64)
    size = cache_size(model)
    assert size.at(64) == size.at(10_000) == 3 * KV_BYTES * 64
    live = model(token_ids(1, 100), use_cache=True).past_key_values.layers
    assert abs(sum(layer.keys.nbytes + layer.values.nbytes for layer in live) - size.at(100)) <= 3 * KV_BYTES  # transformers keeps one less


def test_break_even_is_the_first_length_where_the_student_is_smaller():
    teacher, student = CacheSize(((160, 10, None),)), CacheSize(((1000, 0, None),))
    length = break_even(teacher, student)
    assert teacher.at(length) > student.at(length) and teacher.at(length - 1) <= student.at(length - 1)
    assert break_even(student, teacher) is None
    assert break_even(CacheSize(((160, 10, 50),)), student) is None


def test_keys_and_values_count_as_they_are_shipped():
    teacher, student = tiny_teacher("llama"), swap(tiny_teacher("llama"), "mamba2")
    assert 2 * cache_size(teacher, torch.bfloat16).at(64) == cache_size(teacher).at(64)
    assert cache_size(student, torch.bfloat16).at(64) == cache_size(student).at(64)  # states are float32 always
