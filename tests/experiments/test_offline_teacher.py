"""Students of a teacher and of its recordings: a line of results each, and their table."""

import pytest

from convert.core import json_lines
from experiments import offline_teacher
from experiments.offline_teacher import Bench, Row, results_of, show


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CONVERT_CACHE", str(tmp_path / "cache"))


def test_students_see_the_same_and_learn_from_what_was_kept(finished_run, tmp_path, monkeypatch):
    bench = Bench("neox-nano", "linear", finished_run, 512, 0)
    bench.held_out = bench.held_out[:1]
    rows = Row(), Row(64), Row(4, 8)
    lines = [bench.train(row, tmp_path / row.name) for row in rows]
    json_lines.append(tmp_path / "results.jsonl", lines)
    found = results_of(tmp_path / "results.jsonl")
    assert list(found) == [(row, 0) for row in rows]
    assert len({line["perplexity_teacher"] for line in lines}) == 1  # which came back
    assert len({line["perplexity_student"] for line in lines}) == 3
    assert lines[1]["perplexity_student"] == pytest.approx(lines[0]["perplexity_student"], rel=0.05)
    assert lines[1]["bytes"] > 512 * 250 and "bytes" not in lines[0]
    monkeypatch.setattr(offline_teacher, "ROWS", rows)
    table = show(list(found.values()))
    assert [line.split(" | ")[0] for line in table[2:]] == ["| the teacher", "| top 64", "| top 4 + 8 drawn"]
    assert all(line.count("|") == table[0].count("|") for line in table)
