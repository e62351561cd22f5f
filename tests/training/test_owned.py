"""What terms own: trained with the student, in its checkpoints, resumed bit for bit, gone at the end."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from convert.core.errors import Interrupted
from convert.models.student import ConvertedForCausalLM
from convert.objectives import LogitTerm, Objective
from convert.objectives.taid import Interpolation
from convert.training import loop
from convert.training.distill import distill
from tests.conftest import assert_close, tiny_teacher
from tests.training.stages import SETTINGS, Kept, batches, student_of

OWNING = dataclasses.replace(SETTINGS, objective=Objective.of("taid(alpha=0.1) + 0.5*hidden_projection"))
TEACHER = dict(hidden_size=48, num_hidden_layers=5)  # neither the student's width nor its depth


def run(settings: loop.StageSettings, **kwargs: object) -> ConvertedForCausalLM:
    student, teacher = student_of("gpt_neox", "mamba2"), tiny_teacher("gpt_neox", **TEACHER)
    torch.manual_seed(0)  # as a run does before each step: projections are drawn
    return distill(student, teacher, batches(), settings, **kwargs)


def state_after(step: int, settings: loop.StageSettings = OWNING) -> dict:
    keep = Kept(step)
    with pytest.raises(Interrupted):
        run(settings, track=keep, keep=keep)
    return keep.states[step]


@pytest.mark.parametrize("stop_after", [1, 9])
def test_stopped_in_the_middle_of_a_schedule_and_resumed_is_bit_identical(stop_after):
    last = Kept(20)
    with pytest.raises(Interrupted):
        run(OWNING, track=last, keep=last)
    keep = Kept(stop_after)
    with pytest.raises(Interrupted):
        run(OWNING, track=keep, keep=keep)
    keep.stop_after = 20
    with pytest.raises(Interrupted):
        run(OWNING, track=keep, keep=keep)
    straight, resumed = last.states[20], keep.states[20]
    assert straight["objective"].keys() == resumed["objective"].keys() and len(straight["objective"]) == 3 + 3
    for name, value in straight["objective"].items():
        assert torch.equal(value, resumed["objective"][name]), name
    for kind in ("parts", "owned"):
        assert straight[kind].keys() == resumed[kind].keys()
        for name, kept in straight[kind].items():
            assert all(torch.equal(value, resumed[kind][name][key]) for key, value in kept.items()), name
    assert "exp_avg" in next(iter(resumed["parts"].values())) and "exp_avg" in next(iter(resumed["owned"].values()))


def test_parameters_are_trained_and_the_state_advances_once_a_step():
    first, later = state_after(1)["objective"], state_after(6)["objective"]
    for name, value in first.items():
        assert not torch.equal(value, later[name]) or name.endswith("momentum"), name
    assert first["owned.taid_term.t"] == 0.4 and 0.4 < later["owned.taid_term.t"] < 1


@pytest.mark.parametrize("rows", [1, 3])
def test_micro_batches_change_neither_parameters_nor_state(rows):
    whole, cut = (state_after(4, dataclasses.replace(OWNING, micro_tokens=tokens)) for tokens in (128, 32 * rows))
    for name, value in whole["objective"].items():
        assert_close(cut["objective"][name], value, 1e-4)
    t = "owned.taid_term.t"
    assert float(cut["objective"][t]) == pytest.approx(float(whole["objective"][t]), rel=1e-6)


def test_nothing_of_it_is_in_the_student():
    plain = student_of("gpt_neox", "mamba2")
    assert run(OWNING).state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("objective", ["forward_kl", "forward_kl(temperature=2) + 0.05*feature_matching"])
def test_terms_that_own_nothing_leave_the_random_numbers_alone(objective):
    before = torch.get_rng_state()
    Objective.of(objective).build(student_of("llama"), tiny_teacher("llama"))
    student = student_of("llama")
    before = torch.get_rng_state()
    live = Objective.of(objective).build(student, tiny_teacher("llama"))
    assert torch.equal(before, torch.get_rng_state()) and not live.state_dict()


class Counts(LogitTerm):
    """Notes what it is told after each step."""

    needs_teacher = False

    def build(self, student: nn.Module, teacher: nn.Module | None) -> nn.Module:
        return Interpolation(0.0)

    def loss(self, student: Tensor, teacher: Tensor | None, targets: Tensor, owned: nn.Module | None) -> Tensor:
        bad = float(owned.t) == 2 and not seen.get("bad")
        seen["bad"] = seen.get("bad") or bad
        return nn.functional.cross_entropy(student, targets, reduction="none") * (float("nan") if bad else 1.0)

    def advance(self, owned: nn.Module, loss: float, progress: float) -> None:
        owned.t.add_(1)
        seen.setdefault("calls", []).append((loss, progress))


seen: dict = {}


def test_a_skipped_step_does_not_advance_the_state():
    """Progress is the share of the steps before; the loss is the term's own, whatever its weight."""
    seen.clear()
    losses: list[float] = []

    class Log(loop.Silent):
        def log(self, step: int, tokens: int, numbers: dict[str, float]) -> None:
            losses.append(numbers["train/loss"])

    settings = dataclasses.replace(SETTINGS, tokens=4 * 128, objective=Objective(((0.5, Counts()),)))
    distill(student_of("llama"), None, batches(), settings, track=Log())
    assert [progress for _, progress in seen["calls"]] == [0.0, 0.25, 0.75]
    finite = [loss for loss in losses if loss == loss]
    assert [loss / 2 for loss, _ in seen["calls"]] == pytest.approx(finite, rel=1e-6)
