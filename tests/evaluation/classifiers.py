"""Tiny image classifiers with random weights, and random images."""

from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForImageClassification

from convert.data.image_batch import ImageBatch
from convert.models.vision import mixer, vit_ss2d, vmamba  # noqa: F401  # transformers knows all three by them
from convert.models.vision.inputs import Preprocessing, set_preprocessing

SIZES = {
    "vit": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 8, 12, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"},
    "vmamba": {"hidden_sizes": [8, 16], "depths": [1, 1], "state_size": 4, "rank_ratio": 0.5},
    "vit_ss2d": {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "state_size": 4},
    "mlp_mixer": {"hidden_size": 16, "num_hidden_layers": 2, "token_size": 8, "channel_size": 24},
}


def classifier(family, channels=1, classes=12, side=16, seed=0):
    """A classifier in eval mode whose norms have seen some images."""
    more = {} if family == "resnet" else {"patch_size": 4, "image_size": side}
    config = AutoConfig.for_model(family, num_channels=channels, num_labels=classes, **SIZES[family], **more)
    set_preprocessing(config, Preprocessing(side, side, (0.4, 0.5, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels]))
    torch.manual_seed(seed)
    model = AutoModelForImageClassification.from_config(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for _ in range(3):
            model(pixel_values=torch.randn(16, channels, side, side))
    return model.eval()


def image_batches(*sizes, channels=1, classes=12, side=16, seed=0):
    """Batches of images of noise, of these sizes, with random labels."""
    g = torch.Generator().manual_seed(seed)
    return [
        ImageBatch(
            torch.rand(n, channels, side, side, generator=g),
            torch.eye(classes)[torch.randint(classes, (n,), generator=g)],
        )
        for n in sizes
    ]


class Known:
    """Images of which half of the labels may be used."""

    def __init__(self, count):
        self.known = torch.arange(count) % 2 == 0

    def __len__(self):
        return len(self.known)


def image_data(classes=12):
    names = tuple(f"class {n}" for n in range(classes))
    return SimpleNamespace(class_names=names, train=Known(200), skipped=("a/broken.png",))
