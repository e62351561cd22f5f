"""What is recorded of a teacher, and students that learn from it alone."""

import dataclasses

import numpy as np
import pytest
import torch

from convert.data.recorded import record_type
from convert.models.access import hidden_states
from convert.objectives import Objective
from convert.objectives.divergences import forward_kl, recorded_kl
from convert.objectives.recorded import RecordedTeacher
from convert.training.distill import distill
from convert.training.recording import recorded, records_of
from tests.conftest import VOCAB, tiny_teacher
from tests.training.stages import SETTINGS, Logged, batches, student_of
from tests.training.test_padding import padded

SETTINGS = dataclasses.replace(
    SETTINGS, lr=3e-3, objective=Objective.of("forward_kl"), trains="all_but_embeddings", loss_chunk=50, noise=0.1
)


def kept(top_k: int, sample: int = 0) -> dict[str, int]:
    return {"vocab_size": VOCAB, "top_k": top_k, "sample": sample}


def with_recorded(teacher, settings, how):
    """The batches with what the teacher says of them, as a reader of files gives it."""

    def with_teacher(step):
        plain = batches(settings)(step)
        records = records_of(teacher, settings.altered(plain, step), step, settings, how)
        known, tensors = plain.labels != -100, []
        for name in records.dtype.names:
            values = torch.from_numpy(records[name].astype(np.int32) if name == "ids" else records[name].copy())
            tensors.append(values.new_zeros(*known.shape, *values.shape[1:]))
            tensors[-1][known] = values
        return dataclasses.replace(plain, recorded=tuple(tensors))

    return with_teacher


def log_probabilities(teacher, batch):
    with torch.no_grad():
        hidden = hidden_states(teacher, batch)
        return teacher.get_output_embeddings()(hidden).log_softmax(-1)[batch.labels != -100]


@pytest.mark.parametrize("micro_tokens", [128, 32])
@pytest.mark.parametrize("is_padded", [False, True])
def test_records_are_the_teachers_own(micro_tokens, is_padded):
    teacher, batch = tiny_teacher("llama"), padded(5) if is_padded else batches()(0)
    settings = dataclasses.replace(SETTINGS, micro_tokens=micro_tokens)
    log_p = log_probabilities(teacher, batch).double()
    top, ids = log_p.topk(5)
    found = records_of(teacher, batch, 0, settings, kept(5, 3))
    assert found.dtype == record_type(VOCAB, 5, 3) and len(found) == len(log_p)
    assert np.array_equal(found["ids"][:, :5], ids.numpy())
    tail = (1 - top.exp().sum(-1)).log()
    expected = torch.cat([top, tail[:, None]], -1)
    assert np.allclose(found["log_p"], expected, rtol=2**-11, atol=1e-5)
    assert np.allclose(found["negative_entropy"], (log_p.exp() * log_p).sum(-1), atol=1e-5)
    drawn = torch.from_numpy(found["ids"][:, 5:].astype(int))
    assert not (drawn[:, :, None] == ids[:, None]).any()  # draws are from the others


def test_draws_are_as_likely_as_the_teacher_says_and_depend_on_the_step_alone():
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)) * 2
    generator = torch.Generator().manual_seed(3)
    found = recorded(logits.expand(2000, -1), 2, 20, generator)
    others = logits.softmax(-1)[0].scatter(0, found.ids[0, :2], 0)
    shares = torch.bincount(found.ids[:, 2:].flatten(), minlength=8) / 40_000
    wanted = others / others.sum()
    assert ((shares - wanted).abs() <= 4.5 * (wanted * (1 - wanted) / 40_000).sqrt()).all()
    teacher, batch = tiny_teacher("llama"), batches()(0)
    once, again, later, other = (
        records_of(teacher, batch, step, dataclasses.replace(SETTINGS, seed=seed), kept(2, 20))["ids"]
        for step, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert np.array_equal(once, again) and not np.array_equal(once, later) and not np.array_equal(once, other)
    assert np.array_equal(once[:, :2], later[:, :2])


def test_a_tail_of_nothing_is_no_accident():
    """Where the kept tokens have all of the probability, in float32, draws have no weight."""
    logits = torch.full((3, 8), -300.0)
    logits[:, 0] = 300.0
    student = torch.randn(3, 8, requires_grad=True)
    for top_k, sample in ((1, 0), (1, 4), (7, 1), (8, 0)):
        found = recorded(logits, top_k, sample, torch.Generator().manual_seed(0))
        assert bool(found.log_p.half().isfinite().all())
        loss = recorded_kl(student, found)
        torch.testing.assert_close(loss, forward_kl(student, logits))
        gradient, expected = (
            torch.autograd.grad(each.sum(), student)[0] for each in (loss, forward_kl(student, logits))
        )
        torch.testing.assert_close(gradient, expected)


def test_float16_costs_little_of_the_loss():
    """The teacher's distribution from its record of all tokens is off by less than a millionth of a nat."""
    teacher, batch = tiny_teacher("gpt_neox"), batches()(0)
    records = records_of(teacher, batch, 0, SETTINGS, kept(VOCAB))
    ids, log_p = (torch.from_numpy(records[name].astype(kind)) for name, kind in (("ids", int), ("log_p", np.float64)))
    error = recorded_kl(log_probabilities(teacher, batch).double(), RecordedTeacher(ids, log_p))
    assert 0 < error.mean() < 1e-6 and error.max() < 1e-5


@pytest.mark.parametrize("micro_tokens", [128, 64])
@pytest.mark.parametrize("mixer", ["linear", "mamba2"])
def test_a_student_of_all_recorded_probabilities_is_the_teachers_student(mixer, micro_tokens):
    """The same losses and gradients in every step, with noise, in micro-batches; and no teacher."""
    settings, logs = dataclasses.replace(SETTINGS, micro_tokens=micro_tokens), (Logged(), Logged())
    teacher = tiny_teacher("gpt_neox")
    distill(student_of("gpt_neox", mixer), teacher, batches(settings), settings, track=logs[0])
    taken = with_recorded(teacher, settings, kept(VOCAB))
    distill(student_of("gpt_neox", mixer), None, taken, settings, recorded=True, track=logs[1])
    assert logs[1].losses == pytest.approx(logs[0].losses, rel=2e-3)
    assert logs[1].norms == pytest.approx(logs[0].norms, rel=2e-2)


@pytest.mark.parametrize("how", [kept(32), kept(0, 16), kept(4, 8)], ids=["top", "drawn", "both"])
def test_a_part_is_enough_to_learn_from(how):
    """The whole loss, which no step sees, falls about as it does with the teacher."""
    settings = dataclasses.replace(SETTINGS, noise=0.0, objective=Objective.of("0.9*forward_kl + 0.1*cross_entropy"))
    teacher, batch = tiny_teacher("gpt_neox"), batches()(50)

    def whole_loss(student) -> float:
        return float(forward_kl(log_probabilities(student, batch), log_probabilities(teacher, batch)).mean())

    before, online, offline = student_of("gpt_neox"), student_of("gpt_neox"), student_of("gpt_neox")
    distill(online, teacher, batches(settings), settings)
    distill(offline, None, with_recorded(teacher, settings, how), settings, recorded=True)
    start, wanted, found = map(whole_loss, (before, online, offline))
    assert wanted < start and found - wanted < 0.3 * (start - wanted)
