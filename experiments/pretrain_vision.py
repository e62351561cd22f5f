"""Train the embedded image teachers: vit-nano, resnet-nano, mixer-nano, on digits and on Fashion-MNIST.

    python -m experiments.pretrain_vision                          # all three on digits, into runs/pretrain-vision
    python -m experiments.pretrain_vision --data fashion-mnist     # minutes
    python -m experiments.pretrain_vision --install                # and into the package

Each learns from labels alone, by the loop that students learn by. The best of a few seeds would flatter: the seed is 0,
and the card has the accuracy of others beside it."""

import argparse
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from convert.cli import fail_in_words, number_of_tokens, whole_number
from convert.core import manifest
from convert.core.console import console
from convert.core.files import write_text
from convert.data.image_batches import ImageBatches, held_out_images
from convert.data.image_sets import image_set
from convert.data.images import ImageData, read_images
from convert.evaluation.classification import error
from convert.models.saving import save_student
from convert.models.vision.catalog import CLASSIFIERS, EMBEDDED
from convert.models.vision.families import StudentOptions, student_config
from convert.models.vision.inputs import Preprocessing, preprocessing_of, set_preprocessing
from convert.objectives import Objective
from convert.training.image_settings import ImageSettings
from convert.training.images import classify

NAMES = ("vit-nano", "resnet-nano", "mixer-nano")
IMAGES = {"digits": 100_000, "fashion-mnist": 240_000}
SIDE = {"digits": 16, "fashion-mnist": 28}  # of images, where a model does not need larger ones


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
        images=images, batch_images=64, micro_images=64, lr=1e-3, objective=Objective.of("cross_entropy"),
        trains="everything", seed=seed, schedule="cosine", weight_decay=0.05, beta2=0.999, clip=5.0, crop=1,
        precision="float32",
    )  # fmt: skip
    batches = ImageBatches(data.train, len(data.class_names), settings.batch_images, seed, settings)
    return classify(model, None, batches, settings)


CARD = """# {name}

{about} for {data}: {parameters:,} parameters, images of {channels} x {side} x {side}. An embedded teacher: it needs no
download.

* made by `python -m experiments.pretrain_vision --data {data} --install`, torch {torch}, Python {python}
* {images:,} images ({epochs:.0f} passes over {train:,}), crops of images with a border of 1 pixel, AdamW, no teacher
* top-1 accuracy on {held:,} held-out images, seeds {seeds}: {accuracies}; the weights are those of seed 0
* weights in float32; licence Apache-2.0, as the repository; the images are {source}
"""
SOURCES = {
    "digits": "the UCI set of handwritten digits that scikit-learn ships (CC BY 4.0)",
    "fashion-mnist": "Fashion-MNIST (arXiv 1708.07747, MIT licence)",
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(IMAGES), default="digits")
    parser.add_argument("--images", help="seen in training, 100k for digits and 240k for fashion-mnist by default")
    parser.add_argument("--seeds", type=whole_number(1, 100), default=3)
    parser.add_argument("--only", choices=NAMES, help="one of the models")
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain-vision"))
    parser.add_argument("--install", action="store_true", help="put the weights of seed 0 into the package")
    args = parser.parse_args()
    images = number_of_tokens(args.images) if args.images else IMAGES[args.data]
    data = read_images(image_set(args.data))
    batches = held_out_images(data, 500, len(data.held_out))
    for name in [args.only] if args.only else NAMES:
        models = [pretrained(name, data, SIDE[args.data], images, seed) for seed in range(args.seeds)]
        accuracies = [100 - error(model, batches) for model in models]
        folder = args.out / (name if args.data == "digits" else f"{name}-{args.data}")
        folder.mkdir(parents=True, exist_ok=True)
        models[0].config.architectures = [type(models[0]).__name__]
        save_student(models[0], folder)
        write_text(folder / "README.md", card(name, models[0], data, args.data, images, accuracies))
        console.print(f"{folder.name}: {', '.join(f'{accuracy:.2f} %' for accuracy in accuracies)}", highlight=False)
        if args.install:
            shutil.copytree(folder, EMBEDDED / folder.name, dirs_exist_ok=True)
            manifest.record(EMBEDDED, folder.name)


def card(
    name: str, model: PreTrainedModel, data: ImageData, spec: str, images: int, accuracies: Sequence[float]
) -> str:
    """The card of a teacher."""
    wanted = preprocessing_of(model.config)
    return CARD.format(
        name=name if spec == "digits" else f"{name}-{spec}",
        about=CLASSIFIERS[name].about[0].upper() + CLASSIFIERS[name].about[1:],
        data=spec,
        parameters=model.num_parameters(),
        channels=wanted.channels,
        side=wanted.height,
        torch=torch.__version__,
        python=platform.python_version(),
        images=images,
        epochs=images / len(data.train),
        train=len(data.train),
        held=len(data.held_out),
        seeds=", ".join(map(str, range(len(accuracies)))),
        accuracies=", ".join(f"{accuracy:.2f} %" for accuracy in accuracies),
        source=SOURCES[spec],
    )


if __name__ == "__main__":
    raise SystemExit(fail_in_words(main, debug=False))
