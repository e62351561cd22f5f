"""The domain of images behind the interface that a run knows."""

import dataclasses
import inspect

import pytest
import torch

from convert.core.errors import UserError
from convert.domains import domain_of
from convert.domains.base import Domain
from convert.domains.vision import Vision
from convert.models.vision.catalog import IMAGENET
from convert.models.vision.families import StudentOptions, known_config
from convert.models.vision.inputs import Preprocessing, set_preprocessing
from convert.objectives import Objective
from convert.recipes.targets import TARGETS, default_recipe
from convert.recipes.vision import IMAGENET_IMAGES, LOW_RANK
from convert.runs.schemas import Report
from tests.evaluation.classifiers import classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny-vit")
    classifier("vit", classes=10).save_pretrained(place)
    return place


def test_the_domain_is_found_by_name_by_folder_and_by_target(folder):
    assert all(isinstance(domain_of(name), Vision) for name in ("vit-nano", "resnet-50", str(folder)))
    assert domain_of("neox-nano").name == domain_of("somebody/something").name == "language"
    assert domain_of("somebody/something", "vision").name == "vision"
    with pytest.raises(
        UserError, match="this one is for language models, and vit-nano is one of the image classifiers"
    ):
        domain_of("vit-nano", "language")
    methods = [name for name, _ in inspect.getmembers(Domain, inspect.isfunction)]
    assert all(getattr(Vision, name) is not getattr(Domain, name) for name in methods)
    assert (Vision.unit, Vision.headline) == ("images", "error") and issubclass(Vision().report_type, Report)


def teacher_and_data(folder, labels=1.0):
    domain = Vision()
    teacher = domain.load_teacher(domain.resolve(str(folder)), "cpu", False)
    recipe = default_recipe("tiny", teacher.model.config, "resnet-nano", labels=labels, images=640)
    settings = recipe.measured_by
    return domain, teacher, settings, domain.prepare(domain.corpus("digits"), teacher, 640, settings)


def test_images_without_a_label_are_used_where_a_teacher_speaks(folder):
    domain, _, settings, data = teacher_and_data(folder, labels=0.1)
    assert int(data.train.known.sum()) < 0.11 * len(data.train)
    with_teacher, alone = (
        domain.batches(data, dataclasses.replace(settings, objective=Objective.of(text)))
        for text in ("cross_entropy + forward_kl", "cross_entropy")
    )
    assert len(with_teacher.images) == len(data.train) and 0 < with_teacher(0).num_targets < 64
    assert len(alone.images) == int(data.train.known.sum()) and alone(0).num_targets == 64


def test_a_student_is_drawn_by_the_seed_alone(folder):
    domain, teacher, *_ = teacher_and_data(folder)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(domain.build("mixer-nano", StudentOptions(), teacher))
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in found), strict=True))
    assert found[0].config.id2label == teacher.model.config.id2label


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.domain == "vision"])
@pytest.mark.parametrize("small", [True, False])
def test_every_target_has_a_recipe(name, small):
    config = known_config("vit-base")
    if small:
        set_preprocessing(config, Preprocessing(16, 16, (0.5,) * 3, (0.5,) * 3))
    recipe = default_recipe("tiny", config, name, seed=3)
    *before, settings = recipe.trainings
    assert recipe.target == name and settings.seed == 3
    if name == "vmamba-lowrank":
        assert settings.objective == LOW_RANK and settings.mixup == settings.ema == 0
        assert settings.optimizer == "adamw" and (settings.resized_crop > 0) == (settings.flip > 0) == (not small)
        return
    assert len(before) == (name == "vit-ss2d")
    for align in before:
        assert (align.trains, str(align.objective)) == ("mixers", "energy_mse") and align.seed == 3
        assert align.images + settings.images == (60_000 if small else 300 * IMAGENET_IMAGES)
    labels = "cross_entropy" if small else "cross_entropy(label_smoothing=0.1)"
    of_teacher = "forward_kl + stage_features" if before else "one_for_all"
    assert str(settings.objective) == f"{labels} + {of_teacher}"
    convolutional = name in ("resnet-nano", "resnet-18", "resnet-34", "resnet-50", "mobilenet-v2")
    assert settings.optimizer == ("sgd" if convolutional and not small else "adamw")
    assert (settings.mixup > 0) == (settings.ema > 0) == (not convolutional and not small)
    assert (settings.resized_crop > 0) == (settings.flip > 0) == (not small)


def test_a_classifier_of_the_hub_learns_from_imagenet_where_no_data_is_given():
    assert Vision().resolve("google/vit-base-patch16-224").data == IMAGENET
    assert Vision().resolve("vit-nano").data == "digits"
