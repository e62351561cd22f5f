"""Selectors and terms are tried before anything is trained, on models without memory."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from convert.models.vision import vmamba as _registers  # noqa: F401
from convert.models.vision.inputs import Preprocessing, set_preprocessing
from convert.objectives import (
    TERMS,
    AttentionTerm,
    LogitTerm,
    Objective,
    ScanStates,
    StageFeatures,
    StageTerm,
    TransitionSVD,
)
from convert.training.trial import problem_of_functions
from tests.conftest import tiny_teacher
from tests.training.stages import SETTINGS, student_of


def problem(objective: Objective, **teacher: int) -> str | None:
    settings = replace(SETTINGS, objective=objective)
    return problem_of_functions(settings, student_of("llama").to("meta"), tiny_teacher("llama", **teacher).to("meta"))


def classifier(family: str, **changes: object) -> PreTrainedModel:
    """A small image classifier without memory."""
    fields = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    if family == "resnet":
        fields = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "layer_type": "basic"}
    if family == "vmamba":
        fields = {"hidden_sizes": [8, 8, 12], "depths": [1, 1, 1], "state_size": 4, "image_size": 16}
    config = AutoConfig.for_model(family, **fields | {"num_labels": 5} | changes)
    set_preprocessing(config, Preprocessing(16, 16, (0.5,) * 3, (0.5,) * 3))
    with torch.device("meta"):
        return AutoModelForImageClassification.from_config(config)


def problem_of_images(objective: Objective, student: PreTrainedModel, teacher: PreTrainedModel) -> str | None:
    return problem_of_functions(replace(SETTINGS, objective=objective, trains="everything"), student, teacher)


@pytest.mark.parametrize("term", [term for term in TERMS if not issubclass(term, StageTerm)])
def test_the_built_in_terms_can_be_tried(term):
    assert problem(Objective(((1.0, term()),))) is None


ALIKE = (StageFeatures, ScanStates, TransitionSVD)  # terms of two models with stages, or scans, of one shape


@pytest.mark.parametrize(
    "term", [term for term in TERMS if issubclass(term, StageTerm | LogitTerm) and term not in ALIKE]
)
@pytest.mark.parametrize("student, teacher", [("resnet", "vit"), ("vit", "resnet")])
def test_the_built_in_terms_can_be_tried_on_images(term, student, teacher):
    assert problem_of_images(Objective(((1.0, term()),)), classifier(student), classifier(teacher)) is None


@pytest.mark.parametrize("term", ALIKE)
def test_terms_of_models_that_are_alike_can_be_tried(term):
    objective = Objective(((1.0, term()),))
    half, full, diagonal = (classifier("vmamba", rank_ratio=ratio) for ratio in (0.5, 1.0, None))
    for student, teacher in ((half, full), (half, diagonal)):
        assert problem_of_images(objective, student, teacher) is None
    if term is TransitionSVD:
        assert "their ranks are 4 and 1. Take a smaller rank" in problem_of_images(objective, full, half)
    if term is not StageFeatures:
        wider = classifier("vmamba", rank_ratio=0.5, state_size=5)
        assert "3 (the first of 16 places, 8 channels and states of 5), the teacher" in problem_of_images(
            objective, wider, full
        )
        assert "the student has none" in problem_of_images(objective, classifier("vit"), full)
    else:
        assert "Take hints." in problem_of_images(objective, classifier("vit"), full)


def test_a_term_on_stages_says_which_models_it_cannot_compare():
    three = classifier("resnet", hidden_sizes=[8, 16], depths=[1, 1])  # its stem counts
    for text, student, teacher, words in (
        ("one_for_all", classifier("vit"), classifier("resnet", num_labels=7), "the same classes; they have 5 and 7"),
        ("one_for_all(stages=43)", classifier("vit"), classifier("resnet"), "first to last, each once; it has 4"),
        ("hints(stage=4)", three, classifier("resnet"), "they have 3 and 4, and stage is 4"),
        ("one_for_all", classifier("vit", hidden_size=18), classifier("resnet"), "must be a multiple of 4; it is 18"),
    ):
        found = problem_of_images(Objective.of(text), student, teacher)
        assert found is not None and words in found and found.endswith(".")


def test_a_term_says_which_models_it_cannot_compare():
    assert "Take hidden_projection" in problem(Objective.of("feature_matching"), hidden_size=48)
    assert problem(Objective.of("hidden_projection"), hidden_size=48, num_hidden_layers=5) is None


def own(loss: object, kind: type = AttentionTerm, build: object = None, advance: object = None) -> Objective:
    given = {"loss": loss, "build": build, "advance": advance}
    term = type("Own", (kind,), {name: given[name] for name in given if given[name] is not None})
    return Objective(((1.0, term()),))


def mean(self: AttentionTerm, student: Tensor, teacher: Tensor, owned: nn.Module | None) -> Tensor:
    return (student - teacher).square().mean()


def broken(*_: object) -> None:
    raise RuntimeError("of the user's own")


@pytest.mark.parametrize("objective, words", [
    (own(lambda self, a, b, owned: None), "an objective must give one number to minimise, by .* gives None"),
    (own(lambda self, a, b, owned: a - b), "an objective must give one number"),
    (own(lambda self, a, b, owned: mean(self, a, b, owned).detach()), "an objective must give one number"),
    (own(lambda self, a, b: 1.0), "an objective compares attention outputs; .* fails with TypeError"),
    (own(lambda self, a, b, c, owned: a.mean(), LogitTerm), "must give one number for each token"),
    (own(mean, build=broken), "fails with RuntimeError"),
    (own(mean, build=lambda self, s, t: nn.Linear(3, 3)), None),
    (own(mean, build=lambda self, s, t: nn.Linear(3, 3), advance=broken), "fails with RuntimeError"),
    (own(mean), None),
    (own(lambda self, a, b, c, owned: a.topk(10).values.sum(-1), LogitTerm), None),
])  # fmt: skip
def test_terms_of_the_users_own(objective, words):
    found = problem(objective)
    assert found is None if words is None else re.search(words, found) and found.endswith(".")


def test_selectors_of_the_users_own():
    for trains, words in [
        (lambda student: [], "trains must choose parameters of the student, one or more"),
        (lambda student: [torch.zeros(1)], "trains must choose parameters of the student"),
        (broken, "trains must choose parameters of a student; .* fails with"),
    ]:
        found = problem_of_functions(replace(SETTINGS, trains=trains), student_of("llama"), tiny_teacher("llama"))
        assert found and re.search(words, found)
