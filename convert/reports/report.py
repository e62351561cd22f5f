"""The report that a person reads: the tables at the end of a run, report.md, and the model card."""

from collections.abc import Callable, Iterator

from rich import box
from rich.table import Table

from convert.core.console import Console, count, duration
from convert.reports.markdown import code, escaped
from convert.reports.sections import R, Sections
from convert.runs.schemas import Layers, NativeExport, Report, StepResult


def show(report: R, console: Console, sections: Sections[R]) -> None:
    """Print the tables at the end of a run."""
    table = Table(title=f"{report.teacher} -> {report.target}", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("held-out data", "teacher", "student", ""):
        table.add_column(column, justify="left" if column == "held-out data" else "right")
    for row in sections.comparison(report):
        table.add_row(*row)
    console.print(table, soft_wrap=False)
    for line in sections.remarks(report):
        console.print(line)
    head, *rows = step_rows(report, lambda step: count(step.tokens))
    steps = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(head):
        steps.add_column(column, justify="right" if number else "left")
    for cells in rows:
        steps.add_row(*cells)
    console.print(steps, soft_wrap=False)
    for line in facts(report, sections):
        console.print(line)


def step_rows(report: Report, tokens: Callable[[StepResult], str] = lambda step: f"{step.tokens:,}") -> list[list[str]]:
    """The table of steps; its head comes first. `tokens` says how their numbers are written."""
    unit = f", {report.headline.unit}" if report.headline.unit else ""
    rows = [["step", report.unit, "time", "first loss", "last loss", f"{report.headline.name} after{unit}"]]
    for step in report.steps:
        trained = [""] * 4
        if step.tokens:
            trained = [tokens(step), duration(step.seconds), f"{step.loss_first:.4f}", f"{step.loss_last:.4f}"]
        rows.append([step.name, *trained, f"{step.headline_after:.3f}"])
    return rows


def facts(report: R, sections: Sections[R]) -> list[str]:
    """What a run has to say beside its tables, a sentence each."""
    lines = [*_handover(report), *_kept(report.layers), *_learnt(report), *sections.facts(report)]
    for step in report.stages:
        if step.skipped:
            lines.append(f"Step {step.name}: {step.skipped} steps had no finite gradient and were skipped.")
    lines += _native(report.export.native if report.export else None)
    lines.append(
        f"{count(report.tokens.total)} {report.unit} in {duration(report.seconds.total)}; seed {report.seed};"
        " export checked in a clean process."
    )
    return lines


def _learnt(report: Report) -> Iterator[str]:
    """Sentences on training steps that had data of their own, or did not learn every token."""
    for step in report.settings.steps:
        data, masking = step.get("data"), (step.get("settings") or {}).get("masking", "all")
        if data is not None or masking != "all":
            targets = "every token is a target" if masking == "all" else f"only {masking} are targets"
            yield f"Step {step['name']} trained on {_source(data or report.settings.data)}; {targets}."


def _source(data: str) -> str:
    """The data of a step in words: `teacher` is no name of data."""
    kind, _, file = data.partition(":")
    if kind != "teacher":
        return data
    return "what its teacher wrote after " + (f"the prompts of {file}" if file else "training prompts of the tasks")


def _handover(report: Report) -> list[str]:
    found = report.handover
    if found.max_abs_logit is None:
        return []
    line = (
        f"Hand-over over {found.tokens:,} {report.unit}: logits moved by at most {found.max_abs_logit:.2g}"
        f" (allowed {found.allowed:.2g}), {report.headline.name} by {found.headline_change:.1e} of itself."
    )
    if found.max_abs_logit_float64 is not None:
        line += f" That is float32's rounding: in float64 they move by {found.max_abs_logit_float64:.2g}."
    return [line]


def _native(native: NativeExport | None) -> list[str]:
    """Sentence on native/. It is known when the export is done, and the model card is written before."""
    if native is None:
        return []
    if native.obstacle is not None:
        return [f"No architecture of transformers is this student ({native.obstacle}): model/ brings its code along."]
    line = (
        f"native/ is the same student as a {native.model_type}, without code of ours: in a clean process its logits"
        f" differ by at most {native.max_abs_logit:.2g} (allowed {native.allowed:.2g})."
    )
    if native.max_abs_logit_float64 is not None:
        line += f" That is float32's rounding: in float64 they differ by {native.max_abs_logit_float64:.2g}."
    return [line]


def _kept(layers: Layers) -> list[str]:
    if not layers.kept:
        return []
    kept = ", ".join(map(str, layers.kept))
    if (found := layers.when_given_back) is not None:
        rows = sorted(enumerate(found.alone), key=lambda row: row[1])
        costs = ", ".join(f"{layer} ({value:.3g})" for layer, value in rows)
        measured = {"kl": "KL from the teacher", "recall": "Loss of associative recall"}[found.by]
        return [
            f"Layers that keep their attention, chosen after all were replaced: {kept}. {measured} in nats"
            f" with none given back: {found.none:.3g}; with one layer given back: {costs}."
        ]
    if layers.kl_when_edited_alone is None:
        return [f"Layers that keep their attention: {kept}."]
    ranking = sorted(enumerate(layers.kl_when_edited_alone), key=lambda row: -row[1])
    costs = ", ".join(f"{layer} ({kl:.2g})" for layer, kl in ranking)
    return [
        f"Layers that keep their attention, because they cost most when edited alone: {kept}. KL of each in nats:"
        f" {costs}."
    ]


def markdown(report: R, sections: Sections[R]) -> str:
    """Content of report.md; below its title it is the model card, too."""
    plain, settings, report = report, report.settings, escaped(report)
    parts = [f"# {report.teacher} converted to {report.target}\n", sections.summary(report) + "\n"]
    head, *rows = step_rows(report)
    parts.append("\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]) + "\n")
    parts += sections.tables(report)
    parts.append("\n".join(f"* {line}" for line in facts(report, sections)) + "\n")
    parts += sections.scores(report)
    parts += sections.texts(plain)
    versions = ", ".join(f"{escaped(name)} {version}" for name, version in report.versions.items() if version)
    parts.append(
        f"## Provenance\n\nTeacher {code(settings.teacher)}; data {code(settings.data)} (fingerprint"
        f" {code(settings.data_fingerprint)}); seed {report.seed}; {versions}; commit"
        f" {report.commit or 'unknown'}. Every setting is in `report.json`.\n"
    )
    return "\n".join(parts)


def card(report: R, sections: Sections[R], native: bool = False) -> str:
    """The model card of the export: how to load it, then the report. A `native` one brings no code."""
    tag, usage = sections.usage(native)
    head = f"---\nlibrary_name: transformers\npipeline_tag: {tag}\n---\n\n"
    title, _, rest = markdown(report, sections).partition("\n")
    return f"{head}{title}\n\n{usage}{rest}"
