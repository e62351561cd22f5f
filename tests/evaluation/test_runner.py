"""The whole evaluation: its file, its table, going on after a kill, what it refuses; and lm-evaluation-harness beside
it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from convert.evaluate import main
from convert.evaluation import runner as evaluation
from convert.evaluation import scoring
from convert.evaluation.tasks import TASKS
from convert.reports import scores
from tests.evaluation.scripted import Scripted, chatty_tokenizer, knowing

SOME = [TASKS["copying"], TASKS["facts"]]


@pytest.fixture(scope="module")
def tokenizer():
    return chatty_tokenizer()


@pytest.fixture
def models(tokenizer):
    """An oracle, and a student that ranks like it and writes nothing but As."""
    oracle = knowing(tokenizer, [(task, task.items(4, 0)) for task in SOME])
    (a,) = tokenizer("A", add_special_tokens=False)["input_ids"]
    student = Scripted(
        lambda ids, is_writing: (0 if ids[-1] == a else a) if is_writing else oracle(ids), len(tokenizer)
    )
    student.weight.data.fill_(1)  # another fingerprint
    return {"teacher": Scripted(lambda ids, _: oracle(ids), len(tokenizer)), "student": student}


def test_the_table_says_what_likelihood_hides(models, tokenizer):
    found = evaluation.evaluate_tasks(models, tokenizer, SOME, limit=4)
    assert len(found.rows) == 8
    gaps = {(row.task, row.scoring): row.gap for row in found.gaps}
    assert gaps == {
        ("copying", "generation"): 1,
        ("copying", "likelihood"): 0,
        ("facts", "generation"): 0.75,
        ("facts", "likelihood"): 0,
    }
    assert (
        found.row("facts", "student", "generation").stickiness == 1
        and found.row("copying", "student", "generation").first_divergence is not None
    )
    console = Console(width=140, record=True)
    scores.show(found, console)
    text = console.export_text()
    assert "the student is 87.5 points behind by generation, and 0.0 points behind by likelihood" in text
    assert "The student follows the label, not the content, in facts: it predicts A in 100%" in text


def test_a_killed_evaluation_goes_on(models, tokenizer, tmp_path, monkeypatch):
    whole = evaluation.evaluate_tasks(models, tokenizer, SOME, limit=4, file=tmp_path / "whole.jsonl")
    monkeypatch.setattr(scoring, "BATCH_ROWS", 3)  # several batches of a task
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:20])
    generated = []  # rows of each batch
    real = scoring._written
    monkeypatch.setattr(scoring, "_written", lambda *a: generated.append(len(a[3])) or real(*a))
    again = evaluation.evaluate_tasks(models, tokenizer, SOME, limit=4, file=tmp_path / "cut.jsonl")
    assert again == whole
    assert sum(generated) < 2 * (4 + 16) and max(generated) <= 3  # not everything, and in parts
    assert all(json.loads(line) for line in (tmp_path / "cut.jsonl").read_text().splitlines() if line.endswith("}"))
    generated.clear()
    assert (
        evaluation.evaluate_tasks(models, tokenizer, SOME, limit=4, file=tmp_path / "cut.jsonl") == whole
        and not generated
    )


def test_answers_of_other_weights_are_not_taken(models, tokenizer, tmp_path):
    file = tmp_path / "answers.jsonl"
    evaluation.evaluate_tasks(models, tokenizer, SOME, limit=4, file=file)
    oracle = models["teacher"]
    oracle.script = lambda ids, _: 0
    oracle.weight.data.fill_(2)
    found = evaluation.evaluate_tasks({"teacher": oracle}, tokenizer, SOME, limit=4, file=file)
    assert found.row("copying", "teacher", "generation").score == 0


def test_the_command_on_a_teacher_alone(tmp_path, capsys):
    arguments = ["neox-nano", "--limit", "2", "--out", str(tmp_path)]
    assert main([*arguments, "--tasks", "names,keys"]) == 0
    assert main([*arguments, "--tasks", "copying"]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert {(row["task"], row["model"], row["scoring"]) for row in found["rows"]} == {
        (task, "teacher", scoring) for task in ("names", "keys", "copying") for scoring in ("generation", "likelihood")
    }
    assert "by likelihood" in capsys.readouterr().out


def test_a_run_is_evaluated_beside_its_own_teacher_and_under_any_name(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, "neox-nano")  # the teacher's alias
    assert main(["neox-nano", "--tasks", "keys", "--limit", "2"]) == 0
    found = json.loads(Path("neox-nano/evaluation.json").read_text())
    assert found["models"]["teacher"] != found["models"]["student"]
    report = json.loads(Path("neox-nano/report.json").read_text())
    report["settings"]["teacher_fingerprint"] = "of another"
    Path("neox-nano/report.json").write_text(json.dumps(report))
    Path("neox-nano/sha256.json").unlink()  # it would say that the report was edited
    capsys.readouterr()
    assert main(["neox-nano", "--tasks", "keys", "--limit", "2"]) == 2
    assert "has other weights here" in capsys.readouterr().err


REFUSALS = {
    "an unknown task": (["neox-nano", "--tasks", "nams"], "There is no task 'nams'. Nearest: names"),
    "a chat without a template": (["neox-nano", "--tasks", "facts"], "this model has no chat template"),
    "code without consent": (
        ["neox-nano", "--tasks", "keys,humaneval"],
        "a limited process is no sandbox; give --exec",
    ),
    "no examples": (["neox-nano", "--limit", "0"], "limit must be within 1 .. 100,000; got 0"),
    "a folder that is no model": (["tests"], "A teacher's folder holds config.json"),
    "an unknown name": (["nope"], "Unknown teacher 'nope'"),
}


@pytest.mark.parametrize("arguments, words", REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_a_sentence(arguments, words, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_the_file_keeps_the_evaluation_with_the_most_examples(models, tokenizer, tmp_path):
    for limit, n in ((2, 2), (4, 4), (3, 4)):
        evaluation.write(
            evaluation.evaluate_tasks(models, tokenizer, SOME[:1], limit=limit), tmp_path / "evaluation.json"
        )
        found = json.loads((tmp_path / "evaluation.json").read_text())
        assert {row["n"] for row in found["rows"] + found["gaps"]} == {n} and len(found["rows"]) == 4
    evaluation.write(evaluation.evaluate_tasks(models, tokenizer, SOME[1:], limit=1), tmp_path / "evaluation.json")
    assert {row["task"] for row in json.loads((tmp_path / "evaluation.json").read_text())["rows"]} == {
        "copying",
        "facts",
    }


def test_texts_from_disk_are_read_as_texts_are_read_now(models, tokenizer, tmp_path):
    file, task = tmp_path / "answers.jsonl", SOME[0]
    before = evaluation.evaluate_tasks(models, tokenizer, [task], limit=4, file=file)
    deaf = dataclasses.replace(task, parse=lambda text: None)
    after = evaluation.evaluate_tasks(models, tokenizer, [deaf], limit=4, file=file)
    assert [found.row(task.name, "teacher", "generation").unparsable for found in (before, after)] == [0, 1]
