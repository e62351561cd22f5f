"""DLRMamba's terms: against plain formulas, zero for equal models, and blind to the signs of singular vectors."""

import math

import pytest
import torch

from convert.objectives import Objective
from convert.objectives.low_rank import factor_distance, singular_factors
from convert.objectives.stages import Features, Scan, ScanShape, StagedModel
from tests.objectives.test_divergences import logits
from tests.objectives.test_one_for_all import SMALL, Model, output, tokens

RANK, STATES = 2, 4


def orthonormal(*size, seed):
    return torch.linalg.qr(logits(*size, seed=seed))[0]


def scan(rank=STATES, seed=0):
    sigma = torch.linspace(0.9, 0.2, rank, dtype=torch.float64) * torch.tensor([1, 0.9, 0.8, 0.7]).double()[:, None]
    states = logits(3, 4, 6, 5, STATES, seed=seed + 2)
    U, V = (orthonormal(4, STATES, rank, seed=seed + i) for i in range(2))
    return Scan(U, sigma, V, lambda: states)


def featuring(scans, shapes=SMALL, seed=0):
    stages = tuple(output(shape, 3, seed + i) for i, shape in enumerate(shapes))
    return Features(stages, logits(3, 5), tuple(scans))


def live(text, rank=RANK, shapes=SMALL):
    def staged(model):
        scans = [ScanShape(6, 5, STATES, STATES if model is teacher else rank)] * 2
        return StagedModel(model, model.shapes, scans)

    student, teacher = Model(shapes), Model(shapes)
    return Objective.of(text).build(student, teacher, staged)


def loss(text, ours, theirs, rank=RANK, shapes=SMALL):
    return live(text, rank, shapes).on_stages(ours, theirs, torch.zeros(3, 5), 1.0)


def truncated(whole, rank=RANK):
    return Scan(whole.U[..., :rank], whole.sigma[:, :rank], whole.V[..., :rank], whole.states)


def signed(one, signs):
    signs = torch.tensor(signs, dtype=torch.float64)
    return one._replace(U=one.U * signs, V=one.V * signs)


TERMS = ("transition_svd", "scan_states", "stage_features")


@pytest.mark.parametrize("text", TERMS)
def test_equal_models_have_no_loss(text):
    ours = featuring([scan(), scan(seed=5)])
    assert loss(text, ours, ours, STATES) < 1e-24
    different = featuring([scan(seed=7), scan(seed=5)], seed=3)
    assert loss(text, different, ours, STATES) > 1e-2


def test_a_student_with_the_largest_singular_values_has_no_loss_in_whatever_order_and_signs():
    teacher = [scan(), scan(seed=5)]
    shuffled = [whole._replace(U=whole.U.flip(2), sigma=whole.sigma.flip(1), V=whole.V.flip(2)) for whole in teacher]
    student = [signed(truncated(teacher[0]), [1, -1]), signed(truncated(teacher[1]), [-1, -1])]
    assert loss("transition_svd", featuring(student), featuring(shuffled)) < 1e-24
    only_one_side = [one._replace(U=one.U * torch.tensor([1.0, -1.0])) for one in student]  # another transition
    assert loss("transition_svd", featuring(only_one_side), featuring(shuffled)) > 1e-2


@pytest.mark.parametrize("text", TERMS)
def test_signs_of_singular_vectors_change_nothing(text):
    student, teacher = [truncated(scan(seed=8)), truncated(scan(seed=9))], [scan(), scan(seed=5)]
    wanted = loss(text, featuring(student, seed=2), featuring(teacher))
    turned = [signed(one, [-1, 1]) for one in student]
    torch.testing.assert_close(loss(text, featuring(turned, seed=2), featuring(teacher)), wanted)
    turned = [signed(one, [1, -1, -1, 1]) for one in teacher]
    torch.testing.assert_close(loss(text, featuring(student, seed=2), featuring(turned)), wanted)


def test_equal_singular_values_may_turn():
    """Where they are equal, any two vectors of their plane are singular vectors."""
    whole = scan()._replace(sigma=torch.tensor([0.9, 0.9, 0.3, 0.2]).double().expand(4, -1))
    c, s = math.cos(1.1), math.sin(1.1)
    turn = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    student = truncated(whole)._replace(U=whole.U[..., :2] @ turn, V=whole.V[..., :2] @ turn)
    assert loss("transition_svd", featuring([student] * 2), featuring([whole] * 2)) < 1e-24


def test_the_distance_is_the_least_over_all_turns_and_mirrors():
    student, teacher = (singular_factors(truncated(scan(seed=seed)), RANK) for seed in (0, 9))
    angles = torch.linspace(0, 2 * math.pi, 20_001, dtype=torch.float64)
    c, s = angles.cos(), angles.sin()
    least = []
    for mirror in (1, -1):
        R = torch.stack([torch.stack([c, -mirror * s], -1), torch.stack([s, mirror * c], -1)], -2)[:, None]
        least.append(sum((a @ R - b).square().sum((-2, -1)) for a, b in zip(student, teacher, strict=True)).amin(0))
    torch.testing.assert_close(factor_distance(student, teacher), torch.minimum(*least), rtol=1e-6, atol=0)


def test_states_and_features_by_hand():
    student, teacher = [truncated(scan(seed=8)), truncated(scan(seed=9))], [scan(), scan(seed=5)]
    ours, theirs = featuring(student, seed=2), featuring(teacher)
    each = [(s.states() - t.states()).pow(2).sum(-1).mean() / STATES for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(loss("scan_states", ours, theirs), sum(each) / 2)
    each = [(s - t).pow(2).mean() for s, t in zip(ours.stages, theirs.stages, strict=True)]
    torch.testing.assert_close(loss("stage_features", ours, theirs), sum(each) / 4)
    total = loss("0.5*transition_svd + 0.1*scan_states + 1.5*stage_features", ours, theirs)
    parts = [loss(text, ours, theirs) for text in TERMS]
    torch.testing.assert_close(total, 0.5 * parts[0] + 0.1 * parts[1] + 1.5 * parts[2])


def test_special_tokens_are_no_features():
    with_two, with_one = tokens((12,) * 4, (4,) * 4, 2), tokens((12,) * 4, (4,) * 4, 1)
    ours = featuring((), with_two)
    theirs = Features(tuple(stage[:, 1:] + 0.0 for stage in ours.stages), ours.logits)
    term = Objective.of("stage_features").build(Model(with_two), Model(with_one), lambda m: StagedModel(m, m.shapes))
    assert term.on_stages(ours, theirs, torch.zeros(3, 5), 1.0) == 0


def test_gradients():
    """The best turn is part of the loss, though no gradient flows through it."""
    teacher = featuring([scan(), scan(seed=5)])
    found = live("transition_svd + scan_states + stage_features")
    W = [logits(4, STATES, RANK, seed=20), logits(4, RANK, seed=21).sigmoid(), logits(4, STATES, RANK, seed=22)]
    inputs = [*W, logits(3, 4, 6, 5, STATES, seed=23), output(SMALL[3], 3, 9)]

    def total(U, sigma, V, states, stage):
        ours = featuring([Scan(U, sigma, V, lambda: states)] * 2, seed=2)
        return found.on_stages(ours._replace(stages=(*ours.stages[:3], stage)), teacher, torch.zeros(3, 5), 1.0)

    assert torch.autograd.gradcheck(total, [each.requires_grad_() for each in inputs], fast_mode=True)


def test_losses_stay_float32_under_autocast():
    def single(features):
        one = features.scans[0]
        scan = Scan(one.U.float(), one.sigma.float(), one.V.float(), lambda: one.states().float())
        return Features(tuple(stage.float() for stage in features.stages), features.logits.float(), (scan, scan))

    ours, theirs = single(featuring([truncated(scan(seed=8))] * 2, seed=2)), single(featuring([scan()] * 2))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(loss("transition_svd + scan_states + stage_features", ours, theirs))
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)
