"""The table of ways to scans over places: who learns what, from how many images."""

import pytest

from convert.models.catalog import resolve
from convert.models.vision.loading import load_teacher
from experiments.vit_ss2d import ALONE, AT_ONCE, FORCED, VMAMBA, WAYS, Training, said_of, show, stages_of, student_of


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(resolve("vit-nano")).model


@pytest.mark.parametrize("images", [1000, 12_800])
def test_all_ways_see_as_many_images(images):
    stages = {way: stages_of(way, images, seed=2) for way in WAYS}
    assert all(sum(settings.images for _, settings in each) == images for each in stages.values())
    assert all(settings.seed == 2 and not settings.evaluate_every for each in stages.values() for _, settings in each)
    assert {way: [stage for stage, _ in each] for way, each in stages.items()} == {
        FORCED: ["align", "classify"], AT_ONCE: ["classify"], VMAMBA: ["classify"], ALONE: ["classify"],
    }  # fmt: skip
    assert stages[FORCED][1][1].objective == stages[AT_ONCE][0][1].objective
    assert str(stages[ALONE][0][1].objective) == "cross_entropy"


def test_only_those_that_learn_from_labels_alone_have_nothing_of_the_teacher(teacher):
    head = teacher.classifier.weight
    assert (student_of(AT_ONCE, teacher).host.classifier.weight == head).all()
    assert (student_of(ALONE, teacher).host.classifier.weight != head).any()
    assert student_of(VMAMBA, teacher).config.model_type == "vmamba"


def test_the_table_has_mean_and_spread(teacher, capsys):
    found = {
        Training(way, seed): {
            "way": way, "seed": seed, "accuracy": 0.9 + seed / 100, "seconds": 10.0 + seed,
            "after_align": 0.5 if way == FORCED else None,
        }
        for way in WAYS for seed in range(2)
    }  # fmt: skip
    lines = show(found, teacher, 0.978).splitlines()
    assert len(lines) == 2 + 1 + len(WAYS) and "97.8" in lines[2]
    assert "50.0 ± 0.0 | 90.5 ± 1.0 | 10" in lines[3] and "|  | 90.5 ± 1.0 |" in lines[4]
    assert "teacher-forced" in capsys.readouterr().out
    assert said_of(next(iter(found.values()))) == "SS2D, teacher-forced first: 90.0%"
