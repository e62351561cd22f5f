"""Teacher and student on the same questions, by what they write and by what they rank first.

Answers go to disk as they come, so that an evaluation that was killed goes on where it was.
"""

import dataclasses
import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convert.core import json_lines as lines
from convert.core import manifest
from convert.core.console import console
from convert.core.errors import UserError, files_in_words
from convert.core.fields import Place, Range, Text, checked
from convert.core.files import write_json
from convert.core.places import path_of
from convert.data.corpus import corpus
from convert.data.prompts import chat_text, has_chat_template
from convert.data.text import tokenize
from convert.evaluation import lm_eval as harness
from convert.evaluation import statistics as scores
from convert.evaluation.final_metrics import held_out_of, numbers
from convert.evaluation.scoring import READINGS, Answer, fits, prompt_ids
from convert.evaluation.tasks import TASKS, Item, Task
from convert.evaluation.tasks.base import LIMIT
from convert.models.devices import pick_device
from convert.models.loading import Teacher, fingerprint, load_teacher
from convert.reports import report
from convert.runs import records
from convert.runs.ledger import locked
from convert.runs.schemas import AnswerRow


def chosen(names: str | None, tokenizer) -> list[Task]:
    """The tasks of these names; without names all that this model can be asked."""
    if has_chat_template(tokenizer):
        chat_text(tokenizer, "Is anybody there?")  # a template that renders nothing is said now, not after hours
    if names is None:
        return [task for task in TASKS.values() if not task.chat or has_chat_template(tokenizer)]
    found = []
    for name in names.split(","):
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, 3, 0.4) or list(TASKS)
            raise UserError(f"There is no task {name!r}. Nearest: {', '.join(near)}. All: {', '.join(TASKS)}.")
        if TASKS[name].chat and not has_chat_template(tokenizer):
            raise UserError(f"Task {name} is a conversation, and this model has no chat template. Leave it out.")
        found.append(TASKS[name])
    return found


class Answers:
    """All answers so far, a line each in `file`. A line that a power cut left half is dropped; None keeps them in
    memory alone."""

    def __init__(self, file: Path | None):
        self.file, self.known = file, {}
        if file is not None and file.exists():
            manifest.check(file.parent, file.name)
            lines.mend(file)
            for row in records.rows(file, AnswerRow):
                answer = Answer(
                    row["item"], row["right"], row["said"], row["text"], tuple(row["tokens"]), tuple(row["nats"])
                )
                self._put(row["key"], answer)

    def _put(self, key: str, answer: Answer) -> None:
        self.known.setdefault(key, {})[answer.item] = answer

    def add(self, key: str, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self._put(key, answer)
        if self.file is not None:
            lines.append(self.file, [{"key": key} | dataclasses.asdict(answer) for answer in answers])

    def of(self, key: str) -> dict[int, Answer]:
        return self.known.get(key, {})


@checked
def evaluate_tasks(
    models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], *,
    limit: Annotated[int, Range(1, 100_000)] = LIMIT, seed: Annotated[int, Range(0, 2**63 - 1)] = 0,
    file: Path | None = None,
) -> dict:  # fmt: skip
    """Rows of scores, and gaps between "teacher" and "student" where both are there. Every model reads the same prompts
    in the same batches."""
    answers, rows, gaps = Answers(file), [], []
    weights = {name: fingerprint(model) for name, model in models.items()}
    asked = {task: _asked(models, tokenizer, task, limit, seed) for task in tasks}
    total = len(models) * len(READINGS) * sum(map(len, asked.values()))
    with tqdm(total=total, desc="ask", unit="answer", dynamic_ncols=True, delay=1) as bar:
        for task, items in asked.items():
            found = {}
            for name, model in models.items():
                for reading in READINGS:
                    bar.set_description(f"{task.name}, {name}, {reading}", refresh=False)  # shown with the next answers
                    key = f"{weights[name]} {task.name} {reading} {_digest(tokenizer, task, items)}"
                    found[name, reading] = _read(model, tokenizer, task, items, reading, answers, key, bar)
            rows += _rows(task, items, found)
            if {"teacher", "student"} <= set(models) and items:
                for reading in READINGS:
                    pair = found["teacher", reading], found["student", reading]
                    gaps.append({"task": task.name, "reading": reading} | scores.gap(items, *pair))
    return {
        "rows": rows,
        "gaps": gaps,
        "models": weights,
        "seed": seed,
    }


def _asked(models, tokenizer, task: Task, limit: int, seed: int) -> list[Item]:
    items = task.items(limit, seed)
    if (there := len({item.question for item in items})) < limit:
        console.print(f"{task.name}: there are {there} questions, fewer than the {limit} asked for.", style="yellow")
    room = set.intersection(*(set(fits(model, tokenizer, task, items)) for model in models.values()))
    if len(room) < len(items):
        left_out = f"{len(items) - len(room)} of {len(items)} prompts are too long for the model and left out."
        console.print(f"{task.name}: {left_out}", style="yellow")
    return [items[i] for i in sorted(room)]


def _digest(tokenizer, task: Task, items: list[Item]) -> str:
    """Of the questions as the model sees them."""
    prompts = [prompt_ids(tokenizer, task, item.prompt) for item in items]
    return hashlib.sha256(repr((items, prompts, task.max_new_tokens, task.stop)).encode()).hexdigest()[:12]


def _read(
    model, tokenizer, task: Task, items: list[Item], reading: str, answers: Answers, key: str, bar: tqdm
) -> list[Answer]:
    known = answers.of(key)
    if known and max(known) >= len(items):
        raise UserError(
            f"{answers.file} is damaged: it answers item {max(known)} of {len(items)}."
            f" {manifest.WAYS_OUT['answers.jsonl']}."
        )
    bar.update(len(known))
    for batch in READINGS[reading](model, tokenizer, task, items, known=lambda batch: all(i in known for i in batch)):
        bar.update(sum(answer.item not in known for answer in batch))
        answers.add(key, batch)
    return [
        _judged(task, items, answer) if reading == "generation" else answer
        for _, answer in sorted(answers.of(key).items())
    ]


def _judged(task: Task, items: list[Item], answer: Answer) -> Answer:
    """A text from disk is read as texts are read now."""
    said = task.parse(answer.text)
    return dataclasses.replace(answer, said=said, right=said == items[answer.item].answer)


def _rows(task: Task, items: list[Item], found: dict[tuple[str, str], list[Answer]]) -> list[dict]:
    rows = []
    for (model, reading), answers in found.items():
        if not answers:
            continue
        row = {"task": task.name, "model": model, "reading": reading} | scores.score(
            items, answers, lettered=task.lettered
        )
        if model == "student" and reading == "generation" and ("teacher", reading) in found:
            row |= scores.divergence(found["teacher", reading], answers)
        rows.append(row)
    return rows


def show(found: dict, console: Console) -> None:
    """The table, and what it says in a line."""
    rows = {(row["task"], row["model"], row["reading"]): row for row in found["rows"]}
    gaps = {(row["task"], row["reading"]): row for row in found["gaps"]}
    models = list(dict.fromkeys(row["model"] for row in found["rows"]))
    table = Table(box=box.SIMPLE_HEAD, title="questions answered rightly, in %", title_justify="left")
    table.add_column("task")
    for reading in READINGS:
        for number, column in enumerate([*models, *(["gap, 95 %"] if gaps else [])]):
            table.add_column(f"{'by ' + reading if number == 0 else ''}\n{column}", justify="right", no_wrap=True)
    table.add_column("\nunparsable", justify="right")
    table.add_column("\nn", justify="right")
    for task in dict.fromkeys(row["task"] for row in found["rows"]):
        cells = [task]
        for reading in READINGS:
            cells += [_percent(rows[task, model, reading], "score", bare=bool(gaps)) for model in models]
            cells += [_percent(gaps[task, reading], "gap")] if gaps else []
        mute = [f"{rows[task, model, 'generation']['unparsable']:.0%}" for model in models]
        table.add_row(*cells, " / ".join(mute), str(rows[task, models[0], "generation"]["n"]))
    console.print(table, soft_wrap=False)
    for line in findings(found):
        console.print(line, highlight=False)


def _percent(row: dict, key: str, bare: bool = False) -> str:
    return f"{100 * row[key]:z.1f}" + ("" if bare else f" [{100 * row['low']:z.0f}, {100 * row['high']:z.0f}]")


def findings(found: dict) -> list[str]:
    """What the numbers say, in sentences."""
    lines = []
    if found["gaps"]:
        mean = {r: [row["gap"] for row in found["gaps"] if row["reading"] == r] for r in READINGS}
        by = {r: sum(values) / len(values) for r, values in mean.items()}
        lines.append(
            f"The student is {_behind(by['generation'])} when it writes, and {_behind(by['likelihood'])} when it ranks"
            " (mean of the tasks)."
        )
    for row in found["rows"]:
        if row.get("stickiness", 0) > 0.5 and row["reading"] == "generation":
            most = max(row["letters"], key=row["letters"].get)
            lines.append(
                f"The {row['model']} follows the label, not the content, in {row['task']}: it says {most} in"
                f" {row['letters'][most]:.0%} of the items, and mostly the same letter whatever the order of the"
                f" options (stickiness {row['stickiness']:.2f})."
            )
    return lines


def _behind(gap: float) -> str:
    return f"{abs(gap):.1%} {'behind' if gap >= 0 else 'ahead'}"


@files_in_words()
@checked
def evaluate_run(
    folder: Place,
    *,
    tasks: Text | None = None,
    limit: Annotated[int, Range(1, 100_000)] | None = None,
    lm_eval: Text | None = None,
    device: Text = "auto",
    out: Place | None = None,
    trust_remote_code: bool = False,
) -> dict:
    """Of a finished run: the final measurements again, and the tasks by both readings; of any other model: the tasks.
    Writes evaluation.json into `out` (the run's folder, or runs/evaluation-NAME) and returns it; of a run without
    `tasks`, in its report.

    `tasks`: names with commas, and then nothing else is measured. `lm_eval`: likewise, of lm-evaluation-harness; its
    rows are found["lm_eval"]."""
    if lm_eval:
        harness.find(lm_eval)  # wrong names are said before anything is asked
    device, run, old = pick_device(device), path_of(folder, "The folder"), {}
    if (run / "ledger.json").exists() or (run / "report.json").exists():
        models, taught, old = _of_run(run, device, trust_remote_code)
        out = path_of(out or run, "--out")
    else:
        taught = load_teacher(str(folder), device=device, trust_remote_code=trust_remote_code)
        models, out = {"teacher": taught.model}, path_of(out or f"runs/evaluation-{taught.source.name}", "--out")
    asked = chosen(tasks, taught.tokenizer) if tasks or not lm_eval else []
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        earlier(out)  # damage is said before anything is asked
        if old and not (tasks or lm_eval):
            old |= _measured_again(models["student"], taught, old["settings"])
            report.show(old, console)
        found = evaluate_tasks(models, taught.tokenizer, asked, limit=limit or LIMIT, file=out / "answers.jsonl")
        if asked:
            write(found, out / "evaluation.json")
            show(found, console)
        if lm_eval:
            found["lm_eval"] = harness.run_harness(models, taught.tokenizer, lm_eval, limit=limit)
            write(found, out / "evaluation.json")
            harness.show(found["lm_eval"], console)
    console.print(f"{out / 'evaluation.json'} has the numbers, {out / 'answers.jsonl'} every answer.", style="dim")
    return old | {"evaluation": found}


def _of_run(run: Path, device: str, trust_remote_code: bool) -> tuple[dict[str, PreTrainedModel], Teacher, dict]:
    """Both models, and the report."""
    found = records.report(run)
    taught = load_teacher(found["settings"]["teacher"], device=device, trust_remote_code=trust_remote_code)
    if fingerprint(taught.model) != found["settings"]["teacher_fingerprint"]:
        raise UserError(
            f"A student stands beside its own teacher; {found['settings']['teacher']} has other weights here than when"
            f" {run} was made. Evaluate where those are, or repeat the run."
        )
    student = load_teacher(str(run.absolute()), device=device).model  # not an alias of that name
    return {"teacher": taught.model, "student": student}, taught, found


def earlier(folder: Path) -> dict:
    """What an evaluation in this folder found before."""
    return records.evaluation(folder) or {}


def write(found: dict, file: Path) -> None:
    """Together with what earlier evaluations of the same models found: of each task what was asked most questions."""
    before, merged = earlier(file.parent), dict(found)
    if before.get("models") == found["models"]:
        for key in ("rows", "gaps", "lm_eval"):
            merged[key] = _most(before.get(key, []), found.get(key, []))
    with manifest.renewing(file.parent, file.name, "answers.jsonl"):
        write_json(file, merged)


def _most(earlier: list[dict], later: list[dict]) -> list[dict]:
    """Rows of the tasks of both; of a task in both those with more questions, the later ones where they are equal."""
    before, now = ({row["task"]: row["n"] for row in rows} for rows in (earlier, later))
    kept = {task for task, n in before.items() if n > now.get(task, 0)}
    return [row for row in earlier if row["task"] in kept] + [row for row in later if row["task"] not in kept]


def _measured_again(student, taught: Teacher, settings: dict) -> dict:
    trains = [step["settings"] for step in settings["steps"] if step["kind"] == "Train"]
    tokens = sum(train["tokens"] for train in trains)
    text = tokenize(corpus(settings["data"]), taught.tokenizer, limit=tokens)
    if text.fingerprint != settings["data_fingerprint"]:
        console.print(
            f"The data {settings['data']} changed since the run, so its held-out text is another one.", style="yellow"
        )
    return numbers(student, taught, text, held_out_of(text, tokens, trains[-1]["seq_len"], trains[-1]["micro_tokens"]))
