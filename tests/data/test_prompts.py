"""Prompts as ids, for tokenizers that add special tokens in front, behind or both, and for chat templates of
strangers."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from convert import generate
from convert.core.errors import UserError
from convert.data.prompts import chat_text, encode, has_chat_template, leading, left_padded
from convert.evaluation.generation import continuations
from convert.evaluation.scoring import SCORING_METHODS
from convert.evaluation.tasks import TASKS
from convert.models.catalog import NANO
from convert.models.loading import load_teacher

IN_FRONT, BEHIND = 1, 0  # ids of neox-nano's that stand for a begin and an end
TEMPLATES = {
    "nothing": "$A",
    "in front": "<b> $A",
    "behind": "$A <e>",
    "both": "<b> $A <e>",
    "several": "<b> <b> $A <e> <e>",
}


def tokenizer_that_adds(what: str):
    tokenizer = load_teacher(str(NANO)).tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=TEMPLATES[what], special_tokens=[("<b>", IN_FRONT), ("<e>", BEHIND)]
    )
    return tokenizer


@pytest.mark.parametrize("what", TEMPLATES)
def test_only_what_belongs_in_front_stays(what):
    tokenizer, text = tokenizer_that_adds(what), "def add(a, b):"
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    front = [IN_FRONT] * TEMPLATES[what].count("<b>")
    assert tokenizer(text)["input_ids"] == front + plain + [BEHIND] * TEMPLATES[what].count("<e>")
    assert leading(tokenizer) == front
    assert encode(tokenizer, text) == front + plain
    assert encode(tokenizer, text, " pass") == front + tokenizer(text + " pass", add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, "") == front


@pytest.mark.parametrize("name", ["names", "indentation"])
def test_a_tokenizer_that_ends_texts_changes_no_answer(name):
    """Neither what is written, nor how choices rank, nor continuations."""
    nano, task = load_teacher(str(NANO)), TASKS[name]
    items, found = task.items(4, 0), []
    for what in ("nothing", "behind"):
        tokenizer = tokenizer_that_adds(what)
        answers = [
            a
            for method in SCORING_METHODS.values()
            for batch in method(nano.model, tokenizer, task, items)
            for a in batch
        ]
        found.append((answers, continuations(nano.model, tokenizer, ["def add(a, b):\n", "import"], 6)))
    assert found[0] == found[1]


def test_prompts_of_different_lengths_end_together():
    ids, mask = left_padded([[5, 6, 7], [8]], 0, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("text", ["a \ud83d b", "\udcff"])
def test_text_that_utf8_cannot_hold_is_refused(text):
    with pytest.raises(UserError, match="A prompt must be text that UTF-8 can hold"):
        encode(load_teacher(str(NANO)).tokenizer, text)


STRANGE = {
    "undefined": "{{ foo.bar.baz }}",
    "raises": "{{ raise_exception('roles must alternate') }}",
    "syntax": "{% if %}",
    "unclosed": "{% for m in messages %}",
    "silent": "{% for m in messages %}{% endfor %}",
    "blank": "  \n ",
    "number": 5,
    "list": ["x"],
    "no default": {"tool_use": "x"},
    "divides": "{{ 1 / 0 }}",
    "range": "{% for i in range(10**9) %}a{% endfor %}",
    "endless": "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}x",
    "long": "{{ 'a' * 5_000_000 }}",
    "huge": "{{ 'a' * 10**10 }}",
    "growing": (
        "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{"
        " ns.x }}"
    ),
    "attribute": "{{ messages.__class__.__mro__ }}",
    "include": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strangers_template_is_refused_in_a_sentence(name, monkeypatch):
    monkeypatch.setattr("convert.data.prompts.RENDER_SECONDS", 0.5)
    tokenizer = load_teacher(str(NANO)).tokenizer
    tokenizer.chat_template = STRANGE[name]
    with pytest.raises(UserError, match="The chat template must render a message"):
        chat_text(tokenizer, "hello")


def test_an_empty_template_is_none():
    tokenizer = load_teacher(str(NANO)).tokenizer
    assert not has_chat_template(tokenizer)
    tokenizer.chat_template = ""
    assert not has_chat_template(tokenizer)


@pytest.fixture(scope="module")
def nano_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers") / "nano"
    shutil.copytree(NANO, folder)
    return folder


PUBLISHED = {
    "beams": {"num_beams": 3},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "penalty": {"repetition_penalty": 5.0},
    "n-grams": {"no_repeat_ngram_size": 1},
    "forced": {"forced_bos_token_id": 7, "min_new_tokens": 5},
    "suppressed": {"suppress_tokens": [10, 11, 12, 13, 14]},
    "short": {"max_length": 3},
    "watermark": {"watermarking_config": {"bias": 9.0, "seeding_scheme": "lefthash"}},
    "dola": {"dola_layers": "high"},
    "sampling": {"do_sample": True, "temperature": 3.0},
}


def test_published_generation_settings_do_not_change_greedy_text(nano_folder, capsys):
    settings, said = nano_folder / "generation_config.json", {}
    whole = settings.read_text()
    try:
        for name, more in {"none": {}, **PUBLISHED}.items():
            settings.write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0} | more))
            assert generate.main([str(nano_folder), "def add(a, a, a", "--max-new-tokens", "8"]) == 0, (
                name,
                capsys.readouterr().err,
            )
            said[name] = capsys.readouterr().out
    finally:
        settings.write_text(whole)
    assert said["none"].strip() != "def add(a, a, a"
    assert {name: text for name, text in said.items() if text != said["none"]} == {}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([""], "must not be empty"),
        (["\udcff"], "UTF-8"),
        (["x", "--temperature", "nan"], "--temperature must be a number within 0 .. 1000"),
        (["x", "--temperature", "inf"], "--temperature must be a number within 0 .. 1000"),
        (["x", "--temperature", "-1"], "--temperature must be a number within 0 .. 1000"),
        (["x", "--temperature", "1e-45"], "--temperature must be 0 or at least 1e-06"),
        (["x", "--seed", str(2**70)], "--seed must be a whole number within 0"),
        (["x", "--seed", "-1"], "--seed must be a whole number within 0"),
        (["x", "--max-new-tokens", "0"], "--max-new-tokens must be a whole number within 1"),
        (["x", "--max-new-tokens", str(10**30)], "--max-new-tokens must be a whole number within 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    assert generate.main([str(NANO), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_sampling_follows_its_seed(capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert (
            generate.main([str(NANO), "def add(", "--max-new-tokens", "12", "--temperature", "1.5", "--seed", seed])
            == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_whoever_stops_reading_is_no_fault(tmp_path):
    """`convert.generate ... | true`: no words, and the exit code that a shell gives to such a command."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "convert.generate", str(NANO), "def add(", "--max-new-tokens", "4"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert done.returncode == 141 and "error" not in done.stderr and "Traceback" not in done.stderr
