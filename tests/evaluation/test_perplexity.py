"""Perplexity by position counts positions within documents, and adds up to the perplexity."""

import math

import pytest
import torch

from convert.data.batches import Batch
from convert.evaluation.perplexity import compare, perplexity, perplexity_by_position
from convert.models.access import hidden_states
from tests.conftest import VOCAB, tiny_teacher
from tests.training.stages import Reads, batches


def test_perplexity_by_hand():
    teacher, batch = tiny_teacher("llama"), batches()(0)
    with torch.no_grad():
        logits = teacher(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits.log_softmax(-1)
    is_target = batch.labels != -100
    assert not is_target.all()
    nats = -logits.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0][is_target].mean()
    assert perplexity(teacher, [batch]) == pytest.approx(nats.exp().item(), rel=1e-5)


def test_perplexity_by_position_is_that_of_the_tokens_there():
    model = tiny_teacher("llama")
    ids = torch.randint(0, VOCAB, (2, 201))
    positions = torch.cat([torch.arange(130), torch.arange(70)])[None].expand(2, -1)  # two documents in a row
    labels = ids[:, 1:].clone()
    labels[:, 129] = -100
    found = perplexity_by_position(model, [Batch(ids[:, :-1], labels, positions)])
    assert list(found) == [0, 64, 128]
    with torch.no_grad():
        logs = model(input_ids=ids[:, :-1], position_ids=positions, use_cache=False).logits.log_softmax(-1)
    nats = -logs.gather(2, ids[:, 1:, None])[..., 0]
    for start, end in ((0, 64), (64, 128), (128, 256)):
        there = (positions >= start) & (positions < end) & (labels != -100)
        assert found[start] == pytest.approx(math.exp(nats[there].mean()), rel=1e-5)
    whole = sum(
        math.log(found[start]) * int(((positions >= start) & (positions < end) & (labels != -100)).sum())
        for start, end in ((0, 64), (64, 128), (128, 256))
    )
    assert perplexity(model, [Batch(ids[:, :-1], labels, positions)]) == pytest.approx(
        math.exp(whole / int((labels != -100).sum())), rel=1e-5
    )


@pytest.mark.parametrize("measure", [perplexity, perplexity_by_position, lambda m, b: compare(m, m, b)])
def test_sums_are_read_from_the_device_once(measure):
    """However many batches there are; but each model looks in each of them whether it has several documents."""
    model, counts = tiny_teacher("llama"), []
    given = [batches()(i) for i in range(4)]
    for some in (given[:1], given):
        with Reads() as reads:
            measure(model, some)
        counts.append(reads.count)
    with torch.no_grad(), Reads() as of_a_pass:
        hidden_states(model, given[0])
    passes = 2 if measure not in (perplexity, perplexity_by_position) else 1
    assert of_a_pass.count and counts[1] - counts[0] == 3 * passes * of_a_pass.count
