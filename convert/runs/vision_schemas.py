"""What report.json holds of an image classifier."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator

from convert.runs.evaluation_schemas import ROUNDING
from convert.runs.keys import (
    CheckedAs,
    Count,
    Key,
    Measured,
    ModelName,
    Number,
    Rate,
    Share,
    Size,
    Text,
    require,
)
from convert.runs.schemas import Headline, Report, Settings, some_training


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over held-out images, with its uncertainty."""

    value: Annotated[Number, Key("The mean over the images.", "share")]
    low: Annotated[Number, Key("Lower end of its 95 % bootstrap interval.", "share")]
    high: Annotated[Number, Key("Upper end of its 95 % bootstrap interval.", "share")]

    def __post_init__(self) -> None:
        require(self.low - ROUNDING <= self.value <= self.high + ROUNDING, "value is not within low and high")


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How well one model predicts held-out images."""

    top1: Annotated[Estimate, Key("Images whose right class has the highest probability.")]
    top5: Annotated[
        Estimate | None, Key("Images whose right class is among the five likeliest; null up to ten classes.")
    ]
    cross_entropy: Annotated[Measured, Key("Mean negative log probability of the right class.", "nats")]
    calibration_error: Annotated[
        Share,
        Key(
            "Expected calibration error: mean over images of |accuracy - mean confidence| in the image's bin, of 15"
            " bins of equal width over the confidence (arXiv 1706.04599).",
            "share",
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class Accuracies:
    """How well both models predict the same held-out images."""

    teacher: Annotated[Accuracy, Key("The teacher.")]
    student: Annotated[Accuracy, Key("The student.")]
    difference: Annotated[Estimate, Key("Top-1 of the student minus that of the teacher, paired by image.")]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of both models on held-out images."""

    same: Annotated[Share, Key("Images of which both predict the same class.", "share")]
    both_right: Annotated[Count, Key("Images of which both predict the right class.", "images")]
    only_teacher: Annotated[Count, Key("Images of which the teacher alone does.", "images")]
    only_student: Annotated[Count, Key("Images of which the student alone does.", "images")]
    both_wrong: Annotated[Count, Key("Images of which neither does.", "images")]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predictions of every held-out image, by which runs can be compared image by image. Each text is the numbers of
    the classes, with spaces between, in the order of the held-out images."""

    labels: Annotated[Text, Key("The right classes.")]
    teacher: Annotated[Text, Key("The classes that the teacher predicts.")]
    student: Annotated[Text, Key("The classes that the student predicts.")]

    def __post_init__(self) -> None:
        texts = {name: getattr(self, name).split(" ") for name in ("labels", "teacher", "student")}
        for name, numbers in texts.items():
            right = all(number.isascii() and number.isdecimal() and len(number) < 9 for number in numbers)
            require(right, f"{name} has a word that is no class")
            require(len(numbers) == len(texts["labels"]), f"{name} has another number of images than labels")

    def classes(self, model: ModelName | None = None) -> list[int]:
        """The classes that a model predicts; None: the right ones."""
        return [int(number) for number in getattr(self, model or "labels").split(" ")]

    def counts(self, model: ModelName) -> Counter[tuple[int, int]]:
        """(right class, predicted class) to the number of such images."""
        return Counter(zip(self.classes(), self.classes(model), strict=True))

    def totals(self) -> Counter[int]:
        """Right class to the number of its images."""
        return Counter(self.classes())

    def confusion(self, model: ModelName, num_classes: int) -> list[list[int]]:
        """Confusion matrix of a model: row the right class, column what was predicted."""
        counts = self.counts(model)
        return [[counts[label, predicted] for predicted in range(num_classes)] for label in range(num_classes)]


@dataclass(frozen=True, kw_only=True)
class ErrorInTraining:
    """Top-1 error of the student whenever it was measured in training, on the held-out images."""

    best: Annotated[Number, Key("Lowest error. Choosing by it looks at held-out images.", "%")]
    best_after: Annotated[Count, Key("Images trained on when it was first reached.", "images")]
    last: Annotated[Number, Key("Error at the last measurement.", "%")]
    last_after: Annotated[Count, Key("Images trained on at the last measurement.", "images")]


@dataclass(frozen=True, kw_only=True)
class LayerSimilarity:
    """Similarity of the representations of both models, layer by layer."""

    images: Annotated[Count, Key("Held-out images that it is estimated from.", "images")]
    values: Annotated[
        list[list[Number]],
        Key(
            "Linear CKA of each hidden state of the teacher (rows) with each of the student (columns), from the"
            " embedding on; an unbiased estimate, which can be a little below 0 or above 1."
        ),
    ]

    def __post_init__(self) -> None:
        lengths = {len(row) for row in self.values}
        require(len(lengths) <= 1 and 0 not in lengths, "values: a number of some row is missing")


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Similarity of the representations before training and after it."""

    before: Annotated[
        LayerSimilarity | None, Key("That of the student as it began; null where it was not measured.")
    ] = None
    after: Annotated[LayerSimilarity, Key("That of the finished student.")]


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """What one model costs."""

    parameters: Annotated[Size, Key("Number of parameters.")]
    macs: Annotated[Count, Key("Multiply-accumulates of one image, in matrix products, convolutions and attention.")]
    weight_bytes: Annotated[Size, Key("Size of the weights as they are measured.", "bytes")]
    latency_ms: Annotated[Rate, Key("Median time of a pass of one image.", "milliseconds")]
    images_per_s: Annotated[Rate, Key("Throughput in batches of 64 images, by the median pass.", "images per second")]


@dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """What both models cost on the device of the report."""

    teacher: Annotated[ModelCost, Key("The teacher.")]
    student: Annotated[ModelCost, Key("The student.")]
    threads: Annotated[Size, Key("Threads of the CPU that a pass may use.")]


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """The images of a run."""

    class_names: Annotated[list[Text], Key("Names of the classes, by number.")]
    train: Annotated[Count, Key("Training images.", "images")]
    labelled: Annotated[Count, Key("Training images whose label is used.", "images")]
    held_out: Annotated[Count, Key("Held-out images that the final numbers are measured on.", "images")]
    skipped: Annotated[Count, Key("Files that do not decode, and were left out.", "files")]
    skipped_names: Annotated[list[Text], Key("Names of the first of them.")] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class VisionMetrics:
    """What is measured on a finished image classifier, beside its teacher."""

    headline: Annotated[Headline, Key("The number by which both are compared: the top-1 error in percent.")]
    accuracy: Annotated[Accuracies, Key("Accuracy on held-out images.")]
    agreement: Annotated[Agreement, Key("Agreement of both models on them.")]
    predictions: Annotated[Predictions, Key("Predictions of each of them; confusion matrices follow.")]
    in_training: Annotated[ErrorInTraining | None, Key("Error in training; null where it was not measured then.")] = (
        None
    )
    similarity: Annotated[Similarity, Key("Similarity of representations.")]
    cost: Annotated[ModelCosts, Key("Cost of a pass.")]
    images: Annotated[ImageFacts, Key("The images of the run.")]

    def __post_init__(self) -> None:
        known, n = len(self.images.class_names), self.images.held_out
        for name in ("labels", "teacher", "student"):
            classes = self.predictions.classes(None if name == "labels" else name)  # type: ignore[arg-type]
            require(len(classes) == n, f"predictions.{name} has another number of images than images.held_out")
            require(max(classes) < known, f"predictions.{name} has a class that has no name")


# --- the settings of a run


@dataclass(frozen=True, kw_only=True)
class ImageTrainingSettings:
    """The settings of a training step on images that are read again."""

    images: Annotated[Size, Key("Images that the step trains on, each as often as it comes round.", "images")]
    batch_images: Annotated[Size, Key("Images of an optimizer step.", "images")]


@dataclass(frozen=True, kw_only=True)
class ImageStepSettings:
    """The parts of a step's settings that are read again."""

    kind: Annotated[Text, Key("Kind of the step: the name of its class, such as Build or TrainImages.")]
    name: Annotated[Text, Key("Name of the step, by which --set reaches it.")]
    settings: Annotated[
        ImageTrainingSettings | None, Key("Settings of a training step; all of them are in the file.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ImageRunSettings(Settings):
    """What a run on images was asked for."""

    steps: Annotated[
        list[dict[str, Any]],
        CheckedAs(Annotated[list[ImageStepSettings], AfterValidator(some_training)]),
        Key("Every setting of every step, in order; of a training step at least these."),
    ]


@dataclass(frozen=True, kw_only=True)
class VisionReport(VisionMetrics, Report):
    """Report of an image classifier that learnt from another."""

    settings: Annotated[ImageRunSettings, Key("What the run was asked for.")]
