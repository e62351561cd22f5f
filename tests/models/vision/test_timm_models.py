"""Teachers of the package timm: their config.json is read without it, and the models with it, where it is installed."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from convert.core.errors import UserError
from convert.models.catalog import resolve
from convert.models.vision.catalog import IMAGENET_MEAN, IMAGENET_STD
from convert.models.vision.families import StudentOptions
from convert.models.vision.features import features, logits, stage_shapes
from convert.models.vision.inputs import FIELD, Preprocessing, preprocessing_of
from convert.models.vision.loading import load_teacher, read_config
from convert.models.vision.operations import cost_of_pass
from convert.models.vision.start import starting_config
from convert.models.vision.timm_models import timm_fields
from tests.models.vision.small_models import PUBLISHED, SMALL, published, small_model, timm_folder


@pytest.mark.parametrize(
    "of_images, wanted",
    [
        ({}, Preprocessing(224, 224, IMAGENET_MEAN, IMAGENET_STD)),
        ({"mean": None, "std": None}, Preprocessing(224, 224, IMAGENET_MEAN, IMAGENET_STD)),
        ({"input_size": [3, 96, 64], "mean": [0.5], "std": [1]}, Preprocessing(96, 64, (0.5,) * 3, (1.0,) * 3)),
        ({"input_size": [1, 32, 32], "mean": [0.1], "std": [0.2]}, Preprocessing(32, 32, (0.1,), (0.2,))),
    ],
)
def test_preprocessing_is_that_of_pretrained_cfg(of_images, wanted):
    fields, found = timm_fields(published(**of_images), "there")
    assert found == wanted and fields["num_classes"] == 1000 and "label_names" not in fields
    assert fields["model_args"] == ({} if wanted.channels == 3 else {"in_chans": 1})


def test_a_model_of_one_size_is_made_for_its_images():
    images = {"fixed_input_size": True, "input_size": [1, 32, 48], "mean": [0.5], "std": [0.5]}
    assert timm_fields(published(**images), "there")[0]["model_args"] == {"in_chans": 1, "img_size": (32, 48)}
    arguments = {"img_size": 32, "num_classes": 1000, "depth": 3}
    fields, _ = timm_fields(published({"model_args": arguments}, **images), "there")
    assert fields["model_args"] == {"in_chans": 1, "img_size": 32, "depth": 3}


@pytest.mark.parametrize(
    "changes, of_images, words",
    [
        ({"architecture": "hf-hub:someone/something"}, {}, "must be the name of a timm model"),
        ({"architecture": None}, {}, "must be the name of a timm model"),
        ({"pretrained_cfg": None}, {}, "pretrained_cfg in the config.json of there must be a JSON object; got None"),
        ({"model_args": [1]}, {}, "model_args in the config.json of there must be a JSON object"),
        ({"num_classes": 1}, {}, r"num_classes in the config.json of there must be within 2 \.\."),
        ({"model_args": {"checkpoint_path": "x.pth"}}, {}, "it has checkpoint_path. Take them out"),
        ({"model_args": {"num_classes": 10}}, {}, "must be its num_classes, 1,000; it is 10"),
        ({"model_args": {"in_chans": 1}}, {}, "it has 3, and model_args.in_chans is 1"),
        ({"label_names": ["a", "b"]}, {}, "must name each of its 1,000 classes; it has 2 names"),
        ({}, {"input_size": [224, 224]}, "must be channels, height and width"),
        ({}, {"input_size": None}, "pretrained_cfg.input_size in the config.json of there must be"),
        ({}, {"input_size": [3, 0, 224]}, "pretrained_cfg.input_size in the config.json of there must be"),
        ({}, {"mean": [0.5, 0.5]}, "one for each channel of input_size, 3; it has 2"),
        ({}, {"input_size": [1, 32, 32]}, "one for each channel of input_size, 1; it has 3"),
        ({}, {"std": [0.0]}, "a deviation above 0"),
        ({}, {"std": "half"}, "pretrained_cfg.std in the config.json of there must be"),
    ],
)
def test_senseless_configurations_are_refused(changes, of_images, words):
    with pytest.raises(UserError, match=words):
        timm_fields(published(changes, **of_images), "there")


@pytest.mark.parametrize("kind", [{}, {"model_type": "timm_wrapper"}])
def test_a_missing_package_is_named(kind, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(published(kind)))
    source, teacher = resolve(str(tmp_path)), small_model("vit").config
    assert source.domain == "vision"
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    with pytest.raises(
        UserError, match="packages timm and torchvision.* import of torchvision halted.*whl/cu130, then"
    ):
        read_config(source)
    with pytest.raises(UserError, match="resnet-18 is a resnet, and .* a timm_wrapper"):
        starting_config("resnet-18", StudentOptions(start=str(tmp_path)), teacher)


def test_a_torchvision_of_another_torch_is_reported(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(
        UserError, match="must fit torch .* says: RuntimeError: operator torchvision::nms does not exist"
    ):
        read_config(resolve(str(tmp_path)))


def test_hidden_states_of_timm_have_no_embedding():
    states = tuple(torch.full((1, 4, 2, 2), float(block)) for block in range(1, 13))

    def model(pixel_values, output_hidden_states):
        return SimpleNamespace(hidden_states=states, logits=torch.zeros(1, 2))

    prepared = {"height": 8, "width": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    model.config = SimpleNamespace(model_type="timm_wrapper", preprocessing=prepared)
    assert [int(stage[0, 0, 0, 0]) for stage in features(model, torch.rand(1, 3, 8, 8)).stages] == [3, 6, 9, 12]


@pytest.mark.parametrize("architecture", SMALL)
def test_a_folder_of_timm_is_a_teacher(architecture, tmp_path):
    model = timm_folder(tmp_path / "timm", architecture)
    teacher = load_teacher(resolve(str(tmp_path / "timm"))).model
    assert preprocessing_of(teacher.config) == Preprocessing(32, 32, (0.25,), (0.5,))
    assert teacher.config.num_labels == 10 and not any(p.requires_grad for p in teacher.parameters())
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(logits(teacher, images), model((images - 0.25) / 0.5))
        found, hidden = features(teacher, images), model.forward_intermediates((images - 0.25) / 0.5)[1]
    torch.testing.assert_close(found.logits, logits(teacher, images))
    ends = (1, 3, 5, 7) if architecture == "test_vit" else (1, 2, 3, 4)
    assert all(torch.allclose(stage, hidden[end]) for stage, end in zip(found.stages, ends, strict=True))
    assert [shape.width_of_features for shape in stage_shapes(teacher)] == [hidden[end].shape[1] for end in ends]
    assert cost_of_pass(teacher)[0] > 1e5

    teacher.config.id2label = {number: f"class {number}" for number in range(10)}
    teacher.save_pretrained(tmp_path / "transformers")  # with model_type, and in its own form
    assert json.loads((tmp_path / "transformers" / "config.json").read_text())["model_type"] == "timm_wrapper"
    again = load_teacher(resolve(str(tmp_path / "transformers"))).model
    torch.testing.assert_close(logits(again, images), logits(teacher, images))
    assert again.config.id2label[3] == "class 3" and again.config.label2id["class 3"] == 3
    assert getattr(again.config, FIELD) == getattr(teacher.config, FIELD)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"model_args": SMALL["test_vit"] | {"img_size": 64, "dynamic_img_size": False}},
            "test_vit in .* fails with images of 1 x 32 x 32 .AssertionError",
        ),
        ({"model_args": {"no_such": 1}}, "fails with images of 1 x 32 x 32 .TypeError"),
        ({"architecture": "no_such_model"}, "'no_such_model' is not supported in your version of timm"),
        ({"model_args": SMALL["test_vit"] | {"depth": 9}}, "Weights must fit config.json"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(changes, words, tmp_path):
    timm_folder(tmp_path, changes=changes)
    with pytest.raises(UserError, match=words):
        load_teacher(resolve(str(tmp_path)))


def test_classes_of_imagenet_have_names(tmp_path):
    timm_folder(tmp_path, classes=1000)
    config = read_config(resolve(str(tmp_path)))
    assert config.id2label[0].startswith("tench") and config.label2id[config.id2label[999]] == 999
