"""A finished run's folder in which something changed: the page, an evaluation and the student say what, or work."""

import json
import shutil

import pytest
from hypothesis import strategies as st

from convert.evaluate import main as evaluate
from convert.generate import main as generate
from experiments.compare import main as compare
from tests.fuzz import SEED, behaves, contents, damaged, fuzz, mutated
from tests.fuzz.test_commands import reached

JSON_FILES = (
    "report.json",
    "evaluation.json",
    "ledger.json",
    "model/config.json",
    "model/tokenizer_config.json",
    "model/generation_config.json",
)
LINES = ("metrics.jsonl", "generations.jsonl", "answers.jsonl")
# by an evaluation
REWRITTEN = {
    "report.html",
    "evaluation.json",
    "answers.jsonl",
    "report.md",
    "report.json",
    "manifest.json",
    "lock",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("convert.evaluation.runner.evaluate_tasks", reached)
        patch.setattr("convert.evaluation.runner._measured_again", lambda student, teacher, report: report)
        yield folder


def reads(run, before) -> None:
    """Every command that takes a run's folder."""
    from convert.cli import fail_in_words

    behaves(lambda: fail_in_words(compare, debug=False), [str(run), "--out", "page.html"], "compare")
    behaves(evaluate, [str(run), "--limit", "1", "--tasks", "names"])
    behaves(generate, [str(run), "x", "--max-new-tokens", "1"])
    after = contents(run)
    assert {
        name: digest for name, digest in before.items() if name not in REWRITTEN and after.get(name) != digest
    } == {}


def copied(finished_run, place):
    run = place / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(finished_run, run)
    return run


@fuzz(5, name=st.sampled_from(JSON_FILES), seed=SEED)
def test_senseless_values(name, seed, finished_run, place):
    run = copied(finished_run, place)
    (run / name).write_text(json.dumps(mutated(json.loads((run / name).read_text()), seed)))
    reads(run, contents(run))


@fuzz(5, name=st.sampled_from(LINES), seed=SEED)
def test_senseless_rows(name, seed, finished_run, place):
    run = copied(finished_run, place)
    rows = mutated([json.loads(line) for line in (run / name).read_text().splitlines()], seed)
    (run / name).write_text("".join(json.dumps(row) + "\n" for row in (rows if isinstance(rows, list) else [rows])))
    reads(run, contents(run))


@fuzz(5, name=st.sampled_from([*JSON_FILES, *LINES, "model/tokenizer.json", "report.html", "report.md"]), seed=SEED)
def test_damaged_and_missing_files(name, seed, finished_run, place):
    run = copied(finished_run, place)
    content = damaged((run / name).read_bytes(), seed) if seed % 8 else None
    (run / name).unlink() if content is None else (run / name).write_bytes(content)
    reads(run, contents(run))
