"""A cache is handed on whole, belongs to its model and batch, and is checked once, when a model is loaded."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from convert.core.errors import UserError
from convert.models.cache import CACHE_NAME, CACHE_NAMES, StudentCache, check_cache
from convert.models.student import ConvertedForCausalLM, attention_of, swap
from tests.conftest import FAMILIES, assert_close, tiny_teacher, token_ids
from tests.models.test_student import CACHED, logits_of, student_of

every_family = pytest.mark.parametrize("family", FAMILIES)


def handed_on(student, layer: int, change) -> None:
    """As a transformers that hands this layer its cache in another way: `change` edits the keyword arguments."""

    def hook(module, args, kwargs):
        change(kwargs)
        return args, kwargs

    attention_of(student.blocks[layer]).register_forward_pre_hook(hook, with_kwargs=True)


def drop(kwargs: dict) -> None:
    for name in CACHE_NAMES:
        kwargs.pop(name, None)


def rename(kwargs: dict) -> None:
    name = next(name for name in CACHE_NAMES if name in kwargs)
    kwargs["memory"] = kwargs.pop(name)


def fresh(family: str, layers: tuple[int, ...] | None) -> ConvertedForCausalLM:
    student_of.cache_clear()  # its hooks are for one test
    return student_of(family, "mamba2", layers)


@every_family
@pytest.mark.parametrize("change, words", [(drop, "must be given the cache of the call"), (rename, "memory")])
def test_a_mixer_that_misses_its_cache_says_so(family, change, words):
    student = fresh(family, (1,))
    handed_on(student, 1, change)
    with pytest.raises(TypeError, match=words):
        student(token_ids(), use_cache=True)


@every_family
@torch.no_grad()
def test_the_check_sees_a_kept_layer_that_misses_its_cache(family):
    student = fresh(family, (1,))
    check_cache(student)
    handed_on(student, 2, drop)
    with pytest.raises(
        UserError,
        match=(
            r"One token decoded with the cache must give the logits of a full pass; they differ by .* under"
            r" transformers"
        ),
    ):
        check_cache(student)


@pytest.mark.parametrize("loader", [ConvertedForCausalLM, AutoModelForCausalLM])
def test_loading_checks_the_cache(loader, tmp_path, monkeypatch):
    student_of("llama", "mamba2", (1,)).save_pretrained(tmp_path)
    loader.from_pretrained(tmp_path)
    monkeypatch.setattr(StudentCache, "count", lambda *_: None)  # every token is at position 0
    with pytest.raises(UserError, match="must give the logits of a full pass"):
        loader.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixer", ["mamba", "mla", "gate-swa"])
def test_the_check_allows_rounding_and_no_more(mixer, dtype, tmp_path, monkeypatch):
    student_of("qwen3", mixer, (0, 2)).save_pretrained(tmp_path)
    student = ConvertedForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert student.dtype == dtype
    monkeypatch.setattr(StudentCache, "count", lambda *_: None)
    with pytest.raises(UserError):
        check_cache(student)


def test_the_check_leaves_no_trace():
    """Neither random numbers, nor training mode, nor gradients; and nothing happens where there are no weights."""
    student = fresh("gpt_neox", (1,)).train()
    student.blocks[0].eval()
    before, modes = torch.get_rng_state(), [module.training for module in student.modules()]
    check_cache(student)
    assert torch.equal(torch.get_rng_state(), before) and [module.training for module in student.modules()] == modes
    assert all(p.grad is None for p in student.parameters())
    check_cache(student.to("meta"))


@pytest.mark.parametrize("places", ["auto", "meta", {"": "cpu"}, {"": "meta"}])
def test_loading_by_a_device_map(places, tmp_path):
    student = student_of("llama", "linear", (1,))
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
    if "meta" not in str(places):
        assert torch.equal(logits_of(loaded, token_ids()), logits_of(student, token_ids()))


@torch.no_grad()
def test_both_names_of_the_cache():
    student, ids = student_of("llama", "mamba2", (1,)), token_ids()
    expected = logits_of(student, ids)[:, 40:]
    for name in ("cache", "past_key_values"):
        cache = student(ids[:, :40], use_cache=True)[CACHE_NAME]
        assert_close(student(ids[:, 40:], **{name: cache}).logits, expected, CACHED)
    with pytest.raises(ValueError, match="two names of one argument"):
        student(ids, cache=cache, past_key_values=cache)


@pytest.mark.parametrize("other", [DynamicCache, lambda: ((torch.zeros(1), torch.zeros(1)),)])
def test_a_cache_of_another_kind_is_refused(other):
    student, ids = student_of("llama", "mamba2", (1,)), token_ids()
    with pytest.raises(
        TypeError, match=f"need its own cache, a StudentCache; got a .* use_cache=True, .* output's {CACHE_NAME}"
    ):
        student(ids, past_key_values=other(), use_cache=True)
    with pytest.raises((TypeError, ValueError), match="a StudentCache|a tuple"):  # transformers itself refuses tuples
        student.generate(ids, max_new_tokens=2, **{CACHE_NAME: other()})


@torch.no_grad()
def test_a_cache_of_another_batch_or_model_is_refused():
    student, ids = student_of("llama", "mamba2", (1,)), token_ids()
    cache = student(ids, use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match=re.escape("it holds 3 layers and 2 rows, and was given 3 and 1")):
        student(ids[:1, :1], past_key_values=cache)
    cache.layers.pop()
    with pytest.raises(ValueError, match="it holds 2 layers"):
        student(ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_generation_goes_on_with_a_cache():
    """What `generate` returned is a prompt already seen."""
    student, ids = student_of("llama", "mamba2", (1,)), token_ids(1, 12)
    whole = student.generate(ids, max_new_tokens=8, do_sample=False)
    first = student.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    rest = student.generate(first.sequences, max_new_tokens=4, do_sample=False, **{CACHE_NAME: first[CACHE_NAME]})
    assert torch.equal(rest, whole)


def test_a_cache_while_checkpointing_is_refused():
    student = fresh("llama", (1,)).train()
    student.activation_checkpointing_enable()
    assert student(token_ids())[0] is not None
    with pytest.raises(ValueError, match="use_cache=False, or eval"):
        student(token_ids(), use_cache=True)
    student_of.cache_clear()


@pytest.mark.parametrize(
    "other", ["static", "offloaded", "quantized", "sliding_window", "offloaded_static", "hybrid", "paged"]
)
def test_another_implementation_of_the_cache_is_refused(other):
    """However it is asked for; transformers would say that it ignores it. None and "dynamic" are the cache of this
    model."""
    student, ids = fresh("llama", (1,)), token_ids(1, 6)
    expected = student.generate(ids, max_new_tokens=2)
    assert torch.equal(student.generate(ids, max_new_tokens=2, cache_implementation="dynamic"), expected)
    refused = pytest.raises(
        ValueError, match=f"its own cache, a StudentCache, .* cache_implementation='{other}' asks for another"
    )
    with refused:
        student.generate(ids, max_new_tokens=2, cache_implementation=other)
    how = GenerationConfig(max_new_tokens=2)
    how.cache_implementation = other
    with refused:
        student.generate(ids, generation_config=how)
    with refused:
        student.generate(ids, how)
    student.generation_config.cache_implementation = other
    with refused:
        student.generate(ids, max_new_tokens=2)


def test_the_cache_of_the_teacher_means_nothing_to_its_student():
    teacher = tiny_teacher("llama")
    teacher.generation_config.cache_implementation = "static"
    assert swap(teacher, "mamba2").generate(token_ids(1, 6), max_new_tokens=2).shape == (1, 8)
