"""Losses against plain formulas, their gradients, and what they must be at the ends."""

import pytest
import torch
from torch.nn import functional as F

from convert.objectives.divergences import cross_entropy, forward_kl, reverse_kl
from convert.objectives.divergences import Distill
from convert.objectives.features import cosine_distance, energy_mse
from convert.training.backward import backward_through_head


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


def test_cosine_distance_is_a_mean_over_tokens_and_scale_free():
    a, b = logits(2, 3, 8), logits(2, 3, 8, seed=1)
    expected = (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
    torch.testing.assert_close(cosine_distance(a, b), expected)
    torch.testing.assert_close(cosine_distance(3 * a, b), expected)
    assert cosine_distance(a, a).abs() < 1e-12


def test_energy_mse_is_one_for_a_silent_student_and_free_of_scale():
    a, b = logits(2, 3, 8), logits(2, 3, 8, seed=1)
    torch.testing.assert_close(energy_mse(torch.zeros_like(b), b), torch.ones((), dtype=torch.float64))
    assert energy_mse(b, b) == 0
    torch.testing.assert_close(energy_mse(10 * a, 10 * b), energy_mse(a, b))


def test_energy_mse_of_a_batch_is_the_mean_of_its_sequences():
    scales = torch.tensor([1.0, 30.0, 0.1], dtype=torch.float64)[:, None, None]
    a, b = scales * logits(3, 4, 8), scales * logits(3, 4, 8, seed=1)
    each = [(x - y).square().sum() / y.square().sum() for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(energy_mse(a, b), torch.stack(each).mean())


@pytest.mark.parametrize(
    "objective", [Distill(), Distill(0.5, 0.3, 0.2, 2.0), Distill(1.0, 0.0)], ids=["kl", "all", "ce"]
)
def test_gradients(objective):
    s, t, targets = logits(3, 5).requires_grad_(), logits(3, 5, seed=1), torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda z: objective(z, t, targets), (s,))
    for loss in (cosine_distance, energy_mse):
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, t), (s,))


def test_distill_is_the_weighted_sum_of_its_terms():
    s, t, targets = logits(3, 5), logits(3, 5, seed=1), torch.tensor([0, 4, 2])
    expected = (
        0.5 * F.cross_entropy(s, targets, reduction="sum")
        + 0.3 * forward_kl(s, t, 2.0).sum()
        + 0.2 * reverse_kl(s, t, 2.0).sum()
    )
    torch.testing.assert_close(Distill(0.5, 0.3, 0.2, 2.0)(s, t, targets), expected)


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_backward_through_head_equals_one_plain_backward(chunk):
    """Same loss and gradients, of the head and of what is below it, whatever the size of the chunks."""
    x, targets = logits(11, 6), torch.arange(11) % 9
    grads = []
    for chunked in (True, False):
        torch.manual_seed(0)
        below, head = torch.nn.Linear(6, 6, dtype=torch.float64), torch.nn.Linear(6, 9, dtype=torch.float64)
        hidden = below(x)
        if chunked:
            loss = backward_through_head(hidden, head, lambda z, rows: cross_entropy(z, targets[rows]).sum(), chunk)
        else:
            loss = cross_entropy(head(hidden).float(), targets).sum()
            loss.backward()
        grads.append([loss.detach(), *(p.grad for p in (*below.parameters(), *head.parameters()))])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)
    assert grads[0][1].abs().max() > 1e-3


def test_backward_through_head_never_holds_more_logits_than_a_chunk():
    seen = []
    hidden, head = logits(10, 4).float().requires_grad_(), torch.nn.Linear(4, 50)

    def loss(z, rows):
        seen.append(z.shape)
        return z.sum()

    backward_through_head(hidden, head, loss, 3)
    assert seen == [(3, 50), (3, 50), (3, 50), (1, 50)]


@pytest.mark.parametrize("objective", [cosine_distance, energy_mse, forward_kl, reverse_kl])
def test_losses_stay_float32_under_autocast(objective):
    s, t = logits(5, 700).float().requires_grad_(), logits(5, 700, seed=1).float()
    outside = objective(s, t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = objective(s, t)
    assert torch.equal(inside, outside)
    gradients = [torch.autograd.grad(loss.sum(), s)[0] for loss in (inside, outside)]
    assert torch.equal(*gradients)
