"""What report.json holds of a language model, and what context.json holds."""

from dataclasses import dataclass, field
from typing import Annotated

from convert.runs.keys import (
    VERSION,
    Count,
    Key,
    Length,
    Measured,
    ModelName,
    Quantile,
    Rate,
    Share,
    Size,
    Text,
    require,
)
from convert.runs.schemas import Headline, Report

LENGTH = "8192"  # tokens of context at which caches are compared


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity on held-out text."""

    teacher: Annotated[Measured, Key("exp of the teacher's mean negative log-likelihood per token.")]
    student: Annotated[Measured, Key("exp of the student's mean negative log-likelihood per token.")]
    ratio: Annotated[Measured, Key("Student's perplexity over the teacher's; 1 where nothing was lost.")]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of the two models on the next token."""

    top1: Annotated[Share, Key("Top-1 agreement: positions where both put the same token first.", "share")]


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Divergence of the student's next-token distribution from the teacher's."""

    mean_nats: Annotated[Measured, Key("Mean KL(teacher || student).", "nats per token")]


@dataclass(frozen=True, kw_only=True)
class CacheFormula:
    """Cache size of one sequence by formula, from the configurations."""

    teacher: Annotated[dict[Length, Size], Key("Context length in tokens to the teacher's cache size.", "bytes")]
    student: Annotated[dict[Length, Size], Key("Context length in tokens to the student's cache size.", "bytes")]

    def __post_init__(self) -> None:
        require(LENGTH in self.teacher, f"teacher.{LENGTH} is missing")


@dataclass(frozen=True, kw_only=True)
class CacheBytes:
    """Cache size of one sequence."""

    teacher: Annotated[
        dict[Length, Size], Key("Context length in tokens to the size of the teacher's live cache.", "bytes")
    ]
    student: Annotated[
        dict[Length, Size], Key("Context length in tokens to the size of the student's live cache.", "bytes")
    ]
    formula: Annotated[CacheFormula, Key("The same by formula, at every length.")]
    break_even_tokens: Annotated[
        Count | None,
        Key("Context length from which the student's cache is the smaller one; null where it never is.", "tokens"),
    ]

    def __post_init__(self) -> None:
        measured, formula = self.teacher.keys(), self.formula.teacher.keys()
        require(
            self.formula.student.keys() == formula and self.student.keys() == measured and not measured - formula,
            "a length of teacher, student or formula is missing",
        )


@dataclass(frozen=True, kw_only=True)
class ContextCost:
    """What a context of this length costs one sequence."""

    length: Annotated[Size, Key("Context length.", "tokens")]
    bytes: Annotated[Size, Key("Size of the live cache after the prefill.", "bytes")]
    time_to_first_token_s: Annotated[Rate, Key("Time of the prefill, up to the first token.", "seconds")]
    tokens_per_s: Annotated[Rate, Key("Speed of greedy decoding after it.", "tokens per second")]


@dataclass(frozen=True, kw_only=True)
class ContextCosts:
    """What contexts cost, by length, as far as measuring them is quick."""

    teacher: Annotated[list[ContextCost], Key("Costs of the teacher.")]
    student: Annotated[list[ContextCost], Key("Costs of the student.")]


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Greedy continuations of a held-out text."""

    prompt: Annotated[Text, Key("Start of a held-out text.")]
    teacher: Annotated[Text, Key("The teacher's continuation.")]
    student: Annotated[Text, Key("The student's continuation.")]


HalfLives = dict[Length, dict[Quantile, Rate | None]]


@dataclass(frozen=True, kw_only=True)
class LanguageMetrics:
    """What is measured on a finished language model, beside its teacher."""

    headline: Annotated[Headline, Key("The number by which student and teacher are compared: the perplexity.")]
    perplexity: Annotated[Perplexity, Key("Perplexity on held-out text.")]
    agreement: Annotated[Agreement, Key("Agreement on the next token of held-out text.")]
    kl: Annotated[Divergence, Key("Divergence on held-out text.")]
    measured_tokens: Annotated[Count, Key("Held-out tokens that these three were measured on.", "tokens")]
    cache_bytes: Annotated[CacheBytes, Key("Cache size of one sequence.")]
    contexts: Annotated[ContextCosts, Key("Costs of a context by its length.")]
    half_lives: Annotated[
        HalfLives,
        Key("Layer to quantile to the half-life of its states at that quantile; null: it never decays.", "tokens"),
    ]
    continuations: Annotated[list[Continuation], Key("Greedy continuations by both models.")]

    def __post_init__(self) -> None:
        quantiles = {tuple(quantiles) for quantiles in self.half_lives.values()}
        require(len(quantiles) <= 1, "half_lives: a quantile of some layer is missing")


@dataclass(frozen=True, kw_only=True)
class LanguageReport(LanguageMetrics, Report):
    """Report of a converted language model."""


# --- context.json, which experiments.context writes


@dataclass(frozen=True, kw_only=True)
class AbsorbedDecoding:
    """Latent attention decoded with absorbed matrices, against keys and values expanded for every token."""

    max_abs_logit: Annotated[Measured, Key("Largest difference of the last logits between the two ways.")]
    tokens_per_s: Annotated[Rate, Key("Speed with absorbed matrices.", "tokens per second")]
    expanded_tokens_per_s: Annotated[Rate, Key("Speed with expanded keys and values.", "tokens per second")]
    max_abs_logit_float64: Annotated[
        Measured | None, Key("The difference in float64, where float32's rounding could explain it.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class MeasuredContext(ContextCost):
    """Cost of a context at a length that was asked for."""

    model: Annotated[ModelName, Key("Which model: teacher or student.")]
    formula: Annotated[Size, Key("Size of the cache by formula.", "bytes")]
    absorbed: Annotated[AbsorbedDecoding | None, Key("Latent attention: both ways to decode.")] = None


@dataclass(frozen=True, kw_only=True)
class Needle:
    """Whether one assignment in a long text is found."""

    model: Annotated[ModelName, Key("Which model: teacher or student.")]
    length: Annotated[Size, Key("Length of the text.", "tokens")]
    depth: Annotated[Share, Key("Place of the assignment: 0 at the beginning, 1 at the end.", "share")]
    generation: Annotated[Share, Key("Found by generation.", "share")]
    likelihood: Annotated[Share, Key("Found by likelihood.", "share")]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Score on a probe of recall at one length."""

    model: Annotated[ModelName, Key("Which model: teacher or student.")]
    task: Annotated[Text, Key("Name of the task.")]
    length: Annotated[Size, Key("Length of the prompt and the room for its answer.", "tokens")]
    n: Annotated[Size, Key("Examples that were scored.", "examples")]
    generation: Annotated[Share, Key("Mean share of correct answers by generation.", "share")]
    likelihood: Annotated[Share, Key("Mean share of correct answers by likelihood; a quarter is chance.", "share")]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What long contexts cost, and what they are good for."""

    costs: Annotated[list[MeasuredContext], Key("Costs by model and length.")] = field(default_factory=list)
    needles: Annotated[list[Needle], Key("Retrieval by model, length and depth.")] = field(default_factory=list)
    probes: Annotated[list[Probe], Key("Scores on the probes by model, task and length.")] = field(default_factory=list)
    perplexity_by_position: Annotated[
        dict[ModelName, dict[Length, Measured]],
        Key("Model to the number of tokens before, up to the next key, to the perplexity of the tokens there."),
    ] = field(default_factory=dict)
    version: Annotated[Size, Key("Version of this file's layout.")] = VERSION
