"""What "auto" takes on a GPU after a bench: the faster implementation of that card and of those versions."""

import pytest
import torch

from kernels import bench, dispatch, measured
from kernels.bench_case import BY_IMPL, OURS
from kernels.dispatch import always_available, choose

IMPLEMENTATIONS = {"triton": always_available, "reference": always_available, "mamba_ssm": always_available}


@pytest.fixture(autouse=True)
def card(monkeypatch, tmp_path):
    """A card of a name that tests can change, and an empty cache."""
    card = ["Card A"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card[0])
    monkeypatch.setenv("CONVERT_KERNELS", str(tmp_path / "kernels"))
    for cached in (measured._here, measured._choices, dispatch._print_once):
        cached.cache_clear()
    yield card
    for cached in (measured._here, measured._choices, dispatch._print_once):
        cached.cache_clear()


def taken(operator: str = "scan", device: str = "cuda", **others) -> str:
    return choose(operator, "auto", device, torch.float32, IMPLEMENTATIONS | others)


def test_ours_until_one_was_measured(card):
    assert taken() == "triton"
    measured.keep_fastest("scan", "mamba_ssm")
    assert taken() == "mamba_ssm" and taken("another") == "triton"
    assert taken(device="cpu") == "reference"
    measured.keep_fastest("scan", "triton")
    assert taken() == "triton"


def test_a_choice_is_that_of_its_card_and_versions(card, monkeypatch):
    measured.keep_fastest("scan", "mamba_ssm")
    card[0] = "Card B"
    measured._here.cache_clear()
    assert taken() == "triton"
    measured.keep_fastest("scan", "reference")
    assert taken() == "reference"
    card[0] = "Card A"
    measured._here.cache_clear()
    assert taken() == "mamba_ssm"
    monkeypatch.setattr(measured, "_version", lambda _: "another")
    measured._here.cache_clear()
    assert taken() == "triton"


def test_a_call_that_the_fastest_cannot_do_is_ours(capsys):
    measured.keep_fastest("scan", "mamba_ssm")
    assert taken(mamba_ssm=lambda device, dtype: "it has no denominator") == "triton"
    assert "not 'mamba_ssm' (it has no denominator)" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}', "{"])
def test_a_damaged_file_is_no_measurement(content):
    measured.keep_fastest("scan", "mamba_ssm")
    measured._file().write_text(content)
    measured._choices.cache_clear()
    assert taken() == "triton"
    measured.keep_fastest("scan", "mamba_ssm")
    assert taken() == "mamba_ssm"


@pytest.mark.parametrize(
    "ours, theirs, expected",
    [
        ({"time_s": 2.0, "error": 1e-6}, {"time_s": 1.0, "error": 1e-6}, "mamba_ssm"),
        ({"time_s": 1.0, "error": 1e-6}, {"time_s": 2.0, "error": 1e-6}, OURS),
        ({"time_s": 2.0, "error": 1e-6}, {"time_s": 1.0, "error": 2e-3}, OURS),  # tf32
        ({"time_s": 2.0, "error": 1e-6}, {"error": 0.5}, OURS),
        ({"time_s": 2.0, "error": 1e-6}, {"failed": "no such module"}, OURS),
        ({"failed": "out of memory"}, {"time_s": 1.0, "error": 1e-6}, None),
        ({"time_s": 2.0, "error": 1e-6}, None, None),
    ],
)
def test_the_bench_chooses_among_exact_implementations(ours, theirs, expected):
    rows = [{"implementation": "ours"} | ours, {"implementation": "mamba-ssm", "time_s": 0.1, "error": 1e-6}]
    rows += [{"implementation": BY_IMPL} | theirs] if theirs is not None else []
    assert bench.faster(rows) == expected
