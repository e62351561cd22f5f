"""The compiled operators in torch's own machinery: a saved program in a new process, and forward-mode gradients."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

from kernels.chunk_scan import cases as chunk_cases
from kernels.chunk_scan import chunk_scan
from kernels.delta_rule import cases as rule_cases
from kernels.delta_rule import kda
from kernels.selective_scan import cases as selective_cases
from kernels.selective_scan import selective_scan, selective_state_update
from kernels.ss2d import cases as image_cases
from kernels.ss2d import ss2d, ss2d_lowrank
from tests.conftest import assert_close
from tests.kernels.conftest import needs_compiler


def delta_rule(**arguments):
    return kda(**arguments)[0]


OPERATORS = {
    "selective_scan": (selective_scan, lambda: selective_cases.make(8, dtype=torch.float32)),
    "chunk_scan": (chunk_scan, lambda: chunk_cases.make(8, dtype=torch.float32)),
    "delta_rule": (delta_rule, lambda: rule_cases.make(8, dtype=torch.float32)),
    "ss2d": (ss2d, lambda: image_cases.make(3, 5, dtype=torch.float32)),
    "ss2d_lowrank": (ss2d_lowrank, lambda: image_cases.make(3, 5, r=2, dtype=torch.float32)),
    "selective_state_update": (selective_state_update, lambda: selective_cases.make_update(dtype=torch.float32)),
}
LOAD = """
import sys, torch
from pathlib import Path
import kernels.chunk_scan, kernels.delta_rule, kernels.selective_scan, kernels.ss2d
for folder in map(Path, sys.argv[1:]):
    arguments, y = torch.load(folder / "expected.pt")
    found = torch.export.load(folder / "model.pt2").module()(*arguments)
    assert torch.equal(found, y), (folder, (found - y).abs().max())
"""


@needs_compiler
def test_saved_programs_run_in_a_new_process(tmp_path):
    """Each runs before its operator was used in that process, which is when it compiles."""
    folders = [tmp_path / name for name in OPERATORS]
    for folder, (operator, make) in zip(folders, OPERATORS.values(), strict=True):
        folder.mkdir()
        save(folder, operator, make())
    done = subprocess.run([sys.executable, "-c", LOAD, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def save(folder, operator, a) -> None:
    """Write a program of one call, its arguments, and what it gives."""
    tensors, options = (
        {k: v for k, v in a.items() if isinstance(v, torch.Tensor) is is_tensor} for is_tensor in (True, False)
    )

    class Model(torch.nn.Module):
        def forward(self, *arguments):
            return operator(**dict(zip(tensors, arguments, strict=True)), **options, impl="cpu")

    arguments = tuple(t.clone() for t in tensors.values())
    with torch.no_grad():
        torch.export.save(torch.export.export(Model(), arguments), folder / "model.pt2")
        torch.save((arguments, Model()(*(t.clone() for t in arguments))), folder / "expected.pt")


@needs_compiler
@pytest.mark.parametrize(
    "name, lengths",
    [
        ("selective_scan", dict(u=2, delta=2, B=3, C=3)),
        ("chunk_scan", dict(x=1, dt=1, B=1, C=1)),
        ("delta_rule", dict(q=1, k=1, v=1, g=1, beta=1)),
        ("ss2d", dict(x=2, delta=3, B=3, C=3)),
        ("ss2d_lowrank", dict(x=2, B=3, C=3)),
    ],
)
def test_an_export_takes_any_length(name, lengths):
    """The length is not bound by the sizes that kernels/allocator.py distinguishes."""
    scan, make = OPERATORS[name]
    tensors = {k: v for k, v in make().items() if isinstance(v, torch.Tensor)}

    class Model(torch.nn.Module):
        def forward(self, *arguments):
            return scan(**dict(zip(tensors, arguments, strict=True)), impl="cpu")

    shapes = tuple({lengths[k]: torch.export.Dim("L", min=2, max=1 << 24)} if k in lengths else None for k in tensors)
    program = torch.export.export(Model(), tuple(tensors.values()), dynamic_shapes=(shapes,)).module()
    longer = {k: v.repeat_interleave(5, lengths[k]) if k in lengths else v for k, v in tensors.items()}
    assert_close(program(*longer.values()), scan(**longer, impl="cpu"), 1e-6)


@needs_compiler
@pytest.mark.parametrize(
    "name, value",
    [("selective_scan", "u"), ("chunk_scan", "x"), ("delta_rule", "v"), ("ss2d", "x"), ("ss2d_lowrank", "x")],
)
def test_forward_mode_is_refused_where_it_would_be_zero(name, value):
    scan, make = OPERATORS[name]
    a = make()
    direction = torch.randn_like(a[value])
    with forward_ad.dual_level():
        moved = a | {value: forward_ad.make_dual(a[value], direction)}
        with pytest.raises(
            RuntimeError, match=f"The compiled {name} has no forward-mode gradients; impl='reference' has."
        ):
            scan(**moved, impl="cpu")
        tangent = forward_ad.unpack_dual(scan(**moved, impl="reference")).tangent
    assert_close(tangent, scan(**a | {value: direction}, impl="reference"), 1e-5)  # it is linear in its values
