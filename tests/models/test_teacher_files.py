"""What a stranger's folder says is checked before transformers sees it: nothing senseless, endless or hostile gets
further."""

import json
import math
import os

import pytest
import torch
from transformers import AutoConfig

from convert.core.errors import UserError
from convert.exporting.hub import export
from convert.models.catalog import NANO, resolve
from convert.models.loading import load_teacher, read_config
from convert.models.swap import swap
from convert.models.teacher_files import config_of, read_json
from tests.conftest import FAMILIES, tiny_teacher

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def raw(family: str = "llama") -> dict:
    return json.loads(tiny_teacher(family).config.to_json_string())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_good_configuration_is_what_transformers_makes_of_it(family):
    expected = AutoConfig.for_model(**raw(family)).to_dict()
    found = config_of(raw(family), "x").to_dict()
    assert {k: v for k, v in expected.items() if found.get(k) != v} == {}


SENSELESS = [
    ("num_hidden_layers", 100_000_000, "within 1 .. 1,000"),
    ("num_hidden_layers", "2", "a whole number"),
    ("num_hidden_layers", 0, "within 1"),
    ("num_attention_heads", 0, "within 1"),
    ("num_attention_heads", -2, "within 1"),
    ("num_key_value_heads", 3, "a multiple of num_key_value_heads"),
    ("hidden_size", 10**9, "within 1 .. 131,072"),
    ("vocab_size", 2**40, "within 1 .. 16,777,216"),
    ("hidden_act", "nope", "one of"),
    ("dtype", "float7", "one of"),
    ("dtype", "int8", "one of"),
    ("max_position_embeddings", 10**12, "within 2"),
    ("tie_word_embeddings", "yes", "True or False"),
    ("rms_norm_eps", math.nan, "a finite number"),
    ("eos_token_id", 99, "below vocab_size"),
    ("eos_token_id", [1, 10**6], "below vocab_size"),
    ("pad_token_id", "x", "a whole number"),
    ("rope_parameters", 5, "a dictionary"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": -1.0}, "rope_theta"),
    ("rope_parameters", LLAMA3 | {"factor": math.inf}, "a finite number"),
    ("per_layer_config", {"0": {"head_dim": 4}}, "None"),
    ("head_dim", 0, "within 1"),
    ("layer_types", ["nope"], "a list"),
]


@pytest.mark.parametrize("field, value, words", SENSELESS, ids=[f"{f}={str(v)[:20]}" for f, v, _ in SENSELESS])
def test_senseless_facts(field, value, words):
    with pytest.raises(UserError, match=words) as caught:
        config_of(raw() | {field: value}, "x")
    assert field in str(caught.value) or "rotary" in str(caught.value)


def test_only_what_a_model_is_made_of_reaches_transformers():
    hostile = {
        "attn_implementation": "evil/evil",
        "_attn_implementation": "evil/evil",
        "to_dict": 5,
        "num_labels": 10**9,
        "auto_map": 5,
        "output_attentions": True,
    }
    config = config_of(raw() | hostile, "x")
    assert (
        config._attn_implementation is None
        and config.num_labels == 2
        and config.to_dict()["hidden_size"] == 32
        and not config.output_attentions
    )


def student() -> dict:
    return json.loads(swap(tiny_teacher("llama"), "mamba2", layers=(0, 2)).config.to_json_string())


def changed(content: dict, path: str, value) -> dict:
    *way, last = path.split(".")
    inner = content
    for key in way:
        inner = inner[int(key) if key.isdecimal() else key]
    inner[last] = value
    return content


def test_a_student_is_read():
    assert [m and m["name"] for m in config_of(student(), "x").mixers] == ["mamba2", None, "mamba2"]


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("host", None, "host must be a dictionary"),
        ("host.model_type", "converted", "one of"),
        ("host.num_hidden_layers", 4, "one for each of 4"),
        ("mixers", None, "mixers must be"),
        ("mixers", [], "mixers must be one for each"),
        ("mixers.0.name", "rwkv", "one of"),
        ("mixers.0.options", {"conv": 0}, "within 1 .. 64"),
        ("mixers.0.options", {"speed": 1}, "may have conv, dt_rank"),
        ("mixers.0.shape.width", 64, "of its host"),
        ("mixers.0.shape.num_heads", "4", "a whole number"),
        ("mixers.0.more", 1, "must have name, shape and options"),
        ("mixers.2.options.conv", 0, r"^x: mixers\[2\]\.options: Mamba2\.Options: conv must be"),
        ("mixers.0.shape", {"width": 8}, r"^x: mixers\[0\]\.shape must have head_dim, num_heads"),
        ("mixers.2.shape.head_dim", 2, r"mixers\[2\]\.shape\.head_dim must be that of its host"),
        ("mixers.2.shape.head_dim", 64, r"head_dim must be that of its host"),
        *(
            ("mixers.0.shape.rotary_dim", size, r"^x: mixers\[0\]\.shape\.rotary_dim must be its host's")
            for size in (0, 2, 3, 64, 8192)
        ),
    ],
)
def test_a_senseless_student(path, value, words):
    with pytest.raises(UserError, match=words):
        config_of(changed(student(), path, value), "x")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"5",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe{}",
        b'{"a": ' + b"9" * 5000 + b"}",
        b"{}{}",
        b"\0",
    ],
)
def test_what_is_no_json_object(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json must be a JSON object"):
        read_json(tmp_path / "config.json")


def test_a_file_without_end(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**32)  # takes no room on the disk
    with pytest.raises(UserError, match="must be at most 16,777,216 bytes; it has 4,294,967,296"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("tokenizer_config.json", "null", "must be a JSON object"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token must be text or a dictionary"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template must be"),
        ("tokenizer_config.json", '{"tokenizer_class": []}', "tokenizer_class must be"),
        ("generation_config.json", "[]", "must be a JSON object"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id must be"),
        ("tokenizer.json", "[" * 100_000, "must be a JSON object"),
        ("tokenizer.json", "{}", "cannot be read|no readable tokenizer"),
    ],
)
def test_other_files_of_the_folder(name, content, words, tmp_path):
    teacher = copy_of_nano(tmp_path)
    (teacher / name).write_text(content)
    with pytest.raises(UserError, match=words):
        load_teacher(teacher)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "more.safetensors"])
def test_a_pipe_would_never_end(name, tmp_path):
    teacher = copy_of_nano(tmp_path)
    (teacher / name).unlink(missing_ok=True)
    os.mkfifo(teacher / name)
    with pytest.raises(UserError, match="is a pipe, a socket or a device"):
        read_config(resolve(teacher))


def copy_of_nano(place):
    teacher = place / "teacher"
    teacher.mkdir()
    for file in NANO.iterdir():
        (teacher / file.name).write_bytes(file.read_bytes())
    return teacher


def test_an_exported_student_passes(tmp_path):
    made = swap(tiny_teacher("qwen3"), "gate-swa", layers=(1,))
    export(made, load_teacher(NANO).tokenizer, tmp_path / "model", card="")
    config = read_config(resolve(tmp_path / "model"))
    assert config.mixers == made.config.mixers and config.dtype == torch.float32
