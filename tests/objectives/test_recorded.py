"""The forward KL from a part of a teacher's distributions, against the whole one and against plain formulas in
float64."""

import itertools
import math

import pytest
import torch

from convert.core.errors import UserError
from convert.objectives import TERMS, LogitTerm, Objective
from convert.objectives.base import name_of
from convert.objectives.divergences import forward_kl, recorded_kl
from convert.objectives.recorded import RecordedTeacher
from convert.training.settings import check_objective

V = 6


def logits(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kept(teacher, top_k, drawn=None):
    """A recording in float64 of the teacher's logits, with these drawn tokens [N, S]."""
    log_p = teacher.log_softmax(-1)
    top, ids = log_p.topk(top_k)
    tail = (1 - top.exp().sum(-1, keepdim=True)).clamp(min=0).log().clamp(min=-65504.0)
    if drawn is None:
        return RecordedTeacher(ids, torch.cat([top, tail], -1))
    return RecordedTeacher(torch.cat([ids, drawn], -1), torch.cat([top, tail], -1), (log_p.exp() * log_p).sum(-1))


def value_and_gradient(loss, student):
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


def test_all_tokens_give_the_whole_loss():
    student, teacher = logits(7, V).requires_grad_(), logits(7, V, seed=1)
    ours = value_and_gradient(recorded_kl(student, kept(teacher, V)), student)
    theirs = value_and_gradient(forward_kl(student, teacher), student)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("top_k", [0, 1, 3, V - 1])
def test_all_other_tokens_are_one(top_k):
    student, teacher = logits(7, V).requires_grad_(), logits(7, V, seed=1)
    p, q, loss = teacher.softmax(-1), student.softmax(-1), torch.zeros(7, dtype=torch.float64)
    order = p.argsort(-1, descending=True)
    for n in range(7):
        top, others = order[n, :top_k], order[n, top_k:]
        loss[n] = sum(p[n, i] * (p[n, i] / q[n, i]).log() for i in top)
        loss[n] += p[n, others].sum() * (p[n, others].sum() / q[n, others].sum()).log()
    ours = recorded_kl(student, kept(teacher, top_k))
    torch.testing.assert_close(
        value_and_gradient(ours, student), value_and_gradient(loss, student), rtol=1e-12, atol=1e-14
    )
    whole = forward_kl(student, teacher)
    assert (ours < whole).all() or top_k == V - 1  # one other token is no part, but that token
    assert recorded_kl(teacher, kept(teacher, top_k)).abs().max() < 1e-14
    assert torch.autograd.gradcheck(lambda z: recorded_kl(z, kept(teacher, top_k)), (student,))


@pytest.mark.parametrize("top_k, sample", [(0, 1), (0, 3), (2, 1), (2, 2)])
def test_the_mean_over_all_draws_is_the_whole_loss_and_its_gradient(top_k, sample):
    """Every draw there can be, each with its probability."""
    student, teacher = logits(1, V).requires_grad_(), logits(1, V, seed=1)
    p = teacher.softmax(-1)[0]
    others = p.argsort(descending=True)[top_k:].tolist()
    tail, mean, gradient, chances = p[others].sum(), 0.0, 0.0, 0.0
    spread = []
    for draw in itertools.product(others, repeat=sample):
        chance = math.prod(float(p[i] / tail) for i in draw)
        value, slope = value_and_gradient(recorded_kl(student, kept(teacher, top_k, torch.tensor([draw]))), student)
        mean, gradient, chances = mean + chance * value, gradient + chance * slope, chances + chance
        spread.append(float(value))
    assert chances == pytest.approx(1, abs=1e-12)
    whole = value_and_gradient(forward_kl(student, teacher), student)
    torch.testing.assert_close((mean, gradient), whole, rtol=1e-12, atol=1e-13)
    assert max(spread) - min(spread) > 0.01 * abs(float(whole[0]))  # single draws do differ
    biased = value_and_gradient(recorded_kl(student, kept(teacher, top_k)), student)
    assert (biased[1] - whole[1]).abs().max() > 1e-3  # what the draws mend


def test_draws_need_the_entropy():
    with pytest.raises(ValueError, match="the entropy is missing"):
        recorded_kl(logits(1, V), kept(logits(1, V), 1, torch.tensor([[2]]))._replace(negative_entropy=None))


@pytest.mark.parametrize("sample", [0, 2])
def test_the_loss_stays_float32_under_autocast(sample):
    student, teacher = logits(5, 700).float().requires_grad_(), logits(5, 700, seed=1)
    drawn = torch.arange(5 * sample).view(5, sample) if sample else None
    recording = RecordedTeacher(
        *(t if t is None or t.dtype == torch.long else t.float() for t in kept(teacher, 9, drawn))
    )
    outside = value_and_gradient(recorded_kl(student, recording), student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = recorded_kl(student, recording)
    inside = value_and_gradient(inside, student)
    assert outside[0].dtype == torch.float32
    assert torch.equal(inside[0], outside[0]) and torch.equal(inside[1], outside[1])


def test_which_terms_a_recording_is_enough_for():
    enough = set()
    for term in TERMS:
        if not issubclass(term, LogitTerm):
            continue
        try:
            check_objective("distill", Objective.of(name_of(term)), has_teacher=False, recorded=True)
            enough.add(name_of(term))
        except UserError as error:
            assert f"its objective cannot be {name_of(term)}, which needs" in str(error)
    assert enough == {"forward_kl", "cross_entropy"}


@pytest.mark.parametrize(
    "text, words",
    [
        ("0.5*cross_entropy + 0.5*forward_kl(temperature=2)", r"forward_kl\(temperature=2\), whose temperature needs"),
        ("forward_kl + 0.05*feature_matching", "feature_matching, which compares layer outputs"),
    ],
)
def test_what_needs_more_is_refused_by_name(text, words):
    with pytest.raises(UserError, match=f"distill has recorded probabilities .* its objective cannot be {words}"):
        check_objective("distill", Objective.of(text), has_teacher=False, recorded=True)
