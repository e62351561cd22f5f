"""report.html: a run, or several side by side, as one page that needs no network."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

from convert.core import manifest
from convert.core.files import write_text
from convert.reports import charts, report
from convert.reports.sections import Card, Chart, Curve, PageSection, R, Run, Sections, Table

POINTS = 300  # of a curve


def write_page(folders: Sequence[Path], out: Path, sections: Sections[Any]) -> None:
    """Write the page of these finished runs to the file `out`."""
    runs = [Run.read(folder) for folder in folders]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page(runs, sections))


def write_report_page(run: Path, sections: Sections[Any]) -> None:
    """Write the page of a run into its folder."""
    with manifest.renewing(run, "report.html"):
        write_page([run], run / "report.html", sections)


def page(runs: Sequence[Run[R]], sections: Sections[R]) -> str:
    """The page as HTML."""
    one = runs[0] if len(runs) == 1 else None
    title = f"{one.report.teacher} → {one.report.target}" if one else f"{len(runs)} conversions side by side"
    made = PageSection(
        "How it was made",
        lines=report.facts(one.report, sections) if one else [],
        tables=[Table(_provenance(runs))],
    )
    shown = [*sections.results(runs), _training(runs, sections.curves), *sections.costs(runs), made]
    lead = [_lead(run, sections, named=one is None) for run in runs]
    settings = [(f"Settings of {run.name}", json.dumps(vars(run.report.settings), indent=1)) for run in runs]
    return rendered(title, lead, shown, cards=sections.cards(one) if one else (), settings=settings)


def rendered(
    title: str,
    lead: Sequence[str],
    sections: Sequence[PageSection],
    *,
    cards: Sequence[Card] = (),
    settings: Sequence[tuple[str, str]] = (),
) -> str:
    """A page of these sections as HTML; empty ones are left out. `settings` are texts, each with its title, that are
    folded away. The template escapes all that is not Markup."""
    environment = Environment(autoescape=True, trim_blocks=False)
    template = environment.from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        lead=lead,
        cards=cards,
        sections=[section for section in sections if not _is_empty(section)],
        settings=settings,
        table=_table,
        colours=charts.COLOURS,
    )


def _is_empty(section: PageSection) -> bool:
    tables = [table for table in section.tables if len(table.rows) > 1]
    return not (section.lines or section.charts or tables or section.texts)


def _lead(run: Run[R], sections: Sections[R], *, named: bool) -> str:
    sentence = sections.lead(run)
    return f"{run.name}: {sentence}" if named else sentence[:1].upper() + sentence[1:]


def _table(rows: Sequence[Sequence[str]]) -> Markup:
    """A table of HTML; the first row is the head."""
    lines = [
        "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row)
        for kind, row in zip(["th"] + ["td"] * len(rows), rows, strict=False)
    ]
    return Markup("<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")


def _training(runs: Sequence[Run[R]], curves: Sequence[Curve]) -> PageSection:
    """Losses by stage, what was measured meanwhile, and the table of steps."""
    found, unit = [], runs[0].report.unit
    for stage in dict.fromkeys(row.stage for run in runs for row in run.metrics):
        lines = [_line(run, "loss", stage) for run in runs]
        svg = charts.curves(f"loss-{stage}", [line for line in lines if line[1]], "loss", log=True, unit=unit)
        found.append(Chart(f"Loss of {stage}", svg))
    for curve in curves:
        lines = [line for run in runs if (line := _line(run, curve.field))[1]]
        if lines:
            svg = charts.curves(curve.field, lines, curve.title.lower(), log=curve.log, zero=not curve.log, unit=unit)
            found.append(Chart(curve.title, svg))
    head, *_ = report.step_rows(runs[0].report)
    rows = [head]
    for run in runs:
        _, *steps = report.step_rows(run.report)
        rows += [[name if len(runs) == 1 else f"{run.name}: {name}", *cells] for name, *cells in steps]
    return PageSection("Training", charts=found, tables=[Table(rows)])


def _line(run: Run[R], field: str, stage: str | None = None) -> charts.Line:
    """A field of the metrics over tokens or images, thinned so that the page stays small: means of neighbours."""
    rows = [
        (row.tokens, value)
        for row in run.metrics
        if stage in (None, row.stage) and (value := getattr(row, field)) is not None
    ]
    step = max(1, len(rows) // POINTS)
    groups = [rows[i : i + step] for i in range(0, len(rows), step)]
    return run.name, [group[-1][0] for group in groups], [sum(y for _, y in group) / len(group) for group in groups]


def _provenance(runs: Sequence[Run[R]]) -> list[list[str]]:
    rows = [["", *(run.name for run in runs)]]
    for label, value in (
        ("teacher", lambda r: r.settings.teacher),
        ("target", lambda r: r.target),
        ("data", lambda r: f"{r.settings.data} ({r.settings.data_fingerprint[:12]})"),
        ("seed", lambda r: str(r.seed)),
        ("device", lambda r: r.device),
        ("commit", lambda r: r.commit or "unknown"),
        ("versions", lambda r: ", ".join(f"{name} {version}" for name, version in r.versions.items() if version)),
    ):
        rows.append([label, *(value(run.report) for run in runs)])
    return rows
