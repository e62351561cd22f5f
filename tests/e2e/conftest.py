"""What the tests of whole runs share: a tiny teacher, a text, the command, and runs that are quick."""

import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import VOCAB, measure_briefly, tiny_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a tiny GPT-NeoX and a tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("tiny-neox")
    tiny_teacher("gpt_neox", tie_word_embeddings=False).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "<end>": 2} | {chr(c): c - 29 for c in range(32, 29 + VOCAB)} | {"\n": 96 + 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{i}: " + "the cat sat on the mat and the dog sat on the log. " * (5 + i % 7))
    return folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """No W&B, a cache of our own, and the clean process only where a test asks for it (it takes seconds)."""
    monkeypatch.setenv("CONVERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    measure_briefly(monkeypatch)


def command(teacher, text, out, *more, to="mamba2"):
    return [
        str(teacher),
        "--to",
        to,
        "--data",
        str(text),
        "--out",
        str(out),
        "--tiny",
        "--wandb",
        "disabled",
        "--device",
        "cpu",
        *more,
    ]


def weights(out):
    return load_file(out / "model" / "model.safetensors")
