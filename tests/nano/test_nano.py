"""The embedded teacher is what its card says, and worth imitating."""

import pytest
import torch

from convert.data.batches import held_out_batches
from convert.data.corpus import corpus
from convert.data.text import tokenize
from convert.evaluation.perplexity import perplexity
from convert.models.catalog import NANO
from convert.models.loading import load_teacher


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("neox-nano")


def test_it_is_small_and_knows_its_files(teacher):
    assert sum(f.stat().st_size for f in NANO.iterdir()) < 16e6
    assert sum(p.numel() for p in teacher.model.parameters()) == 4_242_432
    assert len(teacher.tokenizer) == teacher.model.config.vocab_size == 4096


def test_it_models_held_out_code(teacher, tmp_path, monkeypatch):
    """The exact figure depends on the Python whose library is read; a broken file would be in the thousands."""
    monkeypatch.setenv("CONVERT_CACHE", str(tmp_path))
    text = tokenize(corpus("stdlib"), teacher.tokenizer)
    assert 10 < perplexity(teacher.model, held_out_batches(text.held_out, 512, 4, 8192)) < 22


@torch.no_grad()
def test_its_greedy_continuations_look_like_python(teacher):
    ids = teacher.tokenizer("class Stack:\n    def __init__(self", return_tensors="pt")["input_ids"]
    text = teacher.tokenizer.decode(teacher.model.generate(ids, max_new_tokens=24, do_sample=False)[0])
    assert "):\n" in text and "self." in text
