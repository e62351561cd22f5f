"""An objective as data: a line and back, weights and fields changed, terms of the user's own."""

import json
from dataclasses import dataclass
from typing import Annotated

import pytest
import torch
from torch import Tensor, nn

from convert.core.errors import UserError
from convert.core.fields import Range
from convert.objectives import TERMS, AttentionTerm, CrossEntropy, ForwardKL, Objective, Term
from convert.objectives.base import name_of

LINES = [
    "forward_kl",
    "0.9*forward_kl(temperature=2) + 0.1*cross_entropy",
    "taid(t_start=0.2, beta=0.9) + 1e-05*hidden_projection",
    "0.30000000000000004*forward_kl(temperature=0.1)",
    "energy_mse",
    "cross_entropy(label_smoothing=0.1) + one_for_all(gamma=1.5, last_gamma=1.2, stages=24)",
    "0.5*hints(stage=3) + attention_transfer(beta=10) + relational + dist(temperature=4)",
    "0",
]


@pytest.mark.parametrize("line", LINES)
def test_a_line_and_back(line):
    objective = Objective.of(line)
    assert str(objective) == line and Objective.of(str(objective)) == objective
    json.dumps(objective.plain())


@pytest.mark.parametrize("line", ["  .9 * forward_kl ( temperature = 2.0 )+0.10*cross_entropy", LINES[1]])
def test_white_space_and_the_form_of_numbers_do_not_matter(line):
    assert Objective.of(line) == Objective(((0.9, ForwardKL(2.0)), (0.1, CrossEntropy())))


def test_every_term_is_known_by_its_name():
    names = "cross_entropy forward_kl reverse_kl jensen_shannon skewed_forward_kl skewed_reverse_kl bdkd taid"
    names += " dist cosine_distance energy_mse l2_distance block_energy_mse block_l2_distance feature_matching"
    names += " hidden_projection one_for_all hints attention_transfer relational"
    names += " transition_svd scan_states stage_features"
    assert [name_of(term) for term in TERMS] == names.split()
    for term in TERMS:
        assert Objective.of(name_of(term)) == Objective(((1.0, term()),))


@pytest.mark.parametrize(
    "line, words",
    [
        ("forward", "no term 'forward'. Nearest: forward_kl"),
        ("forward_kl(temp=2)", "forward_kl has no field 'temp'. Nearest: temperature"),
        ("forward_kl(temperature=0)", "temperature must be within 0.01 .. 100; got 0"),
        ("forward_kl(temperature=hot)", "temperature must be a finite number; got 'hot'"),
        ("forward_kl(temperature=1, temperature=1)", "has 'temperature' twice"),
        ("reverse_kl + feature_matching(a=1)", "feature_matching has no field 'a'. Nearest: none"),
        ("one_for_all(gamma=0)", "gamma must be within 0.1 .. 10; got 0"),
        ("one_for_all(stages=1+2)", "A field of one_for_all is written NAME=VALUE; got 'stages=1"),
        ("forward_kl(2)", "written NAME=VALUE; got '2'"),
        ("cross_entropy(temperature=2)", "cross_entropy has no field 'temperature'. Nearest: label_smoothing"),
        ("", "must be 1 to 4,096 characters"),
        ("2*", "cannot be read from its character 1 on"),
        ("forward_kl +", "cannot be read from its character 13 on"),
        ("forward_kl cross_entropy", "cannot be read from its character 12 on"),
        ("-1*forward_kl", "cannot be read from its character 1 on"),
        ("٣*forward_kl", "cannot be read from its character 1 on"),
        ("9e9*forward_kl", "weight of forward_kl must be within 0 .. 1e.06; got 9000000000.0"),
        ("1e400*forward_kl", "weight of forward_kl must be a finite number"),
        ("0*forward_kl", "a weight must be above 0"),
        ("forward_kl + 2*forward_kl", "each term must be there once; got forward_kl, forward_kl"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(line, words):
    with pytest.raises(UserError, match=words) as refused:
        Objective.of(line)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


@pytest.mark.parametrize("line", ["1" * 4000, "(" * 4000, "a(" * 2000, "1*" * 2000, "a=" * 2000, "forward_kl+" * 370])
def test_long_nonsense_is_refused_at_once(line):
    with pytest.raises(UserError):
        Objective.of(line)


def test_weights():
    objective = Objective.of("forward_kl(temperature=2)")
    assert str(objective.with_weight("forward_kl", 0.7)) == "0.7*forward_kl(temperature=2)"
    assert objective.with_weight("forward_kl", 0) == Objective(())
    both = objective.with_weight("cross_entropy", 0.3).with_weight("feature_matching", 0.05)
    assert str(both) == "0.3*cross_entropy + forward_kl(temperature=2) + 0.05*feature_matching"
    assert objective.with_weight("feature_matching", 0.05).with_weight("cross_entropy", 0.3) == both
    with pytest.raises(UserError, match="There is no term 'kl'"):
        objective.with_weight("kl", 1)
    with pytest.raises(UserError, match="must be within"):
        objective.with_weight("forward_kl", -1)


def test_fields():
    objective = Objective.of("forward_kl + reverse_kl + cross_entropy").with_field("temperature", 2)
    assert str(objective) == "forward_kl(temperature=2) + reverse_kl(temperature=2) + cross_entropy"
    assert objective.field_names() == ["temperature", "label_smoothing"]
    with pytest.raises(
        UserError, match="No term of the objective .* has a field 'alpha'; their fields: temperature, label_smoothing"
    ):
        objective.with_field("alpha", 1)
    with pytest.raises(UserError, match="temperature must be within"):
        objective.with_field("temperature", 0)


@pytest.mark.parametrize(
    "terms", [None, [], ("forward_kl",), ((1.0, "forward_kl"),), ((1.0, ForwardKL),), (("1", ForwardKL()),)]
)
def test_terms_are_pairs_of_weight_and_term(terms):
    with pytest.raises(UserError, match=r"Objective: .*\.$"):
        Objective(terms)


@dataclass(frozen=True)
class Huber(AttentionTerm):
    """A term of a user's own."""

    delta: Annotated[float, Range(0, 10)] = 1.0

    def loss(self, student: Tensor, teacher: Tensor, owned: nn.Module | None) -> Tensor:
        return nn.functional.huber_loss(student, teacher, delta=self.delta)


def test_a_term_of_the_users_own_needs_no_table():
    objective = Objective(((0.5, Huber(0.1)),))
    assert str(objective) == "0.5*huber(delta=0.1)" and objective.with_field("delta", 2).terms[0][1] == Huber(2)
    assert objective.with_weight("huber", 1).terms == ((1.0, Huber(0.1)),)
    assert objective.plain() == [{"term": "huber", "weight": 0.5, "delta": 0.1}]
    a, b = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    assert objective.build(None, None).on_attention(a, b, 1.0) == 0.5 * nn.functional.huber_loss(a, b, delta=0.1)
    with pytest.raises(UserError, match="Huber: delta must be within 0 .. 10; got 11"):
        Huber(11)


def test_kinds_and_the_need_of_a_teacher():
    live = Objective.of("cross_entropy + feature_matching").build(None, None)
    logit, layer, attention, block, stage = (kind for kind in Term.__subclasses__())
    assert live.has(logit) and live.has(layer) and not any(live.has(kind) for kind in (attention, block, stage))
    assert live.needs_teacher() and live.needs_teacher(layer) and not live.needs_teacher(logit)


@dataclass(frozen=True)
class Values(AttentionTerm):
    """A term with the name of a method of nn.ModuleDict, and fields that a file may not be able to hold."""

    distance: object = torch.nn.functional.mse_loss

    def build(self, student, teacher):
        return nn.Linear(3, 3, bias=False)

    def loss(self, student, teacher, owned):
        return self.distance(owned(student), teacher)


def test_a_term_may_have_any_name():
    live = Objective(((1.0, Values()),)).build(nn.Identity(), None)
    live.on_attention(torch.ones(1, 2, 3), torch.zeros(1, 2, 3), 1.0).backward()
    live.advance(0.0)
    assert [parameter.grad.shape for parameter in live.parameters()] == [(3, 3)]


def test_fields_are_what_a_file_can_hold():
    named = Objective(((1.0, Values()),))
    named.check_plain()
    assert named.plain() == [{"term": "values", "weight": 1.0, "distance": "mse_loss"}]
    with pytest.raises(UserError, match="The fields of a term must be numbers, words, or functions with a name"):
        Objective(((1.0, Values(nn.Linear(2, 2))),)).check_plain()
