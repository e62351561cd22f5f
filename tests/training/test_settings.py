"""Learning rates, and which objectives a stage takes."""

import dataclasses

import pytest

from convert.core.errors import UserError
from convert.objectives import Objective
from convert.training.settings import check_objective
from tests.training.stages import SETTINGS


def test_schedules():
    wsd = dataclasses.replace(SETTINGS, tokens=100 * 128, lr=1.0)
    rates = [wsd.rate(i) for i in range(100)]
    assert (
        rates[0] == pytest.approx(0.1)
        and rates[9:90] == [1.0] * 81
        and rates[-1] == pytest.approx(0.1)
        and min(rates) >= 0.02
    )
    cosine = dataclasses.replace(wsd, schedule="cosine")
    rates = [cosine.rate(i) for i in range(100)]
    assert rates[9] == 1.0 and rates[-1] == pytest.approx(0.02) and rates[54] == pytest.approx(0.51, abs=0.01)


@pytest.mark.parametrize(
    "stage, objective, words",
    [
        (
            "align",
            "forward_kl",
            "align compares attention outputs and block outputs on the same input; its objective cannot be forward_kl",
        ),
        ("align", "feature_matching", "cannot be feature_matching, which compares layer outputs"),
        ("distill", "energy_mse", "distill compares logits and layer outputs; its objective cannot be energy_mse"),
        ("distill", "forward_kl + energy_mse", "cannot be energy_mse"),
        ("distill", "block_energy_mse", "cannot be block_energy_mse, which compares block outputs on the same input"),
        ("supervised", "block_l2_distance", "supervised compares logits; its objective cannot be block_l2_distance"),
        ("supervised", "hidden_projection", "supervised compares logits; its objective cannot be hidden_projection"),
        ("distill", "0", "a loss needs a term; the objective of distill has none"),
    ],
)
def test_a_stage_refuses_terms_that_it_cannot_compute(stage, objective, words):
    with pytest.raises(UserError, match=words):
        check_objective(stage, Objective.of(objective))


def test_a_stage_takes_the_terms_it_can_compute():
    for stage, objective in [
        ("align", "cosine_distance"),
        ("align", "block_l2_distance + 0.5*energy_mse"),
        ("distill", "taid + feature_matching"),
        ("supervised", "cross_entropy"),
    ]:
        check_objective(stage, Objective.of(objective))
    with pytest.raises(UserError, match="supervised has no teacher to compare with; its objective cannot be taid"):
        check_objective("supervised", Objective.of("taid"), has_teacher=False)
