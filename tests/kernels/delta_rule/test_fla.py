"""What flash-linear-attention's kernels are given, by a stand-in that asks what they ask and runs the reference.

Their kernels themselves need a GPU: tests/kernels/test_gpu.py."""

import importlib.machinery
import sys
import types

import pytest
import torch

import kernels.delta_rule
from kernels.delta_rule import fla, gated_delta_rule, kda
from kernels.delta_rule.cases import CASES, make
from kernels.delta_rule.reference import delta_rule_reference
from tests.conftest import assert_close
from tests.kernels.conftest import FLOAT64, run

RULES = {"kda": (kda, True), "gated_delta_rule": (gated_delta_rule, False)}
every_rule = pytest.mark.parametrize("rule, per_channel", RULES.values(), ids=RULES)


def stand_in(operator: str, form: str, calls: list):
    def run_reference(
        *, q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens=None
    ):
        """The checks of `chunk_kda` and the others, version 0.6.0, and each sequence by itself."""
        calls.append((operator, form, q.dtype, v.dtype))
        assert q.shape == k.shape and v.shape[2] % q.shape[2] == 0
        assert g.shape == ((*beta.shape, q.shape[3]) if operator == "kda" else beta.shape) and g.isfinite().all()
        assert v.shape[:3] == beta.shape and output_final_state
        assert form == "chunk" or not any(t.requires_grad for t in (q, k, v, g, beta, initial_state))
        if use_qk_l2norm_in_kernel:
            q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
        g = g if operator == "kda" else g[..., None]
        q, k, v, g, beta, initial_state = (t.double() for t in (q * scale, k, v, g, beta, initial_state))
        if cu_seqlens is None:
            assert len(initial_state) == len(q)
            o, last = delta_rule_reference(q, k, v, g, beta, initial_state)
            return o, last
        assert len(q) == 1 and cu_seqlens.dtype == torch.int64 and cu_seqlens[-1] == q.shape[1]
        assert len(initial_state) == len(cu_seqlens) - 1 and bool((cu_seqlens.diff() > 0).all())
        parts = [
            delta_rule_reference(*(t[:, a:b] for t in (q, k, v, g, beta)), initial_state[i : i + 1])
            for i, (a, b) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True))
        ]
        return torch.cat([o for o, _ in parts], 1), torch.cat([last for _, last in parts])

    return run_reference


@pytest.fixture
def calls(monkeypatch):
    """The calls of the stand-in, which every rule now runs by."""
    found: list = []
    modules = {name: types.ModuleType(name) for name in ("fla", "fla.ops", "fla.ops.kda", "fla.ops.gated_delta_rule")}
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    for operator in RULES:
        for form in ("chunk", "fused_recurrent"):
            setattr(modules[f"fla.ops.{operator}"], f"{form}_{operator}", stand_in(operator, form, found))
    monkeypatch.setattr(kernels.delta_rule, "_choose", lambda operator, impl, *_: "fla" if impl == "auto" else impl)
    fla._why_not_imported.cache_clear()
    yield found
    fla._why_not_imported.cache_clear()


@every_rule
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 3, 70])
def test_they_are_given_what_the_reference_is_given(calls, rule, per_channel, case, length):
    a = make(length, **CASES[case], per_channel=per_channel)
    (outputs, gradients), (expected, expected_gradients) = (run(rule, a, impl) for impl in ("auto", "reference"))
    assert_close(outputs, expected, FLOAT64)
    assert_close(gradients, expected_gradients, FLOAT64, floor=0.01)
    # with one key the two rules are one
    assert [call[:2] for call in calls] == [("kda" if a["k"].shape[-1] == 1 else rule.__name__, "chunk")]


@every_rule
@torch.no_grad()
def test_short_calls_without_gradients_go_step_by_step(calls, rule, per_channel):
    for length, form in ((1, "fused_recurrent"), (64, "fused_recurrent"), (65, "chunk")):
        a = make(length, documents=True, state=True, per_channel=per_channel)
        found, expected = (rule(**a, output_final_state=True, impl=impl) for impl in ("auto", "reference"))
        assert_close(found, expected, FLOAT64)
        assert calls.pop()[:2] == (rule.__name__, form)


def test_an_id_that_comes_back_is_another_document(calls):
    a = make(9, state=True) | {"document_ids": torch.tensor([[5] * 3 + [2] * 2 + [5] * 4, [1] * 9])}
    found, expected = (kda(**a, output_final_state=True, impl=impl) for impl in ("auto", "reference"))
    assert_close(found, expected, FLOAT64)


def test_sixteen_bits_stay_what_they_are_and_decays_are_float32(calls):
    a = make(9)
    kda(**{name: t.bfloat16() for name, t in a.items()})
    assert calls == [("kda", "fused_recurrent", torch.bfloat16, torch.bfloat16)]


def test_why_they_cannot_run(calls, monkeypatch):
    def reason(operator="kda", device="cuda", dtype=torch.float32, keys=64):
        fla._why_not_imported.cache_clear()
        return fla.why_no_fla(device, dtype, operator=operator, keys=keys)

    monkeypatch.setattr(fla, "_is_refused", lambda: True)
    assert reason() is None
    assert "refuses its gradients on this GPU with Triton 3.4 to 3.7.0" in reason("gated_delta_rule")
    assert "need a GPU" in reason(device="cpu")
    assert "it computes in float32" in reason(dtype=torch.float64)
    assert reason(keys=257) == "it takes heads of at most 256 keys; these have 257"
    monkeypatch.delattr(sys.modules["fla.ops.kda"], "chunk_kda")
    assert "does not import (AttributeError: " in reason()
    monkeypatch.setattr(fla.importlib.util, "find_spec", lambda name: None)
    assert reason() == "flash-linear-attention is not installed"


@pytest.mark.parametrize(
    "version, capability, refused",
    [("3.3.1", 9, False), ("3.4.0", 9, True), ("3.7.0", 9, True), ("3.7.1", 9, False), ("3.6.0", 8, False)],
)
def test_their_refusal_on_hopper_is_known_before(monkeypatch, version, capability, refused):
    triton = types.ModuleType("triton")
    triton.__version__ = version
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    monkeypatch.setattr(fla.importlib.util, "find_spec", lambda name: None)  # tilelang
    assert fla._is_refused() == refused


def test_what_they_raise_is_raised(calls, monkeypatch):
    def broken(**_):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(sys.modules["fla.ops.kda"], "fused_recurrent_kda", broken)
    with pytest.raises(RuntimeError, match="out of shared memory"):
        kda(**make(9))
