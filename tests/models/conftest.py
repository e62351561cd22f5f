"""What the tests of models share: a teacher's folder with a tokenizer, and a machine without network."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    PreTrainedTokenizerFast,
)

from convert.models import loading
from tests.conftest import tiny_teacher


def write_tokenizer(folder: Path, words: int = 90, eos: str | None = "w2", pad: str | None = None) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w1"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w1", eos_token=eos, pad_token=pad).save_pretrained(
        folder
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny GPT-NeoX with a tokenizer, its weights in bfloat16."""
    place = tmp_path / "My Model"
    tiny_teacher("gpt_neox").to(torch.bfloat16).save_pretrained(place)
    write_tokenizer(place)
    return place


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """No hub; an empty cache."""
    monkeypatch.setattr(loading, "is_hub_reachable", lambda: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
