"""Which parameters an optimizer has, and with what weight decay."""

import dataclasses

import pytest
import torch
from torch import nn

from convert.core.errors import UserError
from convert.objectives import Objective
from convert.training.optimizer import optimizers_of
from tests.conftest import tiny_teacher
from tests.training.stages import SETTINGS, student_of


def test_weight_decay_is_only_on_matrices():
    student = student_of("gpt_neox", "mamba")
    (optimizer,) = optimizers_of(student, dataclasses.replace(SETTINGS, trains="everything"), nn.Module())
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    names = {n for n, p in student.named_parameters() if id(p) in decayed}
    assert any("qkv.q.weight" in n for n in names)
    assert not any(n.endswith((".s", ".bias", "conv.weight", "norm.weight", "skip")) or "feature" in n for n in names)


def test_what_terms_own_has_no_weight_decay_and_joins_the_last_optimizer():
    student, teacher = student_of("llama"), tiny_teacher("llama")
    objective = Objective.of("forward_kl + hidden_projection").build(student, teacher)
    (optimizer,) = optimizers_of(student, SETTINGS, objective)
    assert [id(p) for p in optimizer.param_groups[-1]["params"]] == [id(p) for p in objective.parameters()]
    assert optimizer.param_groups[-1]["weight_decay"] == 0 and optimizer.param_groups[0]["weight_decay"] > 0

    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD([p], lr=1.0, weight_decay=0.5) for p in model.parameters() if p.requires_grad][:2]

    first, last = optimizers_of(student, SETTINGS, objective, make)
    assert len(first.param_groups) == 1 and len(last.param_groups) == 2
    assert last.param_groups[-1]["weight_decay"] == 0


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="nothing to train: mixers selects no parameter"):
        optimizers_of(tiny_teacher("llama"), SETTINGS, nn.Module())
