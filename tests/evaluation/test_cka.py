"""Linear CKA: the unbiased estimator by its formula, and what must not change it."""

import pytest
import torch

from convert.evaluation import cka as module
from convert.evaluation.cka import Alignment, centred_gram, minibatches, similarity
from tests.evaluation.classifiers import classifier, image_batches


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cka(first, second, size=None):
    found = Alignment()
    for a, b in zip(first.split(size or len(first)), second.split(size or len(second)), strict=True):
        found.add([a], [b])
    return found.value().item()


def test_the_estimator_is_that_of_the_paper(monkeypatch):
    """HSIC_1 of Song et al. 2012, as in equation 3 of arXiv 2010.15327, on odd sizes."""
    x, y, n = noise(7, 5), noise(7, 3, seed=1), 7
    k, low = (t @ t.T - torch.diag(torch.diag(t @ t.T)) for t in (x, y))
    one = torch.ones(n, 1, dtype=torch.float64)
    formula = torch.trace(k @ low) + (one.T @ k @ one) * (one.T @ low @ one) / ((n - 1) * (n - 2))
    formula = (formula - 2 / (n - 2) * one.T @ k @ low @ one) / (n * (n - 3))
    monkeypatch.setattr(module, "WIDTH", 2)
    found = (centred_gram(x) * centred_gram(y)).sum() / (n * (n - 3))
    assert found.item() == pytest.approx(formula.item(), rel=1e-10)


def test_rotation_scale_and_shift_change_nothing():
    x = noise(32, 6)
    rotation = torch.linalg.qr(noise(6, 6, seed=1)).Q
    assert cka(x, x) == pytest.approx(1)
    assert cka(x, 3 * x @ rotation + 100) == pytest.approx(1)
    assert cka(x.float(), 1e-30 * x.float()) == pytest.approx(1)  # deep in an untrained network
    assert cka(x, x @ noise(6, 6, seed=2)) < 0.99  # but other linear maps do


def test_independent_representations_are_near_zero_however_wide():
    """The biased estimator gives 0.9 for representations so much wider than images are many."""
    x, y = noise(640, 500), noise(640, 500, seed=1)
    assert abs(cka(x, y, size=64)) < 0.02


def test_minibatches_estimate_what_all_images_do():
    x = noise(512, 8)
    y = x @ noise(8, 5, seed=1) + noise(512, 5, seed=2)
    assert cka(x, y, size=64) == pytest.approx(cka(x, y), abs=0.02)


def test_every_hidden_state_of_two_architectures():
    teacher, student = classifier("vit"), classifier("resnet")
    found = similarity(teacher, student, image_batches(40, 40))
    assert found.images == 64
    assert [len(row) for row in found.values] == [5] * 4  # embedding and three layers; embedding and four stages
    own = torch.tensor(similarity(teacher, teacher, image_batches(64)).values)
    torch.testing.assert_close(own.diagonal(), torch.ones(4))
    torch.testing.assert_close(own, own.T)


def test_layers_without_variation_and_few_images():
    found = Alignment()
    found.add([torch.ones(8, 3)], [noise(8, 3).float()])
    assert found.value().item() == 0.0
    assert [len(part) for part in minibatches(image_batches(3, 4))] == [7]
    assert similarity(classifier("vit"), classifier("vit"), image_batches(3)).values == []
