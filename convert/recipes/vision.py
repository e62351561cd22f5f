"""The recipes of image classifiers: any architecture teaches any by One-for-All distillation (arXiv 2310.19444), a
VMamba one of low rank by structure-aware distillation (DLRMamba, arXiv 2603.06920), and a vision transformer itself
with SS2D in place of attention."""

from dataclasses import dataclass
from typing import Annotated, Any

from transformers import PreTrainedConfig

from convert.core.fields import Checked, Range, Text, checked, require
from convert.models.vision.catalog import CLASSIFIERS, CONVOLUTIONAL
from convert.models.vision.families import StudentOptions
from convert.objectives import Objective
from convert.recipes.base import Recipe
from convert.steps.build import Build
from convert.steps.factorise import Factorise
from convert.steps.swap_ss2d import SwapSS2D
from convert.steps.train_images import TrainImages
from convert.training.image_settings import ImageSettings

IMAGENET_IMAGES = 1_281_167
# what students that are not convolutional have: DeiT's augmentation and the official code's
DEIT: dict[str, Any] = {
    "randaugment": 9.0, "randaugment_std": 0.5, "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0, "ema": 0.99996,
}  # fmt: skip
ALIGN_SHARE = 0.25  # of the images, teacher-forced (ours)
SAME_STAGES = "forward_kl + stage_features"  # of a student whose stages are its teacher's (ours)
OBJECTIVE = Objective.of("cross_entropy + one_for_all")
# DLRMamba's, eq. 9, with the labels of images as task
LOW_RANK = Objective.of("cross_entropy + 0.5*transition_svd + 0.1*scan_states + 1.5*stage_features")
SMOOTHED = Objective.of("cross_entropy(label_smoothing=0.1) + one_for_all")  # the official code's for ImageNet


@dataclass(frozen=True)
class Budget(Checked):
    """What the defaults depend on. `images` is what the student sees in all."""

    images: Annotated[int, Range(1, 1e12)]
    batch_images: Annotated[int, Range(1, 2**20)]
    labels: Annotated[float, Range(1e-6, 1)] = 1.0
    is_small: bool = False  # images of at most 64 x 64: digits, clothes
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0


@checked
def budget(
    teacher: Text,
    config: PreTrainedConfig,
    images: int | None = None,
    labels: float | None = None,
    seed: int = 0,
) -> Budget:
    """Return the defaults for a teacher, by its name and configuration, but for what is given."""
    given = {"images": images, "labels": labels, "seed": seed}
    for name, value in given.items():
        if value is not None:
            require(Budget.__dataclass_fields__[name].type, value, f"--{name}")
    is_small = max(config.preprocessing["height"], config.preprocessing["width"]) <= 64
    default = Budget(60_000, 64, is_small=True) if is_small else Budget(300 * IMAGENET_IMAGES, 1024)
    return Budget(images or default.images, default.batch_images, 1.0 if labels is None else labels, is_small, seed)


@checked
def one_for_all(budget: Budget, student: Text) -> Recipe:
    """A student of any family learns from labels and from the teacher's logits, at its end and behind each stage.

    Settings of large images are the official code's for ImageNet, where it trains convolutional students by SGD (rate
    0.1 for 256 images, weight decay 1e-4) and the others by AdamW (rate 5e-4 for 512, weight decay 0.05); those of
    small images are ours."""
    convolutional = CLASSIFIERS[student].family in CONVOLUTIONAL
    batch = budget.batch_images
    if budget.is_small:
        settings = ImageSettings(
            images=budget.images, batch_images=batch, micro_images=batch, labels=budget.labels,
            lr=1e-3 if convolutional else 3e-3, warmup=0.0 if convolutional else 0.1, objective=OBJECTIVE,
            trains="everything", seed=budget.seed, schedule="cosine", weight_decay=0.05, beta2=0.999, clip=5.0,
            precision="float32", crop=1, evaluate_every=max(1, budget.images // 10),
        )  # fmt: skip
    else:
        settings = ImageSettings(
            images=budget.images, batch_images=batch, micro_images=min(batch, 128), labels=budget.labels,
            lr=0.1 * batch / 256 if convolutional else 5e-4 * batch / 512,
            optimizer="sgd" if convolutional else "adamw",
            weight_decay=1e-4 if convolutional else 0.05, clip=5.0, objective=SMOOTHED, trains="everything",
            seed=budget.seed, schedule="cosine", beta2=0.999, warmup=0.0 if convolutional else 20 / 300,
            resized_crop=0.08, flip=0.5, evaluate_every=IMAGENET_IMAGES, **({} if convolutional else DEIT),
        )  # fmt: skip
    steps = Build("build", student, StudentOptions()), TrainImages("distill", settings)
    return Recipe(student, steps, examples=1)  # images have no tasks; all that are held out are classified


@checked
def low_rank(budget: Budget) -> Recipe:
    """A VMamba of low rank starts from the singular value decomposition of its teacher's weights and learns from labels
    and from the teacher's transitions, states and features.

    The rates are ours, a third of those of students with random weights or less; the paper trains a detector by SGD."""
    batch = budget.batch_images
    common: dict[str, Any] = dict(
        images=budget.images, batch_images=batch, labels=budget.labels, warmup=0.1, objective=LOW_RANK,
        trains="everything", seed=budget.seed, schedule="cosine", weight_decay=0.05, beta2=0.999, clip=5.0,
    )  # fmt: skip
    if budget.is_small:
        settings = ImageSettings(
            **common, micro_images=batch, lr=1e-3, precision="float32", crop=1,
            evaluate_every=max(1, budget.images // 10),
        )  # fmt: skip
    else:
        settings = ImageSettings(
            **common, micro_images=min(batch, 32), lr=1e-4 * batch / 512, resized_crop=0.08, flip=0.5,
            evaluate_every=IMAGENET_IMAGES,
        )  # fmt: skip
    return Recipe("vmamba-lowrank", (Factorise("lowrank"), TrainImages("distill", settings)), examples=1)


@checked
def to_vit_ss2d(budget: Budget) -> Recipe:
    """Attention -> SS2D of the same width. Teacher-forced first: each mixer learns the attention's output from the
    teacher's own input to its layer (as Attention Editing, arXiv 2604.05688); then the whole model learns from labels,
    and the teacher's logits and hidden states. The shares and rates are ours."""
    batch, first = budget.batch_images, int(budget.images * ALIGN_SHARE)
    common: dict[str, Any] = dict(
        batch_images=batch, labels=budget.labels, warmup=0.1, seed=budget.seed, schedule="cosine", weight_decay=0.05,
        beta2=0.999, clip=5.0,
    )  # fmt: skip
    if budget.is_small:
        common |= dict(micro_images=batch, precision="float32", crop=1, evaluate_every=max(1, budget.images // 10))
        rates, labels, more = (1e-2, 3e-3), "cross_entropy", dict[str, Any]()
    else:
        common |= dict(micro_images=min(batch, 64), resized_crop=0.08, flip=0.5, evaluate_every=IMAGENET_IMAGES)
        rates, labels, more = (1e-3, 1e-4 * batch / 512), "cross_entropy(label_smoothing=0.1)", DEIT
    attention, whole = (Objective.of(text) for text in ("energy_mse", f"{labels} + {SAME_STAGES}"))
    align = ImageSettings(**common, images=first, lr=rates[0], objective=attention, trains="mixers")
    distill = ImageSettings(
        **common, images=budget.images - first, lr=rates[1], objective=whole, trains="everything", **more
    )  # fmt: skip
    steps = SwapSS2D("swap"), TrainImages("align", align, "align"), TrainImages("distill", distill)
    return Recipe("vit-ss2d", steps, examples=1)
