"""Writes docs/REPORT.md from the dataclasses of a run's files: every key with its type, unit and meaning.

python -m convert.runs.document > docs/REPORT.md
"""

import dataclasses
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from convert.runs.evaluation_schemas import AnswerRow, Evaluation
from convert.runs.keys import VERSION, CheckedAs, Key
from convert.runs.language_schemas import Context, LanguageReport
from convert.runs.schemas import GenerationRow, MetricRow
from convert.runs.vision_schemas import VisionMetrics

FILES = (
    ("report.json", LanguageReport, "What a finished run measured. `python -m convert.run` writes it at the end."),
    (
        "report.json of images",
        VisionMetrics,
        "What it holds in the place of perplexity, agreement, kl, measured_tokens, cache_bytes, contexts, half_lives"
        " and continuations.",
    ),
    (
        "evaluation.json",
        Evaluation,
        "Scores by task. `python -m convert.run` and `python -m convert.evaluate` write it; of each task the evaluation"
        " with the most examples is kept.",
    ),
    ("context.json", Context, "Costs and use of long contexts. `python -m experiments.context` writes it."),
    ("metrics.jsonl", MetricRow, "A line for each optimizer step. W&B shows the same keys."),
    ("generations.jsonl", GenerationRow, "A line for each text that the student wrote when it was measured."),
    ("answers.jsonl", AnswerRow, "A line for each answer of an evaluation, so that one that was stopped goes on."),
)
HEAD = f"""\
# The files of a run

Every key of the JSON files in a run's folder. This page is generated from the dataclasses in `convert/runs`
(`python -m convert.runs.document > docs/REPORT.md`).

`[]` stands for each element of a list, `*` for each key of an object. A type with `null` may be missing.
`report.json`, `evaluation.json`, `context.json` and `answers.jsonl` have layout {VERSION}; files of another layout are
refused by name. `sha256.json` has the hashes of all of them.
"""


def document() -> str:
    """Content of docs/REPORT.md."""
    parts = [HEAD]
    for name, kind, about in FILES:
        rows = [f"## {name}", "", about, "", "| key | type | unit | meaning |", "|---|---|---|---|"]
        rows += [f"| `{key}` | {words} | {unit} | {meaning} |" for key, words, unit, meaning in _keys(kind, "")]
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _keys(kind: type, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """(key, type, unit, meaning) of each key of a dataclass, and of the dataclasses inside of it."""
    for field in dataclasses.fields(kind):
        hint, key, alias, checked_as = _parts(field.type)
        name = prefix + (alias or field.name)
        yield name, _words(hint), key.unit, key.meaning
        inner, suffix = _inner(checked_as or hint)
        if inner is Evaluation and prefix == "" and kind is not Evaluation:
            continue  # it has a table of its own
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from _keys(inner, f"{name}{suffix}.")


def _parts(hint: Any) -> tuple[Any, Key, str | None, Any]:
    """The bare type of a field, what is said of it, its name in the file, and the type that it is checked as."""
    bare, *notes = get_args(hint)
    (key,) = (note for note in notes if isinstance(note, Key))
    alias = next((note.alias for note in notes if isinstance(note, FieldInfo) and note.alias), None)
    return bare, key, alias, next((note.kind for note in notes if isinstance(note, CheckedAs)), None)


def _inner(hint: Any) -> tuple[Any, str]:
    """The type of the elements of a list or an object, however deep, and how the key says so."""
    hint, origin = _bare(hint), get_origin(_bare(hint))
    if origin is list:
        inner, suffix = _inner(get_args(hint)[0])
        return inner, "[]" + suffix
    if origin is dict:
        inner, suffix = _inner(get_args(hint)[1])
        return inner, ".*" + suffix
    return hint, ""


def _bare(hint: Any) -> Any:
    """A type without its bounds, and without null."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (each for each in get_args(hint) if each is not type(None))
        return _bare(hint)
    return hint


WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "any value"}


def _words(hint: Any) -> str:
    """A type in words."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(each) for each in args)
    if origin is Literal:
        return " or ".join(f"`{each}`" for each in args)
    if origin is list:
        return f"list of {_words(args[0])}"
    if origin is dict:
        return f"object: {_words(args[0])} to {_words(args[1])}"
    return WORDS.get(hint, "object")


if __name__ == "__main__":
    print(document(), end="")
