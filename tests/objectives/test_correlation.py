"""DIST against numpy's correlations."""

import numpy as np
import pytest
import torch

from convert.objectives import DIST, Objective
from convert.objectives.correlation import pearson
from tests.objectives.test_divergences import logits


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_that_of_rows_and_columns(temperature):
    s, t = logits(6, 5), logits(6, 5, seed=1)
    q, p = ((z / temperature).softmax(-1).numpy() for z in (s, t))
    rows = [np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)]
    columns = [np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)]
    expected = temperature**2 * (0.7 * (1 - np.array(rows)) + 2 * (1 - np.mean(columns)))
    found = DIST(0.7, 2, temperature).loss(s, t, torch.zeros(6, 5), None)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-5, atol=1e-7)  # 1e-8 beside the norms
    summed = Objective.of("dist").build(None, None).on_logits(s, t, torch.zeros(6, 5), 1 / 6)
    torch.testing.assert_close(summed, DIST().loss(s, t, torch.zeros(6, 5), None).mean())


def test_a_linear_relation_is_enough():
    """Unlike the KL it does not ask for equal values (the paper's argument)."""
    s = logits(6, 5)
    torch.testing.assert_close(pearson(3 * s + 2, s, -1), torch.ones(6, dtype=torch.float64))
    assert DIST().loss(s, s, torch.zeros(6, 5), None).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(1, 5), (6, 1), (4, 3)])
def test_gradients_are_finite_where_nothing_varies(shape):
    s = logits(*shape).requires_grad_()
    loss = DIST().loss(s, logits(*shape, seed=1), torch.zeros(shape), None)
    assert loss.shape == (shape[0],) and torch.isfinite(torch.autograd.grad(loss.sum(), s)[0]).all()
    if shape == (4, 3):
        assert torch.autograd.gradcheck(lambda z: DIST().loss(z, logits(*shape, seed=1), s, None), (s,))
