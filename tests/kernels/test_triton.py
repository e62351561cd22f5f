"""The Triton kernels in Triton's interpreter, which needs no GPU: forward and gradients against float64."""

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kernels.chunk_scan import cases as chunk_cases
from kernels.chunk_scan import chunk_scan, fused
from kernels.selective_scan import cases as selective_cases
from kernels.selective_scan import selective_scan, selective_state_update
from tests.conftest import assert_close
from tests.kernels.conftest import BFLOAT16, FLOAT32, run

SCANS = {"selective_scan": (selective_scan, selective_cases.make), "chunk_scan": (chunk_scan, chunk_cases.make)}
pytestmark = pytest.mark.skipif(
    os.environ["TRITON_INTERPRET"] != "1", reason="there is a GPU: test_gpu.py has these cases"
)
CASES = [
    pytest.param(name, options, id=f"{name}-{case}")
    for name, cases in (("selective_scan", selective_cases.CASES), ("chunk_scan", chunk_cases.CASES))
    for case, options in cases.items()
]


def compare(
    name: str, length: int, dtype: torch.dtype = torch.float32, tolerance: float = FLOAT32, **options: Any
) -> None:
    scan, make = SCANS[name]
    expected, expected_gradients = run(scan, make(length, **options), "reference")
    outputs, gradients = run(scan, make(length, **options, dtype=dtype), "triton")
    assert_close(outputs, expected, tolerance)
    # one normalized step: nearly 0
    assert_close(gradients, expected_gradients, tolerance, floor=0.1 if length == 1 else 0.0)


@pytest.mark.parametrize("length", [1, 63])
@pytest.mark.parametrize("name, options", CASES)
def test_every_case(name, options, length):
    compare(name, length, **options)


# the interpreter's associative scan is a loop over elements
LEAST = {
    "selective_scan": dict(channels=2),
    "chunk_scan": {},
}


@pytest.mark.parametrize("name, length", [("selective_scan", 9), ("chunk_scan", 70)])
@pytest.mark.parametrize("N", [16, 70])
def test_states_in_several_blocks(name, length, N):
    """70 states are two blocks of 64, the second hardly used; the last chunk is not full."""
    compare(name, length, N=N, normalize=True, documents=True, state=True, **LEAST[name])


@pytest.mark.parametrize("case", ["groups", "queries"])
def test_a_program_adds_up_all_heads_of_a_group(monkeypatch, case):
    monkeypatch.setattr(fused, "PROGRAMS", 1)
    compare("chunk_scan", 40, **chunk_cases.CASES[case])


def test_a_program_adds_up_two_heads_of_three(monkeypatch):
    """Two batch entries of two chunks are four programs; a fifth makes two slices of each, of two heads and of one."""
    monkeypatch.setattr(fused, "PROGRAMS", 5)
    single, double = (
        a | dict(x=a["x"][:, :, :3], dt=a["dt"][:, :, :3], A=a["A"][:3])
        for a in (chunk_cases.make(40, dtype=dtype) for dtype in (torch.float32, torch.float64))
    )
    found, expected = run(chunk_scan, single, "triton"), run(chunk_scan, double, "reference")
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted, FLOAT32)


@pytest.mark.parametrize(
    "name, length", [("selective_scan", 127), ("selective_scan", 500), ("chunk_scan", 127), ("chunk_scan", 300)]
)
def test_many_chunks(name, length):
    compare(name, length, N=3, normalize=True, documents=name == "chunk_scan" or length < 500, **LEAST[name])


def test_channels_in_several_blocks():
    """A backward program adds up 64 channels of a group, which has 70."""
    compare("selective_scan", 3, channels=70, N=2, R=2, normalize=True)


@pytest.mark.parametrize("name", SCANS)
def test_bfloat16(name):
    compare(name, 63, dtype=torch.bfloat16, tolerance=BFLOAT16)


@pytest.mark.parametrize("name", SCANS)
def test_bfloat16_with_a_denominator(name):
    compare(name, 63, dtype=torch.bfloat16, tolerance=BFLOAT16, normalize=True)


@pytest.mark.parametrize("name", SCANS)
def test_a_perturbed_decay_shows(name):
    scan, make = SCANS[name]
    a = make(63, dtype=torch.float32)
    y = scan(**a, impl="triton")
    with pytest.raises(AssertionError):
        assert_close(scan(**a | dict(A=a["A"] * 1.001), impl="triton"), y, FLOAT32)


@pytest.mark.parametrize("options", selective_cases.UPDATE_CASES.values(), ids=selective_cases.UPDATE_CASES)
def test_state_update(options):
    a, single = selective_cases.make_update(**options), selective_cases.make_update(**options, dtype=torch.float32)
    assert_close(
        selective_state_update(**single, impl="triton"), selective_state_update(**a, impl="reference"), FLOAT32
    )
    assert_close(single["state"], a["state"], FLOAT32)


def test_a_small_step_through_softplus_is_not_rounded_away():
    a = selective_cases.make_update(dtype=torch.float32)
    a["dt"] = torch.linspace(-20, 25, a["dt"].numel()).view_as(a["dt"])
    wanted = selective_state_update(
        **{k: v.double() if k != "dt_softplus" else v for k, v in a.items()}, impl="reference"
    )
    assert_close(selective_state_update(**a, impl="triton"), wanted, FLOAT32)


@pytest.mark.parametrize("name", SCANS)
def test_float64_is_refused(name):
    scan, make = SCANS[name]
    with pytest.raises(
        ValueError, match="cannot run here: it computes in float32; for float64 there are 'chunked' and 'reference'"
    ):
        scan(**make(8), impl="triton")
