"""Image classifiers: the domain of images."""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from convert.core.console import console
from convert.core.errors import UserError
from convert.core.processes import in_turn, on_first
from convert.data.image_batch import ImageBatch
from convert.data.image_batches import ImageBatches, held_out_images
from convert.data.image_sets import ImageSet, image_set, whole_name
from convert.data.images import ImageData, read_images
from convert.domains.base import Domain
from convert.models.catalog import Source, resolve
from convert.models.saving import fingerprint, load_student
from convert.models.vision.catalog import CLASSIFIERS, IMAGENET
from convert.models.vision.families import StudentOptions, student_config
from convert.models.vision.inputs import preprocessing_of
from convert.models.vision.loading import ImageTeacher, load_teacher, read_config
from convert.models.vision.start import started, starting_config

if TYPE_CHECKING:
    from convert.evaluation.image_monitor import ErrorMonitor
    from convert.evaluation.rules import Rule
    from convert.reports.sections import Sections
    from convert.runs.evaluation_schemas import Evaluation
    from convert.runs.vision_schemas import VisionMetrics, VisionReport
    from convert.training.image_settings import ImageSettings

HELD_OUT = 10_000  # images at most that a run measures on (ours; ImageNet's 50,000 would take 30 GB)
TRIED = 512  # held-out images on which the teacher is tried before a run (ours)
PROBED = 4  # images on which an export is checked


class Vision(Domain[Source, ImageTeacher, ImageSet, ImageData]):
    """Top-1 error on held-out images is the headline metric; training counts images."""

    name = "vision"
    unit = "images"
    headline = "error"

    @property
    def report_type(self) -> "type[VisionReport]":
        from convert.runs.vision_schemas import VisionReport

        return VisionReport

    @property
    def sections(self) -> "Sections":
        from convert.reports.vision import VISION

        return VISION

    # --- before a run

    def resolve(self, teacher: str) -> Source:
        source = resolve(teacher)
        return source if source.domain else dataclasses.replace(source, data=IMAGENET, domain=self.name)

    def read_config(self, source: Source, trust_remote_code: bool = False) -> PreTrainedConfig:
        return read_config(source, trust_remote_code=trust_remote_code)

    def outline(self, config: PreTrainedConfig) -> tuple[PreTrainedConfig, tuple[str | None, ...]]:
        return config, ()

    def problem(self, config: PreTrainedConfig) -> str | None:
        return None  # reading it has refused what is no classifier

    def problem_of_pair(self, run: PreTrainedConfig, step: PreTrainedConfig) -> str | None:
        if run.num_labels == step.num_labels:
            return None
        return (
            f"Teachers of one run share their classes; the run's has {run.num_labels:,}, this one {step.num_labels:,}."
        )

    def problem_of_loaded_pair(self, run: ImageTeacher, step: ImageTeacher) -> str | None:
        return self.problem_of_pair(run.model.config, step.model.config)

    def empty_model(self, config: PreTrainedConfig) -> PreTrainedModel:
        return AutoModelForImageClassification.from_config(config)

    def build_config(self, model: str, sizes: StudentOptions, teacher: PreTrainedConfig) -> PreTrainedConfig:
        if sizes.start is None:
            return student_config(model, sizes, teacher)
        return starting_config(model, sizes, teacher)

    def describe_student(self, model: str, options: StudentOptions, config: PreTrainedConfig) -> str:
        wanted = preprocessing_of(config)
        start = f" from {options.start}" if options.start else ""
        return f"{CLASSIFIERS[model].about}{start}, {wanted.channels} x {wanted.height} x {wanted.width}"

    def build(self, model: str, options: StudentOptions, teacher: ImageTeacher) -> PreTrainedModel:
        config = self.build_config(model, options, teacher.model.config)
        with torch.device(teacher.model.device):
            student = self.empty_model(config)
        return student if options.start is None else started(model, options, config, student)

    def keep_start(
        self, student: PreTrainedModel, teacher: ImageTeacher, batches: Sequence[ImageBatch], folder: Path
    ) -> None:
        from convert.evaluation import vision_metrics

        on_first(vision_metrics.keep_start, student, teacher.model, batches, folder)

    def corpus(self, spec: str) -> ImageSet:
        return image_set(spec)

    def whole_data(self, spec: str) -> str:
        return whole_name(spec)

    def check_data(self, corpus: ImageSet, settings: "ImageSettings") -> None:
        pass

    def monitor_rules(self, rules: Sequence[str]) -> "list[Rule]":
        from convert.evaluation.image_monitor import METRICS
        from convert.evaluation.rules import Rule

        return [Rule.of(rule, METRICS) for rule in rules]

    # --- models and data of a run

    def load_teacher(self, source: Source, device: str, trust_remote_code: bool, shared: bool = False) -> ImageTeacher:
        return in_turn(lambda: load_teacher(source, device=device, trust_remote_code=trust_remote_code))

    def copy(self, model: PreTrainedModel) -> PreTrainedModel:
        return copy.deepcopy(model)

    def load_student(self, folder: Path, teacher: PreTrainedModel) -> PreTrainedModel:
        return load_student(folder, teacher, self.empty_model)

    def origins(self, teacher: ImageTeacher, data: ImageData) -> dict[str, str]:
        return {"teacher": fingerprint(teacher.model), "data": data.fingerprint}

    def prepare(self, corpus: ImageSet, teacher: ImageTeacher, limit: int, settings: "ImageSettings") -> ImageData:
        wanted = preprocessing_of(teacher.model.config)
        size = wanted.height, wanted.width
        data = in_turn(lambda: read_images(corpus, size=size, labels=settings.labels, seed=settings.seed))
        if len(data.class_names) != teacher.model.config.num_labels:
            raise UserError(
                f"A teacher must know the classes of the data; {corpus.spec} has {len(data.class_names):,}, and"
                f" {teacher.source.name} {teacher.model.config.num_labels:,}. Give other --data, or a teacher that was"
                " trained on these."
            )
        if data.channels > wanted.channels:
            raise UserError(
                f"A teacher must take the channels that images have; those of {corpus.spec} have {data.channels}, and"
                f" {teacher.source.name} takes {wanted.channels}."
            )
        self._warn_of_chance(teacher, data)
        return data

    def _warn_of_chance(self, teacher: ImageTeacher, data: ImageData) -> None:
        """Say so where the teacher guesses: its classes may be others, or the same in another order."""
        from convert.evaluation.classification import error

        right, chance = 100 - error(teacher.model, held_out_images(data, 64, TRIED)), 100 / len(data.class_names)
        if right < 2 * chance:
            console.print(
                f"{teacher.source.name} has {right:.1f} % of some held-out images right, where chance has"
                f" {chance:.1f} %. Its classes must be those of the data, in the same order.",
                style="yellow",
                highlight=False,
            )

    def batches(self, data: ImageData, settings: "ImageSettings") -> ImageBatches:
        learns_without_labels = any(term.needs_teacher for _, term in settings.objective.terms)
        images = data.train if learns_without_labels else data.train.labelled()
        return ImageBatches(images, len(data.class_names), settings.batch_images, settings.seed, settings)

    def held_out(self, data: ImageData, budget: int, settings: "ImageSettings") -> list[ImageBatch]:
        return held_out_images(data, max(64, settings.micro_images), HELD_OUT)

    def probe(self, data: ImageData, length: int) -> ImageBatch:
        return held_out_images(data, length, length)[0]

    def check(self, teacher: ImageTeacher, tasks: str | None) -> None:
        if tasks is not None:
            raise UserError("--tasks chooses what a language model is asked; images have one task, their class.")

    # --- measurements

    def measure(self, model: PreTrainedModel, batches: Sequence[ImageBatch]) -> float:
        from convert.evaluation.classification import error

        return error(model, batches)

    def recall_loss(self, model: PreTrainedModel, teacher: ImageTeacher) -> float:
        raise UserError("Associative recall is measured on text; an image classifier has none.")

    def monitor(self, teacher: ImageTeacher, batches: Sequence[ImageBatch], rules: "Sequence[Rule]") -> "ErrorMonitor":
        from convert.evaluation.image_monitor import ErrorMonitor

        return ErrorMonitor(batches, rules)

    def final_metrics(
        self,
        student: PreTrainedModel,
        teacher: ImageTeacher,
        data: ImageData,
        batches: Sequence[ImageBatch],
        folder: Path,
    ) -> "VisionMetrics":
        from convert.evaluation import vision_metrics

        return on_first(vision_metrics.final_metrics, student, teacher.model, data, batches, folder)

    def evaluate(
        self,
        models: Mapping[str, PreTrainedModel],
        teacher: ImageTeacher,
        tasks: str | None,
        examples: int,
        folder: Path,
    ) -> "Evaluation":
        from convert.runs.evaluation_schemas import Evaluation

        return Evaluation(rows=[], gaps=[], models={})  # the class of an image is the only task: final_metrics has it

    def try_it(self, run: Path) -> str:
        return f"python -m convert.export {run} --format onnx"

    def export(
        self, student: PreTrainedModel, teacher: ImageTeacher, folder: Path, cards: tuple[str, str], data: ImageData
    ) -> dict[str, Any]:
        from convert.exporting.images import export_and_verify

        write = functools.partial(
            export_and_verify,
            student,
            folder,
            card=cards[0],
            card_without_code=cards[1],
            class_names=data.class_names,
            images=held_out_images(data, PROBED, PROBED)[0].images,
            dtype=teacher.dtype,
        )
        return on_first(write)
