"""The types of what a run's folder holds: what report.json, evaluation.json, context.json and the rows of the growing
files must have.

Dictionaries, because the files are JSON and are written as they are read. Keys that no one reads are kept as they are.
"""

from collections.abc import Callable
from typing import Annotated, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field
from typing_extensions import TypedDict

from convert.evaluation.tasks import LETTERS

ROUNDING = 1e-9
LENGTH = "8192"  # of the context at which caches are compared

Count = Annotated[int, Field(ge=0, le=1 << 60)]
Number = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]
Measured = float  # may have overflowed
Rate = Annotated[float, Field(gt=0, le=1e30)]
Share = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[int, Field(gt=0, le=1 << 60)]
Length = Annotated[str, Field(pattern=r"^[0-9]{1,12}$")]
Quantile = Annotated[str, Field(pattern=r"^0?\.[0-9]{1,6}$")]
WHO, READINGS = ("teacher", "student"), ("generation", "likelihood")
Who, How = Literal["teacher", "student"], Literal["generation", "likelihood"]


class Open(TypedDict):
    """A dictionary with the keys that are read; others stay as they are."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)


def _needs(*keys: str, when: Callable[[dict], bool] = lambda found: True) -> AfterValidator:
    def check(found: dict) -> dict:
        missing = [key for key in keys if key not in found]
        if missing and when(found):
            raise ValueError(f"{missing[0]} is missing")
        return found

    return AfterValidator(check)


def _within(key: str) -> AfterValidator:
    """A number lies in its interval. Both are means, which round by themselves: so little is no damage, and is taken
    out."""

    def check(found: dict) -> dict:
        value, low, high = found[key], found["low"], found["high"]
        if not low - ROUNDING <= value <= high + ROUNDING:
            raise ValueError(f"{key} is not within low and high")
        return found | {"low": min(low, value), "high": max(high, value)}

    return AfterValidator(check)


# --- evaluation.json


class Row(Open):
    task: str
    model: str
    reading: How
    score: Number
    low: Number
    high: Number
    n: Count
    unparsable: Share
    repetition: NotRequired[Share]
    distinct_2: NotRequired[Share]
    letters: NotRequired[Annotated[dict[str, Share], _needs(*LETTERS)]]
    stickiness: NotRequired[Number]
    same_text: NotRequired[Share]
    first_divergence: NotRequired[Number | None]


class Gap(Open):
    task: str
    reading: How
    gap: Number
    low: Number
    high: Number
    n: Count


class HarnessRow(Open):
    task: str
    model: str
    reading: How
    metric: str
    score: Measured
    error: Measured | None
    n: Count


class _Evaluation(Open):
    rows: list[Annotated[Row, _needs("stickiness", when=lambda row: "letters" in row), _within("score")]]
    gaps: list[Annotated[Gap, _within("gap")]]
    lm_eval: NotRequired[list[HarnessRow]]
    models: NotRequired[dict[str, str]]


def _both_readings(found: _Evaluation) -> _Evaluation:
    """Every task is read both ways, and every gap is between two rows."""
    rows, gaps = (
        {(r["task"], r["reading"], r["model"]) for r in found["rows"]},
        {(g["task"], g["reading"]) for g in found["gaps"]},
    )
    tasks, models = (
        {task for task, _, _ in rows} | {task for task, _ in gaps},
        {who for _, _, who in rows} | set(WHO if gaps else ()),
    )
    missing = [
        f"the gap of {task} by {how}"
        for task in {task for task, _ in gaps}
        for how in READINGS
        if (task, how) not in gaps
    ]
    missing += [
        f"the {who}'s row of {task} by {how}"
        for task in tasks
        for who in models
        for how in READINGS
        if (task, how, who) not in rows
    ]
    if missing:
        raise ValueError(f"{min(missing)} is missing")
    return found


Evaluation = Annotated[_Evaluation, AfterValidator(_both_readings)]


# --- report.json


def _same_quantiles(layers: dict) -> dict:
    if len({tuple(quantiles) for quantiles in layers.values()}) > 1:
        raise ValueError("a quantile of some layer is missing")
    return layers


class Training(Open):
    tokens: Size
    seq_len: Size
    micro_tokens: Size


class Step(Open):
    kind: str
    name: str
    settings: NotRequired[Training]


def _some_training(steps: list[Step]) -> list[Step]:
    if not any(step["kind"] == "Train" for step in steps):
        raise ValueError("a training step is missing")
    return steps


class Settings(Open):
    teacher: str
    teacher_fingerprint: str
    data: str
    data_fingerprint: str
    steps: Annotated[
        list[Annotated[Step, _needs("settings", when=lambda step: step["kind"] == "Train")]],
        AfterValidator(_some_training),
    ]


class Perplexity(Open):
    teacher: Measured
    student: Measured
    ratio: Measured


class Agreement(Open):
    top1: Share


class Divergence(Open):
    mean_nats: Measured


class Formula(Open):
    teacher: Annotated[dict[Length, Size], _needs(LENGTH)]
    student: dict[Length, Size]


class CacheBytes(Open):
    teacher: dict[Length, Size]
    student: dict[Length, Size]
    formula: Formula
    break_even_tokens: Count | None


def _same_lengths(found: CacheBytes) -> CacheBytes:
    formula, measured = found["formula"], found["teacher"].keys()
    if (
        formula["student"].keys() != formula["teacher"].keys()
        or found["student"].keys() != measured
        or measured - formula["teacher"].keys()
    ):
        raise ValueError("a length of teacher, student or formula is missing")
    return found


class Cost(Open):
    length: Size
    tokens_per_s: Rate
    first_token_s: Rate


class Contexts(Open):
    teacher: list[Cost]
    student: list[Cost]


class Layers(Open):
    kept: list[int]
    kl_when_edited_alone: NotRequired[list[Measured]]


class Handover(Open):
    max_abs_logit: Measured | None
    allowed: NotRequired[Measured]
    tokens: NotRequired[Count]
    perplexity_change: NotRequired[Measured]
    max_abs_logit_float64: NotRequired[Measured]


class Done(Open):
    name: str
    tokens: Count
    seconds: Number
    perplexity_after: Measured
    loss_first: NotRequired[Measured]
    loss_last: NotRequired[Measured]
    skipped: NotRequired[Count]


class Total(Open):
    total: Number


class TokenCount(Open):
    total: Count


class Continuation(Open):
    prompt: str
    teacher: str
    student: str


class Native(Open):
    obstacle: NotRequired[str]
    model_type: NotRequired[str]
    max_abs_logit: NotRequired[Measured]
    allowed: NotRequired[Measured]


class Export(Open):
    native: NotRequired[
        Annotated[
            Native, _needs("model_type", "max_abs_logit", "allowed", when=lambda native: "obstacle" not in native)
        ]
    ]


class Report(Open):
    teacher: str
    target: str
    seed: int
    device: str
    commit: str | None
    measured_tokens: Count
    perplexity: Perplexity
    agreement: Agreement
    kl: Divergence
    cache_bytes: Annotated[CacheBytes, AfterValidator(_same_lengths)]
    contexts: NotRequired[Contexts]
    half_lives: Annotated[dict[Length, dict[Quantile, Rate | None]], AfterValidator(_same_quantiles)]
    layers: Layers
    handover: Annotated[
        Handover,
        _needs("allowed", "tokens", "perplexity_change", when=lambda handover: handover["max_abs_logit"] is not None),
    ]
    seconds: Total
    tokens: TokenCount
    stages: list[Annotated[Done, _needs("skipped")]]
    steps: list[Annotated[Done, _needs("loss_first", "loss_last", when=lambda step: step["tokens"] > 0)]]
    continuations: list[Continuation]
    settings: Settings
    versions: dict[str, str | None]
    evaluation: Evaluation
    export: NotRequired[Export]


# --- metrics.jsonl, generations.jsonl, answers.jsonl, context.json

MEASURED = ("train/loss", "train/seconds", "held_out/perplexity", "held_out/generation")
Metric = TypedDict(
    "Metric",
    {"stage": str, "step": Count, "tokens": Count, "train/skipped": NotRequired[Count]}
    | dict.fromkeys(MEASURED, NotRequired[Measured]),
)
Metric.__pydantic_config__ = Open.__pydantic_config__


class Text(Open):
    stage: str
    step: Count


class AnswerRow(Open):
    key: str
    item: Count
    right: bool
    said: str | None
    text: str
    tokens: list[Count]
    nats: list[float]


class ContextCost(Cost):
    model: Who


class Needle(Open):
    model: Who
    length: Size
    depth: Share
    generation: Share
    likelihood: Share


class Context(Open):
    costs: NotRequired[list[ContextCost]]
    needles: NotRequired[list[Needle]]
    perplexity_by_position: NotRequired[dict[Who, dict[Length, Measured]]]
