"""The comparison of distillations between architectures: what is trained, kept and told."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import one_for_all
from experiments.one_for_all import MODELS, Training, by_seed, results_of, show, trainings


def test_each_pair_has_each_method_and_each_student_learns_without_a_teacher():
    wanted = list(trainings([0.1, 1.0], 2, list(one_for_all.METHODS)))
    assert len(wanted) == len(set(wanted)) == 2 * 2 * (3 + 9 * 4)
    assert all((training.teacher == "") == (training.method == "scratch") for training in wanted)
    assert {training.seed for training in wanted[: len(wanted) // 2]} == {0}


def rows(accuracies: dict[str, float]) -> dict[Training, np.ndarray]:
    """Two seeds of every pair, whose accuracy depends on the method alone."""
    draw = np.random.default_rng(0)
    return {each: draw.random(400) < accuracies[each.method] for each in trainings([1.0], 2, list(accuracies))}


@pytest.mark.parametrize("best, good", [("OFA", 9), ("DIST", 0)])
def test_the_table_says_in_how_many_pairs_one_for_all_is_not_surely_worse(best, good):
    found = rows({"scratch": 0.6, "DIST": 0.7, "OFA": 0.7} | {best: 0.9})
    lines = show(found, 1.0)
    assert f"OFA is best, or not surely worse than the best, in {good} of 9 pairs." in lines
    assert len(lines) == 4 + 9 + 3 and by_seed(found, MODELS[0], MODELS[1], "OFA", 1.0).shape == (2, 400)


def test_ctrl_c_ends_it_and_what_was_trained_is_not_trained_again(tmp_path, monkeypatch):
    options = "--images 128 --labels 1 --seeds 1 --jobs 1 --methods scratch --out".split()
    command = [sys.executable, "-m", "experiments.one_for_all", *options, str(tmp_path)]
    file, started = tmp_path / "results.jsonl", time.monotonic()
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not file.exists() and time.monotonic() < started + 120:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=60)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert running.returncode == 130 and b"Traceback" not in said and len(lines) < 3
    with file.open("a", encoding="utf-8") as results:
        results.write('{"teacher": "", "stu')  # as a kill in the middle of a line leaves it
    monkeypatch.setattr("sys.argv", command[2:])
    one_for_all.main()
    after = file.read_text(encoding="utf-8").splitlines()
    assert after[: len(lines)] == lines and len(results_of(file)) == len(after) == 3
    assert all(len(json.loads(line)["right"]) == 500 for line in after) and (tmp_path / "table.md").exists()
