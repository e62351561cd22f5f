"""TAID at the ends of its interpolation, and its schedule against numbers made by hand."""

import math

import pytest
import torch

from convert.core.errors import UserError
from convert.objectives import TAID
from convert.objectives.divergences import forward_kl
from convert.objectives.taid import taid
from tests.objectives.test_divergences import logits


def gradient(loss_of, s):
    s = s.clone().requires_grad_()
    return torch.autograd.grad(loss_of(s).sum(), s)[0]


def test_at_zero_the_target_is_the_student_and_the_gradient_zero():
    s, t = logits(5, 7), logits(5, 7, seed=1)
    assert gradient(lambda z: taid(z, t, 0.0), s).abs().max() < 1e-12
    entropy = -(s.softmax(-1) * s.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(taid(s, t, 0.0), entropy)


def test_at_one_the_gradient_is_that_of_the_forward_kl():
    s, t = logits(5, 7), logits(5, 7, seed=1)
    torch.testing.assert_close(gradient(lambda z: taid(z, t, 1.0), s), gradient(lambda z: forward_kl(z, t), s))
    entropy = -(t.softmax(-1) * t.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(taid(s, t, 1.0), forward_kl(s, t) + entropy)


@pytest.mark.parametrize("at", [0.2, 0.7])
def test_in_between_the_target_is_mixed_in_logits_without_a_gradient(at):
    s, t = logits(5, 7), logits(5, 7, seed=1)
    target = ((1 - at) * s + at * t).softmax(-1)
    torch.testing.assert_close(taid(s, t, at), -(target * s.log_softmax(-1)).sum(-1))
    torch.testing.assert_close(gradient(lambda z: taid(z, t, at), s), s.softmax(-1) - target)


def test_it_stays_float32_under_autocast():
    s, t = logits(5, 700).float().requires_grad_(), logits(5, 700, seed=1).float()
    outside = taid(s, t, 0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = taid(s, t, 0.4)
    assert torch.equal(inside, outside)


def schedule(term, losses):
    owned, seen = term.build(None, None), []
    for step, loss in enumerate(losses):
        term.advance(owned, loss, step / len(losses))
        seen.append(float(owned.t))
    return seen


def test_the_schedule_by_hand():
    """t_start 0.2, t_end 0.9, alpha 0.5, beta 0.5; losses 4, 2, 3, 3 of four steps.

    step 0: the loss is only noted, t = 0.2
    step 1: change (4 - 2) / 4 = 0.5, momentum 0.25; 0.2 + 0.5 sigmoid(0.25) 0.8 = 0.42487; the line is at 0.375
    step 2: change (2 - 3) / 2 = -0.5, momentum -0.125; 0.42487 + 0.5 sigmoid(-0.125) 0.57513 = 0.55968; line 0.55
    step 3: change 0, momentum -0.0625; 0.55968 + 0.5 sigmoid(-0.0625) 0.44032 = 0.666; the line is further, at 0.725
    """
    found = schedule(TAID(0.2, 0.9, 0.5, 0.5), [4.0, 2.0, 3.0, 3.0])
    first = 0.2 + 0.5 / (1 + math.exp(-0.25)) * 0.8
    second = first + 0.5 / (1 + math.exp(0.125)) * (1 - first)
    assert found == pytest.approx([0.2, first, second, 0.725], rel=1e-12)
    assert found == pytest.approx([0.2, 0.42487, 0.55968, 0.725], rel=1e-4)


def test_the_line_from_start_to_end_is_the_least_and_the_end_the_most():
    slow = schedule(TAID(0.4, 1.0, 0.0, 0.99), [1.0] * 10)
    assert slow == pytest.approx([0.4, *(0.4 + 0.6 * step / 10 for step in range(1, 10))])
    fast = schedule(TAID(0.4, 0.8, 1.0, 0.0), [1.0 / 2**i for i in range(10)])
    assert fast[-1] == 0.8 and all(b >= a for a, b in zip(fast, fast[1:], strict=False))


def test_a_loss_that_jumps_is_survived():
    assert all(0.4 <= t <= 1 for t in schedule(TAID(), [1e-12, 1e12, 1e-12, 0.0, 5.0]))


def test_bounds():
    with pytest.raises(UserError, match="TAID: t_start must be within 0 .. 1"):
        TAID(t_start=1.5)
    with pytest.raises(UserError, match="t rises from t_start to t_end; got 0.6 and 0.5"):
        TAID(t_start=0.6, t_end=0.5)
