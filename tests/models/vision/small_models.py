"""Small image classifiers of several families, with random weights."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from convert.models.vision import mixer as _registers  # noqa: F401
from convert.models.vision.inputs import Preprocessing, set_preprocessing

FIELDS = {
    "vit": dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, patch_size=8),
    "mlp_mixer": dict(hidden_size=16, num_hidden_layers=5, token_size=8, channel_size=32, patch_size=8),
    "swin": dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, patch_size=4),
    "resnet": dict(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic"),
    "vmamba": dict(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], state_size=2),
    "convnext": dict(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
    "mobilenet_v2": dict(depth_multiplier=0.25),
    "poolformer": dict(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]),
}


def small_model(family: str, channels: int = 3, classes: int = 5, side: int = 64, mean: float = 0.5) -> PreTrainedModel:
    """In eval mode; images have the statistics `mean` and 0.25."""
    config = AutoConfig.for_model(family, **FIELDS[family], image_size=side, num_channels=channels, num_labels=classes)
    set_preprocessing(config, Preprocessing(side, side, (mean,) * channels, (0.25,) * channels))
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(config).eval()


PUBLISHED = {  # config.json of timm/resnet18.a1_in1k
    "architecture": "resnet18",
    "num_classes": 1000,
    "num_features": 512,
    "pretrained_cfg": {
        "tag": "a1_in1k", "custom_load": False, "input_size": [3, 224, 224], "test_input_size": [3, 288, 288],
        "fixed_input_size": False, "interpolation": "bicubic", "crop_pct": 0.95, "test_crop_pct": 1.0,
        "crop_mode": "center", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "num_classes": 1000,
        "pool_size": [7, 7], "first_conv": "conv1", "classifier": "fc", "license": "apache-2.0",
    },
}  # fmt: skip


def published(changes=(), **of_images):
    """That config.json, with changes to it and to its pretrained_cfg."""
    return PUBLISHED | {"pretrained_cfg": PUBLISHED["pretrained_cfg"] | of_images} | dict(changes)


SMALL = {  # architecture -> arguments; timm makes both for its own tests
    "test_resnet": {},
    "test_vit": {"img_size": 32, "patch_size": 8, "depth": 8},
}


def timm_folder(folder, architecture="test_vit", classes=10, changes=()):
    """A folder as on the hub, of a gray model with random weights; returns the model of timm."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    arguments = SMALL[architecture]
    model = timm.create_model(architecture, num_classes=classes, in_chans=1, **arguments).eval()
    config = published(input_size=[1, 32, 32], mean=[0.25], std=[0.5], num_classes=classes)
    config |= {"architecture": architecture, "num_classes": classes, "model_args": arguments} | dict(changes)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return model
