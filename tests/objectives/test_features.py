"""Distances between the outputs of layers, against plain formulas."""

import pytest
import torch

from convert.core.errors import UserError
from convert.objectives import (
    BlockEnergyMSE,
    BlockL2Distance,
    BlockTerm,
    CosineDistance,
    EnergyMSE,
    FeatureMatching,
    L2Distance,
)
from convert.objectives.features import cosine_distance, energy_mse
from tests.conftest import tiny_teacher
from tests.objectives.test_divergences import logits


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


def test_terms_are_the_functions_and_their_mean_over_layers():
    a, b = ([logits(2, 3, 8, seed=i) for i in range(n, n + 3)] for n in (0, 3))
    assert CosineDistance().loss(a[0], b[0], None) == cosine_distance(a[0], b[0])
    assert EnergyMSE().loss(a[0], b[0], None) == energy_mse(a[0], b[0])
    torch.testing.assert_close(L2Distance().loss(a[0], b[0], None), (a[0] - b[0]).square().sum(-1).sqrt().mean())
    assert BlockL2Distance().loss(a[0], b[0], a[1], None) == L2Distance().loss(a[0], b[0], None)
    expected = sum(cosine_distance(x, y) for x, y in zip(a, b, strict=True)) / 3
    torch.testing.assert_close(FeatureMatching().loss(a, b, None), expected)
    assert FeatureMatching().loss(a, a, None).abs() < 1e-12


def test_the_error_of_a_block_is_over_the_energy_of_what_the_teachers_adds():
    term, x, t = BlockEnergyMSE(), 100 * logits(2, 3, 8), logits(2, 3, 8, seed=1)
    torch.testing.assert_close(term.loss(x, x + t, x, None), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(term.loss(x + t / 2, x + t, x, None), torch.tensor(0.25, dtype=torch.float64))
    assert term.loss(x + t, x + t, x, None) == 0


@pytest.mark.parametrize("term", [CosineDistance(), EnergyMSE(), L2Distance(), BlockEnergyMSE(), BlockL2Distance()])
def test_gradients(term):
    a, b, x = logits(2, 3, 5).requires_grad_(), logits(2, 3, 5, seed=1), logits(2, 3, 5, seed=2)
    inputs = [x] * isinstance(term, BlockTerm)
    assert torch.autograd.gradcheck(lambda z: term.loss(z, b, *inputs, None), (a,))


def test_feature_matching_needs_layers_of_one_shape():
    with pytest.raises(UserError, match="student has 3 of width 32, the teacher 2 of width 32. Take hidden_projection"):
        FeatureMatching().build(tiny_teacher("llama"), tiny_teacher("llama", num_hidden_layers=2))
    FeatureMatching().build(tiny_teacher("llama"), tiny_teacher("gpt_neox"))
