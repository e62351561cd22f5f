"""What a run's folder holds, read in one place: report.json, evaluation.json, context.json and the files that grow.

They may be a stranger's, cut or edited: each is held against its hash and its types once, and a fault is told by file
and key."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from convert.core import json_lines, manifest
from convert.core.errors import UserError
from convert.core.files import parse_json
from convert.runs.evaluation_schemas import Evaluation
from convert.runs.keys import VERSION
from convert.runs.language_schemas import Context, LanguageReport
from convert.runs.schemas import GenerationRow, MetricRow
from convert.runs.vision_schemas import VisionReport

Kind = TypeVar("Kind")
REPORTS: dict[str, type] = {"language": LanguageReport, "vision": VisionReport}  # domain -> what its report.json holds


def report(run: Path) -> Any:
    """Report of a finished run, of the type that its domain has."""
    if not (run / "report.json").exists():
        raise UserError(
            f"A finished run has a report.json; {run} has none. Give run folders, or finish it by repeating its"
            " command."
        )
    found, where, way_out = _content(run, "report.json")
    domain = found.get("domain") if isinstance(found, dict) else None
    kind = REPORTS.get(domain, LanguageReport) if isinstance(domain, str) else LanguageReport
    read: Any = checked(found, kind, where, way_out)
    if read.domain not in REPORTS:
        raise UserError(f"{where} is damaged: domain should be one of {', '.join(REPORTS)}. {way_out}")
    return read


def evaluation(folder: Path) -> Evaluation | None:
    """What an evaluation of this folder found before; None where there was none."""
    if not (folder / "evaluation.json").exists():
        return None
    found, where, way_out = _content(folder, "evaluation.json")
    return checked(found, Evaluation, where, way_out)


def context(run: Path) -> Context:
    """What experiments.context found; empty where it was not run."""
    if not (run / "context.json").exists():
        return Context()
    found, where, way_out = _content(run, "context.json")
    return checked(found, Context, where, way_out)


def metrics(run: Path) -> list[MetricRow]:
    """A row for each optimizer step of a run."""
    manifest.check(run, "metrics.jsonl")
    return list(rows(run / "metrics.jsonl", MetricRow))


def generations(run: Path) -> list[GenerationRow]:
    """What was written while stages trained."""
    manifest.check(run, "generations.jsonl")
    return list(rows(run / "generations.jsonl", GenerationRow))


def rows(file: Path, kind: type[Kind]) -> Iterator[Kind]:
    """The rows of a growing file, each checked against its type."""
    versioned = "version" in getattr(kind, "__dataclass_fields__", {})
    for number, row in enumerate(json_lines.read(file), 1):
        if versioned:
            _refuse_other_layout(row, str(file), f"{manifest.WAYS_OUT.get(file.name, manifest.AGAIN)}.")
        yield checked(row, kind, f"{file}, row {number},", "Put back a copy of the file, or take that line out.")


def checked(found: Any, kind: type[Kind], where: str, way_out: str) -> Kind:
    """`found` as this type, or a UserError that begins with `where` and names the first key that is wrong."""
    try:
        value: Kind = _adapter(kind).validate_python(found)  # type: ignore[arg-type]  # a type is hashable
        return value
    except UnicodeEncodeError:  # of pydantic's own message
        raise UserError(f"{where} is damaged: a word in it holds half of a surrogate pair. {way_out}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    place, reason = ".".join(str(part) for part in first["loc"]), "is missing"
    if first["type"] == "value_error":  # ours, a whole clause
        place, reason = f"{place}: " if place else "", first["msg"].removeprefix("Value error, ")
    elif first["type"] != "missing":
        place, reason = f"{place} " if place else "it ", first["msg"].removeprefix("Input ")
    else:
        place += " "
    raise UserError(f"{where} is damaged: {place}{reason}. {way_out}")


def _content(folder: Path, name: str) -> tuple[Any, str, str]:
    """The JSON value of a file of this layout, and what an error begins and ends with."""
    manifest.check(folder, name)
    file = folder / name
    way_out = f"{manifest.WAYS_OUT.get(name, manifest.AGAIN)}."
    try:
        found = parse_json(file.read_bytes(), str(file))
    except UserError as error:
        raise UserError(f"{file} is damaged: it {str(error).removeprefix(str(file)).strip()} {way_out}") from None
    _refuse_other_layout(found, str(file), OTHER_LAYOUT if name == "report.json" else way_out)
    return found, str(file), way_out


OTHER_LAYOUT = "Start the run again with --fresh, or read it with the version that wrote it."


def _refuse_other_layout(found: Any, where: str, way_out: str) -> None:
    """The first layout had no version in it."""
    version = found.get("version", 1) if isinstance(found, dict) else VERSION
    if type(version) is int and version != VERSION:
        raise UserError(
            f"{where} was written by another version of this project (its layout is {version}, and {VERSION} is read"
            f" here). {way_out}"
        )


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
