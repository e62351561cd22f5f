"""Folders say things by the names that older readers know, and mean the same to the newest. `make check-oldest` asks an
older one."""

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from convert.exporting import hub as export_module
from convert.exporting.hub import OLDEST, export_native, model_code
from convert.exporting.portability import make_tokenizer_portable
from tests.conftest import token_ids
from tests.exporting.test_hub import tiny_tokenizer
from tests.models.test_student import logits_of
from tests.exporting.test_native import CASES, student_of

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *LETTERS, "▁", "▁d"])}


def plain(add: str | None) -> PreTrainedTokenizerFast:
    """Of bytes; `add`: the template that its tokenizer.json ends a text with."""
    backend = Tokenizer(models.BPE(VOCABULARY, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if add:
        backend.post_processor = processors.TemplateProcessing(single=add, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def with_more_tokens() -> PreTrainedTokenizerFast:
    tokenizer = plain(None)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|user|>", AddedToken("<|bot|>", lstrip=True, special=True)]}
    )
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


named = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>")
TOKENIZERS = {
    "plain": lambda: plain(None),
    "begins": lambda: plain("<s> $A"),
    "ends": lambda: plain("$A </s>"),
    "more tokens": with_more_tokens,
    "llama": lambda: LlamaTokenizer(vocab=VOCABULARY, merges=[("▁", "d")], **named),
    "llama that adds": lambda: LlamaTokenizer(
        vocab=VOCABULARY, merges=[("▁", "d")], add_bos_token=True, add_eos_token=True, **named
    ),
    "gpt_neox": lambda: GPTNeoXTokenizer(vocab=VOCABULARY, merges=[], **named),
    "qwen2": lambda: Qwen2Tokenizer(vocab=VOCABULARY, merges=[], **named),
}
TEXTS = ["def f(x):\n    return x", "  two  spaces ", "<|user|>hi <|bot|> ho</s>", ""]


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers(make, tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    make_tokenizer_portable(tmp_path, tokenizer)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (
        settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        and "token_type_ids" not in settings["model_input_names"]
    )
    assert not isinstance(settings.get("extra_special_tokens"), list)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    for name in (
        "bos_token",
        "eos_token",
        "pad_token",
        "padding_side",
        "chat_template",
        "all_special_tokens",
        "model_max_length",
    ):
        assert getattr(again, name) == getattr(tokenizer, name), name


@pytest.mark.parametrize("family, changes, options", CASES.values(), ids=CASES)
def test_rotary_positions_by_both_names(family, changes, options, tmp_path):
    student = student_of(family, changes, options)
    export_native(student, tiny_tokenizer(), tmp_path / "native", card="")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    rope = config["rope_parameters"]
    assert config["rope_theta"] == rope["rope_theta"] == student.host.config.rope_parameters["rope_theta"]
    assert config["rope_scaling"] == (
        None if rope["rope_type"] == "default" else {k: v for k, v in rope.items() if k != "rope_theta"}
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert torch.equal(
        loaded.model.rotary_emb.inv_freq, student.host.model.rotary_emb.inv_freq[student.slots()[0].mixer.frequencies]
    )
    assert (logits_of(loaded, token_ids()) - logits_of(student, token_ids())).abs().max() < 1e-4


def test_the_code_says_what_it_needs(monkeypatch):
    source = (export_module.ROOT / "setup.py").read_text()
    assert f"transformers>={OLDEST[0]}.{OLDEST[1]}," in source
    code, (first, *_) = model_code(), model_code()
    assert first == "convert_models_student.py" and all(
        f"from .{name.removesuffix('.py')} import" in code[first] for name in code if name != first
    )
    guard = code[first].split("if False")[0]
    exec(guard, {})
    for old in ("4.57.6", "5.22.0"):
        monkeypatch.setattr("transformers.__version__", old)
        with pytest.raises(ImportError, match=f"needs transformers 5.23 or later, and this is {old}"):
            exec(guard, {})
    for new in ("5.23.0", "5.24.0.dev0", "6.0"):
        monkeypatch.setattr("transformers.__version__", new)
        exec(guard, {})
