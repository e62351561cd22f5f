"""run_recipe(): the one place where recipe, data, tracking, checkpoints and measurements meet."""

import copy
import dataclasses
import difflib
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedConfig

from convert import recipes
from convert.core import manifest
from convert.core.console import console, duration, size
from convert.core.errors import Interrupted, UserError, files_in_words
from convert.core.fields import Place, Text, checked
from convert.core.files import write_json, write_text
from convert.core.places import path_of, refuse_overlap
from convert.core.provenance import commit, versions
from convert.data.batches import Batch, Batches
from convert.data.text import TokenData, corpus, tokenize
from convert.evaluation import final_metrics as final
from convert.evaluation.monitor import Monitor, Rule
from convert.evaluation.perplexity import perplexity
from convert.evaluation.runner import chosen, evaluate_tasks, write
from convert.exporting.verify import ship
from convert.mixers.parts import DecayRate
from convert.models.loading import Source, Teacher, fingerprint, load_teacher, pick_device, read_config, resolve
from convert.models.student import ConvertedForCausalLM
from convert.planning import plan as planning
from convert.recipes.base import Forget, Recipe, Swap, Train
from convert.reports import report as reports
from convert.reports import scores
from convert.reports.language import LANGUAGE
from convert.reports.page import write_page
from convert.runs import records
from convert.runs.evaluation_schemas import Evaluation
from convert.runs.language_schemas import LanguageReport
from convert.runs.ledger import LOGS, StepFolder, StopRequest, check_out, locked, open_run
from convert.runs.schemas import Export, Handover, Layers, Seconds, Settings, StepResult, TokenCount
from convert.runs.tracking import Track
from convert.steps.swap import do_swap

SHIPPED = (
    "model",
    "native",
    "report.json",
    "report.md",
    "report.html",
    "evaluation.json",
    "answers.jsonl",
    "layers.json",
    *LOGS,
)


@files_in_words()
@checked
def run_recipe(
    teacher: Place,
    recipe: Text | Recipe,
    out: Place | None = None,
    *,
    data: Place | None = None,
    device: Text = "auto",
    fresh: bool = False,
    wandb: Literal["online", "offline", "disabled"] | None = None,
    stop_when: Sequence[Text] = (),
    trust_remote_code: bool = False,
) -> LanguageReport:
    """Do what the recipe (or the default one of a target) says to the teacher, in the folder `out`; returns the report.

    Steps already done are skipped, an unfinished one goes on. `wandb`: online, offline, disabled, None: as configured.
    `stop_when`: rules like "generation<0.2", looked at whenever a stage measures."""
    started, rules = time.monotonic(), [Rule.of(rule) for rule in stop_when]
    teacher, data = str(teacher), None if data is None else str(data)
    source = resolve(teacher)
    config = read_config(source, trust_remote_code=trust_remote_code)
    if isinstance(recipe, str):
        recipe = default_recipe(source, config, recipe)
    if rules and not any(isinstance(step, Train) and step.settings.evaluate_every for step in recipe.steps):
        raise UserError(
            "--stop-when is looked at when a stage measures, and none of this recipe does; set"
            " STEP.evaluate_every=TOKENS."
        )
    out = path_of(out or f"runs/{source.name}-{recipe.target}", "--out")
    device, data = pick_device(device), data or source.data
    documents = corpus(data)  # wrong --data and --out are said before anything is loaded
    plan = planning.make_plan(source.name, config, recipe, data, device)
    planning.show(plan, console)
    if plan.refusals:
        raise UserError(plan.refusals[0])
    if reason := planning.check_space(plan, out):
        raise UserError(reason)
    peak = max((step.peak_bytes for step in plan.steps), default=0)
    if device == "cpu" and peak > planning.physical_memory():
        console.print(
            f"This may not fit: about {size(peak)} needed, {size(planning.physical_memory())} here.", style="yellow"
        )

    check_out(out, fresh)
    refuse_overlap(
        out, [("teacher", place) for place in _places(source)] + [("data", place) for place in documents.places()]
    )
    taught = load_teacher(source, device=device, trust_remote_code=trust_remote_code)
    text = tokenize(documents, taught.tokenizer, limit=recipe.tokens)
    held_out(text, recipe)  # and too little text before the folder is taken
    chosen(None, taught.tokenizer)  # and a chat template that renders nothing
    for step in recipe.steps:
        if isinstance(step, Train):
            Batches(text.train, step.settings.seq_len, step.settings.num_sequences)
    settings = {
        "teacher": _whole_name(teacher, source),
        "teacher_fingerprint": fingerprint(taught.model),
        "target": recipe.target, "data": data, "data_fingerprint": text.fingerprint,
        "steps": [recipes.describe(step) for step in recipe.steps],
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))
    open_run(out, settings, fresh)
    with locked(out):
        _check_what_is_read_back(out)
        report = _locked_run(recipe, taught, text, out, settings, wandb, rules, started, plan)
    reports.show(report, console, LANGUAGE)
    scores.show(report.evaluation, console)
    console.print(
        f"The student is in {out / 'model'}, the report in {out / 'report.md'}. Try:  python -m convert.generate {out}"
        ' "def add("'
    )
    return report


def _locked_run(
    recipe: Recipe,
    taught: Teacher,
    text: TokenData,
    out: Path,
    settings: dict,
    wandb: str | None,
    rules: Sequence[Rule],
    started: float,
    plan: planning.Plan,
) -> LanguageReport:
    track = Track(out, mode=wandb, config=settings, name=out.name)
    try:
        with StopRequest() as stop:
            student, results = _steps(recipe, taught, text, out, track, stop, rules, plan)
        _round(student, taught.dtype)
        report = _report(student, taught, text, recipe, settings, results, out)
        with manifest.renewing(out, *SHIPPED):
            export = records.checked(ship(student, taught, out / "model", report, text), Export, "The export", "")
            seconds = dataclasses.replace(report.seconds, this_call=time.monotonic() - started)
            report = dataclasses.replace(report, export=export, seconds=seconds)
            write_json(out / "report.json", dataclasses.asdict(report))
            write_text(out / "report.md", reports.markdown(report, LANGUAGE))
            write_page([out], out / "report.html", LANGUAGE)
        track.enter("evaluate")
        numbers = dataclasses.asdict(report.perplexity)
        track.made(fingerprint(student), {"architecture": recipe.target} | numbers, out / "model")
        track.finish(report.evaluation, out / "report.html", LANGUAGE.numbers(report))
    finally:
        track.close()
    return report


def _places(source: Source) -> list[Path]:
    """Where the teacher is on this machine: its file or folder (of a run all of it), and what links in there lead
    to."""
    if source.is_remote:
        return []
    where = Path(source.where)
    return [where.parent if source.kind == "run" else where, *(file for file in where.rglob("*") if file.is_symlink())]


def _check_what_is_read_back(out: Path) -> None:
    """Of an earlier call: before hours are spent."""
    manifest.check(out, "answers.jsonl", *LOGS)
    records.evaluation(out)
    records.context(out)


def _steps(
    recipe: Recipe,
    taught: Teacher,
    text: TokenData,
    out: Path,
    track: Track,
    stop: StopRequest,
    rules: Sequence[Rule],
    plan: planning.Plan,
) -> tuple[ConvertedForCausalLM, list[dict]]:
    """Do the steps that are not done yet. The student of the last finished step is on disk."""
    folders = [StepFolder(out, i, step.name, stop) for i, step in enumerate(recipe.steps)]
    results, student, tokens_before, steps_before = [], None, 0, 0
    batches = held_out(text, recipe)
    watch = Monitor(taught, batches[: max(1, len(batches) // 4)], rules)
    for i, (step, folder) in enumerate(zip(recipe.steps, folders, strict=True)):
        result = folder.result()
        if result is not None:
            console.print(f"{step.name}: done, skipped", style="dim")
            folder.tidy()
            if i:
                folders[i - 1].drop_weights()  # again, where a kill came before it
            student, track.model = None, result.get("model", track.model)
        else:
            start = functools.partial(folders[i - 1].student if i else copy.deepcopy, taught.model)
            student = start() if student is None else student
            console.print(step.name, style="bold")
            if isinstance(step, Train):
                track.enter(step.name, tokens_before, steps_before)
            student, result = _do(step, student, start, taught, text, recipe, folder, track, watch, batches)
            if isinstance(step, Train):
                result["model"] = fingerprint(student)
            result = folder.finish(student, result)
            if isinstance(step, Train):
                track.made(
                    result["model"], {"architecture": architecture(student), "perplexity": result["headline_after"]}
                )
            if "layers" in result:
                with manifest.renewing(out, "layers.json"):
                    write_json(out / "layers.json", result["layers"])
            if i:
                folders[i - 1].drop_weights()
            left = planning.time_left(plan, [*results, result])
            ahead = f"; about {duration(left)} of training left" if left else ""
            console.print(f"{step.name}: perplexity {result['headline_after']:.3f}{ahead}", style="dim")
        results.append(result)
        if stop.requested:
            raise Interrupted(f"Stopped after step {step.name}; it is saved. The same command goes on from there.")
        if isinstance(step, Train):
            tokens_before += step.settings.num_steps * step.settings.batch_tokens
            steps_before += step.settings.num_steps
    return student or folders[-1].student(taught.model), results


def _do(
    step,
    student,
    start,
    taught: Teacher,
    text: TokenData,
    recipe: Recipe,
    folder: StepFolder,
    track: Track,
    watch: Monitor,
    batches: list[Batch],
):
    """The student after the step, and what the ledger says of it. `start()` makes the student from before the step once
    more."""
    started = time.monotonic()
    result = {"name": step.name, "kind": type(step).__name__, "tokens": 0, "seconds": 0.0}
    torch.manual_seed(seed_of(recipe))  # a swap draws too: what is new in a mixer and cannot start at zero
    if isinstance(step, Swap):
        student, found = do_swap(step, student, start, text, recipe, console)
        result |= found
    elif isinstance(step, Forget):
        with torch.no_grad():
            for module in student.modules():
                if isinstance(module, DecayRate):
                    module.s.fill_(step.rate)
    else:
        student, found = _train(step, student, taught, text, folder, track, watch)
        result |= found
    result["headline_after"] = perplexity(student, batches)
    result["seconds"] += time.monotonic() - started
    return student, result


def _train(step: Train, student, taught: Teacher, text: TokenData, folder: StepFolder, track: Track, watch: Monitor):
    """`seconds`: those before a crash."""
    started, s = time.monotonic(), step.settings

    def look(student) -> dict[str, float]:
        numbers = watch(student)
        track.generations(watch.generations)
        folder.stop.requested |= watch.stopped_by is not None
        return numbers

    student = step.stage(
        student, taught.model, Batches(text.train, s.seq_len, s.num_sequences, s.seed), s, track=track, keep=folder,
        measure=look,
    )  # fmt: skip
    rows = track.rows(step.name)
    if not rows:
        raise UserError(
            f"{track.file} has no line of step {step.name}, which was trained. Put back a copy, or start again with"
            " --fresh."
        )
    losses = [row["train/loss"] for row in rows]
    few = max(1, len(losses) // 20)
    return student, {
        "tokens": s.num_steps * s.batch_tokens,
        "loss_first": sum(losses[:few]) / few,
        "loss_last": sum(losses[-few:]) / few,
        "skipped": rows[-1]["train/skipped"],
        "seconds": max(0.0, rows[-1]["train/seconds"] - (time.monotonic() - started)),
    }


def architecture(student: ConvertedForCausalLM) -> str:
    """The names of its mixers."""
    return ", ".join(dict.fromkeys(mixer["name"] for mixer in student.config.mixers if mixer is not None))


def seed_of(recipe: Recipe) -> int:
    return next((step.settings.seed for step in recipe.steps if isinstance(step, Train)), 0)


def _report(
    student, taught: Teacher, text: TokenData, recipe: Recipe, settings: dict, results: list[dict], out: Path
) -> LanguageReport:
    console.print("measure", style="bold")
    metrics = final.final_metrics(student, taught, text, held_out(text, recipe))
    steps = [records.checked(result, StepResult, "The ledger", "") for result in results]
    stages = [step for step in steps if step.tokens]
    return LanguageReport(
        domain="language",
        teacher=taught.source.name,
        target=recipe.target,
        evaluation=_evaluate(student, taught, recipe, out),
        seed=seed_of(recipe),
        device=str(student.device),
        commit=commit(),
        versions=versions(),
        settings=Settings(**settings),
        steps=steps,
        stages=stages,
        handover=next((step.handover for step in reversed(steps) if step.handover), Handover()),
        layers=next((step.layers for step in steps if step.layers), Layers()),
        seconds=Seconds(total=sum(step.seconds for step in steps)),
        tokens=TokenCount(total=sum(step.tokens for step in stages)),
        **vars(metrics),
    )


def _evaluate(student, taught: Teacher, recipe: Recipe, out: Path) -> Evaluation:
    """Scores of both models on the tasks: a loss can be fine and what the student writes useless."""
    console.print("evaluate", style="bold")
    models = {"teacher": taught.model, "student": student}
    tasks = chosen(None, taught.tokenizer)
    found = evaluate_tasks(models, taught.tokenizer, tasks, limit=recipe.questions, file=out / "answers.jsonl")
    write(found, out / "evaluation.json")
    return found


@torch.no_grad()
def _round(student, dtype: torch.dtype) -> None:
    """The weights as the export will hold them, so that what is measured is what is shipped."""
    for p in student.parameters():
        p.copy_(p.to(dtype))


def held_out(text: TokenData, recipe: Recipe) -> list[Batch]:
    """The batches on which every perplexity of a run is measured."""
    last = [step.settings for step in recipe.steps if isinstance(step, Train)][-1]
    return final.held_out(text, recipe.tokens, last.seq_len, last.micro_tokens)


# --- defaults


def _whole_name(teacher: str, source: Source) -> str:
    """As the settings of a run hold it, from wherever it is repeated."""
    return str(Path(teacher).expanduser().absolute()) if source.kind in ("folder", "run", "gguf") else teacher


def finished(out: Path, teacher: str, recipe: Recipe, data: str | None) -> LanguageReport | None:
    """The report of a finished run of just this, else None."""
    if not (out / "report.json").exists():
        return None
    report = records.report(out)
    source = resolve(teacher)
    steps = json.loads(json.dumps([recipes.describe(step) for step in recipe.steps]))
    asked = {
        "teacher": _whole_name(teacher, source),
        "target": recipe.target,
        "data": data or source.data,
        "steps": steps,
    }
    return report if asked.items() <= vars(report.settings).items() else None


@checked
def default_recipe(
    source: Source, config: PreTrainedConfig, target: Text, *, tokens=None, seq_len=None, batch_tokens=None, seed=0
) -> Recipe:
    """The recipe of a target with the defaults of this teacher, but for what is given."""
    if target not in recipes.RECIPES:
        near = difflib.get_close_matches(target, recipes.RECIPES, 3, 0.3) or list(recipes.RECIPES)
        raise UserError(f"Unknown target {target!r}. Nearest: {', '.join(near)}. All: {', '.join(recipes.RECIPES)}.")
    return recipes.RECIPES[target](recipes.budget(source.name, config, tokens, seq_len, batch_tokens, seed))
