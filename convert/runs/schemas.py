"""What report.json holds whatever was converted: dataclasses, written with dataclasses.asdict and checked when read.

A domain adds what it measures in a subclass of Report (convert.runs.language_schemas). The rows of the files that grow
while a run trains are here too.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from convert.runs.evaluation_schemas import Evaluation
from convert.runs.keys import VERSION, CheckedAs, Count, Key, Measured, Number, Size, Text, Whole, require


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The settings of a training step that a later evaluation needs."""

    tokens: Annotated[Size, Key("Tokens that the step trains on.", "tokens")]
    seq_len: Annotated[Size, Key("Length of its sequences.", "tokens")]
    micro_tokens: Annotated[Size, Key("Tokens of one forward and backward pass.", "tokens")]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The parts of a step's settings that are read again."""

    kind: Annotated[Text, Key("Kind of the step: the name of its class, such as Swap or Train.")]
    name: Annotated[Text, Key("Name of the step, by which --set reaches it.")]
    settings: Annotated[TrainingSettings | None, Key("Settings of a training step; all of them are in the file.")] = (
        None
    )


def some_training(steps: list[Any]) -> list[Any]:
    """A run trains in at least one step."""
    require(any(step.settings is not None for step in steps), "a training step is missing")
    return steps


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the run was asked for, as the ledger has it."""

    teacher: Annotated[Text, Key("The teacher as it was named: an alias, a hub id, or an absolute path.")]
    teacher_fingerprint: Annotated[Text, Key("Hash of the teacher's weights.")]
    target: Annotated[Text, Key("Name of the target.")]
    data: Annotated[Text, Key("The data as it was named.")]
    data_fingerprint: Annotated[Text, Key("Hash of the tokenized data.")]
    steps: Annotated[
        list[dict[str, Any]],
        CheckedAs(Annotated[list[StepSettings], AfterValidator(some_training)]),
        Key("Every setting of every step, in order; of a training step at least these."),
    ]

    @property
    def training(self) -> list[TrainingSettings]:
        """The settings of the training steps, in order."""
        return [_training_settings(step) for step in self.steps if step.get("settings") is not None]

    @property
    def measured_by(self) -> TrainingSettings:
        """The settings whose sequences the run was measured by: those of the last training step on its data."""
        trained = [step for step in self.steps if step.get("settings") is not None]
        return _training_settings(([step for step in trained if step.get("data") is None] or trained)[-1])


def _training_settings(step: dict[str, Any]) -> TrainingSettings:
    return TrainingSettings(**{name: step["settings"][name] for name in TrainingSettings.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The one number by which a domain compares a student with its teacher."""

    name: Annotated[Text, Key("Name of the metric, such as perplexity.")]
    unit: Annotated[Text, Key("Unit of the metric; empty where it has none.")]
    teacher: Annotated[Measured, Key("Value of the teacher, in the metric's unit.")]
    student: Annotated[Measured, Key("Value of the finished student, in the metric's unit.")]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How far a student was from its teacher, all of whose layers were replaced, with one layer given back. Lower is
    better."""

    by: Annotated[
        Literal["kl", "recall"],
        Key(
            "What was measured: kl, the KL divergence from the teacher, or recall, the loss of associative recall over"
            " the tokens of the right values."
        ),
    ]
    none: Annotated[Measured, Key("Its value with no layer given back.", "nats per token")]
    alone: Annotated[
        list[Measured], Key("Its value with this layer alone given back, layer by layer.", "nats per token")
    ]
    order: Annotated[list[Whole], Key("Layers in the order in which they were chosen.")]


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Which layers kept their attention."""

    kept: Annotated[list[Whole], Key("Layers that keep the teacher's attention.")] = field(default_factory=list)
    kl_when_edited_alone: Annotated[
        list[Measured] | None,
        Key("KL divergence from the unedited model when only this layer is edited, layer by layer.", "nats per token"),
    ] = None
    when_given_back: Annotated[
        Ranking | None, Key("Ranking of the layers once all were replaced, where that chose them.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class Handover:
    """How far the logits moved in a swap that must not change the function."""

    max_abs_logit: Annotated[Measured | None, Key("Largest change of a logit; null where no swap was exact.")] = None
    allowed: Annotated[Measured | None, Key("Largest change that rounding explains.")] = None
    tokens: Annotated[Count | None, Key("Held-out tokens that were compared.", "tokens")] = None
    headline_change: Annotated[Measured | None, Key("Relative change of the headline metric.", "share")] = None
    max_abs_logit_float64: Annotated[
        Measured | None, Key("Largest change of a logit in float64, where float32 was not exact enough.")
    ] = None

    def __post_init__(self) -> None:
        if self.max_abs_logit is not None:
            for name in ("allowed", "tokens", "headline_change"):
                require(getattr(self, name) is not None, f"{name} is missing")


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a finished step did."""

    name: Annotated[Text, Key("Name of the step.")]
    kind: Annotated[Text, Key("Kind of the step, such as Swap or Train.")]
    tokens: Annotated[Count, Key("Tokens that it trained on; 0 where it trains nothing.", "tokens")]
    seconds: Annotated[Number, Key("Time that it took, in all processes that worked on it.", "seconds")]
    headline_after: Annotated[Measured, Key("Headline metric of the student on held-out data after the step.")]
    loss_first: Annotated[Measured | None, Key("Mean loss of the first twentieth of the step.")] = None
    loss_last: Annotated[Measured | None, Key("Mean loss of the last twentieth of the step.")] = None
    skipped: Annotated[Count | None, Key("Optimizer steps skipped: their gradients were not finite.", "steps")] = None
    model: Annotated[Text | None, Key("Hash of the student's weights after a training step.")] = None
    layers: Annotated[Layers | None, Key("Layers that a swap left alone, or that got their attention back.")] = None
    handover: Annotated[Handover | None, Key("Hand-over check of a swap that must not change the function.")] = None

    def __post_init__(self) -> None:
        if self.tokens > 0:
            for name in ("loss_first", "loss_last", "skipped"):
                require(getattr(self, name) is not None, f"{name} is missing")


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Time of a run."""

    total: Annotated[Number, Key("Time of all steps, in all processes that worked on them.", "seconds")]
    this_call: Annotated[Number | None, Key("Time of the call that finished the run.", "seconds")] = None


@dataclass(frozen=True, kw_only=True)
class TokenCount:
    """Tokens of a run."""

    total: Annotated[Count, Key("Tokens trained on, over all steps.", "tokens")]


@dataclass(frozen=True, kw_only=True)
class NativeExport:
    """The export that needs no code of ours, or why there is none."""

    obstacle: Annotated[Text | None, Key("Why there is no native/: the reason, in words.")] = None
    model_type: Annotated[Text | None, Key("transformers' model type of native/.")] = None
    max_abs_logit: Annotated[Measured | None, Key("Largest difference of its logits in a clean process.")] = None
    allowed: Annotated[Measured | None, Key("Largest difference that rounding explains.")] = None
    max_abs_logit_float64: Annotated[
        Measured | None, Key("The same in float64, where float32 was not exact enough.")
    ] = None

    def __post_init__(self) -> None:
        if self.obstacle is None:
            for name in ("model_type", "max_abs_logit", "allowed"):
                require(getattr(self, name) is not None, f"{name} is missing")


@dataclass(frozen=True, kw_only=True)
class Export:
    """How the export was checked: loaded in a process that does not know this project."""

    max_abs_logit: Annotated[Measured | None, Key("Largest difference of the export's logits in a clean process.")] = (
        None
    )
    allowed: Annotated[Measured | None, Key("Largest difference that rounding explains.")] = None
    max_abs_logit_float64: Annotated[
        Measured | None, Key("The same in float64, where float32 was not exact enough.")
    ] = None
    dtype: Annotated[Text | None, Key("Data type of the exported weights.")] = None
    native: Annotated[NativeExport | None, Key("The export without code of ours.")] = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What every finished run tells."""

    domain: Annotated[Text, Key("What was converted: language or vision. It decides which further keys there are.")]
    teacher: Annotated[Text, Key("Short name of the teacher.")]
    target: Annotated[Text, Key("Name of the target.")]
    headline: Annotated[Headline, Key("The number by which student and teacher are compared.")]
    unit: Annotated[Text, Key("What training counts: tokens for language, images for vision.")]
    evaluation: Annotated[Evaluation, Key("Scores by task at the end of the run; the keys of evaluation.json.")]
    seed: Annotated[Whole, Key("Seed of training.")]
    device: Annotated[Text, Key("Device that the student was measured on, such as cpu or cuda:0.")]
    commit: Annotated[Text | None, Key("Commit of this project; null outside of a checkout.")]
    versions: Annotated[dict[str, Text | None], Key("Library to its version.")]
    settings: Annotated[Settings, Key("What the run was asked for.")]
    steps: Annotated[list[StepResult], Key("What each step did, in order.")]
    stages: Annotated[list[StepResult], Key("The training steps among them.")]
    handover: Annotated[Handover, Key("Hand-over check of the last swap that had one.")]
    layers: Annotated[Layers, Key("Layers that keep the teacher's attention.")]
    seconds: Annotated[Seconds, Key("Time of the run.")]
    tokens: Annotated[TokenCount, Key("Tokens of the run.")]
    export: Annotated[Export | None, Key("How the export was checked.")] = None
    version: Annotated[Size, Key("Version of this file's layout.")] = VERSION


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """A line of metrics.jsonl: one optimizer step. Layer by layer there are also weights/layer_NN and
    gradients/layer_NN, the norms of the mixer's trained parameters and of their clipped gradients."""

    stage: Annotated[Text, Key("Name of the training step.")]
    step: Annotated[Count, Key("Optimizer step within the stage, from 1 on.", "steps")]
    tokens: Annotated[Count, Key("Tokens trained on since the run began.", "tokens")]
    global_step: Annotated[Count | None, Key("Optimizer step since the run began.", "steps")] = None
    loss: Annotated[Measured | None, Field(alias="train/loss"), Key("Training loss of the batch.")] = None
    grad_norm: Annotated[
        Measured | None, Field(alias="train/grad_norm"), Key("Norm of all gradients before clipping.")
    ] = None
    learning_rate: Annotated[Measured | None, Field(alias="train/lr"), Key("Learning rate.")] = None
    skipped: Annotated[
        Count | None, Field(alias="train/skipped"), Key("Steps of the stage skipped so far.", "steps")
    ] = None
    seconds: Annotated[
        Measured | None, Field(alias="train/seconds"), Key("Time of the stage so far, in all processes.", "seconds")
    ] = None
    tokens_per_s: Annotated[
        Measured | None, Field(alias="speed/tokens_per_s"), Key("Mean training speed so far.", "tokens per second")
    ] = None
    perplexity: Annotated[
        Measured | None, Field(alias="held_out/perplexity"), Key("Language: perplexity of the student, when measured.")
    ] = None
    error: Annotated[
        Measured | None, Field(alias="held_out/error"), Key("Images: top-1 error of the student, when measured.", "%")
    ] = None
    generation: Annotated[
        Measured | None,
        Field(alias="held_out/generation"),
        Key("Language: correct answers by generation, when measured.", "share"),
    ] = None
    generation_gap: Annotated[
        Measured | None,
        Field(alias="held_out/generation_gap"),
        Key("Language: teacher's score by generation minus the student's, when measured.", "share"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class GenerationRow:
    """A line of generations.jsonl: what the student wrote when it was measured in training."""

    stage: Annotated[Text, Key("Name of the training step.")]
    step: Annotated[Count, Key("Optimizer step within the stage.", "steps")]
    tokens: Annotated[Count | None, Key("Tokens trained on since the run began.", "tokens")] = None
    global_step: Annotated[Count | None, Key("Optimizer step since the run began.", "steps")] = None
    task: Annotated[Text | None, Key("Name of the task.")] = None
    prompt: Annotated[Text | None, Key("The prompt.")] = None
    teacher: Annotated[Text | None, Key("What the teacher wrote.")] = None
    student: Annotated[Text | None, Key("What the student wrote.")] = None
    reference: Annotated[Text | None, Key("The right answer.")] = None
