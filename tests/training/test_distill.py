"""The stage distill: losses fall, frozen stays frozen, and the loss is the plain formula's."""

import dataclasses
import math

import pytest
import torch

from convert.core.errors import UserError
from convert.models.access import hidden_states, layer_outputs
from convert.objectives import Objective
from convert.training.distill import distill
from convert.training.selectors import mixers
from tests.conftest import tiny_teacher
from tests.training.stages import SETTINGS, Logged, batches, student_of

KL, CE = Objective.of("forward_kl"), Objective.of("cross_entropy")


@pytest.mark.parametrize(
    "objective",
    [KL, CE, Objective.of("reverse_kl"), Objective.of("0.5*cross_entropy + 0.5*forward_kl(temperature=2)")],
    ids=["kl", "ce", "reverse", "mixed"],
)
@pytest.mark.parametrize("mixer", ["linear", "mamba", "mamba2"])
def test_distill_lowers_its_loss_and_freezes_embeddings(objective, mixer):
    teacher, student, log = tiny_teacher("gpt_neox"), student_of("gpt_neox", mixer), Logged()
    with torch.no_grad():
        for p in mixers(student):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    ends = [student.get_input_embeddings().weight.clone(), student.get_output_embeddings().weight.clone()]
    distill(
        student,
        teacher,
        batches(),
        dataclasses.replace(SETTINGS, lr=3e-3, objective=objective, trains="all_but_embeddings"),
        track=log,
    )
    assert sum(log.losses[-4:]) < sum(log.losses[:4])
    assert torch.equal(student.get_input_embeddings().weight, ends[0])
    assert torch.equal(student.get_output_embeddings().weight, ends[1])
    assert not any(p.requires_grad for p in student.parameters())


def test_cross_entropy_alone_does_not_run_the_teacher():
    """There is none; and the student learns the text."""
    log = Logged()
    distill(
        student_of("gpt_neox"),
        None,
        batches(),
        dataclasses.replace(SETTINGS, lr=3e-3, objective=CE),
        track=log,
    )
    assert all(map(math.isfinite, log.losses)) and sum(log.losses[-4:]) < 0.8 * sum(log.losses[:4])


@pytest.mark.parametrize("micro_tokens", [128, 32])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_features_are_matched(family, micro_tokens):
    """Loss and gradient norm of a step are those of the plain formula: KL, and the mean cosine distance of all layers'
    outputs."""
    weight, log = 0.5, Logged()
    teacher, student = tiny_teacher(family), student_of(family)
    settings = dataclasses.replace(
        SETTINGS,
        tokens=128,
        micro_tokens=micro_tokens,
        objective=Objective.of(f"forward_kl + {weight}*feature_matching"),
        trains="everything",
        clip=1e9,
    )
    batch, found = batches()(0), []
    for model in (teacher, student):
        model.requires_grad_(model is student)
        with layer_outputs(model) as outputs:
            hidden = hidden_states(model, batch)
        found.append((outputs, model.get_output_embeddings()(hidden).log_softmax(-1)))
    (wanted, p), (outputs, q) = found
    assert len(outputs) == len(wanted) == 3
    real = batch.labels != -100
    kl = (p.exp() * (p - q)).sum(-1)[real].mean()
    distance = torch.stack(
        [(1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).mean() for a, b in zip(outputs, wanted, strict=True)]
    )
    loss = kl + weight * distance.mean()
    assert weight * distance.mean().item() > 0.01 * loss.item()
    gradients = torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad])
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt().item()
    distill(student, teacher, batches(), settings, track=log)
    assert log.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert log.norms[0] == pytest.approx(norm, rel=1e-4)


def test_features_alone_are_an_objective():
    """The logits are not even made, and the head's parameters stay as they are."""
    teacher, student, log = tiny_teacher("llama"), student_of("llama", "mamba2"), Logged()
    head = student.get_output_embeddings().weight.clone()
    settings = dataclasses.replace(SETTINGS, lr=3e-3, objective=Objective.of("feature_matching"), trains="mixers")
    distill(student, teacher, batches(), settings, track=log)
    assert sum(log.losses[-4:]) < 0.8 * sum(log.losses[:4])
    assert torch.equal(student.get_output_embeddings().weight, head)


def test_layers_of_other_shapes_need_a_projection():
    teacher = tiny_teacher("llama", hidden_size=64, num_hidden_layers=2)
    settings = dataclasses.replace(SETTINGS, objective=Objective.of("forward_kl + feature_matching"))
    with pytest.raises(UserError, match="has 3 of width 32, the teacher 2 of width 64. Take hidden_projection"):
        distill(student_of("llama"), teacher, batches(), settings)


def test_terms_that_need_a_teacher_are_refused_without_one():
    with pytest.raises(UserError, match="distill has no teacher to compare with; its objective cannot be forward_kl"):
        distill(student_of("llama"), None, batches(), dataclasses.replace(SETTINGS, objective=KL))


def test_a_plain_model_is_a_student():
    """A model of transformers without a converted layer learns from a teacher of another family, width and depth."""
    teacher, student, log = (
        tiny_teacher("gpt_neox"),
        tiny_teacher("llama", hidden_size=24, num_hidden_layers=2),
        Logged(),
    )
    settings = dataclasses.replace(
        SETTINGS, objective=Objective.of("forward_kl + 0.1*hidden_projection"), trains="everything", lr=3e-3
    )
    trained = distill(student, teacher, batches(), settings, track=log)
    assert trained is student and not student.training and sum(log.losses[-4:]) < 0.8 * sum(log.losses[:4])
