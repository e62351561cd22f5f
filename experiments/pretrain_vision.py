"""Train the embedded image teachers: vit-nano, resnet-nano, mixer-nano, on digits and on Fashion-MNIST.

    python -m experiments.pretrain_vision                          # all three on digits, into runs/pretrain-vision
    python -m experiments.pretrain_vision --data fashion-mnist     # minutes
    python -m experiments.pretrain_vision --install                # and into the package

Each learns from labels alone, by the loop that students learn by. The best of a few seeds would flatter: the seed is 0,
and the card has the accuracy of others beside it."""

import argparse
import statistics
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from convert.cli import fail_in_words, number_of_tokens, whole_number
from convert.core.console import console
from convert.core.files import write_text
from convert.core.provenance import versions
from convert.data.image_batches import ImageBatches, held_out_images
from convert.data.image_sets import ImageData, image_set, read_images
from convert.evaluation.classification import error
from convert.models.saving import save_student
from convert.models.vision.catalog import CLASSIFIERS, EMBEDDED
from convert.models.vision.families import StudentOptions, student_config
from convert.models.vision.inputs import Preprocessing, set_preprocessing
from convert.objectives import Objective
from convert.training.image_settings import ImageSettings
from convert.training.images import classify

NAMES = ("vit-nano", "resnet-nano", "mixer-nano")
IMAGES = {"digits": 100_000, "fashion-mnist": 600_000}
SIDE = {"digits": 16, "fashion-mnist": 28}  # what a model of scale 1 sees


def pretrained(name: str, data: ImageData, side: int, images: int, seed: int) -> PreTrainedModel:
    """A classifier that has learnt from the labels."""
    outputs = AutoConfig.for_model("vit", num_labels=len(data.class_names))  # stands for a teacher: inputs and outputs
    outputs.id2label = dict(enumerate(data.class_names))
    outputs.label2id = {label: i for i, label in outputs.id2label.items()}
    half = (0.5,) * data.channels
    set_preprocessing(outputs, Preprocessing(side, side, half, half))
    torch.manual_seed(seed)
    model = AutoModelForImageClassification.from_config(student_config(name, StudentOptions(), outputs))
    settings = ImageSettings(
        images=images, batch_images=64, micro_images=64, lr=2e-3, objective=Objective.of("cross_entropy"),
        trains="everything", seed=seed, schedule="cosine", weight_decay=0.05, beta2=0.999, clip=5.0, crop=0.1,
        precision="float32",
    )  # fmt: skip
    batches = ImageBatches(data.train, len(data.class_names), settings.batch_images, seed, settings)
    return classify(model, None, batches, settings)
