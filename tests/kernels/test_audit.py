"""The audit of the Triton kernels: ours pass on every target, and kernels with each kind of fault do not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from kernels.gpu_specs import GPU_SPECS
from kernels.triton_stats import Resources, faults

ROOT = Path(__file__).resolve().parents[2]
# it compiles, so it needs a process
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}

BAD = """
import json, torch, triton, triton.language as tl
from kernels.audit import audit

@triton.jit
def spilling(x, SIZE: tl.constexpr):
    values = tl.load(x + tl.arange(0, SIZE))
    tl.store(x + tl.arange(0, SIZE), values - tl.sum(values, 0))

@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left, right = tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(left, right))

tune = triton.autotune([triton.Config({}, num_warps=1), triton.Config({}, num_warps=4)], key=["SIZE"])
tuned = tune(spilling)

def multiply(M, N, K):
    dtype = torch.bfloat16
    product[(1,)](torch.empty(M, K, dtype=dtype), torch.empty(K, N, dtype=dtype), torch.empty(M, N), M=M, N=N, K=K)

cases = {
    "spilling sm_90": (lambda: tuned[(1,)](torch.empty(1 << 14), SIZE=1 << 14), "sm_90"),
    "spilling gfx942": (lambda: tuned[(1,)](torch.empty(1 << 15), SIZE=1 << 15), "gfx942"),
    "shared sm_90": (lambda: multiply(128, 128, 512), "sm_90"),
    "shared gfx942": (lambda: multiply(256, 256, 256), "gfx942"),
    "small gfx942": (lambda: multiply(4, 4, 16), "gfx942"),
    "good sm_90": (lambda: multiply(64, 64, 64), "sm_90"),
    "good gfx942": (lambda: multiply(64, 64, 64), "gfx942"),
    "wrong gfx942": (lambda: multiply(5, 4, 16), "gfx942"),
}
found = {name: audit(call, name, target) for name, (call, target) in cases.items()}
print(json.dumps({name: [(row.faults, row.bytes, row.operations) for row in rows] for name, rows in found.items()}))
"""


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )


def test_these_kernels_pass(tmp_path):
    names = "selective_scan N=16 training=False", "selective_state_update N=16", "chunk_scan N=128 G=1 bf16"
    done = run("-m", "kernels.audit", *names, "--targets", "sm_90,gfx942", "--json", str(tmp_path / "audit.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "audit.json").read_text())
    assert {(row["case"], row["target"]) for row in rows} == {
        (name, target) for name in names for target in ("sm_90", "gfx942")
    }
    assert len(rows) < 50  # more take too long here
    assert all(row["resources"]["registers"] > 0 and row["bytes"] > 0 and row["seconds"] > 0 for row in rows)
    assert all(row["resources"]["matrix"] > 0 for row in rows if "bf16" in row["case"])
    assert max(len(line) for line in done.stdout.splitlines()) <= 140


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    file = tmp_path_factory.mktemp("audit") / "bad.py"
    file.write_text(BAD)
    done = run(str(file))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "name, words",
    [
        ("spilling sm_90", "spills"),
        ("spilling sm_90", "bytes of stack"),
        ("spilling gfx942", "spills"),
        ("spilling gfx942", "bytes of stack"),
        ("shared sm_90", "takes 262144 bytes of shared memory, 232448 is the most"),
        ("shared gfx942", "takes 131072 bytes of shared memory, 65536 is the most"),
        ("small gfx942", "1 products of 16 bits or tf32 and no matrix instruction"),
        ("wrong gfx942", "does not compile"),
    ],
)
def test_a_fault_is_found(bad, name, words):
    faults, _, _ = bad[name][0]
    assert any(words in fault for fault in faults), faults


@pytest.mark.parametrize(
    "target, registers, spills, stack, count",
    [
        ("sm_90", 168, 16, 24, 0),  # a choice of ptxas, which changes from version to version
        ("sm_90", 168, 20, 24, 2),
        ("sm_90", 168, 0, 32, 1),
        ("sm_90", 255, 4, 8, 2),
        ("gfx942", 168, 4, 8, 2),
    ],
)
def test_a_small_spill_is_a_fault_where_registers_ran_out(target, registers, spills, stack, count):
    found = Resources(registers, spills, stack, shared=0, matrix=0, products=0)
    assert len(faults(found, GPU_SPECS[target])) == count


def test_only_the_configuration_that_spills_is_at_fault(bad):
    (one_warp, *_), (four_warps, *_) = bad["spilling gfx942"]
    assert one_warp and not four_warps


@pytest.mark.parametrize("name", ["good sm_90", "good gfx942"])
def test_bytes_and_operations(bad, name):
    ((faults, size, operations),) = bad[name]
    assert not faults
    assert size == 64 * 64 * (2 + 2 + 4)
    assert operations == {"float32": 0, "exp": 0, "tf32": 0, "bf16": 2 * 64**3}


def test_in_the_interpreter_it_says_why_not():
    done = subprocess.run(
        [sys.executable, "-m", "kernels.audit"],
        cwd=ROOT,
        env=ENVIRONMENT | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set, so there is nothing to compile; unset it." in done.stderr
