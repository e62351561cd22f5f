"""The kernels for GPUs on a real one, on the cases of the other tests; they are skipped where there is none."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.chunk_scan import cases as chunk_cases
from kernels.chunk_scan import chunk_scan
from kernels.delta_rule import cases as rule_cases
from kernels.delta_rule import gated_delta_rule, kda
from kernels.delta_rule.fla import why_no_fla
from kernels.mamba_ssm import why_no_mamba_ssm
from kernels.selective_scan import cases as selective_cases
from kernels.selective_scan import selective_scan, selective_state_update
from kernels.ss2d import cases as image_cases
from kernels.ss2d import ss2d, ss2d_lowrank
from tests.conftest import assert_close
from tests.kernels.conftest import BFLOAT16, FLOAT32, run
from tests.kernels.ss2d.test_ss2d import run as run_image

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
needs_fla = pytest.mark.skipif(
    importlib.util.find_spec("fla") is None, reason="flash-linear-attention is not installed"
)

SCANS = {"selective_scan": (selective_scan, selective_cases.make), "chunk_scan": (chunk_scan, chunk_cases.make)}
CASES = [
    pytest.param(name, options, id=f"{name}-{case}")
    for name, cases in (("selective_scan", selective_cases.CASES), ("chunk_scan", chunk_cases.CASES))
    for case, options in cases.items()
]


def on_gpu(v: Any) -> Any:
    return tuple(on_gpu(item) for item in v) if isinstance(v, tuple) else v.cuda() if isinstance(v, Tensor) else v


def compare(
    name: str, length: int, dtype: torch.dtype = torch.float32, tolerance: float = FLOAT32, **options: Any
) -> None:
    scan, make = SCANS[name]
    expected, expected_gradients = run(scan, make(length, **options), "reference")
    outputs, gradients = run(scan, {k: on_gpu(v) for k, v in make(length, **options, dtype=dtype).items()}, "triton")
    assert_close([o.cpu() for o in outputs], expected, tolerance)
    assert_close([g.cpu() for g in gradients], expected_gradients, tolerance, floor=0.1 if length == 1 else 0.0)


@pytest.mark.parametrize("length", [1, 63, 127, 1000])
@pytest.mark.parametrize("name, options", CASES)
def test_every_case(name, options, length):
    compare(name, length, **options)


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("N", [16, 70, 512, 1000])
def test_states_in_several_blocks(name, N):
    compare(name, 127, N=N, G=2, normalize=True, documents=True, state=True)


@pytest.mark.parametrize("name", SCANS)
def test_bfloat16(name):
    compare(name, 63, dtype=torch.bfloat16, tolerance=BFLOAT16)


@pytest.mark.parametrize("case", ["plain", "groups", "queries"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)])
def test_a_program_adds_up_all_heads_of_a_group(monkeypatch, case, dtype, tolerance):
    monkeypatch.setattr("kernels.chunk_scan.fused.PROGRAMS", 1)
    compare("chunk_scan", 127, dtype, tolerance, **chunk_cases.CASES[case])


@pytest.mark.parametrize("name", SCANS)
def test_twice_the_same_bits(name):
    scan, make = SCANS[name]
    a = {k: on_gpu(v) for k, v in make(300, G=2, R=2, normalize=True, dtype=torch.float32).items()}
    first, second = run(scan, a, "triton"), run(scan, a, "triton")
    assert all(
        torch.equal(x, y) for one, other in zip(first, second, strict=True) for x, y in zip(one, other, strict=True)
    )


IMAGES = [
    pytest.param(scan, options, id=f"{scan.__name__}-{case}")
    for scan, cases in ((ss2d, image_cases.CASES), (ss2d_lowrank, image_cases.LOWRANK_CASES))
    for case, options in cases.items()
]


@pytest.mark.parametrize("size", [*image_cases.SIZES, (31, 33)])
@pytest.mark.parametrize("scan, options", IMAGES)
def test_every_case_of_images(scan, options, size):
    y, gradients = run_image(image_cases.make(*size, **options), "reference", scan)
    a = {k: on_gpu(v) for k, v in image_cases.make(*size, **options, dtype=torch.float32).items()}
    found, found_gradients = run_image(a, "triton", scan)
    assert_close(found.cpu(), y, FLOAT32)
    assert_close([g.cpu() for g in found_gradients], gradients, FLOAT32, floor=0.01)


@pytest.mark.parametrize("scan, options", [(ss2d, {}), (ss2d_lowrank, dict(r=8))], ids=["ss2d", "ss2d_lowrank"])
def test_images_of_a_large_batch(scan, options):
    """Programs that take all four directions, and add up in place; twice the same bits, and what "auto" takes."""
    a = image_cases.make(9, 13, N=16, **options, channels=96, batch=400, dtype=torch.float32)
    a = {k: on_gpu(v) for k, v in a.items()}
    found, again, other = (run_image(a, impl, scan) for impl in ("triton", "auto", "chunked"))
    assert torch.equal(found[0], again[0]) and all(map(torch.equal, found[1], again[1]))
    assert_close(found[0], other[0], FLOAT32)
    assert_close(found[1], other[1], FLOAT32, floor=0.01)


@pytest.mark.parametrize("options", selective_cases.UPDATE_CASES.values(), ids=selective_cases.UPDATE_CASES)
def test_state_update(options):
    a = selective_cases.make_update(**options)
    single = {k: on_gpu(v) for k, v in selective_cases.make_update(**options, dtype=torch.float32).items()}
    y = selective_state_update(**single, impl="triton")
    assert_close(y.cpu(), selective_state_update(**a, impl="reference"), FLOAT32)
    assert_close(single["state"].cpu(), a["state"], FLOAT32)


def by_mamba_ssm(operator: str) -> None:
    if reason := why_no_mamba_ssm("cuda", torch.float32, operator=operator, lacks=None):
        pytest.skip(reason)


@pytest.mark.parametrize("case", ["plain", "groups", "strong-decay", "D-z-softplus"])
def test_the_selective_scan_is_mamba_ssms(case):
    by_mamba_ssm("selective_scan")
    options = selective_cases.CASES[case] | dict(R=1)
    a = {k: on_gpu(v) for k, v in selective_cases.make(127, N=16, **options, dtype=torch.float32).items()}
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in a.items()}
    tensors = [v for v in leaves.values() if isinstance(v, Tensor)]
    found = []
    for impl in ("triton", "mamba_ssm"):
        y = selective_scan(**leaves, impl=impl)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), tensors)])
        with torch.no_grad():
            found[-1].append(selective_scan(**leaves, return_last_state=True, impl=impl)[1])
    assert_close(*found, FLOAT32, floor=0.01)


@pytest.mark.parametrize("case", ["plain", "groups", "initial-state", "documents", "D"])
def test_the_chunk_scan_is_mamba_ssms(case):
    """Theirs multiplies in TF32."""
    by_mamba_ssm("chunk_scan")
    options = chunk_cases.CASES[case] | dict(R=1)
    a = {k: on_gpu(v) for k, v in chunk_cases.make(300, **options | dict(N=16), dtype=torch.float32).items()}
    outputs, gradients = run(chunk_scan, a, "mamba_ssm")
    expected, expected_gradients = run(chunk_scan, a, "triton")
    assert_close(outputs, expected, 1e-2)
    assert_close(gradients, expected_gradients, 1e-2, floor=0.1)


@pytest.mark.parametrize("options", selective_cases.UPDATE_CASES.values(), ids=selective_cases.UPDATE_CASES)
def test_the_decoding_step_is_mamba_ssms(options):
    by_mamba_ssm("selective_state_update")
    a, b = (
        {k: on_gpu(v) for k, v in selective_cases.make_update(**options, dtype=torch.float32).items()} for _ in range(2)
    )
    found, expected = selective_state_update(**a, impl="mamba_ssm"), selective_state_update(**b, impl="triton")
    assert_close([found, a["state"]], [expected, b["state"]], FLOAT32)


@needs_fla
def test_chunk_scan_is_flash_linear_attentions():
    from fla.ops.simple_gla import chunk_simple_gla

    a = {k: on_gpu(v) for k, v in chunk_cases.make(128, N=16, G=chunk_cases.HEADS, dtype=torch.float32).items()}
    y, _ = chunk_simple_gla(a["C"], a["B"], a["x"] * a["dt"][..., None], g=a["dt"] * a["A"], scale=1.0)
    assert_close(chunk_scan(a["x"], a["dt"], a["A"], a["B"], a["C"], impl="triton"), y, 1e-2)


RULES = [("kda", kda, True), ("gated_delta_rule", gated_delta_rule, False)]
TF32 = 3e-3  # theirs multiplies float32 in TF32


@pytest.mark.parametrize("impl", ["fla", "chunked"])
@pytest.mark.parametrize("name, rule, per_channel", RULES, ids=[name for name, *_ in RULES])
@pytest.mark.parametrize("case", rule_cases.CASES)
@pytest.mark.parametrize("length", [1, 150])
def test_every_case_of_the_delta_rules(impl, name, rule, per_channel, case, length):
    """Heads of 64 keys: flash-linear-attention's are made for powers of two."""
    options = rule_cases.CASES[case] | dict(K=64, V=32, per_channel=per_channel)
    if impl == "fla" and (reason := why_no_fla("cuda", torch.float32, operator=name, keys=64)):
        pytest.skip(reason)
    expected, expected_gradients = run(rule, rule_cases.make(length, **options), "reference")
    a = {k: on_gpu(v) for k, v in rule_cases.make(length, **options, dtype=torch.float32).items()}
    outputs, gradients = run(rule, a, impl)
    tolerance = TF32 if impl == "fla" else FLOAT32
    assert_close([o.cpu() for o in outputs], expected, tolerance)
    assert_close([g.cpu() for g in gradients], expected_gradients, tolerance, floor=0.1)


@pytest.mark.parametrize("name, rule, per_channel", RULES, ids=[name for name, *_ in RULES])
@torch.no_grad()
def test_steps_of_the_delta_rules_without_gradients(name, rule, per_channel):
    """By `fused_recurrent_*`, which multiplies float32 as it is."""
    if reason := why_no_fla("cuda", torch.float32, operator=name, keys=64):
        pytest.skip(reason)
    for length in (1, 40):
        options = dict(K=64, V=32, q=2, k=1, documents=True, state=True, per_channel=per_channel)
        expected = rule(**rule_cases.make(length, **options), output_final_state=True, impl="reference")
        a = {k: on_gpu(v) for k, v in rule_cases.make(length, **options, dtype=torch.float32).items()}
        found = rule(**a, output_final_state=True, impl="fla")
        assert_close([t.cpu() for t in found], expected, FLOAT32)
