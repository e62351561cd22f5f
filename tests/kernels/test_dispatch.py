"""The choice of an implementation: what "auto" takes, what it prints, and what is refused."""

import pytest
import torch

from kernels import dispatch
from kernels.dispatch import always_available, choose, why_no_triton

IMPLEMENTATIONS = {
    "triton": always_available,
    "cpu": lambda device, dtype: None if device == "cpu" else f"the tensors are on {device}",
    "reference": always_available,
}


@pytest.fixture(autouse=True)
def nothing_printed():
    dispatch._print_once.cache_clear()
    yield
    dispatch._print_once.cache_clear()


@pytest.mark.parametrize("device, expected", [("cpu", "cpu"), ("cuda", "triton")])
def test_auto_takes_the_first_that_runs(device, expected):
    """Triton's interpreter could run on a CPU, but is not chosen."""
    assert choose("scan", "auto", device, torch.float32, IMPLEMENTATIONS) == expected


def test_auto_prints_its_choice_and_the_reasons_once(capsys):
    implementations = {name: IMPLEMENTATIONS[name] for name in ("cpu", "reference")}
    for _ in range(2):
        choose("scan", "auto", "mps", torch.float32, implementations)
    line = "scan runs on this mps by its implementation 'reference', not 'cpu' (the tensors are on mps).\n"
    assert capsys.readouterr().err == line


def test_a_named_implementation_is_taken_silently_or_refused(capsys):
    assert choose("scan", "triton", "cpu", torch.float32, IMPLEMENTATIONS) == "triton"
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="impl='cpu' of scan cannot run here: the tensors are on cuda."):
        choose("scan", "cpu", "cuda", torch.float32, IMPLEMENTATIONS)
    with pytest.raises(ValueError, match="impl is 'auto' or one of 'triton', 'cpu', 'reference'; got 'fast'."):
        choose("scan", "fast", "cuda", torch.float32, IMPLEMENTATIONS)


def test_auto_is_refused_where_nothing_runs():
    with pytest.raises(ValueError, match="impl='auto' of scan cannot run here: the tensors are on cuda."):
        choose("scan", "auto", "cuda", torch.float32, {"cpu": IMPLEMENTATIONS["cpu"]})


@pytest.mark.parametrize(
    "installed, interpreted, device, dtype, reason",
    [
        (True, "0", "cuda", torch.float32, None),
        (True, "1", "cpu", torch.float32, None),
        (True, "0", "cpu", torch.float32, "it needs a GPU"),
        (True, "0", "mps", torch.float32, "the tensors are on mps"),
        (True, "0", "cuda", torch.float64, "it computes in float32"),
        (False, "0", "cuda", torch.float32, "triton is not installed"),
    ],
)
def test_why_no_triton(monkeypatch, installed, interpreted, device, dtype, reason):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    found = why_no_triton(device, dtype)
    assert found is None if reason is None else found.startswith(reason)
