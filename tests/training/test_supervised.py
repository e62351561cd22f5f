"""The stage supervised: an ordinary training step bit for bit, with the caller's optimizers and schedule."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from convert.core.errors import Interrupted, UserError
from convert.data.batches import Batch, Batches
from convert.objectives import Objective
from convert.training.settings import Settings
from convert.training.supervised import supervised
from tests.conftest import tiny_teacher
from tests.training.stages import SETTINGS, Kept, Logged, batches, student_of, tokens

TEXT = dataclasses.replace(SETTINGS, objective=Objective.of("cross_entropy"), trains="everything", lr=3e-3)


@pytest.mark.parametrize("mixer", [None, "mamba2"])
def test_the_text_is_learnt(mixer):
    model = tiny_teacher("gpt_neox") if mixer is None else student_of("gpt_neox", mixer)
    log = Logged()
    assert supervised(model, None, batches(), TEXT, track=log) is model and not model.training
    assert all(map(math.isfinite, log.losses)) and sum(log.losses[-4:]) < 0.8 * sum(log.losses[:4])


@dataclass(frozen=True)
class Line(Settings):
    def rate(self, step: int) -> float:
        return self.lr * (1 - step / self.num_steps)


def make(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return [torch.optim.Muon(matrices, lr=1.0), torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)]


def test_a_step_is_an_ordinary_training_step_bit_for_bit():
    """With two optimizers, a schedule of the caller's, and batches whose sequences become longer."""

    def batch(step: int) -> Batch:
        return Batches(tokens(), 32 if step < 5 else 64, 4 if step < 5 else 2)(step)

    settings = Line(**{f.name: getattr(TEXT, f.name) for f in dataclasses.fields(TEXT)} | {"tokens": 8 * 128})
    found = supervised(tiny_teacher("llama"), None, batch, settings, optimizers=make)
    model = tiny_teacher("llama").train()
    optimizers = make(model)
    for step in range(8):
        one = batch(step)
        assert one.input_ids.numel() == 128 and one.num_targets < 128
        logits = model(input_ids=one.input_ids, position_ids=one.position_ids, use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), one.labels.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (1 - step / 8)
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(found.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name


class Own(nn.Module):
    """A model that is none of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Embedding(99, 8), nn.Linear(8, 99)

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return self.body(input_ids)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_any_module_with_hidden_states_and_a_head_can_be_trained():
    log = Logged()
    supervised(Own(), None, batches(), dataclasses.replace(TEXT, lr=1e-1), track=log)
    assert sum(log.losses[-4:]) < 0.8 * sum(log.losses[:4])


def test_several_optimizers_are_resumed_bit_for_bit():
    straight = supervised(tiny_teacher("llama"), None, batches(), TEXT, optimizers=make)
    keep = Kept(7)
    with pytest.raises(Interrupted):
        supervised(tiny_teacher("llama"), None, batches(), TEXT, optimizers=make, track=keep, keep=keep)
    keep.stop_after = None
    resumed = supervised(tiny_teacher("llama"), None, batches(), TEXT, optimizers=make, track=keep, keep=keep)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_terms_that_need_a_teacher_are_refused():
    with pytest.raises(UserError, match="supervised has no teacher to compare with"):
        supervised(
            tiny_teacher("llama"),
            tiny_teacher("llama"),
            batches(),
            dataclasses.replace(TEXT, objective=Objective.of("forward_kl")),
        )
