"""Hints, attention maps and relations between images, against plain formulas."""

import math

import pytest
import torch
from torch.nn import functional as F

from convert.objectives import Objective
from convert.objectives.stage_distances import angles, attention_map, relative_distances
from convert.objectives.stages import Features, StageShape, map_of, pooled, tokens_of
from tests.objectives.test_divergences import logits
from tests.objectives.test_one_for_all import SMALL, Model, built, maps, output, staged, tokens

VIT = tokens((12,) * 4, (4,) * 4, 1)


def outputs(shapes, batch=3, seed=0):
    return Features(tuple(output(shape, batch, seed + i) for i, shape in enumerate(shapes)), logits(batch, 5))


def on_stages(text, student, teacher, batch=3):
    live = built(text, Model(student), Model(teacher))
    return live, live.on_stages(outputs(student, batch), outputs(teacher, batch, 9), torch.zeros(batch, 5), 1.0)


def test_a_stage_as_map_and_as_tokens():
    shape = StageShape(False, 3, 2, 2, 1)
    stage = output(shape)
    assert torch.equal(map_of(stage, shape)[1, :, 1, 0], stage[1, 1 + 2])
    assert torch.equal(tokens_of(map_of(stage, shape), StageShape(True, 3, 2, 2)), stage[:, 1:])
    torch.testing.assert_close(pooled(stage, shape), stage[:, 1:].mean(1))


def test_hints_are_a_squared_error_on_the_teachers_grid():
    for student, teacher in ((SMALL, SMALL), (SMALL, VIT), (VIT, SMALL)):
        live, loss = on_stages("hints(stage=3)", student, teacher)
        weight = live.owned["hints_term"].convolution.weight[:, :, 0, 0]
        wanted = map_of(outputs(teacher, 3, 9).stages[2], teacher[2])
        found = map_of(outputs(student).stages[2], student[2])
        assert found.shape[2:] != wanted.shape[2:] or student is teacher
        found = torch.einsum("oc,bchw->bohw", weight, found)
        found = F.interpolate(found, wanted.shape[2:], mode="bilinear", antialias=True)
        torch.testing.assert_close(loss, (found - wanted).square().mean())


def test_attention_maps_are_unit_vectors_of_squares():
    x = logits(2, 3, 4, 5)
    energy = (x**2).sum(1).flatten(1)
    torch.testing.assert_close(attention_map(x), energy / energy.norm(dim=1, keepdim=True))


def test_attention_transfer_is_a_sum_over_stages_on_the_smaller_grid():
    live, loss = on_stages("attention_transfer(beta=10)", SMALL, VIT)
    expected = 0.0
    for s, shape, t, of_teacher in zip(outputs(SMALL).stages, SMALL, outputs(VIT, 3, 9).stages, VIT, strict=True):
        side, (a, b) = min(shape.height, of_teacher.height), (map_of(s, shape), map_of(t, of_teacher))
        a, b = (F.avg_pool2d(z, z.shape[-1] // side) for z in (a, b))
        expected += 10 * (attention_map(a) - attention_map(b)).pow(2).sum() / (3 * side**2)
    torch.testing.assert_close(loss, expected)
    same = outputs(SMALL)
    assert built("attention_transfer", Model(SMALL), Model(SMALL)).on_stages(same, same, torch.zeros(3, 5), 1.0) == 0


def test_stages_are_paired_from_the_last():
    three = SMALL[1:]
    _, loss = on_stages("attention_transfer", three, three)
    live = built("attention_transfer", Model(three), Model(SMALL))
    wider = Features((output(SMALL[0], 3), *outputs(three, 3, 9).stages), logits(3, 5))
    torch.testing.assert_close(live.on_stages(outputs(three), wider, torch.zeros(3, 5), 1.0), loss)


def test_relations_by_hand():
    """A right angle at the first of three images; their distances are 3, 4 and 5."""
    x = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    expected = torch.tensor([[0, 3, 4], [3, 0, 5], [4, 5, 0]], dtype=torch.float64) / 4
    torch.testing.assert_close(relative_distances(x), expected)
    cosines = angles(x)
    for i, j, k, cosine in ((0, 1, 2, 0.0), (1, 0, 2, 0.6), (2, 0, 1, 0.8), (1, 2, 2, 1.0), (1, 1, 2, 0.0)):
        assert float(cosines[i, j, k]) == pytest.approx(cosine, abs=1e-12)


def test_relational_is_free_of_scale_rotation_and_width():
    live = built("relational", Model(SMALL), Model(maps((9,) * 4, (2,) * 4)))
    s = outputs(SMALL, 5)
    rotation = torch.linalg.qr(logits(32, 32))[0]
    turned = 7 * torch.einsum("oc,bchw->bohw", rotation, s.stages[-1])
    assert live.on_stages(s, Features((turned,), s.logits), torch.zeros(5, 5), 1.0) < 1e-12
    t = outputs(maps((9,) * 4, (2,) * 4), 5, 3)
    a, b = s.stages[-1].mean((2, 3)), t.stages[-1].mean((2, 3))
    huber = 0.0
    distances = [[[math.dist(z[i], z[j]) for j in range(5)] for i in range(5)] for z in (a.tolist(), b.tolist())]
    for i in range(5):
        for j in range(5):
            one, other = (d[i][j] / (sum(map(sum, d)) / 20) for d in distances)
            error = abs(one - other)
            huber += (error**2 / 2 if error < 1 else error - 0.5) / 25
    found = live.on_stages(s, t, torch.zeros(5, 5), 1.0)
    expected = 25 * huber + 50 * F.smooth_l1_loss(angles(a), angles(b))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("text", ["hints", "attention_transfer", "relational", "one_for_all(gamma=1.3)"])
def test_gradients(text):
    live = built(text, Model(SMALL), Model(VIT))
    live.eval()  # or the finite differences would move running means
    teacher = outputs(VIT, 3, 9)
    stages = [stage.requires_grad_() for stage in outputs(SMALL).stages]

    def loss(*stages):
        return live.on_stages(Features(stages, teacher.logits.flip(0)), teacher, torch.eye(3, 5).double(), 1.0)

    assert torch.autograd.gradcheck(loss, stages, fast_mode=True)


def test_one_image_has_no_relations_and_equal_ones_no_angles():
    live = built("relational", Model(SMALL), Model(SMALL))
    for batch, make in (
        (1, outputs),
        (3, lambda shapes, n: Features(tuple(output(s, 1).expand(n, -1, -1, -1) for s in shapes), logits(n, 5))),
    ):
        ours = make(SMALL, batch)
        stages = tuple(stage.clone().requires_grad_() for stage in ours.stages)
        loss = live.on_stages(Features(stages, ours.logits), ours, torch.zeros(batch, 5), 1.0)
        loss.backward()
        assert loss == 0 and torch.isfinite(stages[-1].grad).all()


@pytest.mark.parametrize("text", ["attention_transfer", "relational", "dist", "one_for_all(gamma=1.3, stages=4)"])
def test_losses_stay_float32_under_autocast(text):
    live = Objective.of(text).build(Model(SMALL), Model(SMALL), staged)
    ours, theirs = (
        Features(tuple(stage.float() for stage in found.stages), found.logits.float())
        for found in (outputs(SMALL, 4), outputs(SMALL, 4, 9))
    )
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            targets = torch.eye(4, 5)
            found.append(
                live.on_stages(ours, theirs, targets, 1.0) + live.on_logits(ours.logits, theirs.logits, targets, 1)
            )
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=1e-2 if "one_for_all" in text else 1e-6, atol=0)  # projectors are bfloat16
