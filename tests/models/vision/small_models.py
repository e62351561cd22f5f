"""Small image classifiers of several families, with random weights."""

import torch
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from convert.models.vision import mixer as _registers  # noqa: F401
from convert.models.vision.inputs import Preprocessing, set_preprocessing

FIELDS = {
    "vit": dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, patch_size=8),
    "mlp_mixer": dict(hidden_size=16, num_hidden_layers=5, token_size=8, channel_size=32, patch_size=8),
    "swin": dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, patch_size=4),
    "resnet": dict(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic"),
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
