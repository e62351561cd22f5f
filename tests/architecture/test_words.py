"""Files that stay readable: their length, their docstrings, and tests beside every folder."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [file for top in ("convert", "kernels", "experiments") for file in sorted((ROOT / top).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
LONGEST = 350  # lines of a file
# A docstring that begins with one of these is no sentence: "Of one sequence, by formula" has no subject.
PREPOSITIONS = set(
    "Of By From For In With Without As At On Around Beside After Before Between While Where To And Up Over Through"
    " Under Behind Into Likewise But Or If When Whatever Also Half".split()
)
# what a table of section 8 of the design renamed: word -> what it is called now
OLD_WORDS = {
    "Watch": "Monitor",
    "taught": "teacher",
    "OneIn": "EveryNth, MostSensitive",
    "Forget": "SetDecay",
    "READINGS": "SCORING_METHODS",
    "readings": "scoring, queries per state",
    "rises": "sensitivity",
    "first_token_s": "time_to_first_token_s",
    "perplexity_after": "headline_after",
    "questions": "examples",
    "contenders": "baselines",
}


def docstrings(source: str) -> list[tuple[int, str]]:
    """Line and text of every docstring."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return [(getattr(node, "lineno", 1), text) for node in nodes if (text := ast.get_docstring(node))]


def without_subject(source: str) -> list[tuple[int, str]]:
    """Docstrings that begin with a bare preposition."""
    return [(line, text) for line, text in docstrings(source) if text.split()[0].strip(",:;.") in PREPOSITIONS]


def test_docstrings_are_sentences():
    assert not {str(f.relative_to(ROOT)): found for f in SOURCES if (found := without_subject(f.read_text()))}


def test_a_planted_docstring_without_a_subject_is_caught():
    assert without_subject('def f():\n    """Of one sequence, by formula."""\n') == [
        (1, "Of one sequence, by formula.")
    ]


def test_no_file_is_long():
    lines = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in [*SOURCES, *TESTS]}
    assert not {name: count for name, count in lines.items() if count > LONGEST}


@functools.cache
def names_of(file: Path) -> set[str]:
    return names_in(file.read_text())


def names_in(source: str) -> set[str]:
    """Every name in a file: of variables, arguments, attributes, functions, classes and keywords."""
    fields = {ast.Name: "id", ast.arg: "arg", ast.Attribute: "attr", ast.keyword: "arg", ast.alias: "name"}
    fields |= dict.fromkeys((ast.FunctionDef, ast.ClassDef), "name")
    nodes = ast.walk(ast.parse(source))
    return {getattr(node, fields[type(node)]) for node in nodes if type(node) in fields} - {None}


@pytest.mark.parametrize("word", OLD_WORDS)
def test_old_words_are_gone(word):
    found = [str(f.relative_to(ROOT)) for f in [*SOURCES, *TESTS] if word in names_of(f)]
    assert not found, f"{word} is called {OLD_WORDS[word]}"


def test_tests_have_the_folders_of_the_source():
    """A test of convert/FOLDER/x.py is in tests/FOLDER; of kernels and experiments likewise."""
    folders = {f.parent.relative_to(ROOT / "convert") for f in SOURCES if f.is_relative_to(ROOT / "convert")}
    mirrored = {f.parent.relative_to(ROOT / "tests") for f in TESTS}
    missing = {str(folder) for folder in folders if folder not in mirrored and folder.name != "nano"}
    assert not missing - {"mixers/init"}, "mixers are tested from their start on"
    own = {"architecture", "e2e", "fuzz", "kernels", "experiments", "nano", "parallel"}
    assert {folder.parts[0] for folder in mirrored if folder.parts} <= own | {f.parts[0] for f in folders if f.parts}
