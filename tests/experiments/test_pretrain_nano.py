"""The embedded teacher's training: its schedule, its sequences, its folder; a stopped one goes on bit for bit."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import GPTNeoXConfig

from convert.core.errors import UserError
from convert.data.text import Tokens
from experiments import pretrain_nano

TOKENS = Tokens((torch.arange(20_000) * 7 % 61).numpy(), torch.arange(0, 20_000, 500).numpy())
DATA = SimpleNamespace(train=TOKENS, held_out=TOKENS)
STEPS = 12


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A tiny model and batches of 2,048 tokens; held-out text is not measured."""
    config = GPTNeoXConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=2048, hidden_dropout=0.05, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    monkeypatch.setattr(pretrain_nano, "CONFIG", config)
    monkeypatch.setattr(pretrain_nano, "BATCH_TOKENS", 2048)
    monkeypatch.setattr(pretrain_nano, "held_out_losses", lambda model, data: {"held_out_512": 1.0})


def test_rates_rise_stay_and_fall_to_nothing():
    settings = pretrain_nano.settings_of(1000 * 2048)
    rates = [settings.rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-3 / 50) and rates[49:701] == [2e-3] * 652
    assert rates[850] == pytest.approx(1e-3) and rates[-1] == pytest.approx(2e-3 / 300)


def test_the_last_tenth_has_long_sequences_and_every_batch_as_many_tokens():
    settings = pretrain_nano.settings_of(20 * 2048)
    batches = pretrain_nano.batches_of(DATA, settings)
    shapes = [tuple(batches(step).input_ids.shape) for step in range(20)]
    assert shapes == [(4, 512)] * 18 + [(1, 2048)] * 2


def test_a_killed_training_goes_on_bit_for_bit(tmp_path, monkeypatch):
    straight = pretrain_nano.pretrain(tmp_path / "straight", STEPS * 2048, DATA)
    rows = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, STEPS] and rows[-1]["tokens"] == STEPS * 2048
    assert rows[-1]["held_out_512"] == 1.0 and not (tmp_path / "straight" / "checkpoint.pt").exists()

    class Killed(Exception):
        pass

    save = pretrain_nano.Folder.save

    def save_and_die(self, step, state):
        save(self, step, state)
        raise Killed

    every_step = pretrain_nano.settings_of
    monkeypatch.setattr(
        pretrain_nano, "settings_of", lambda tokens: dataclasses.replace(every_step(tokens), save_every=0.0)
    )
    monkeypatch.setattr(pretrain_nano.Folder, "save", save_and_die)
    for _ in range(5):
        with pytest.raises(Killed):
            pretrain_nano.pretrain(tmp_path / "killed", STEPS * 2048, DATA)
    assert (tmp_path / "killed" / "checkpoint.pt").exists()
    monkeypatch.setattr(pretrain_nano.Folder, "save", save)
    resumed = pretrain_nano.pretrain(tmp_path / "killed", STEPS * 2048, DATA)
    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_finished_training_is_read_and_never_taken_for_another(tmp_path):
    first = pretrain_nano.pretrain(tmp_path, STEPS * 2048, DATA)
    again = pretrain_nano.pretrain(tmp_path, STEPS * 2048, DATA)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    with pytest.raises(UserError, match="was trained on 24,576 tokens. Repeat that number"):
        pretrain_nano.pretrain(tmp_path, 5 * 2048, DATA)
