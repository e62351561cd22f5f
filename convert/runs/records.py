"""What a run's folder holds, read in one place: report.json, evaluation.json, context.json and the files that grow.

They may be a stranger's, cut or edited: each is held against its hash and its types once, and a fault is told by file
and key."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from convert.core import json_lines as lines
from convert.core import manifest
from convert.core.errors import UserError
from convert.core.files import parse_json
from convert.runs.schemas import Context, Evaluation, Metric, Report, Text


def report(run: Path) -> dict:
    """Of a finished run."""
    if not (run / "report.json").exists():
        raise UserError(
            f"A finished run has a report.json; {run} has none. Give run folders, or finish it by repeating its"
            " command."
        )
    return _read(run, "report.json", Report)


def evaluation(folder: Path) -> dict | None:
    return _read(folder, "evaluation.json", Evaluation) if (folder / "evaluation.json").exists() else None


def context(run: Path) -> dict:
    """What experiments.context found; empty where nobody asked."""
    return _read(run, "context.json", Context) if (run / "context.json").exists() else {}


def metrics(run: Path) -> list[dict]:
    """A row for each step of a run."""
    manifest.check(run, "metrics.jsonl")
    return list(rows(run / "metrics.jsonl", Metric))


def texts(run: Path) -> list[dict]:
    """What was written while stages trained."""
    manifest.check(run, "generations.jsonl")
    return list(rows(run / "generations.jsonl", Text))


def rows(file: Path, kind) -> Iterator:
    """The rows of a growing file, each held against its type."""
    for number, row in enumerate(lines.read(file), 1):
        yield checked(row, kind, f"{file}, row {number},", "Put back a copy of the file, or take that line out.")


def checked(found, kind, where: str, way_out: str):
    """`found` as this type, or a UserError that begins with `where` and names the first key that is wrong."""
    try:
        return _adapter(kind).validate_python(found)
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


def _read(folder: Path, name: str, kind) -> dict:
    manifest.check(folder, name)
    file = folder / name
    way_out = f"{manifest.WAYS_OUT.get(name, manifest.AGAIN)}."
    try:
        found = parse_json(file.read_bytes(), str(file))
    except UserError as error:
        raise UserError(f"{file} is damaged: it {str(error).removeprefix(str(file)).strip()} {way_out}") from None
    return checked(found, kind, str(file), way_out)


@cache
def _adapter(kind) -> TypeAdapter:
    return TypeAdapter(kind)
