"""The Triton kernels of the scans over images in Triton's interpreter, which needs no GPU, against float64."""

import os

import pytest
import torch

pytest.importorskip("triton")

from kernels.ss2d import fused, ss2d, ss2d_lowrank
from kernels.ss2d.cases import make
from tests.conftest import assert_close
from tests.kernels.conftest import FLOAT32
from tests.kernels.ss2d.test_ss2d import run

pytestmark = pytest.mark.skipif(
    os.environ["TRITON_INTERPRET"] != "1", reason="there is a GPU: test_gpu.py has these cases"
)
# the interpreter takes every program one after another
SMALL = dict(batch=1, channels=2)
CASES = {
    "one place": (ss2d, 1, 1, dict(N=2, **SMALL)),
    "one column": (ss2d, 7, 1, dict(N=3, **SMALL)),
    "many states": (ss2d, 2, 5, dict(N=33, batch=1, channels=1)),
    "many channels": (ss2d, 1, 2, dict(N=1, batch=1, channels=9)),
    "strong decay": (ss2d, 3, 5, dict(N=2, decay=100.0, **SMALL)),
    "two images": (ss2d, 3, 2, dict(N=2, batch=2, channels=2, D=True, bias=True)),
    "low rank, one place": (ss2d_lowrank, 1, 1, dict(N=2, r=1, **SMALL)),
    "low rank, two chunks": (ss2d_lowrank, 3, 7, dict(r=3, **SMALL)),
    "low rank with delta": (ss2d_lowrank, 5, 4, dict(r=2, D=True, bias=True, **SMALL)),
    "low rank, two blocks": (ss2d_lowrank, 2, 3, dict(N=20, r=18, batch=1, channels=17)),
    "low rank, two images": (ss2d_lowrank, 2, 3, dict(r=2, batch=2, channels=2)),
}


def compare(scan, height, width, options):
    y, gradients = run(make(height, width, **options, dtype=torch.float32), "triton", scan)
    wanted, wanted_gradients = run(make(height, width, **options), "reference", scan)
    assert y.dtype == torch.float32
    assert_close(y, wanted, FLOAT32)
    assert_close(gradients, wanted_gradients, FLOAT32, floor=0.01)


@pytest.mark.parametrize("scan, height, width, options", CASES.values(), ids=CASES)
def test_each_case(scan, height, width, options):
    compare(scan, height, width, options)


@pytest.mark.parametrize("name", ["many states", "two images", "low rank, two chunks", "low rank with delta"])
def test_one_program_takes_all_directions(monkeypatch, name):
    """As on a large batch: the outputs of a place are added up in place."""
    monkeypatch.setattr(fused, "PROGRAMS", 1)
    compare(*CASES[name])


@pytest.mark.parametrize("scan, options", [(ss2d, {}), (ss2d_lowrank, dict(r=2))], ids=["ss2d", "ss2d_lowrank"])
def test_any_layout_gives_the_same(scan, options):
    a = make(3, 4, N=2, **options, **SMALL, dtype=torch.float32)
    b = a | {k: a[k].movedim(-3, -1).contiguous().movedim(-1, -3) for k in ("x", "B", "C")}
    (y, gradients), (other, other_gradients) = run(a, "triton", scan), run(b, "triton", scan)
    assert torch.equal(y, other) and all(map(torch.equal, gradients, other_gradients))


@pytest.mark.parametrize("scan, options", [(ss2d, {}), (ss2d_lowrank, dict(r=2))], ids=["ss2d", "ss2d_lowrank"])
def test_float64_is_refused(scan, options):
    with pytest.raises(ValueError, match="cannot run here: it computes in float32; for float64 there are 'chunked'"):
        scan(**make(2, 3, **options), impl="triton")


def test_a_high_rank_is_refused_and_taken_by_another():
    a = make(1, 2, N=33, r=33, channels=1, batch=1, dtype=torch.float32)
    with pytest.raises(ValueError, match="it takes a rank of at most 32, not 33"):
        ss2d_lowrank(**a, impl="triton")
    assert ss2d_lowrank(**a).isfinite().all()
