"""run_recipe(): the one place where recipe, data, tracking, checkpoints and measurements meet."""

import dataclasses
import functools
import gc
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from convert.core import manifest
from convert.core.console import console, duration
from convert.core.errors import Interrupted, files_in_words
from convert.core.fields import Place, Text, checked
from convert.core.files import write_json, write_text
from convert.core.processes import gathered, in_turn, joined, on_first
from convert.core.provenance import commit, versions
from convert.domains.base import Domain
from convert.models.saving import fingerprint, save_student
from convert.models.sharding import reshard
from convert.planning import plan as planning
from convert.planning.plan import ShareTeacher
from convert.preparation import Run, domain_for, planned, prepared, whole_name, whole_steps
from convert.recipes.base import Recipe
from convert.reports import report as reports
from convert.reports import scores
from convert.reports.page import write_page
from convert.runs import records
from convert.runs.checkpoint import LOGS, StepFolder, StopRequest
from convert.runs.ledger import check_shared, locked, open_run
from convert.runs.schemas import Export, Handover, Layers, Report, Seconds, Settings, StepResult, TokenCount
from convert.runs.tracking import Track, Unwritten
from convert.steps.base import Session, Step

RESULTS = ("report.json", "report.md", "report.html", "evaluation.json", "answers.jsonl", "layers.json")
SHIPPED = ("model", "native", *RESULTS, *LOGS)


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
    share_teacher: ShareTeacher = "auto",
) -> Report:
    """Do what the recipe (or the default one of a target) says to the teacher, in the folder `out`; return the report.

    Steps already done are skipped, an unfinished one goes on. `wandb`: online, offline, disabled, None: as configured.
    `stop_when`: rules like "generation<0.2", looked at whenever a stage measures. `share_teacher`: whether several
    processes share the teacher out among them (auto: where it does not fit each)."""
    started, teacher = time.monotonic(), str(teacher)
    rules = domain_for(teacher, recipe).monitor_rules(stop_when)
    plan = functools.partial(
        planned,
        teacher,
        recipe,
        out,
        data=data,
        device=device,
        fresh=fresh,
        trust_remote_code=trust_remote_code,
        has_rules=bool(rules),
        share_teacher=share_teacher,
    )
    with joined(), ExitStack() as held:
        run = prepared(in_turn(plan))
        out, domain = run.out, run.domain
        on_first(_taken, run, fresh, held)
        check_shared(out)
        report = _locked_run(run, wandb, rules, started)
        reports.show(report, console, domain.sections)
        scores.show(report.evaluation, console)
        console.print(
            f"The student is in {out / 'model'}, the report in {out / 'report.md'}. Try:  {domain.try_it(out)}"
        )
    return report


def _taken(run: Run, fresh: bool, held: ExitStack) -> None:
    """Open the run's folder, and hold it as long as `held` is open."""
    open_run(run.out, run.settings, fresh)
    held.enter_context(locked(run.out))
    _check_what_is_read_back(run.out)


def _check_what_is_read_back(out: Path) -> None:
    """Damage to the files of an earlier call is said before hours are spent."""
    manifest.check(out, "answers.jsonl", *LOGS)
    records.evaluation(out)
    records.context(out)


def _locked_run(run: Run, wandb: str | None, rules: Sequence[Any], started: float) -> Report:
    """Do the steps, measure, evaluate, export and report."""
    tracks: list[Track] = []
    on_first(lambda: tracks.append(Track(run.out, mode=wandb, config=run.settings, name=run.out.name)))
    track = tracks[0] if tracks else Unwritten()
    try:
        with StopRequest() as stop:
            student, results = _steps(run, track, stop, rules)
        _round(reshard(student), run.teacher.dtype)
        report = _report(run, student, results)
        return _shipped(run, student, report, track, started)
    finally:
        track.close()


def _shipped(run: Run, student: PreTrainedModel, report: Report, track: Unwritten, started: float) -> Report:
    """Export the student, write the report and the page; return the report with what the export says."""
    out, domain = run.out, run.domain
    with ExitStack() as held:
        on_first(held.enter_context, manifest.renewing(out, *SHIPPED))
        cards = reports.card(report, domain.sections), reports.card(report, domain.sections, native=True)
        exported = domain.export(student, run.teacher, out / "model", cards, run.data)
        report = dataclasses.replace(
            report,
            export=records.checked(exported, Export, "The export", ""),
            seconds=dataclasses.replace(report.seconds, this_call=time.monotonic() - started),
        )
        on_first(_write, run, report)
    track.enter("evaluate")
    facts = {"architecture": run.recipe.target, domain.headline: report.headline.student}
    track.made(fingerprint(student), facts, out / "model")
    track.finish(report.evaluation, out / "report.html", domain.sections.numbers(report))
    return report


def _write(run: Run, report: Report) -> None:
    """Write the report and the page."""
    sections = run.domain.sections
    write_json(run.out / "report.json", dataclasses.asdict(report))
    write_text(run.out / "report.md", reports.markdown(report, sections))
    write_page([run.out], run.out / "report.html", sections)


def _steps(
    run: Run, track: Unwritten, stop: StopRequest, rules: Sequence[Any]
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """Do the steps that are not done yet. The student of the last finished step is on disk."""
    recipe, teacher = run.recipe, run.teacher.model
    folders = [StepFolder(run.out, i, step.name, stop) for i, step in enumerate(recipe.steps)]
    read = functools.partial(run.domain.load_student, teacher=teacher)
    held_out = run.held_out()
    monitor = run.domain.monitor(run.teacher, held_out, rules)
    results: list[dict[str, Any]] = []
    student, tokens_before, steps_before = None, 0, 0
    for i, (step, folder) in enumerate(zip(recipe.steps, folders, strict=True)):
        result = on_first(folder.result)
        if result is not None:
            console.print(f"{step.name}: done, skipped", style="dim")
            on_first(folder.tidy)
            if i:
                on_first(folders[i - 1].drop_weights)  # again, where a kill came before it
            student, track.model = None, result.get("model", track.model)
        else:
            start = (
                functools.partial(folders[i - 1].student, read) if i else functools.partial(run.domain.copy, teacher)
            )
            console.print(step.name, style="bold")
            if step.training is not None:
                track.enter(step.name, tokens_before, steps_before)
            session = Session(
                domain=run.domain,
                teacher=run.teacher,
                data=run.data,
                training=recipe.measured_by,
                tokens=recipe.units,
                held_out=held_out,
                monitor=monitor,
                track=track,
                folder=folder,
                start=start,
                load_teacher=run.load_teacher,
                prepare=run.prepare,
                load_run_teacher=run.load_again,
            )
            student, result = _done(step, start() if student is None else student, session, recipe.seed)
            gc.collect()  # a model that is shared out holds itself in circles, and a swap leaves one behind
            result = folder.finish(functools.partial(save_student, student), result)
            on_first(_tell, run, step, student, result, track)
            if i:
                on_first(folders[i - 1].drop_weights)
            left = planning.time_left(run.plan, [*results, result])
            ahead = f"; about {duration(left)} of training left" if left else ""
            metric = f"{run.domain.headline} {result['headline_after']:.3f}"
            console.print(f"{step.name}: {metric}{ahead}", style="dim")
        results.append(result)
        if any(gathered(stop.requested)):
            raise Interrupted(f"Stopped after step {step.name}; it is saved. The same command goes on from there.")
        if step.training is not None:
            tokens_before += result["tokens"]
            steps_before += step.training.num_steps
    return student or folders[-1].student(read), results


def _done(step: Step, student: PreTrainedModel, session: Session, seed: int) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Do one step and measure; return the student after it, and what the ledger says of it."""
    started = time.monotonic()
    result: dict[str, Any] = {"name": step.name, "kind": type(step).__name__, "tokens": 0, "seconds": 0.0}
    torch.manual_seed(seed)  # a swap draws too: what is new in a mixer and cannot start at zero
    student, found = step.run(reshard(student), session)
    result |= found
    result["headline_after"] = session.domain.measure(student, session.held_out)
    result["seconds"] += time.monotonic() - started
    if step.training is not None:
        result["model"] = fingerprint(student)
    return student, result


def _tell(run: Run, step: Step, student: PreTrainedModel, result: Mapping[str, Any], track: Unwritten) -> None:
    """Track the student of a training step, and keep which layers have attention beside the report."""
    if step.training is not None:
        facts = {"architecture": architecture(run.domain, student), run.domain.headline: result["headline_after"]}
        track.made(result["model"], facts)
    if "layers" in result:
        with manifest.renewing(run.out, "layers.json"):
            mixers = run.domain.outline(student.config)[1]
            kept = [i for i, name in enumerate(mixers) if name is None]
            write_json(run.out / "layers.json", result["layers"] | {"kept": kept})


def architecture(domain: Domain, student: PreTrainedModel) -> str:
    """Return the names of a student's mixers, or of its family where nothing was converted."""
    host, mixers = domain.outline(student.config)
    return ", ".join(dict.fromkeys(name for name in mixers if name)) or host.model_type


def _report(run: Run, student: PreTrainedModel, results: list[dict[str, Any]]) -> Report:
    """Measure and evaluate the finished student: its report, but for the export."""
    console.print("measure", style="bold")
    metrics = run.domain.final_metrics(student, run.teacher, run.data, run.held_out(), run.out)
    console.print("evaluate", style="bold")
    models = {"teacher": run.teacher.model, "student": student}
    asked = models, run.teacher, run.recipe.tasks, run.recipe.examples, run.out
    evaluation = run.domain.evaluate(*asked)
    steps = [records.checked(result, StepResult, "The ledger", "") for result in results]
    stages = [step for step in steps if step.tokens]
    return run.domain.report_type(
        domain=run.domain.name,
        unit=run.domain.unit,
        teacher=run.teacher.source.name,
        target=run.recipe.target,
        evaluation=evaluation,
        seed=run.recipe.seed,
        device=str(student.device),
        commit=commit(),
        versions=versions(),
        settings=Settings(**{name: run.settings[name] for name in Settings.__dataclass_fields__}),
        steps=steps,
        stages=stages,
        handover=next((step.handover for step in reversed(steps) if step.handover), Handover()),
        layers=_kept_layers(run.domain, student, steps),
        seconds=Seconds(total=sum(step.seconds for step in steps)),
        tokens=TokenCount(total=sum(step.tokens for step in stages)),
        **vars(metrics),
    )


def _kept_layers(domain: Domain, student: PreTrainedModel, steps: Sequence[StepResult]) -> Layers:
    """The layers of a converted student that no mixer replaced, and what a measurement said of them."""
    mixers = domain.outline(student.config)[1]
    kept = [i for i, name in enumerate(mixers) if name is None] if any(mixers) else []
    rankings = (s.layers for s in steps if s.layers and (s.layers.kl_when_edited_alone or s.layers.when_given_back))
    measured = next(rankings, Layers())
    return dataclasses.replace(measured, kept=kept)


@torch.no_grad()
def _round(student: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the weights to what the export will hold, so that what is measured is what is shipped."""
    for p in student.parameters():
        p.copy_(p.to(dtype))


def finished(out: Path, teacher: str, recipe: Recipe, data: str | None) -> Report | None:
    """Return the report of a finished run of just this, else None."""
    if not (out / "report.json").exists():
        return None
    found = records.report(out)
    domain = domain_for(teacher, recipe)
    source = domain.resolve(teacher)
    asked = {
        "teacher": whole_name(teacher, source),
        "target": recipe.target,
        "data": data or source.data,
        "steps": json.loads(json.dumps(whole_steps(domain, recipe))),
    }
    done = vars(found.settings) | {"steps": [_without_fingerprints(step) for step in found.settings.steps]}
    return found if asked.items() <= done.items() else None


def _without_fingerprints(step: Mapping[str, Any]) -> dict[str, Any]:
    """A described step without what only loading its own data and teacher tells."""
    return {key: value for key, value in step.items() if not key.endswith("_fingerprint")}
