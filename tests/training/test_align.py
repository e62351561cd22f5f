"""The stage align: losses fall, frozen stays frozen, each layer is trained on the teacher's own input."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from convert.core.errors import UserError
from convert.objectives import AttentionTerm, Objective
from convert.objectives.features import cosine_distance
from convert.training.align import align
from tests.conftest import tiny_teacher
from tests.training.stages import SETTINGS, Logged, batches, student_of


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3"])
@pytest.mark.parametrize("objective", map(Objective.of, ("cosine_distance", "energy_mse")), ids=str)
def test_align_lowers_its_loss_and_touches_only_mixers(family, objective):
    teacher, student, log = tiny_teacher(family), student_of(family), Logged()
    frozen = {n: p.clone() for n, p in student.named_parameters() if ".mixer." not in n}
    teacher_model = {n: p.clone() for n, p in teacher.named_parameters()}
    align(student, teacher, batches(), dataclasses.replace(SETTINGS, objective=objective), track=log)
    assert sum(log.losses[-4:]) < 0.8 * sum(log.losses[:4])
    for name, p in student.named_parameters():
        assert name not in frozen or torch.equal(p, frozen[name]), name
    for name, p in teacher.named_parameters():
        assert torch.equal(p, teacher_model[name]), name


def test_align_is_teacher_forced():
    """The loss of layer 2 does not depend on what layer 0 of the student is."""
    teacher, losses = tiny_teacher("llama"), []
    for noise in (0.0, 1.0):
        student = student_of("llama")
        with torch.no_grad():
            for p in student.slots()[0].parameters():
                p.add_(noise * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        per_layer = []

        class Noted(AttentionTerm):
            def loss(self, student: Tensor, teacher: Tensor, owned: nn.Module | None, seen=per_layer) -> Tensor:
                seen.append(cosine_distance(student, teacher))
                return seen[-1]

        align(
            student, teacher, batches(), dataclasses.replace(SETTINGS, tokens=128, objective=Objective(((1, Noted()),)))
        )
        losses.append([x.item() for x in per_layer])
    assert losses[0][1:] == losses[1][1:]
    assert losses[0][0] != losses[1][0]


def test_the_weighted_terms_add_up():
    losses = {}
    for text in ("cosine_distance", "energy_mse", "2*cosine_distance + 0.5*energy_mse"):
        log, one = Logged(), dataclasses.replace(SETTINGS, tokens=128, objective=Objective.of(text))
        align(student_of("llama"), tiny_teacher("llama"), batches(), one, track=log)
        losses[text] = log.losses[0]
    first, second, both = losses.values()
    assert both == pytest.approx(2 * first + 0.5 * second, rel=1e-6)


def test_objectives_of_other_stages_are_refused():
    with pytest.raises(
        UserError, match="align compares attention outputs and block .*; its objective cannot be forward_kl"
    ):
        align(
            student_of("llama"), tiny_teacher("llama"), batches(),
            dataclasses.replace(SETTINGS, objective=Objective.of("cosine_distance + forward_kl")),
        )  # fmt: skip
