"""Plans of runs whose student learns from a recording of its teacher."""

import numpy as np
import pytest

from convert import recipes
from convert.data.recorded import Recording
from convert.domains.language import Language
from convert.models.catalog import resolve
from convert.models.loading import read_config
from convert.planning.plan import make_plan
from convert.recipes.overrides import with_setting
from convert.steps import recorded

CONFIG = read_config(resolve("neox-nano"))


def recipe(target="mamba2"):
    return recipes.TARGETS[target].recipe(recipes.budget("neox-nano", CONFIG))


def plan(recipe):
    return make_plan(Language(), "neox-nano", CONFIG, recipe, "stdlib", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recording of nothing for the default batches of neox-nano."""
    folder = tmp_path_factory.mktemp("recordings") / "a"
    _, settings = recorded.step_to_record(recipe().steps, "distill")
    recording = Recording(
        folder, recorded.about({}, settings, {"vocab_size": CONFIG.vocab_size, "top_k": 2, "sample": 0})
    )
    recording.begin()
    for number, steps in enumerate(recording.parts()):
        recording.write(number, [np.zeros(0, recording.record) for _ in steps])
    recording.finish()
    return folder


@pytest.mark.parametrize("target", ["mamba2", "mla", "hybrid-kda"])
def test_a_step_without_a_teacher_costs_less(target, folder):
    """One recording fits every target whose batches are the same."""
    online = plan(recipe(target))
    offline = plan(with_setting(recipe(target), f"distill.teacher=cache:{folder}"))
    assert not online.refusals and not offline.refusals
    for before, after in zip(online.steps, offline.steps, strict=True):
        if after.name == "distill":
            assert before.peak_bytes - after.peak_bytes == 4 * online.parameters_teacher
            assert after.seconds < before.seconds and after.is_without_teacher
            assert f"from what was recorded in {folder}, without the teacher in memory" in after.what
        else:
            assert before == after and not after.is_without_teacher


def test_a_recording_of_other_batches_is_refused(folder):
    settings = (f"distill.teacher=cache:{folder}", "distill.noise=0", "distill.cross_entropy=0.1")
    changed = recipe()
    for setting in settings:
        changed = with_setting(changed, setting)
    (reason,) = plan(changed).refusals
    assert reason.startswith(f"Step distill: {folder} is a recording of something else (noise: recorded 0.1, now 0.0).")
    (reason,) = plan(with_setting(recipe("scratch"), f"distill.teacher=cache:{folder}")).refusals[:1]
    assert "its objective cannot be hidden_projection, which compares layer outputs" in reason
