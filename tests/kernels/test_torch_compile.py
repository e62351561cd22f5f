"""torch.compile traces the Triton kernels and all around them as one graph; no GPU is needed for tracing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
TRACE = """
import torch
import torch.utils._triton
torch.utils._triton.has_triton = lambda *device: True  # else kernels are not looked for where there is no GPU
from kernels.chunk_scan.fused import chunk_scan_triton
from kernels.selective_scan.fused import selective_scan_triton, update_triton
from kernels.ss2d.fused import ss2d_lowrank_triton, ss2d_triton

def traced(graph, _):
    nodes = [node for part in graph.modules() if hasattr(part, "graph") for node in part.graph.nodes]
    print(name, sum("triton_kernel_wrapper" in str(node.target) for node in nodes))
    return lambda *arguments: [torch.zeros(())] * 10  # nothing runs

r = torch.randn
selective = r(1, 2, 8), r(1, 2, 8), r(2, 4), r(1, 1, 4, 8), r(1, 1, 4, 8), r(1, 1, 2, 4)
chunk = r(1, 8, 2, 16), r(1, 8, 2), r(1, 8, 2, 16), r(1, 8, 2, 1, 16), r(1, 2, 16, 16)
update = r(1, 2, 8, 16), r(1, 2, 8), r(1, 2, 8), r(2, 8, 16), r(1, 1, 16), r(1, 1, 16), None, None, None, True
places = r(1, 4, 2, 3, 5), r(1, 4, 2, 3, 5)
image = r(1, 2, 3, 5), r(1, 4, 2, 3, 5), r(4, 2, 2), *places
lowrank = r(1, 2, 3, 5), None, r(4, 2, 1), r(4, 1), r(4, 2, 1), *places
CALLS = {
    "selective_scan": (selective_scan_triton, selective, (False, True)),
    "chunk_scan": (chunk_scan_triton, chunk, (False, True)),
    "ss2d": (ss2d_triton, image, (False, True)),
    "ss2d_lowrank": (ss2d_lowrank_triton, lowrank, (False, True)),
    "update": (update_triton, update, (False,)),
}
for name, (call, arguments, modes) in CALLS.items():
    for gradients in modes:
        torch._dynamo.reset()
        leaves = [t.requires_grad_(gradients) if isinstance(t, torch.Tensor) else t for t in arguments]
        torch.compile(call, fullgraph=True, backend=traced)(*leaves)
"""


def test_the_real_kernels_are_in_one_graph():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRACE], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.split() for line in done.stdout.splitlines()]
    names = "selective_scan", "chunk_scan", "ss2d", "ss2d_lowrank"
    assert [name for name, _ in found] == [name for name in names for _ in range(2)] + ["update"]
    assert all(int(kernels) > 0 for _, kernels in found), found
