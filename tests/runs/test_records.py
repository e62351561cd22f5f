"""A run's folder as a stranger hands it over: whatever is missing, cut or of another type is told by file and key,
before the page is made."""

import json
import random
import shutil
from pathlib import Path

import pytest

from convert.core.errors import UserError
from convert.evaluate import main
from convert.evaluation import tasks
from convert.reports import page
from convert.reports.language import LANGUAGE
from convert.reports.sections import Run
from convert.runs import document, evaluation_schemas, records
from convert.runs.evaluation_schemas import Evaluation
from convert.runs.keys import VERSION
from convert.runs.language_schemas import LanguageReport

FILES = ("report.json", "evaluation.json", "metrics.jsonl", "context.json")
OTHERS = (None, "x", -1, 0, 10**400, 1e308, float("nan"), [], {}, True, "\ud800", [1], {"a": 1}, "")


@pytest.fixture(scope="module")
def folder(finished_run, tmp_path_factory):
    """The files that a page is made of, without their hashes."""
    mine = tmp_path_factory.mktemp("mine")
    for name in FILES[:3]:
        shutil.copy(finished_run / name, mine)
    costs = [
        {"model": model, "length": 1024, "bytes": 9, "formula": 9, "tokens_per_s": 10.0, "time_to_first_token_s": 0.5}
        for model in ("teacher", "student")
    ]
    positions = {"teacher": {"0": 2.0}, "student": {"0": 3.0}}
    found = {"version": VERSION, "costs": costs, "perplexity_by_position": positions}
    (mine / "context.json").write_text(json.dumps(found))
    return mine


def places(found, path=()):
    yield path
    for key in found if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ():
        yield from places(found[key], (*path, key))


def changed(found, path, how):
    """Without what is at the path, or with something else there."""
    found = json.loads(json.dumps(found))
    home = found
    for key in path[:-1]:
        home = home[key]
    if how == "gone":
        del home[path[-1]]
    else:
        home[path[-1]] = how
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_part_that_is_missing_or_of_another_type_is_named_or_does_not_matter(folder, name):
    """Every key of every file, and the page of what is accepted."""
    file, draw = folder / name, random.Random(0)
    whole, refused, rendered = file.read_text(), 0, 0
    rows = [json.loads(line) for line in whole.splitlines()] if name.endswith("l") else [json.loads(whole)]
    paths = [path for path in places(rows[0]) if path]
    try:
        for path in paths:
            for how in ("gone", draw.choice(OTHERS)):
                damaged = [changed(rows[0], path, how), *rows[1:]]
                file.write_text("".join(json.dumps(row) + "\n" for row in damaged))
                try:
                    run = Run.read(folder)
                except UserError as error:
                    refused += 1
                    is_said = "is damaged" in str(error) or path == ("version",)
                    assert str(error).startswith(str(file)) and is_said and "\n" not in str(error)
                    continue
                if rendered < 2 and draw.random() < 0.1:
                    rendered += 1
                    assert "</html>" in page.page([run], LANGUAGE)
    finally:
        file.write_text(whole)
    assert refused > len(paths) / 2 - 15


@pytest.mark.parametrize("rows, key", [("rows", "score"), ("gaps", "gap")])
def test_a_number_outside_its_interval_is_damage_and_rounding_is_none(folder, rows, key):
    found = json.loads((folder / "evaluation.json").read_text())
    row = found[rows][0]
    for low, high in ((row[key] + 1e-3, row[key] + 1), (row[key] - 1, row[key] - 1e-3)):
        damaged = changed(changed(found, (rows, 0, "low"), low), (rows, 0, "high"), high)
        with pytest.raises(UserError, match=rf"^x is damaged: {rows}\.0: {key} is not within low and high\. y$"):
            records.checked(damaged, Evaluation, "x", "y")
    rounded = records.checked(
        changed(changed(found, (rows, 0, "low"), row[key] + 1e-15), (rows, 0, "high"), row[key]),
        Evaluation,
        "x",
        "y",
    )
    row = getattr(rounded, rows)[0]
    assert row.low <= getattr(row, key) <= row.high


def test_the_way_out_names_the_key_and_what_writes_the_file_again(folder):
    found = json.loads((folder / "report.json").read_text())
    for path, how, words in (
        (
            ("perplexity", "ratio"),
            "gone",
            r"report\.json is damaged: perplexity\.ratio is missing\. Repeat the run's convert\.run command",
        ),
        (("kl", "mean_nats"), "low", r"is damaged: kl\.mean_nats should be a valid number"),
        (("cache_bytes", "formula", "teacher", "8192"), "gone", r"is damaged: cache_bytes.*8192 is missing"),
        (("settings", "steps"), [], r"is damaged: settings\.steps: a training step is missing"),
    ):
        with pytest.raises(UserError, match=words):
            records.checked(
                changed(found, path, how), LanguageReport, "report.json", "Repeat the run's convert.run command."
            )


@pytest.mark.parametrize(
    "name, damage",
    [
        ("context.json", "{}]"),
        ("metrics.jsonl", '{"stage": 1}\n'),
        ("evaluation.json", '{"rows": []}'),
        ("report.json", "[]"),
    ],
)
def test_an_evaluation_refuses_a_damaged_folder_before_it_asks(
    finished_run, tmp_path, monkeypatch, capsys, name, damage
):
    mine = tmp_path / "mine"
    shutil.copytree(finished_run, mine)
    monkeypatch.setattr("convert.evaluation.runner.load_teacher", None)
    (mine / name).write_text(damage)
    for _ in range(2):
        assert main([str(mine)]) == 2
        assert name in (said := capsys.readouterr().err) and len(said.splitlines()) == 1
        (mine / "sha256.json").unlink(missing_ok=True)  # the second time by its types


@pytest.mark.parametrize(
    "name", ["model/model.safetensors", "report.json", "evaluation.json", "metrics.jsonl", "answers.jsonl"]
)
def test_a_flipped_bit_in_a_finished_run_is_named_and_its_evaluation_stays(finished_run, tmp_path, capsys, name):
    from convert.generate import main as generate

    mine = tmp_path / "mine"
    shutil.copytree(finished_run, mine)
    content = bytearray((mine / name).read_bytes())
    content[len(content) * 2 // 3] ^= 1
    (mine / name).write_bytes(content)
    before = (mine / "evaluation.json").read_bytes()
    for command in [lambda: main([str(mine), "--tasks", "keys"])] + (
        [lambda: generate([str(mine), "def"])] if "model" in name else []
    ):
        assert command() == 2
        assert f"{mine / name} is not what was written" in capsys.readouterr().err
    assert (mine / "evaluation.json").read_bytes() == before


@pytest.mark.parametrize(
    "name, way_out",
    [
        ("report.json", "Start the run again with --fresh"),
        ("evaluation.json", "Remove it, and evaluate again"),
        ("answers.jsonl", "Remove it: the examples are evaluated again"),
        ("context.json", "Remove it, and measure again"),
    ],
)
def test_a_file_of_an_older_layout_is_told_in_a_sentence(finished_run, folder, tmp_path, name, way_out):
    read = {"report.json": records.report, "evaluation.json": records.evaluation, "context.json": records.context}
    source = folder if name == "context.json" else finished_run
    rows = [json.loads(line) for line in (source / name).read_text().splitlines()] if name == "answers.jsonl" else None
    found = rows[0] if rows else json.loads((source / name).read_text())
    del found["version"]
    (tmp_path / name).write_text(json.dumps(found) + "\n")
    with pytest.raises(UserError) as error:
        if name == "answers.jsonl":
            list(records.rows(tmp_path / name, evaluation_schemas.AnswerRow))
        else:
            read[name](tmp_path)
    said = str(error.value)
    assert said.startswith(f"{tmp_path / name} was written by another version of this project (its layout is 1, and")
    assert way_out in said and "\n" not in said


def test_the_document_of_the_keys_is_up_to_date():
    """Every key that a run writes is in it."""
    file = Path(document.__file__).parents[2] / "docs" / "REPORT.md"
    assert file.read_text(encoding="utf-8") == document.document(), "python -m convert.runs.document > docs/REPORT.md"


def test_what_a_run_writes_is_documented(finished_run):
    said = (Path(document.__file__).parents[2] / "docs" / "REPORT.md").read_text(encoding="utf-8")
    for name in ("report.json", "evaluation.json", "metrics.jsonl", "generations.jsonl", "answers.jsonl"):
        part = said.split(f"## {name}\n")[1].split("\n## ")[0]
        first = (finished_run / name).read_text().splitlines()[0] if name.endswith("l") else None
        found = json.loads(first or (finished_run / name).read_text())
        layers = {key for key in found if key.startswith(("weights/layer_", "gradients/layer_"))}
        assert not [key for key in found.keys() - layers if f"| `{key}` |" not in part], name


def test_letters_are_those_of_the_tasks():
    assert evaluation_schemas.LETTERS == tasks.LETTERS
