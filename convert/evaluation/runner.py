"""Evaluation of teacher and student on the same examples, by both scoring methods.

Answers go to disk as they come, so that an evaluation that was stopped goes on where it was.
"""

import dataclasses
import difflib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convert.core import json_lines, manifest
from convert.core.console import console
from convert.core.errors import UserError, files_in_words
from convert.core.fields import Place, Range, Text, checked
from convert.core.files import write_json
from convert.core.places import path_of
from convert.core.processes import on_first, rank
from convert.data.corpus import corpus
from convert.data.prompts import chat_text, has_chat_template
from convert.evaluation.completions import prepare
from convert.evaluation.final_metrics import final_metrics, held_out
from convert.evaluation.lm_eval import find, run_harness
from convert.evaluation.scoring import SCORING_METHODS, Answer, fitting, graded, prompt_ids
from convert.evaluation.statistics import divergence, gap, score
from convert.evaluation.tasks import HUMANEVAL, TASKS, Item, Task
from convert.evaluation.tasks.base import LIMIT
from convert.models.devices import pick_device
from convert.models.loading import Teacher, load_teacher
from convert.models.saving import fingerprint
from convert.reports import report as reports
from convert.reports.language import LANGUAGE
from convert.reports.scores import show, show_lm_eval
from convert.runs import records
from convert.runs.evaluation_schemas import AnswerRow, Evaluation, Gap, LmEvalScore, Score
from convert.runs.keys import MODELS, Scoring
from convert.runs.language_schemas import LanguageReport
from convert.runs.ledger import locked

Row = TypeVar("Row", Score, Gap, LmEvalScore)


def chosen(names: str | None, tokenizer: PreTrainedTokenizerBase, *, execute_code: bool = False) -> list[Task]:
    """The tasks of these names (with commas); without names all that this model can be prompted for, but for those on
    request. `execute_code`: the user allows tasks that run what models write."""
    if has_chat_template(tokenizer):
        chat_text(tokenizer, "Is anybody there?")  # a template that renders nothing is said now, not after hours
    if names is None:
        some = (task for task in TASKS.values() if not task.on_request)
        return [task for task in some if not task.chat or has_chat_template(tokenizer)]
    known = TASKS | {HUMANEVAL.name: HUMANEVAL}
    found = []
    for name in names.split(","):
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.4) or list(known)
            raise UserError(f"There is no task {name!r}. Nearest: {', '.join(near)}. All: {', '.join(known)}.")
        task = known[name]
        if task.chat and not has_chat_template(tokenizer):
            raise UserError(f"Task {name} is a conversation, and this model has no chat template. Leave it out.")
        if task.executes_code:
            _require_consent(task, execute_code)
        found.append(task)
    return found


def _require_consent(task: Task, execute_code: bool) -> None:
    if not execute_code:
        raise UserError(
            f"Task {task.name} runs programs that the models write, and a limited process is no sandbox; give"
            " --execute-code if this machine may run them, or leave the task out."
        )
    task.items(1, 0)  # what is missing for it is said now


class Answers:
    """All answers so far, a line each in `file`; None keeps them in memory alone. A line that a power cut left half is
    dropped. Of several processes all ask all questions, and the first one has the file."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.known: dict[str, dict[int, Answer]] = on_first(self._read)

    def _read(self) -> dict[str, dict[int, Answer]]:
        found: dict[str, dict[int, Answer]] = {}
        if self.file is not None and self.file.exists():
            manifest.check(self.file.parent, self.file.name)
            json_lines.mend(self.file)
            for row in records.rows(self.file, AnswerRow):
                parts = row.prediction, row.text, tuple(row.tokens), tuple(row.nats), row.share
                found.setdefault(row.key, {})[row.item] = Answer(row.item, row.correct, *parts)
        return found

    def add(self, key: str, answers: Sequence[Answer]) -> None:
        """Keep these answers, and append them to the file."""
        for answer in answers:
            self.known.setdefault(key, {})[answer.item] = answer
        if self.file is not None and rank() == 0:
            rows = [AnswerRow(key=key, **dataclasses.asdict(answer)) for answer in answers]
            json_lines.append(self.file, map(dataclasses.asdict, rows))

    def of(self, key: str) -> dict[int, Answer]:
        """Item -> answer, of those under a key."""
        return self.known.get(key, {})


@checked
def evaluate_tasks(
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    limit: Annotated[int, Range(1, 100_000)] = LIMIT,
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0,
    file: Path | None = None,
) -> Evaluation:
    """Score models on tasks by both scoring methods, and the gaps where "teacher" and "student" are among them. Every
    model sees the same prompts in the same batches. `limit`: examples of each task; `file`: where answers are kept."""
    answers, rows, gaps = Answers(file), [], []
    weights = {name: fingerprint(model) for name, model in models.items()}
    prompted = {task: items_of(models, tokenizer, task, limit, seed) for task in tasks}
    total = len(models) * len(SCORING_METHODS) * sum(map(len, prompted.values()))
    with tqdm(total=total, desc="evaluate", unit="answer", dynamic_ncols=True, delay=1, disable=rank() > 0) as bar:
        for task, items in prompted.items():
            found: dict[tuple[str, Scoring], list[Answer]] = {}
            for name, model in models.items():
                for scoring in SCORING_METHODS:
                    bar.set_description(f"{task.name}, {name}, {scoring}", refresh=False)  # shown with the next answers
                    key = key_of(weights[name], tokenizer, task, items, scoring)
                    found[name, scoring] = _answers_of(model, tokenizer, task, items, scoring, answers, key, bar)
            rows += _scores(task, items, found)
            if set(MODELS) <= set(models) and items:
                for scoring in SCORING_METHODS:
                    pair = found["teacher", scoring], found["student", scoring]
                    gaps.append(Gap(task=task.name, scoring=scoring, **gap(items, *pair)))
    return Evaluation(rows=rows, gaps=gaps, models=weights, seed=seed)


def items_of(
    models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, task: Task, limit: int, seed: int
) -> list[Item]:
    """The items of so many examples that fit into the positions of every model."""
    items = task.items(limit, seed)
    if (there := len({item.example for item in items})) < limit:
        console.print(f"{task.name}: there are {there} examples, fewer than the {limit} asked for.", style="yellow")
    places = set.intersection(*(set(fitting(model, tokenizer, task, items)) for model in models.values()))
    if len(places) < len(items):
        left_out = f"{len(items) - len(places)} of {len(items)} prompts are too long for the model and left out."
        console.print(f"{task.name}: {left_out}", style="yellow")
    return [items[i] for i in sorted(places)]


def key_of(weights: str, tokenizer: PreTrainedTokenizerBase, task: Task, items: list[Item], scoring: Scoring) -> str:
    """Key of the answers of a model, by its weights' fingerprint, to these items: a hash of them as the model sees them
    is part of it."""
    prompts = [prompt_ids(tokenizer, task, item.prompt) for item in items]
    seen = hashlib.sha256(repr((items, prompts, task.max_new_tokens, task.stop)).encode()).hexdigest()[:12]
    return f"{weights} {task.name} {scoring} {seen}"


def _answers_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, items: list[Item],
    scoring: Scoring, answers: Answers, key: str, bar: tqdm,
) -> list[Answer]:  # fmt: skip
    """Answers to all items by one scoring method, in their order; those that are known are not made again."""
    known = answers.of(key)
    if known and max(known) >= len(items):
        raise UserError(
            f"{answers.file} is damaged: it answers item {max(known)} of {len(items)}."
            f" {manifest.WAYS_OUT['answers.jsonl']}."
        )
    bar.update(len(known))
    method = SCORING_METHODS[scoring]
    for batch in method(model, tokenizer, task, items, known=lambda batch: all(i in known for i in batch)):
        bar.update(sum(answer.item not in known for answer in batch))
        answers.add(key, batch)
    return [parsed_again(task, items, scoring, answer) for _, answer in sorted(answers.of(key).items())]


def parsed_again(task: Task, items: list[Item], scoring: Scoring, answer: Answer) -> Answer:
    """The answer as today's parser reads its text: one from disk may have been parsed by another. Code is not run
    twice."""
    if scoring != "generation" or task.executes_code:
        return answer
    return graded(task, items[answer.item], answer)


def _scores(task: Task, items: list[Item], found: dict[tuple[str, Scoring], list[Answer]]) -> list[Score]:
    """A row for each model and scoring method that has answers."""
    rows = []
    for (model, scoring), answers in found.items():
        if not answers:
            continue
        numbers: dict[str, Any] = score(items, answers, lettered=task.lettered)
        if model == "student" and scoring == "generation" and ("teacher", scoring) in found:
            numbers |= divergence(found["teacher", scoring], answers)
        rows.append(Score(task=task.name, model=model, scoring=scoring, **numbers))
    return rows


@files_in_words()
@checked
def evaluate_run(
    folder: Place, *,
    tasks: Text | None = None, limit: Annotated[int, Range(1, 100_000)] | None = None, lm_eval: Text | None = None,
    device: Text = "auto", out: Place | None = None, trust_remote_code: bool = False, execute_code: bool = False,
) -> LanguageReport:  # fmt: skip
    """Evaluate a finished run: its final metrics again, and the tasks by both scoring methods. Writes evaluation.json
    into `out` (the run's folder by default), and returns the report with what was found.

    `tasks`: names with commas; the final metrics are then left out. `lm_eval`: likewise, tasks of
    lm-evaluation-harness. `limit`: examples of each task. `execute_code`: programs that models write may run here."""
    if lm_eval:
        find(lm_eval)  # wrong names are said before anything is evaluated
    device, run = pick_device(device), path_of(folder, "The folder")
    out = path_of(out or run, "--out")
    student, teacher, report = _models_of(run, device, trust_remote_code)
    models = {"teacher": teacher.model, "student": student}
    selected = chosen(tasks, teacher.tokenizer, execute_code=execute_code) if tasks or not lm_eval else []
    with _evaluated(out):
        if not (tasks or lm_eval):
            report = _measured_again(student, teacher, report)
            reports.show(report, console, LANGUAGE)
        found = _evaluate(models, teacher, selected, lm_eval, limit, out)
    return dataclasses.replace(report, evaluation=found)


@files_in_words()
@checked
def evaluate_model(
    name: Place, *,
    tasks: Text | None = None, limit: Annotated[int, Range(1, 100_000)] | None = None, lm_eval: Text | None = None,
    device: Text = "auto", out: Place | None = None, trust_remote_code: bool = False, execute_code: bool = False,
) -> Evaluation:  # fmt: skip
    """Evaluate any model that `load_teacher` takes on the tasks by both scoring methods. Writes evaluation.json into
    `out` (runs/evaluation-NAME by default). The other arguments are those of `evaluate_run`."""
    if lm_eval:
        find(lm_eval)
    teacher = load_teacher(str(name), device=pick_device(device), trust_remote_code=trust_remote_code)
    out = path_of(out or f"runs/evaluation-{teacher.source.name}", "--out")
    selected = chosen(tasks, teacher.tokenizer, execute_code=execute_code) if tasks or not lm_eval else []
    with _evaluated(out):
        return _evaluate({"teacher": teacher.model}, teacher, selected, lm_eval, limit, out)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, finished or not."""
    return (folder / "ledger.json").exists() or (folder / "report.json").exists()


@contextmanager
def _evaluated(out: Path) -> Iterator[None]:
    """The folder of an evaluation while it is written; damage of what is there is said before anything is evaluated."""
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        records.evaluation(out)
        yield
    console.print(f"{out / 'evaluation.json'} has the numbers, {out / 'answers.jsonl'} every answer.", style="dim")


def _evaluate(
    models: dict[str, PreTrainedModel], teacher: Teacher, tasks: list[Task], lm_eval: str | None,
    limit: int | None, out: Path,
) -> Evaluation:  # fmt: skip
    """Evaluate on the tasks and by the harness; show and write what was found."""
    found = evaluate_tasks(models, teacher.tokenizer, tasks, limit=limit or LIMIT, file=out / "answers.jsonl")
    if tasks:
        write(found, out / "evaluation.json")
        show(found, console)
    if lm_eval:
        found = dataclasses.replace(found, lm_eval=run_harness(models, teacher.tokenizer, lm_eval, limit=limit))
        write(found, out / "evaluation.json")
        show_lm_eval(found.lm_eval, console)
    return found


def _models_of(run: Path, device: str, trust_remote_code: bool) -> tuple[PreTrainedModel, Teacher, LanguageReport]:
    """Student, teacher and report of a run. A student stands beside the teacher that it was made from."""
    report = records.report(run)
    if report.domain != "language":
        raise UserError(
            f"Tasks are asked of language models; {run} is a run of {report.domain}, and all that is measured of it is"
            " in its report.json."
        )
    teacher = load_teacher(report.settings.teacher, device=device, trust_remote_code=trust_remote_code)
    if fingerprint(teacher.model) != report.settings.teacher_fingerprint:
        raise UserError(
            f"A student stands beside its own teacher; {report.settings.teacher} has other weights here than when"
            f" {run} was made. Evaluate where those are, or repeat the run."
        )
    student = load_teacher(str(run.absolute()), device=device).model  # not an alias of that name
    return student, teacher, report


def write(found: Evaluation, file: Path) -> None:
    """Write evaluation.json, with what earlier evaluations of the same models found: of each task that with the most
    examples."""
    before = records.evaluation(file.parent)
    if before is not None and before.models == found.models:
        found = dataclasses.replace(
            found,
            rows=_most(before.rows, found.rows),
            gaps=_most(before.gaps, found.gaps),
            lm_eval=_most(before.lm_eval, found.lm_eval),
        )
    with manifest.renewing(file.parent, file.name, "answers.jsonl"):
        write_json(file, dataclasses.asdict(found))


def _most(earlier: list[Row], later: list[Row]) -> list[Row]:
    """Rows of the tasks of both; of a task in both those with more examples, the later ones where they are equal."""
    before, now = ({row.task: row.n for row in rows} for rows in (earlier, later))
    kept = {task for task, n in before.items() if n > now.get(task, 0)}
    return [row for row in earlier if row.task in kept] + [row for row in later if row.task not in kept]


def _measured_again(student: PreTrainedModel, teacher: Teacher, report: LanguageReport) -> LanguageReport:
    """The report with its final metrics measured anew."""
    settings, by = report.settings, report.settings.measured_by
    tokens = sum(step.tokens for step in settings.training)
    text = prepare(corpus(settings.data), teacher, tokens, by.seq_len)
    if text.fingerprint != settings.data_fingerprint:
        console.print(
            f"The data {settings.data} changed since the run, so its held-out text is another one.", style="yellow"
        )
    batches = held_out(text, tokens, by.seq_len, by.micro_tokens)
    return dataclasses.replace(report, **vars(final_metrics(student, teacher, text, batches)))
