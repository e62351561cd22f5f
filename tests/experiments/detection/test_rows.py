"""The rows of the table of detectors: in which order they are trained, what they start from, and what is told."""

import numpy as np
import pytest
import torch

from convert.data.image_sets import image_set
from convert.data.images import read_images
from convert.models.vision.features import staged
from convert.objectives import Objective
from experiments import multispectral_detection as command
from experiments.detection.scenes import compose
from experiments.detection.training import BATCH, found_by, train
from experiments.multispectral_detection import ALL, FULL, NAMES, ROWS, Training, detector_of, rows_of, show, waves


@pytest.fixture(scope="module")
def scenes():
    data = read_images(image_set("digits"))
    return compose([data.train], data.class_names, BATCH, seed=1)


def test_a_row_comes_after_the_one_that_it_starts_from():
    order = [row.name for wave in waves() for row in wave]
    assert sorted(order) == sorted(NAMES) and len(waves()) == 3
    for row in ROWS:
        assert not row.teacher or order.index(row.teacher) < order.index(row.name)


def test_a_student_of_half_the_rank_learns_from_the_detector_that_it_starts_from(scenes):
    torch.manual_seed(0)
    teacher = detector_of(NAMES[FULL], 10, None).eval()
    row = NAMES["low rank 0.50, distilled"]
    student = detector_of(row, 10, teacher)
    parameters = [sum(p.numel() for p in each.backbone.parameters()) for each in (student, teacher)]
    assert 0.4 < parameters[0] / parameters[1] < 0.75
    shared = [name for name in teacher.state_dict() if name.startswith(("head", "laterals", "stems", "fuse"))]
    assert len(shared) > 10
    assert all(teacher.state_dict()[name].equal(student.state_dict()[name]) for name in shared)
    live, bands = Objective.of(ALL).build(student.backbone, teacher.backbone, staged), scenes.bands(range(BATCH))

    def distance() -> float:
        with torch.no_grad():
            ours, theirs = (each.look(bands, scans=True) for each in (student, teacher))
            return live.on_stages(ours, theirs, ours.logits, 1.0).item()

    before = distance()
    train(student, teacher, row.terms, scenes, 4 * BATCH, seed=0)
    assert distance() < 0.9 * before and len(found_by(student, scenes)) == BATCH
    tuned = detector_of(NAMES["low rank 0.50, distilled, then tuned"], 10, student)
    assert tuned.state_dict().keys() == student.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), student.parameters(), strict=True))


def test_the_table_tells_mean_and_spread(capsys):
    found = {
        Training(row.name, seed): {"map50": 0.5 + seed / 10, "parameters": 1000} for row in ROWS for seed in (0, 1)
    }
    cost = {"bytes": 4000.0, "ms": 1.0, "map50": 0.5, "int8_bytes": 1000.0, "int8_ms": 0.5, "int8_map50": 0.4}
    text = show(rows_of(found, {row.name: cost for row in ROWS}))
    assert text.count("| 55.0 ± 10.0 |") == len(ROWS) and "mean and spread" in capsys.readouterr().out


def test_a_step_sees_all_images_before_any_comes_round():
    count = 3 * BATCH
    seen = np.concatenate([command_rows(count, step) for step in range(3)])
    assert sorted(seen) == list(range(count)) and command_rows(count, 0) != command_rows(count, 3)


def command_rows(count, step):
    from experiments.detection import training

    return training._rows(count, step, seed=0)


def test_missing_packages_are_a_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    with pytest.raises(command.UserError, match="pycocotools"):
        command.precision.check_installed()
