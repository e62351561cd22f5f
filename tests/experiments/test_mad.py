"""The six tasks ask what they say, and their targets can be known."""

import dataclasses

import numpy as np
import pytest
import torch

from convert.objectives import Objective
from experiments.mad import PAPER, REDUCED, Effort, Model, Schedule, learn
from experiments.mad_tasks import (
    IGNORED,
    NOISY,
    TASKS,
    Difficulty,
    compression,
    copying,
    fuzzy_recall,
    memorisation,
    recall,
)

SHORT = Difficulty(seq_len=64, copied=8)


def rng(seed=0):
    return np.random.default_rng(seed)


EVERY = [(name, d) for name, task in TASKS.items() for d in (task.reduced, *task.settings())]


@pytest.mark.parametrize("name, d", EVERY)
@pytest.mark.parametrize("testing", [False, True])
def test_shapes_and_vocabulary(name, d, testing):
    make = TASKS[name].make
    inputs, targets = make(rng(), 20, d, testing)
    assert (
        inputs.shape == targets.shape
        and inputs.min() >= 0
        and inputs.max() < d.vocab
        and abs(inputs.shape[1] - d.seq_len) <= 1
    )
    assert ((targets == IGNORED) | ((targets >= 0) & (targets < d.vocab))).all()
    assert (targets != IGNORED).any(1).all()
    again = make(rng(), 20, d, testing)
    assert (again[0] == inputs).all() and (make(rng(1), 20, d, testing)[0] != inputs).any()


def test_the_papers_settings():
    assert {name: len(task.settings()) for name, task in TASKS.items()} == {
        "in-context recall": 11,
        "noisy recall": 14,
        "fuzzy recall": 11,
        "selective copying": 13,
        "compression": 11,
        "memorisation": 6,
    }
    assert PAPER.steps_of(Difficulty()) == 20_000 and REDUCED.steps_of(Difficulty()) == 400


@pytest.mark.parametrize("d", [SHORT, dataclasses.replace(NOISY, seq_len=64, noise=0.6)], ids=["clean", "noisy"])
def test_what_counts_was_said_before(d):
    inputs, counts = recall(rng(), 50, d, True)
    for row, target in zip(inputs.tolist(), counts.tolist(), strict=True):
        for place in np.flatnonzero(np.array(target) != IGNORED):
            pairs = {row[i]: row[i + 1] for i in range(0, place - 1, 2)}
            assert place % 2 == 0 and pairs[row[place]] == target[place]
        assert target[-1] != IGNORED  # the last key is always known


def test_a_key_of_three_tokens_has_the_value_it_had_before():
    inputs, counts = fuzzy_recall(rng(), 50, SHORT, True)
    for row, target in zip(inputs.tolist(), counts.tolist(), strict=True):
        known = [i for i, value in enumerate(target) if value != IGNORED]
        first = known[0]  # the prediction at this place, from the key's last token
        key, value = row[first - 2 : first + 1], target[first]
        assert any(row[i : i + 3] == key and row[i + 3] == value for i in range(first - 2))


def test_copies_are_the_tokens_among_the_blanks():
    inputs, counts = copying(rng(), 20, SHORT, True)
    for row, target in zip(inputs.tolist(), counts.tolist(), strict=True):
        sign = row.index(15)
        assert [t for t in row[:sign] if t != 14] == [t for t in target if t != IGNORED] and len(row) == 64


def test_the_dictionary_is_the_same_in_training_and_test():
    found = {}
    for seed, testing in ((0, False), (1, True)):
        inputs, targets = memorisation(rng(seed), 50, TASKS["memorisation"].reduced, testing)
        for key, value in zip(inputs[:, ::2].ravel().tolist(), targets[:, 1::2].ravel().tolist(), strict=True):
            assert found.setdefault(key, value) == value
    assert len(set(found.values())) == len(found)


def test_compression_asks_for_everything():
    inputs, targets = compression(rng(), 5, SHORT, True)
    assert (inputs == targets).all() and (inputs[:, -1] == 15).all()


@pytest.mark.parametrize("name", ["compression", "selective copying", "memorisation"])
def test_learning_is_repeatable_and_lowers_the_loss(name):
    """With a decoder of its own, and with targets that are masked."""
    task, effort = TASKS[name], Effort(16, (2e-3,), (0.0,), epochs=3)
    d = dataclasses.replace(task.reduced, examples=40, seq_len=16, copied=4)  # the last batch of an epoch is shorter
    inputs, targets = task.make(rng(), d.examples, d, False)
    losses = []
    for epochs in (0, 3, 3):
        torch.manual_seed(0)
        model = Model("mamba2", d.vocab, 16 if name == "compression" else None, 16)
        if epochs:
            learn(model, inputs, targets, effort, 2e-3, 0.1)
        with torch.no_grad():
            logits = model(torch.from_numpy(inputs).long())
        expected = torch.from_numpy(np.ascontiguousarray(targets)).long()
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), expected.flatten()).item())
    assert losses[1] == losses[2] < losses[0]


def test_the_rate_falls_by_a_cosine_as_in_torch():
    settings = Schedule(
        tokens=100, lr=1e-3, objective=Objective.of("cross_entropy"), trains="everything", seq_len=2, batch_tokens=2,
        micro_tokens=2,
    )  # fmt: skip
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50, 1e-6)
    for step in range(50):
        assert settings.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()
