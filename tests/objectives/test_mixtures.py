"""Mixtures and the balanced pair: what they must be at the ends, at equality, within bounds, and for extreme logits."""

import math

import pytest
import torch

from convert.core.errors import UserError
from convert.objectives import JensenShannon, Objective
from convert.objectives.divergences import balanced_kl, forward_kl, reverse_kl
from convert.objectives.mixtures import jensen_shannon, skewed_kl
from tests.objectives.test_divergences import logits

TERMS = ["jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl", "bdkd"]
VARIANTS = [*TERMS, "jensen_shannon(beta=0.1)", "skewed_forward_kl(alpha=0)", "skewed_reverse_kl(alpha=0.7)"]


def loss_of(text, s, t):
    ((_, term),) = Objective.of(text).terms
    return term.loss(s, t, None, None)


def gradient(text, s, t):
    s = s.clone().requires_grad_()
    return torch.autograd.grad(loss_of(text, s, t).sum(), s)[0]


def kl(a, b):
    """From probabilities."""
    return (a * (a / b).log()).sum(-1)


def entropy(z):
    return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)


def test_mixtures_are_the_plain_formulas():
    s, t = logits(5, 7), logits(5, 7, seed=1)
    q, p = s.softmax(-1), t.softmax(-1)
    m = 0.3 * p + 0.7 * q
    torch.testing.assert_close(loss_of("jensen_shannon(beta=0.3)", s, t), 0.3 * kl(p, m) + 0.7 * kl(q, m))
    torch.testing.assert_close(loss_of("skewed_forward_kl", s, t), kl(p, 0.1 * p + 0.9 * q))
    torch.testing.assert_close(loss_of("skewed_reverse_kl", s, t), kl(q, 0.1 * q + 0.9 * p))


def test_without_a_skew_they_are_the_plain_divergences():
    s, t = logits(5, 7), logits(5, 7, seed=1)
    assert torch.equal(loss_of("skewed_forward_kl(alpha=0)", s, t), forward_kl(s, t))
    assert torch.equal(loss_of("skewed_reverse_kl(alpha=0)", s, t), reverse_kl(s, t))
    near = loss_of("skewed_forward_kl(alpha=1e-9)", s, t)
    torch.testing.assert_close(near, forward_kl(s, t), rtol=1e-6, atol=0)


def test_jensen_shannon_is_symmetric_at_a_half_and_turns_round_with_beta():
    s, t = logits(5, 7), logits(5, 7, seed=1)
    torch.testing.assert_close(jensen_shannon(s, t, 0.5), jensen_shannon(t, s, 0.5))
    torch.testing.assert_close(jensen_shannon(s, t, 0.2), jensen_shannon(t, s, 0.8))
    assert (jensen_shannon(s, t, 0.2) - jensen_shannon(t, s, 0.2)).abs().max() > 1e-3


@pytest.mark.parametrize("beta", [1e-3, 1e-5])
def test_jensen_shannon_over_its_weight_tends_to_the_divergences(beta):
    s, t = logits(5, 7), logits(5, 7, seed=1)
    for found, expected in (
        (jensen_shannon(s, t, beta) / beta, forward_kl(s, t)),
        (jensen_shannon(s, t, 1 - beta) / beta, reverse_kl(s, t)),
    ):
        assert ((found - expected) / expected).abs().max() < 10 * beta


@pytest.mark.parametrize("text", VARIANTS)
def test_zero_with_a_zero_gradient_at_equality_alone(text):
    s, other = logits(5, 7), logits(5, 7, seed=1)
    assert loss_of(text, s, s + 3).abs().max() < 1e-12 and gradient(text, s, s + 3).abs().max() < 1e-12
    assert loss_of(text, s, other).min() > 1e-3 and gradient(text, s, other).abs().amax(-1).min() > 1e-3
    single = loss_of(text, s.float(), s.float() + 3)
    assert single.abs().max() < 2e-6 and gradient(text, s.float(), s.float() + 3).abs().max() < 2e-7


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("beta, alpha", [(0.5, 0.1), (0.1, 0.7), (0.999, 1e-3)])
def test_bounds_hold_and_are_reached_by_models_that_share_no_token(beta, alpha, scale):
    s, t = (scale * logits(40, 7, seed=seed).float() for seed in (0, 1))
    s[0], t[0] = torch.tensor([scale, 0, 0, 0, 0, 0, 0]), torch.tensor([0, scale, 0, 0, 0, 0, 0])
    most = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    js, skewed = jensen_shannon(s, t, beta), skewed_kl(t, s, alpha)
    assert js.min() >= -1e-6 and js.max() <= most + 1e-5 and skewed.min() >= -1e-6
    assert skewed.max() <= -math.log(alpha) + 1e-5
    if scale > 100:
        assert abs(js[0] - most) < 1e-5 and abs(skewed[0] + math.log(alpha)) < 1e-5


@pytest.mark.parametrize("text", VARIANTS)
@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_float32_from_logits_is_float64_and_finite(text, scale):
    """Probabilities of exp(-1e4) are 0 in every precision; their logarithms are not."""
    s, t = (scale * logits(20, 300, seed=seed) for seed in (0, 1))
    t[1:5], t[6:9] = 0.7 * s[1:5], 1.4 * s[6:9]
    s[0, 0] = t[1, 1] = 15 * scale
    alike = torch.zeros(20, dtype=torch.bool)
    if text == "bdkd":  # which of the two is stressed is a coin toss where both are as certain
        alike = (entropy(s) - entropy(t)).abs() < 1e-4
        assert alike.sum() < 20 or scale > 100
    for function in (loss_of, gradient):
        single, double = function(text, s.float(), t.float()), function(text, s.float().double(), t.float().double())
        assert single.isfinite().all()
        roundings = (single - double).abs()[~alike] / (2**-24 * max(s.abs().max(), t.abs().max()))
        assert not roundings.gt(16).any()  # of the largest logit


@pytest.mark.parametrize("text", VARIANTS)
def test_gradients(text):
    s, t = logits(4, 5).requires_grad_(), logits(4, 5, seed=1)
    assert torch.autograd.gradcheck(lambda z: loss_of(text, z, t), (s,))


@pytest.mark.parametrize("text", TERMS)
def test_they_stay_float32_under_autocast(text):
    s, t = (logits(5, 700, seed=seed).float() for seed in (0, 1))
    outside = loss_of(text, s, t), gradient(text, s, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss_of(text, s, t), gradient(text, s, t)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_the_balanced_pair_stresses_by_entropy():
    s, t = logits(6, 7), logits(6, 7, seed=1)
    s[:3] *= 0.1  # less certain than the teacher
    s[3:] *= 9
    forward, reverse = forward_kl(s, t), reverse_kl(s, t)
    found = balanced_kl(s, t, 5.0)
    torch.testing.assert_close(found[:3], forward[:3] + 5 * reverse[:3])
    torch.testing.assert_close(found[3:], 5 * forward[3:] + reverse[3:])
    torch.testing.assert_close(balanced_kl(s, t, 1.0), forward + reverse)


def test_bounds_of_the_fields():
    with pytest.raises(UserError, match="JensenShannon: beta must be within 0.001 .. 0.999; got 0"):
        JensenShannon(0.0)
    with pytest.raises(UserError, match="skewed_forward_kl has no field 'beta'. Nearest: none|alpha"):
        Objective.of("skewed_forward_kl(beta=0.5)")
