"""Known classifiers, students for a teacher's images, and what a stranger's folder says."""

import json

import pytest
import torch
from transformers import AutoModelForImageClassification

from convert.core.errors import UserError
from convert.models.catalog import resolve
from convert.models.vision.catalog import CLASSIFIERS
from convert.models.vision.families import StudentOptions, known_config, preprocessing_from, student_config
from convert.models.vision.features import stage_shapes
from convert.models.vision.inputs import Preprocessing, preprocessing_of
from convert.models.vision.loading import load_teacher, read_config
from convert.models.vision.start import started, starting_config
from tests.models.vision.small_models import FIELDS, small_model

PARAMETERS = {  # of the published models
    "deit-tiny": 5_717_416, "deit-small": 22_050_664, "vit-base": 86_567_656, "swin-tiny": 28_288_354,
    "resnet-18": 11_689_512, "resnet-34": 21_797_672, "resnet-50": 25_557_032, "mobilenet-v2": 3_504_872,
    "convnext-tiny": 28_589_128, "mixer-base": 59_880_472, "vmamba-tiny": 30_249_064,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_known_models_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(known_config(name))
    assert model.num_parameters() in (PARAMETERS[name], PARAMETERS[name] + 1001)  # MobileNetV2 has a background class


@pytest.mark.parametrize(
    "family, stages", [("vit", 4), ("mlp_mixer", 4), ("swin", 4), ("resnet", 4), ("convnext", 4), ("vmamba", 4)]
)
def test_every_family_has_four_stages(family, stages):
    shapes = stage_shapes(small_model(family))
    assert len(shapes) == stages and all(
        shape.is_map == (family in ("resnet", "convnext", "vmamba")) for shape in shapes
    )


@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if name not in ("vit-base", "mixer-base")])
def test_a_student_has_the_teachers_classes_and_channels(name):
    teacher = small_model("vit", channels=1, classes=7, side=32).config
    teacher.id2label = {i: f"class {i}" for i in range(7)}
    teacher.label2id = {label: i for i, label in teacher.id2label.items()}
    config = student_config(name, StudentOptions(), teacher)
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    assert config.id2label == teacher.id2label and model.config.num_labels == 7
    assert preprocessing_of(config).channels == 1 and len(stage_shapes(model)) == 4


def test_images_do_not_grow_from_student_to_student():
    seen, config = [], student_config("vit-nano", StudentOptions(), small_model("vit", side=16).config)
    for name in ("resnet-nano", "resnet-nano", "vit-nano"):
        config = student_config(name, StudentOptions(), config)
        seen.append(preprocessing_of(config).height)
    assert seen == [32, 32, 32]


def test_sizes_that_a_student_cannot_take_are_refused():
    teacher = small_model("resnet", side=64).config
    assert preprocessing_of(student_config("deit-tiny", StudentOptions(image_size=32), teacher)).height == 32
    with pytest.raises(UserError, match="deit-tiny has patches of 16, and the images 40. Set image_size"):
        student_config("deit-tiny", StudentOptions(image_size=40), teacher)
    with pytest.raises(UserError, match="there is no 'vit-huge'"):
        student_config("vit-huge", StudentOptions(), teacher)


@pytest.mark.parametrize(
    "processor, side",
    [
        ({"size": 224}, 224),
        ({"size": {"height": 96, "width": 96}, "do_center_crop": False}, 96),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True}, 224),
        ({"size": {"shortest_edge": 192}}, 192),
        ({}, 64),
    ],
)
def test_preprocessors_in_every_form(processor, side):
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    found = preprocessing_from(processor | statistics, small_model("vit").config, "there")
    assert found == Preprocessing(side, side, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    "processor, words",
    [
        ({"image_mean": [0.5], "image_std": [0.5]}, "takes 3 channels, and its preprocessor_config.json normalises 1"),
        ({"image_mean": "half"}, "must say how large images are"),
        ({"size": {"longest_edge": 3}}, "must say how large images are"),
    ],
)
def test_senseless_preprocessors_are_refused(processor, words):
    with pytest.raises(UserError, match=words):
        preprocessing_from(processor, small_model("vit").config, "there")


def save(folder, family="vit", **changes):
    model = small_model(family)
    del model.config.preprocessing
    model.save_pretrained(folder)
    processor = {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3} | changes
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


@pytest.mark.parametrize("family", FIELDS)
def test_a_published_folder_is_a_teacher(family, tmp_path):
    model = save(tmp_path, family)
    source = resolve(str(tmp_path))
    assert (source.kind, source.domain) == ("folder", "vision")
    teacher = load_teacher(source)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(teacher.model(pixel_values=images).logits, model(pixel_values=images).logits)
    assert preprocessing_of(teacher.model.config) == Preprocessing(64, 64, (0.5,) * 3, (0.25,) * 3)


def test_what_is_no_classifier_is_refused(tmp_path):
    save(tmp_path)
    source = resolve(str(tmp_path))
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="holds preprocessor_config.json"):
        read_config(source)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(UserError, match="has model_type 'llama'"):
        read_config(source)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(UserError, match="must be a JSON object"):
        read_config(source)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(UserError, match="Weights must fit config.json"):
        load_teacher(resolve(str(tmp_path)))


def test_a_student_begins_with_weights_but_for_its_head(tmp_path, monkeypatch):
    weights = save(tmp_path, "resnet")
    options = StudentOptions(start=str(tmp_path))
    for classes in (5, 3):
        config = starting_config("resnet-18", options, small_model("vit", classes=classes).config)
        empty = AutoModelForImageClassification.from_config(config)
        head = empty.classifier[-1].weight.clone()
        student = started("resnet-18", options, config, empty)
        ours, theirs = student.state_dict(), weights.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if "classifier" not in key)
        assert torch.equal(student.classifier[-1].weight, head) == (classes == 3)
    with pytest.raises(UserError, match="deit-tiny is a vit, and .* a resnet"):
        starting_config("deit-tiny", options, small_model("vit").config)
    with pytest.raises(UserError, match="neox-nano is a language model"):
        starting_config("resnet-18", StudentOptions(start="neox-nano"), small_model("vit").config)
