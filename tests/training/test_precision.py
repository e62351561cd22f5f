"""Matrix products in bfloat16, backward passes outside of autocast."""

import dataclasses

import pytest
import torch

from convert.objectives import Objective
from convert.training.align import align
from convert.training.distill import distill
from tests.conftest import tiny_teacher
from tests.training.stages import SETTINGS, Logged, batches, student_of

COSINE, KL = Objective.of("cosine_distance"), Objective.of("forward_kl")


@pytest.mark.parametrize("mixer", ["linear", "mamba", "mamba2"])
@pytest.mark.parametrize("family", ["gpt_neox", "qwen3"])
def test_bfloat16_products_teach_the_same(family, mixer):
    """Packed documents under autocast; the first loss is that of float32 to bfloat16's rounding, and it falls."""
    losses = []
    for precision in ("float32", "bfloat16"):
        log, settings = Logged(), dataclasses.replace(SETTINGS, lr=3e-3, precision=precision)
        student = align(
            student_of(family, mixer), tiny_teacher(family), batches(), dataclasses.replace(settings, tokens=256)
        )
        distill(student, tiny_teacher(family), batches(), dataclasses.replace(settings, objective=KL), track=log)
        losses.append(log.losses)
        assert all(p.dtype == torch.float32 for p in student.parameters())
    assert losses[0] != losses[1]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.05)
    assert sum(losses[1][-4:]) < sum(losses[1][:4])


@pytest.mark.parametrize("stage, objective", [(align, COSINE), (distill, KL)], ids=["align", "distill"])
def test_backward_passes_run_without_autocast(stage, objective, monkeypatch):
    """An operator's own backward pass would else multiply in bfloat16, whatever it promises of its states."""
    seen, original = [], torch.autograd.backward
    monkeypatch.setattr(
        torch.autograd, "backward", lambda *a, **k: seen.append(torch.is_autocast_enabled("cpu")) or original(*a, **k)
    )
    settings = dataclasses.replace(SETTINGS, tokens=128, precision="bfloat16", objective=objective)
    stage(student_of("gpt_neox", "mamba2"), tiny_teacher("gpt_neox"), batches(), settings)
    assert seen and not any(seen)
