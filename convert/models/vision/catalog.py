"""Known image classifiers by name, each a teacher (with its weights) and a student (with random ones). Plain data.

The sizes of published models are those of their own configuration files.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

EMBEDDED = Path(__file__).parents[2] / "nano_images"
DATA = "digits"  # of the embedded teachers
IMAGENET = "hub:ILSVRC/imagenet-1k"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
MOST_CLASSES = 2**20  # ours
TIMM = "timm_wrapper"  # transformers' family of all models of the package timm


@dataclass(frozen=True)
class KnownClassifier:
    """`hub`: its id on the Hugging Face hub, None where it is embedded or has no published weights. `family` and
    `fields`: of its configuration, but for the inputs and outputs, which a student has from its teacher. `size`:
    the side of its images, None for what the teacher sees, but `least` pixels or more."""

    about: str
    family: str
    fields: dict[str, Any]
    hub: str | None = None
    size: int | None = 224
    least: int = 1
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def _vit(width: int, heads: int, layers: int = 12, patch: int = 16) -> dict[str, Any]:
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 4 * width, "patch_size": patch,
    }  # fmt: skip


def _resnet(depths: list[int], widths: list[int], kind: str) -> dict[str, Any]:
    return {"depths": depths, "hidden_sizes": widths, "layer_type": kind, "embedding_size": 64}


NANO_VIT = _vit(64, 4, 6, 4) | {"intermediate_size": 128}
NANO_RESNET = _resnet([1, 1, 1, 1], [16, 32, 64, 96], "basic") | {"embedding_size": 16}
NANO_VMAMBA = {
    "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "state_size": 8, "ssm_ratio": 2.0, "mlp_ratio": 2.0,
}  # fmt: skip
BASIC, WIDE = [64, 128, 256, 512], [256, 512, 1024, 2048]
CLASSIFIERS = {
    "vit-nano": KnownClassifier("a ViT of 0.2 M parameters", "vit", NANO_VIT, size=None, mean=HALF, std=HALF),
    "resnet-nano": KnownClassifier(
        "a ResNet of 0.2 M parameters", "resnet", NANO_RESNET, size=None, least=32, mean=HALF, std=HALF
    ),
    "mixer-nano": KnownClassifier(
        "an MLP-Mixer of 0.2 M parameters",
        "mlp_mixer",
        {"hidden_size": 64, "num_hidden_layers": 6, "token_size": 64, "channel_size": 256, "patch_size": 4},
        size=None,
        mean=HALF,
        std=HALF,
    ),
    "vmamba": KnownClassifier(
        "a VMamba of 0.2 M parameters", "vmamba", NANO_VMAMBA, size=None, least=32, mean=HALF, std=HALF
    ),
    "deit-tiny": KnownClassifier("DeiT-Ti", "vit", _vit(192, 3), "facebook/deit-tiny-patch16-224"),
    "deit-small": KnownClassifier("DeiT-S", "vit", _vit(384, 6), "facebook/deit-small-patch16-224"),
    "vit-base": KnownClassifier("ViT-B/16", "vit", _vit(768, 12), "google/vit-base-patch16-224", mean=HALF, std=HALF),
    "swin-tiny": KnownClassifier(
        "Swin-T",
        "swin",
        {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7, "patch_size": 4},
        "microsoft/swin-tiny-patch4-window7-224",
    ),
    "mixer-base": KnownClassifier("Mixer-B/16", "mlp_mixer", {}, mean=HALF, std=HALF),
    "resnet-18": KnownClassifier("ResNet-18", "resnet", _resnet([2, 2, 2, 2], BASIC, "basic"), "microsoft/resnet-18"),
    "resnet-34": KnownClassifier("ResNet-34", "resnet", _resnet([3, 4, 6, 3], BASIC, "basic"), "microsoft/resnet-34"),
    "resnet-50": KnownClassifier(
        "ResNet-50", "resnet", _resnet([3, 4, 6, 3], WIDE, "bottleneck"), "microsoft/resnet-50"
    ),
    "mobilenet-v2": KnownClassifier(
        "MobileNetV2", "mobilenet_v2", {}, "google/mobilenet_v2_1.0_224", mean=HALF, std=HALF
    ),
    "vmamba-tiny": KnownClassifier("VMamba-T", "vmamba", {}),
    "convnext-tiny": KnownClassifier(
        "ConvNeXt-T", "convnext", {"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]},
        "facebook/convnext-tiny-224",
    ),
}  # fmt: skip
CONVOLUTIONAL = ("resnet", "mobilenet_v2")  # families that the official code trains by SGD


def embedded(name: str) -> Path | None:
    """The folder of an embedded teacher, by its name: that of a nano model, or with the data behind it, as
    vit-nano-fashion-mnist."""
    folder = EMBEDDED / name
    return folder if name.partition("-nano")[1] and (folder / "config.json").is_file() else None


def is_timm(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a model of the package timm, by timm itself or by transformers."""
    return config.get("model_type", TIMM) == TIMM and ("pretrained_cfg" in config or "model_type" in config)


def is_classifier(config: dict[str, Any]) -> bool:
    """Whether a config.json is of an image classifier."""
    if is_timm(config):
        return True
    names = config.get("architectures")
    return isinstance(names, list) and any(str(name).endswith("ForImageClassification") for name in names)
