"""The same tokens become the same batches every time, or one sentence says why not."""

import numpy as np
import pytest
import torch

from convert.core.errors import UserError
from convert.data.batches import Batches, held_out_batches
from convert.data.text import Tokens


def counted(length: int = 200, starts=(0, 7, 8, 40, 41, 42, 100)) -> Tokens:
    """Each token is its own place, so that a window says where it was taken."""
    return Tokens(np.arange(length), np.array(starts))


def test_a_batch_is_a_function_of_seed_and_step():
    batches = Batches(counted(), seq_len=16, num_sequences=3, seed=1)
    sequence = [batches(step).input_ids for step in range(20)]
    for step in (19, 0, 7):  # in any order, by another object
        assert torch.equal(Batches(counted(), 16, 3, seed=1)(step).input_ids, sequence[step])
    assert not torch.equal(sequence[0], sequence[1])
    assert not torch.equal(Batches(counted(), 16, 3, seed=2)(0).input_ids, sequence[0])


def test_an_epoch_sees_every_window_once():
    """And the next one in another order, from another offset."""
    batches = Batches(counted(1000), seq_len=16, num_sequences=1)
    per_epoch = 1000 // 16 - 1
    epochs = [[batches(e * per_epoch + i).input_ids[0, 0].item() for i in range(per_epoch)] for e in range(2)]
    for starts in epochs:
        assert np.array_equal(np.diff(sorted(starts)), [16] * (per_epoch - 1))
    assert epochs[0] != epochs[1] and min(epochs[0]) != min(epochs[1])


@pytest.mark.parametrize(
    "take", [lambda t: Batches(t, 16, 11)(0), lambda t: held_out_batches(t, 16, 5, 1000)[0]], ids=["train", "held-out"]
)
def test_labels_and_positions_at_document_borders(take):
    """By brute force: a label is the next token, or -100 where that begins a document; positions count from a
    document's or the window's first token."""
    tokens = counted()
    batch, starts = take(tokens), set(tokens.starts.tolist())
    for ids, labels, positions in zip(
        batch.input_ids.tolist(), batch.labels.tolist(), batch.position_ids.tolist(), strict=True
    ):
        position = -1
        for t, place in enumerate(ids):
            assert place == ids[0] + t
            position = 0 if place in starts else position + 1
            assert positions[t] == position
            assert labels[t] == (-100 if place + 1 in starts else place + 1)
    assert bool((batch.labels == -100).any()), "no border was seen"
    assert batch.num_targets == int((batch.labels != -100).sum()) < batch.labels.numel()


def test_micro_batches():
    batch = Batches(counted(), 16, 5)(0)
    parts = batch.split(2)
    assert [p.input_ids.shape for p in parts] == [(2, 16), (2, 16), (1, 16)]
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(batch, name))


def test_noise_replaces_its_share_of_the_inputs_by_tokens_of_the_batch():
    batch = Batches(Tokens(np.arange(40_000) % 1000, np.array([0])), 500, 20)(0)
    noisy = batch.with_noise(0.1, (3, 0))
    assert 0.08 < (noisy.input_ids != batch.input_ids).float().mean() < 0.12
    assert set(noisy.input_ids.flatten().tolist()) <= set(batch.input_ids.flatten().tolist())
    assert noisy.labels is batch.labels and noisy.position_ids is batch.position_ids
    assert torch.equal(noisy.input_ids, batch.with_noise(0.1, (3, 0)).input_ids)
    for seed in ((3, 1), (4, 0)):
        assert not torch.equal(noisy.input_ids, batch.with_noise(0.1, seed).input_ids)
    assert batch.with_noise(0.0, (3, 0)) is batch


def test_held_out_windows_are_spread_over_the_text():
    batches = held_out_batches(counted(1000), seq_len=10, num_sequences=4, max_tokens=105)
    starts = torch.cat([b.input_ids[:, 0] for b in batches]).tolist()
    assert [len(b.input_ids) for b in batches] == [4, 4, 2]
    assert starts == [0, 90, 190, 290, 390, 490, 590, 690, 790, 890]
    everything = held_out_batches(counted(1000), 10, 99, 10**9)[0]
    assert everything.input_ids[:, 0].tolist() == list(range(0, 990, 10))


def test_too_little_text_is_refused():
    with pytest.raises(
        UserError,
        match="at least two sequences of 100 tokens; the data has 200 tokens. Give more data or a smaller --seq-len",
    ):
        Batches(counted(), 100, 1)
    with pytest.raises(UserError, match="Held-out text has 200 tokens, fewer than one sequence of 200"):
        held_out_batches(counted(), 200, 1, 1000)
