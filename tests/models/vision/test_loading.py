"""A stranger's classifier: what its files say is checked before a model is made of it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from convert.core.errors import UserError
from convert.domains.vision import Vision
from convert.models.vision.catalog import EMBEDDED
from convert.models.vision.config_file import config_of
from tests.models.vision.small_models import FIELDS, small_model

# entries of vit-nano, or of resnet-nano, that no model can be made of
BAD = [
    ("vit", "hidden_size", -1), ("vit", "hidden_size", 10**9), ("vit", "hidden_size", "64"), ("vit", "hidden_size", 0),
    ("vit", "num_hidden_layers", 10**7), ("vit", "num_attention_heads", 0), ("vit", "patch_size", 0),
    ("vit", "image_size", 10**7), ("vit", "num_channels", 0), ("vit", "hidden_act", "nope"),
    ("vit", "layer_norm_eps", float("nan")), ("vit", "hidden_dropout_prob", 5), ("vit", "pooler_output_size", 10**12),
    ("vit", "id2label", {}), ("vit", "id2label", [1, 2]), ("vit", "id2label", {"a": "b", "c": "d"}),
    ("vit", "id2label", {"0": "b", "2": "d"}), ("vit", "num_labels", 3), ("vit", "dtype", "float99"),
    ("vit", "preprocessing", 3), ("resnet", "depths", "x"), ("resnet", "depths", [10**6] * 4),
    ("resnet", "depths", [1000] * 4), ("resnet", "hidden_sizes", [0, 1, 2, 3]), ("resnet", "embedding_size", 10**9),
]  # fmt: skip


def entries(family: str) -> dict:
    return json.loads((EMBEDDED / f"{family}-nano" / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", FIELDS)
def test_a_configuration_is_read_as_transformers_writes_it(family):
    written = small_model(family).config
    read = config_of(json.loads(written.to_json_string(use_diff=False)), "there")
    for field in (*FIELDS[family], "id2label", "num_channels", "preprocessing"):
        assert getattr(read, field) == getattr(written, field), field


def test_entries_that_the_family_does_not_have_are_left_out():
    config = config_of(entries("vit") | {"auto_map": {"AutoConfig": "a.B"}, "_attn_implementation": "c"}, "there")
    assert config._attn_implementation != "c" and not hasattr(config, "auto_map")


@pytest.mark.parametrize("family, name, value", BAD)
def test_what_no_model_can_be_made_of_is_refused_by_the_name_of_its_entry(family, name, value):
    with pytest.raises(UserError, match=rf"there: {name} must|^there: a classifier has two|^A classifier's config"):
        config_of(entries(family) | {name: value}, "there")


@pytest.mark.parametrize(
    "name, value", [("num_hidden_layers", 10**6), ("hidden_size", 10**12), ("layer_norm_eps", 1e300)]
)
def test_nested_configurations_have_bounds_too(name, value):
    with pytest.raises(UserError, match=rf"^there: vision_config: {name} must be"):
        config_of({"model_type": "clip", "vision_config": {name: value}}, "there")


@pytest.mark.parametrize("mean, std", [([float("nan")], [0.5]), ([0.5], [0.0]), ([0.5], [0.5, 0.5])])
def test_statistics_of_channels_that_normalise_nothing_are_refused(mean, std):
    kept = {"height": 16, "width": 16, "mean": mean, "std": std}
    with pytest.raises(
        UserError, match="^Each channel of images needs a mean|mean must be a tuple, each a finite number"
    ):
        config_of(entries("vit") | {"preprocessing": kept}, "there")


@pytest.mark.parametrize(
    "alter, message",
    [
        (lambda config, weights: weights.update({"extra.weight": torch.zeros(3)}), "are read whole; .* extra.weight"),
        (lambda config, weights: config.update(num_hidden_layers=2), "are read whole; .*holds 64 tensors"),
        (lambda config, weights: weights.pop("classifier.bias"), "must fit config.json; .* first classifier.bias"),
        (lambda config, weights: config.update(hidden_size=1024), "describes .* parameters, and its files hold"),
        (lambda config, weights: config.pop("num_hidden_layers"), "missing or misshapen"),
    ],
)
def test_weights_are_read_whole(alter, message, tmp_path):
    shutil.copytree(EMBEDDED / "vit-nano", tmp_path / "teacher")
    file = tmp_path / "teacher" / "model.safetensors"
    config, weights = entries("vit"), load_file(file)
    alter(config, weights)
    save_file(weights, file, metadata={"format": "pt"})
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    domain = Vision()
    with pytest.raises(UserError, match=message):
        domain.load_teacher(domain.resolve(str(tmp_path / "teacher")), "cpu", False)


def test_what_published_checkpoints_hold_beside_a_classifier_is_passed_over(tmp_path):
    shutil.copytree(EMBEDDED / "vit-nano", tmp_path / "teacher")
    file = tmp_path / "teacher" / "model.safetensors"
    more = {"vit.pooler.dense.weight": torch.zeros(3, 3), "vit.embeddings.mask_token": torch.zeros(1, 1, 3)}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    domain = Vision()
    assert domain.load_teacher(domain.resolve(str(tmp_path / "teacher")), "cpu", False).model.num_parameters() > 0


@pytest.mark.parametrize("family", ["beit", "bit", "cvt", "dinov2", "efficientnet", "focalnet", "hgnet_v2", "pvt_v2"])
def test_published_sizes_pass_the_bounds(family):
    published = json.loads(AutoConfig.for_model(family).to_json_string(use_diff=False))
    assert config_of(published, "there").model_type == family
