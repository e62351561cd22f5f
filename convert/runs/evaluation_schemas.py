"""What evaluation.json and answers.jsonl hold: scores of teacher and student by task and scoring method."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from convert.runs.keys import (
    MODELS,
    SCORINGS,
    VERSION,
    Count,
    Flag,
    Key,
    Measured,
    Number,
    Scoring,
    Share,
    Size,
    Text,
    Whole,
    require,
)

LETTERS = "ABCD"
ROUNDING = 1e-9


def _widen(row: "Score | Gap", key: str) -> None:
    """The number must lie in its interval. Both are means, which round by themselves: a difference of rounding is no
    damage, and the interval is widened by it."""
    value = getattr(row, key)
    require(row.low - ROUNDING <= value <= row.high + ROUNDING, f"{key} is not within low and high")
    object.__setattr__(row, "low", min(row.low, value))
    object.__setattr__(row, "high", max(row.high, value))


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score of one model on one task by one scoring method."""

    task: Annotated[Text, Key("Name of the task.")]
    model: Annotated[Text, Key("Which model answered: teacher or student.")]
    scoring: Annotated[
        Scoring,
        Key("Scoring method: generation (a written answer is parsed) or likelihood (the likeliest choice counts)."),
    ]
    score: Annotated[
        Number, Key("Mean share of correct answers; of several values the share that was found counts.", "share")
    ]
    low: Annotated[Number, Key("Lower end of the 95 % bootstrap interval of the score.", "share")]
    high: Annotated[Number, Key("Upper end of the 95 % bootstrap interval of the score.", "share")]
    n: Annotated[Count, Key("Examples that were scored.", "examples")]
    unparsable: Annotated[Share, Key("Prompts whose answer could not be parsed.", "share")]
    repetition: Annotated[
        Share | None, Key("Generation: 3-grams of tokens that occurred before in the same text.", "share")
    ] = None
    distinct_2: Annotated[
        Share | None, Key("Generation: 2-grams of tokens that are distinct, over all texts.", "share")
    ] = None
    letters: Annotated[
        dict[str, Share] | None, Key("Multiple choice: how often each letter was predicted.", "share")
    ] = None
    stickiness: Annotated[
        Number | None,
        Key("Multiple choice: 0 where the letter follows the content, 1 where it is the same in every order."),
    ] = None
    same_text: Annotated[Share | None, Key("Student, generation: texts that equal the teacher's.", "share")] = None
    first_divergence: Annotated[
        Number | None,
        Key("Student, generation: median number of tokens before the first difference from the teacher.", "tokens"),
    ] = None

    def __post_init__(self) -> None:
        _widen(self, "score")
        if self.letters is not None:
            for letter in LETTERS:
                require(letter in self.letters, f"letters.{letter} is missing")
            require(self.stickiness is not None, "stickiness is missing")


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Score of the teacher minus score of the student, paired by example."""

    task: Annotated[Text, Key("Name of the task.")]
    scoring: Annotated[Scoring, Key("Scoring method: generation or likelihood.")]
    gap: Annotated[Number, Key("Teacher's score minus the student's; above 0 the student is behind.", "share")]
    low: Annotated[Number, Key("Lower end of the gap's paired 95 % bootstrap interval.", "share")]
    high: Annotated[Number, Key("Upper end of the gap's paired 95 % bootstrap interval.", "share")]
    n: Annotated[Count, Key("Examples that both answered.", "examples")]

    def __post_init__(self) -> None:
        _widen(self, "gap")


@dataclass(frozen=True, kw_only=True)
class LmEvalScore:
    """Score by EleutherAI's lm-evaluation-harness."""

    task: Annotated[Text, Key("Name of the harness's task.")]
    model: Annotated[Text, Key("Which model answered: teacher or student.")]
    scoring: Annotated[Scoring, Key("generation where the task lets the model write, else likelihood.")]
    metric: Annotated[Text, Key("Name of the harness's metric, with its filter.")]
    score: Annotated[Measured, Key("Value of the metric.")]
    error: Annotated[Measured | None, Key("Its standard error, as the harness gives it.")]
    n: Annotated[Count, Key("Examples that were scored.", "examples")]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All scores of an evaluation. Both scoring methods of every task are there, and both models of every gap."""

    rows: Annotated[list[Score], Key("A score for each task, model and scoring method.")]
    gaps: Annotated[list[Gap], Key("A gap for each task and scoring method; empty where one model was evaluated.")]
    models: Annotated[dict[str, Text], Key("Model (teacher, student) to the fingerprint of its weights.")]
    seed: Annotated[Whole, Key("Seed that drew the examples.")] = 0
    lm_eval: Annotated[list[LmEvalScore], Key("Scores by lm-evaluation-harness, where it was run.")] = field(
        default_factory=list
    )
    version: Annotated[Size, Key("Version of this file's layout.")] = VERSION

    def __post_init__(self) -> None:
        rows = {(row.task, row.scoring, row.model) for row in self.rows}
        gaps = {(gap.task, gap.scoring) for gap in self.gaps}
        compared = {task for task, _ in gaps}
        models = {model for _, _, model in rows} | set(MODELS if gaps else ())
        missing = [
            f"the gap of {task} by {scoring}"
            for task in compared
            for scoring in SCORINGS
            if (task, scoring) not in gaps
        ]
        missing += [
            f"the {model}'s row of {task} by {scoring}"
            for task in {task for task, _, _ in rows} | compared
            for model in models
            for scoring in SCORINGS
            if (task, scoring, model) not in rows
        ]
        require(not missing, f"{min(missing, default='')} is missing")

    def row(self, task: str, model: str, scoring: str) -> Score:
        """The score of this task, model and scoring method; StopIteration where there is none."""
        return next(row for row in self.rows if (row.task, row.model, row.scoring) == (task, model, scoring))

    def gap(self, task: str, scoring: str) -> Gap:
        """The gap of this task and scoring method; StopIteration where there is none."""
        return next(gap for gap in self.gaps if (gap.task, gap.scoring) == (task, scoring))

    def mean_gap(self, scoring: str) -> float | None:
        """Mean gap of the tasks by this scoring method, as a share; None where there is no gap."""
        gaps = [gap.gap for gap in self.gaps if gap.scoring == scoring]
        return sum(gaps) / len(gaps) if gaps else None


def tasks_of(rows: Sequence[Score] | Sequence[Gap] | Sequence[LmEvalScore]) -> list[str]:
    """Names of the tasks, each once, in the order of the rows."""
    return list(dict.fromkeys(row.task for row in rows))


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """A line of answers.jsonl: one answer of one model, kept so that an evaluation that was stopped goes on."""

    key: Annotated[
        Text, Key("Fingerprint of the weights, task, scoring method and digest of the prompts, with spaces between.")
    ]
    item: Annotated[Count, Key("Number of the prompt among the task's prompts.")]
    correct: Annotated[Flag, Key("Whether the prediction is the right answer.")]
    prediction: Annotated[Text | None, Key("Parsed answer or likeliest choice; null where nothing could be parsed.")]
    text: Annotated[Text, Key("Generation: the text that was written.")]
    tokens: Annotated[list[Count], Key("Generation: the token ids that were written, up to the stop.")]
    nats: Annotated[list[Measured], Key("Likelihood: log probability of each choice.", "nats")]
    share: Annotated[
        Share | None, Key("Generation: share of several values that was found; null where all or none was.", "share")
    ] = None
    version: Annotated[Size, Key("Version of this file's layout.")] = VERSION
