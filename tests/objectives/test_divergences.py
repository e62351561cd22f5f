"""Losses against plain formulas, their gradients, and what they must be at the ends."""

import pytest
import torch
from torch.nn import functional as F

from convert.objectives import Objective
from convert.objectives.divergences import cross_entropy, forward_kl, reverse_kl
from convert.objectives.features import cosine_distance, energy_mse


def logits(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_forward_kl_is_torch_kl_div():
    s, t = logits(5, 7), logits(5, 7, seed=1)
    for temperature in (1.0, 2.5):
        expected = (
            F.kl_div((s / temperature).log_softmax(-1), (t / temperature).softmax(-1), reduction="none").sum(-1)
            * temperature**2
        )
        torch.testing.assert_close(forward_kl(s, t, temperature), expected)
        torch.testing.assert_close(reverse_kl(s, t, temperature), forward_kl(t, s, temperature))


def test_kl_is_zero_only_at_equality_and_ignores_a_shift():
    s = logits(5, 7)
    assert forward_kl(s, s + 3).abs().max() < 1e-12
    assert forward_kl(s, logits(5, 7, seed=1)).min() > 0.01


ALL = "0.5*cross_entropy + 0.3*forward_kl(temperature=2) + 0.2*reverse_kl(temperature=2)"


@pytest.mark.parametrize("text", ["forward_kl", ALL, "cross_entropy"])
def test_gradients(text):
    s, t, targets = logits(3, 5).requires_grad_(), logits(3, 5, seed=1), torch.tensor([0, 4, 2])
    objective = Objective.of(text).build(None, None)
    assert torch.autograd.gradcheck(lambda z: objective.on_logits(z, t, targets, 1.0), (s,))


def test_an_objective_is_the_weighted_sum_of_its_terms():
    s, t, targets = logits(3, 5), logits(3, 5, seed=1), torch.tensor([0, 4, 2])
    expected = (
        0.5 * F.cross_entropy(s, targets, reduction="sum")
        + 0.3 * forward_kl(s, t, 2.0).sum()
        + 0.2 * reverse_kl(s, t, 2.0).sum()
    )
    torch.testing.assert_close(Objective.of(ALL).build(None, None).on_logits(s, t, targets, 0.25), expected / 4)


@pytest.mark.parametrize("objective", [cosine_distance, energy_mse, forward_kl, reverse_kl])
def test_losses_stay_float32_under_autocast(objective):
    s, t = logits(5, 700).float().requires_grad_(), logits(5, 700, seed=1).float()
    outside = objective(s, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = objective(s, t)
    assert torch.equal(inside, outside)
    gradients = [torch.autograd.grad(loss.sum(), s)[0] for loss in (inside, outside)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_tokens_and_of_probabilities(smoothing):
    s, targets = logits(4, 5), torch.tensor([0, 4, 2, 1])
    smoothed = (1 - smoothing) * F.one_hot(targets, 5).double() + smoothing / 5
    expected = -(smoothed * s.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(cross_entropy(s, targets, smoothing), expected)
    torch.testing.assert_close(cross_entropy(s, F.one_hot(targets, 5).double(), smoothing), expected)
    live = Objective.of(f"cross_entropy(label_smoothing={smoothing})").build(None, None)
    torch.testing.assert_close(live.on_logits(s, None, targets, 0.25), expected.mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_image_without_a_label_has_no_cross_entropy(smoothing):
    s = logits(3, 5).requires_grad_()
    targets = torch.tensor([[0, 0.3, 0, 0.7, 0], [0] * 5, [0, 0, 0, 0, 1]], dtype=torch.float64)
    loss = cross_entropy(s, targets, smoothing)
    assert loss[1] == 0 and loss[[0, 2]].min() > 0
    loss.sum().backward()
    assert s.grad[1].abs().max() == 0 and s.grad[[0, 2]].abs().min() > 0


@pytest.mark.parametrize("text", ["forward_kl(temperature=4)", "reverse_kl", "jensen_shannon", "bdkd", "taid", "dist"])
def test_terms_that_need_no_label_take_images(text):
    """The targets may be probabilities, and their loss is the same where the label is not known."""
    s, t = logits(4, 5).float(), logits(4, 5, seed=1).float()
    live = Objective.of(text).build(None, None)
    losses = [live.on_logits(s, t, targets, 1.0) for targets in (torch.eye(4, 5), torch.zeros(4, 5))]
    assert torch.equal(*losses) and losses[0] > 0
