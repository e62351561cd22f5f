"""Layers of different widths and depths, compared through projections."""

import pytest
import torch

from convert.objectives import HiddenProjection
from convert.objectives.projectors import matched_layers
from tests.conftest import tiny_teacher
from tests.objectives.test_divergences import logits


@pytest.mark.parametrize(
    "student, teacher, expected",
    [
        (4, 12, [2, 5, 8, 11]),
        (3, 3, [0, 1, 2]),
        (4, 6, [1, 2, 4, 5]),
        (6, 4, [0, 1, 1, 2, 3, 3]),
        (1, 7, [6]),
        (3, 1, [0, 0, 0]),
    ],
)
def test_layers_are_matched_in_proportion(student, teacher, expected):
    assert matched_layers(student, teacher) == expected


def test_one_projection_for_each_student_layer():
    student, teacher = tiny_teacher("llama"), tiny_teacher("llama", hidden_size=48, num_hidden_layers=5)
    owned = HiddenProjection().build(student, teacher)
    assert [tuple(p.shape) for p in owned.parameters()] == [(48, 32)] * 3
    with torch.device("meta"):
        empty = tiny_teacher("llama").to("meta")
        assert all(p.is_meta for p in HiddenProjection().build(empty, teacher).parameters())


def test_the_loss_is_half_the_squared_error_of_unit_vectors():
    """Patient KD's; and both student and projections get gradients."""
    student_model, teacher_model = tiny_teacher("llama"), tiny_teacher("llama", hidden_size=48, num_hidden_layers=5)
    term = HiddenProjection()
    owned = term.build(student_model, teacher_model)
    student = [logits(2, 3, 32, seed=i).float().requires_grad_() for i in range(3)]
    teacher = [logits(2, 3, 48, seed=9 + i).float() for i in range(5)]
    loss = term.loss(student, teacher, owned)
    expected = 0.0
    for project, s, layer in zip(owned, student, (1, 3, 4), strict=True):
        units = [x / x.norm(dim=-1, keepdim=True) for x in (project(s), teacher[layer])]
        expected += (units[0] - units[1]).square().sum(-1).mean() / 2 / 3
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(x.grad.abs().max() > 0 for x in (*student, *owned.parameters()))


def test_it_is_zero_for_projections_that_give_the_teacher():
    model, term = tiny_teacher("llama"), HiddenProjection()
    owned = term.build(model, model)
    with torch.no_grad():
        for p in owned.parameters():
            p.copy_(torch.eye(32))
    outputs = [logits(2, 3, 32, seed=i).float() for i in range(3)]
    assert term.loss(outputs, outputs, owned).abs() < 1e-6
