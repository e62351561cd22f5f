"""The hand-over of a whole run: an exact swap is checked, and one that is not stops the run."""

import json

import pytest
import torch

from convert.mixers.init.hedgehog import Mamba2Start
from convert.models.student import ConvertedForCausalLM
from convert.run import main
from convert.steps import handover
from tests.e2e.conftest import command


@pytest.mark.parametrize(
    "to, settings", [("mla", ["edit.cache_budget=none"]), ("gate-swa", ["edit.window=5000", "edit.keep=none"])]
)
def test_an_exact_start_is_checked(teacher, text, tmp_path, to, settings):
    more = [part for setting in [*settings, "edit.exact=true"] for part in ("--set", setting)]
    assert main(command(teacher, text, tmp_path / "run", *more, to=to)) == 0
    found = json.loads((tmp_path / "run" / "report.json").read_text())["handover"]
    exact, rounded = found["max_abs_logit_float64"], found["max_abs_logit"]
    assert 0 <= (rounded if exact is None else exact) <= found["allowed"] and rounded < 1e-3


def test_a_start_that_is_not_exact_stops_the_run(teacher, text, tmp_path, capsys):
    # half of the cache is not all
    assert main(command(teacher, text, tmp_path / "run", "--set", "edit.exact=true", to="mla")) == 2
    assert "must not change the function" in capsys.readouterr().err


def test_a_hand_over_that_is_not_exact_stops_the_run(teacher, text, tmp_path, monkeypatch, capsys):
    start = Mamba2Start.from_projections.__func__

    def off(cls, projections, options):
        mixer = start(cls, projections, options)
        mixer.block.conv.weight.data[:, 0] = 0.01
        return mixer

    monkeypatch.setattr(Mamba2Start, "from_projections", classmethod(off))
    assert main(command(teacher, text, tmp_path / "run")) == 2
    assert "must not change the function, and it did" in capsys.readouterr().err


def test_float64_decides_where_float32_is_too_coarse(teacher, text, tmp_path, monkeypatch):
    """A student whose rounding alone moves the logits too far passes; the planted error of the test above does not."""
    exactly = handover.largest_change

    def rounded(head, before, after):
        worst, largest = exactly(head, before, after)
        return (worst, largest) if before.dtype == torch.float64 else (1.0, largest)

    monkeypatch.setattr(handover, "largest_change", rounded)
    assert main(command(teacher, text, tmp_path / "run")) == 0
    found = json.loads((tmp_path / "run" / "report.json").read_text())["handover"]
    assert found["max_abs_logit"] == 1.0 and found["max_abs_logit_float64"] < 1e-9


def test_a_hand_over_copies_no_student(teacher, text, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the student was copied")

    monkeypatch.setattr(ConvertedForCausalLM, "__deepcopy__", refuse, raising=False)
    assert main(command(teacher, text, tmp_path / "run")) == 0
