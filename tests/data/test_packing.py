"""Whole conversations in sequences: nothing lost, nothing mixed, padding that says so."""

import numpy as np
import pytest
import torch

from convert.core.errors import UserError
from convert.data.packing import PackedBatches, best_fit
from convert.data.text import Tokens


def conversations(sizes: list[int], prompts: list[int], dtype: type = np.uint16) -> Tokens:
    """Documents of these sizes; the first `prompts` tokens of each are no completion. Every id is unique. The dtype is
    one of the token cache."""
    starts = np.cumsum([0, *sizes[:-1]])
    mask = np.concatenate([np.arange(size) >= prompt for size, prompt in zip(sizes, prompts, strict=True)])
    return Tokens(np.arange(1, sum(sizes) + 1, dtype=dtype), starts, mask)


def documents_in(batch) -> list[list[tuple[int, int]]]:
    """(id, label) of each document of a batch, without padding."""
    found = []
    lengths = [batch.input_ids.shape[1]] * len(batch.input_ids) if batch.lengths is None else batch.lengths.tolist()
    for ids, labels, positions, length in zip(batch.input_ids, batch.labels, batch.position_ids, lengths, strict=True):
        starts = [i for i in range(length) if positions[i] == 0]
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            assert positions[start:end].tolist() == list(range(end - start))
            found.append(list(zip(ids[start:end].tolist(), labels[start:end].tolist(), strict=True)))
        assert (labels[length:] == -100).all() and (ids[length:] == 0).all()
        assert positions[length:].tolist() == list(range(batch.input_ids.shape[1] - length))
    return found


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("masking", ["completions", "all"])
def test_an_epoch_has_every_conversation_once_and_whole(masking, dtype):
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 31, 200).tolist()
    prompts = [int(rng.integers(1, size)) for size in sizes]
    tokens = conversations(sizes, prompts, dtype)
    batches = PackedBatches(tokens, 30, 1, seed=3, masking=masking)
    found = [document for step in range(len(batches.rows)) for document in documents_in(batches(step))]
    expected = []
    for start, size, prompt in zip(tokens.starts.tolist(), sizes, prompts, strict=True):
        learnt = [i + 1 >= prompt or masking == "all" for i in range(size - 1)]
        expected.append([(start + i + 1, start + i + 2 if learnt[i] else -100) for i in range(size - 1)])
    assert sorted(found) == sorted(expected)
    assert len(batches.rows) <= 1.05 * sum(size - 1 for size in sizes) / 30 + 1  # little is padding


def test_a_batch_is_a_function_of_seed_and_step():
    tokens = conversations([9, 5, 14, 3, 8, 8, 2, 11] * 5, [2, 1, 6, 1, 3, 4, 1, 5] * 5)
    first, second, other = (PackedBatches(tokens, 16, 3, seed) for seed in (1, 1, 2))
    for step in (7, 0, 100):
        a, b = first(step), second(step)
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)
    assert any(first(i).input_ids.tolist() != other(i).input_ids.tolist() for i in range(3))
    batch = next(batch for i in range(20) if (batch := first(i)).lengths is not None)
    assert sum(part.num_targets for part in batch.split(2)) == batch.num_targets
    assert batch.num_tokens == sum(part.num_tokens for part in batch.split(2)) == int(batch.padding_mask.sum())
    noisy = batch.with_noise(1.0, (0, 0))
    assert (noisy.input_ids[batch.padding_mask] != 0).all() and (noisy.input_ids[~batch.padding_mask] == 0).all()


def test_long_conversations_are_cut_at_their_end_and_counted(capsys):
    tokens = conversations([40, 40, 6, 11], [5, 30, 2, 2])
    batches = PackedBatches(tokens, 10, 1)
    found = sorted(document for step in range(len(batches.rows)) for document in documents_in(batches(step)))
    assert [(document[0][0], len(document)) for document in found] == [(1, 10), (81, 5), (87, 10)]
    assert "2 of 4 conversations are longer than 10 tokens and are cut at their end; 1 have" in capsys.readouterr().out
    PackedBatches(tokens, 10, 1)
    assert capsys.readouterr().out == ""  # said once
    with pytest.raises(UserError, match="No conversation has anything to learn within --seq-len 4"):
        PackedBatches(conversations([40, 40], [8, 30]), 4, 1)


def test_best_fit_fills_the_fullest_bin():
    assert best_fit([7, 6, 3, 3, 2, 1], 10) == [[0, 2], [1, 3, 5], [4]]
    assert best_fit([10, 10], 10) == [[0], [1]] and best_fit([], 10) == []
