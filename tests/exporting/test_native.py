"""A student as an architecture that transformers has itself: the same logits, loaded without our code."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from convert.exporting import native, verify
from convert.exporting.hub import export
from convert.exporting.verify import check_in_clean_process
from convert.mixers import GDN, MLA
from convert.models.cache import CACHE_NAME
from convert.models.swap import swap
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


YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128)
DELTA_CASES = {  # changes to the teacher, options of the mixer, layers
    "qwen3": ({}, {}, (0, 1)),
    "the last layers": ({}, dict(conv=2), (1, 2)),
    "one layer, tied": (dict(tie_word_embeddings=True), dict(conv=1), (1,)),
    "biases of attention": (dict(attention_bias=True), {}, (0, 2)),
    "linear rope": (dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)), {}, (0, 1)),
    "yarn": (dict(rope_parameters=YARN), {}, (0, 1)),
}


def delta_student_of(changes: dict, options: dict, layers: tuple[int, ...]):
    student = swap(tiny_teacher("qwen3", **changes), "gdn", GDN.Options(**options), layers)
    for slot in student.slots().values():
        perturb(slot.mixer)
    return student.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("changes, options, layers", DELTA_CASES.values(), ids=DELTA_CASES)
@torch.no_grad()
def test_a_delta_hybrid_is_the_native_model(changes, options, layers, dtype):
    """In one pass and with the cache; in float64 too, where the native class makes norms and rotary tables in
    float32."""
    student, ids = delta_student_of(changes, options, layers).to(dtype), token_ids()
    assert native.obstacle(student) is None
    model = native.to_native(student)
    assert type(model).__name__ == "Qwen3_5ForCausalLM" and model.dtype == dtype
    expected = student(ids, use_cache=False).logits
    assert_close(model(ids, use_cache=False).logits, expected, 1e-5)
    outputs = [model(ids[:, :11], use_cache=True)]
    for token in ids[:, 11:].split(1, 1):
        outputs.append(model(token, use_cache=True, **{CACHE_NAME: outputs[-1][CACHE_NAME]}))
    assert_close(torch.cat([o.logits for o in outputs], 1), expected, 1e-5)
    greedy = [m.generate(ids[:, :9], max_new_tokens=12, do_sample=False) for m in (model, student)]
    assert torch.equal(*greedy)


@torch.no_grad()
def test_a_delta_hybrid_is_exported_and_verified(tmp_path, monkeypatch):
    """In a clean process, from weights in bfloat16, where small weights of norms minus one would be others. The folder
    with code is checked elsewhere."""
    student, ids, dtype = delta_student_of(*DELTA_CASES["one layer, tied"]), token_ids(), torch.bfloat16
    for p in student.parameters():  # as a run rounds them
        p.copy_((0.1 * p if p.ndim == 1 else p).to(dtype))
    expected = student(ids, use_cache=False).logits
    check = verify.check_in_clean_process
    monkeypatch.setattr(
        verify,
        "check_in_clean_process",
        lambda *args, trust_remote_code, dtype: (
            expected if trust_remote_code else check(*args, trust_remote_code=False, dtype=dtype)
        ),
    )
    cards = dict(card="with code", card_without_code="without")
    place = tmp_path / "model"
    found = verify.export_and_verify(student, tiny_tokenizer(), place, **cards, dtype=dtype, input_ids=ids)
    assert found["native"]["model_type"] == "qwen3_5_text"
    assert found["native"]["max_abs_logit"] <= found["native"]["allowed"] <= 1e-3
    folder = tmp_path / "native"
    assert not list(folder.glob("*.py"))
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"]["partial_rotary_factor"] == 1.0 and "auto_map" not in config
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == dtype and type(loaded).__module__.startswith("transformers.")


@torch.no_grad()
def test_exported_it_loads_in_a_clean_process_without_code(tmp_path):
    student, ids = student_of("llama", dict(tie_word_embeddings=True), {}), token_ids()
    export(native.to_native(student), tiny_tokenizer(), tmp_path / "native", card="a card")
    assert not list((tmp_path / "native").glob("*.py"))
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3" and "auto_map" not in config
    found = check_in_clean_process(tmp_path / "native", ids, trust_remote_code=False)
    assert_close(found, student(ids, use_cache=False).logits, 1e-5)
    export(native.to_native(student), tiny_tokenizer(), tmp_path / "native", card="again")  # over an earlier export
    assert (tmp_path / "native" / "README.md").read_text() == "again"


@torch.no_grad()
def test_it_holds_the_latents_only():
    """transformers' own cache: latents and one rotary key per token."""
    student = student_of("llama", {}, dict(rope_dim=4))
    cache = native.to_native(student)(token_ids(1, 20), use_cache=True)[CACHE_NAME]
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert held == 3 * 20 * (11 + 4)


WINDOWS = dict(
    use_sliding_window=True, sliding_window=8, layer_types=["full_attention", "sliding_attention", "full_attention"]
)
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
    "delta rule of another family": (lambda: swap(tiny_teacher("llama"), "gdn", layers=(0, 1)), "this is llama"),
    "delta rule alone": (lambda: swap(tiny_teacher("qwen3"), "gdn"), "cache counts no tokens"),
    "delta rule beside another mixer": (
        lambda: swap(swap(tiny_teacher("qwen3"), "gdn", layers=(0,)), "kda", layers=(2,)),
        "its layers are attention and gdn and kda",
    ),
    "delta rule beside windows": (
        lambda: swap(tiny_teacher("qwen3", **WINDOWS), "gdn", layers=(0,)),
        "its attention has windows",
    ),
    "delta rule of a teacher with another activation": (
        lambda: swap(tiny_teacher("qwen3", hidden_act="gelu"), "gdn", layers=(0, 1)),
        "its MLPs have gelu, and its convolutions silu",
    ),
    "convolutions of two sizes": (
        lambda: swap(swap(tiny_teacher("qwen3"), "gdn", layers=(0,)), "gdn", GDN.Options(conv=2), (2,)),
        "convolutions of different sizes",
    ),
}


@pytest.mark.parametrize("make, words", OBSTACLES.values(), ids=OBSTACLES)
def test_obstacles_are_named(make, words):
    assert words in native.obstacle(make())


def test_auto_classes_do_not_need_us(tmp_path):
    export(
        native.to_native(student_of("llama", {}, {})),
        tiny_tokenizer(),
        tmp_path / "native",
        card="",
        dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert model.dtype == torch.bfloat16 and type(model).__module__.startswith("transformers.")
