"""A student as an architecture that transformers has itself: the same logits, loaded without our code."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from convert.exporting import native
from convert.exporting.hub import check_in_clean_process, export_native
from convert.mixers import MLA
from convert.models.cache import CACHE_NAME
from convert.models.student import swap
from tests.conftest import assert_close, options_of, perturb, tiny_teacher, token_ids
from tests.exporting.test_hub import tiny_tokenizer

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
CASES = {
    "llama": ("llama", {}, {}),
    "tied": ("llama", dict(tie_word_embeddings=True), {}),
    "half of the frequencies": ("llama", {}, dict(rope_dim=4)),
    "low-rank queries": ("llama", {}, dict(q_rank=9)),
    "mistral": ("mistral", {}, {}),
    "another theta": ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=5e5)), {}),
    "linear rope": ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)), {}),
    "llama3 rope": ("llama", dict(rope_parameters=LLAMA3), dict(rope_dim=4)),
}


def student_of(family: str, changes: dict, options: dict):
    student = swap(tiny_teacher(family, **changes), "mla", MLA.Options(shape="native", kv_rank=11, **options))
    for slot in student.slots().values():
        perturb(slot.mixer)
    return student.eval()


@pytest.mark.parametrize("family, changes, options", CASES.values(), ids=CASES)
@torch.no_grad()
def test_the_native_model_gives_the_same_logits(family, changes, options):
    student, ids = student_of(family, changes, options), token_ids()
    assert native.obstacle(student) is None
    model = native.to_native(student)
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert_close(model(ids, use_cache=False).logits, student(ids, use_cache=False).logits, 1e-5)
    greedy = [m.generate(ids[:, :9], max_new_tokens=12, do_sample=False) for m in (model, student)]
    assert torch.equal(*greedy)


@torch.no_grad()
def test_exported_it_loads_in_a_clean_process_without_code(tmp_path):
    student, ids = student_of("llama", dict(tie_word_embeddings=True), {}), token_ids()
    export_native(student, tiny_tokenizer(), tmp_path / "native", card="a card")
    assert not list((tmp_path / "native").glob("*.py"))
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and "auto_map" not in config
    found = check_in_clean_process(tmp_path / "native", ids, trust_remote_code=False)
    assert_close(found, student(ids, use_cache=False).logits, 1e-5)
    export_native(student, tiny_tokenizer(), tmp_path / "native", card="again")  # over an earlier export
    assert (tmp_path / "native" / "README.md").read_text() == "again"


@torch.no_grad()
def test_it_holds_the_latents_only():
    """transformers' own cache: latents and one rotary key per token."""
    student = student_of("llama", {}, dict(rope_dim=4))
    cache = native.to_native(student)(token_ids(1, 20), use_cache=True)[CACHE_NAME]
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert held == 3 * 20 * (11 + 4)


OBSTACLES = {
    "another mixer": (lambda: swap(tiny_teacher("llama"), "gate-swa", options_of("gate-swa")), "layers are gate-swa"),
    "a kept layer": (
        lambda: swap(tiny_teacher("llama"), "mla", MLA.Options(shape="native"), (0, 1)),
        "layers are attention and mla",
    ),
    "the exact shape": (lambda: swap(tiny_teacher("llama"), "mla", MLA.Options()), "edit.shape=native"),
    "another family": (
        lambda: swap(tiny_teacher("gpt_neox", attention_bias=False), "mla", MLA.Options(shape="native")),
        "this one is gpt_neox",
    ),
    "another family, whose exact shape has no other": (
        lambda: swap(tiny_teacher("gpt_neox"), "mla", MLA.Options()),
        "this one is gpt_neox",
    ),
    "biases of MLPs": (
        lambda: swap(tiny_teacher("llama", mlp_bias=True), "mla", MLA.Options(shape="native")),
        "MLPs have biases",
    ),
}


@pytest.mark.parametrize("make, words", OBSTACLES.values(), ids=OBSTACLES)
def test_obstacles_are_named(make, words):
    assert words in native.obstacle(make())


def test_auto_classes_do_not_need_us(tmp_path):
    export_native(student_of("llama", {}, {}), tiny_tokenizer(), tmp_path / "native", card="", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert model.dtype == torch.bfloat16 and type(model).__module__.startswith("transformers.")
