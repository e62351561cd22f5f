"""impl="mamba_ssm", with a stand-in for the package: definitions in PyTorch with its signatures (those of 2.2), which
check what its kernels check. `test_gpu.py` runs the package itself."""

import functools
import importlib.machinery
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

import kernels.chunk_scan
import kernels.selective_scan
from kernels import mamba_ssm
from kernels.chunk_scan import cases as chunk_cases
from kernels.chunk_scan import chunk_scan
from kernels.mamba_ssm import FUNCTIONS, why_no_mamba_ssm
from kernels.selective_scan import cases as selective_cases
from kernels.selective_scan import selective_scan, selective_state_update, update
from tests.conftest import assert_close
from tests.kernels.conftest import FLOAT32, run


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    assert u.dtype == delta.dtype == B.dtype == C.dtype and A.dtype == torch.float32 and A.shape[1] <= 256
    assert delta.shape == u.shape and B.shape == C.shape
    assert D is z is delta_bias is None and not delta_softplus  # ours are applied around it
    B, C = (t.repeat_interleave(u.shape[1] // t.shape[1], 1) for t in (B, C))
    h, ys = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        h = torch.exp(delta[..., t, None] * A) * h + (delta[..., t] * u[..., t])[..., None] * B[..., t]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys, 2)
    return (y, h.detach()) if return_last_state else y


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    heads = x.shape[2]
    assert x.dtype == B.dtype == C.dtype and B.shape == C.shape and A.shape == (heads,)
    assert D is None or D.shape in ((heads,), (heads, x.shape[3]))
    assert chunk_size & (chunk_size - 1) == 0
    assert seq_idx is None or seq_idx.dtype == torch.int32
    B, C = (t.repeat_interleave(heads // t.shape[2], 2).float() for t in (B, C))
    S = x.new_zeros(x.shape[0], heads, x.shape[3], B.shape[3], dtype=torch.float32)
    S, ys, before = S if initial_states is None else initial_states, [], 0
    for t in range(x.shape[1]):
        if seq_idx is not None:  # their states begin as those of a document 0
            S, before = S * (seq_idx[:, t] == before)[:, None, None, None], seq_idx[:, t]
        drive = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        S = torch.exp(dt[:, t] * A)[..., None, None] * S + drive
        ys.append((S * C[:, t, :, None]).sum(-1))
    y = torch.stack(ys, 1)
    y = y if D is None else y + (D[:, None] if D.ndim == 1 else D) * x
    return (y.to(x.dtype), S) if return_final_states else y.to(x.dtype)


def selective_state_update_theirs(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):
    assert state.dim() == 4 and A.shape == state.shape[1:] and dt_bias.shape == state.shape[1:3]
    return update.update_reference(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus).to(x.dtype)


@pytest.fixture
def installed(monkeypatch):
    """A machine with a GPU and the package, as far as the choice of an implementation sees; cleared of what was known
    before and afterwards."""
    functions = selective_scan_fn, mamba_chunk_scan_combined, selective_state_update_theirs
    for (place, name), function in zip(FUNCTIONS.values(), functions, strict=True):
        parts = place.split(".")
        for i in range(1, len(parts) + 1):
            module = sys.modules.get(inner := ".".join(parts[:i])) or ModuleType(inner)
            module.__spec__ = importlib.machinery.ModuleSpec(inner, None)
            monkeypatch.setitem(sys.modules, inner, module)
        monkeypatch.setattr(module, name, function, raising=False)
        module.selective_scan_cuda = object()

    def on_a_gpu(device, dtype, **call):
        return why_no_mamba_ssm("cuda", dtype, **call)

    monkeypatch.setattr(kernels.selective_scan, "why_no_mamba_ssm", on_a_gpu)
    monkeypatch.setattr(kernels.chunk_scan, "why_no_mamba_ssm", on_a_gpu)
    of_updates = functools.partial(on_a_gpu, operator="selective_state_update", lacks=None)
    monkeypatch.setitem(update.IMPLEMENTATIONS, "mamba_ssm", of_updates)
    forget()
    yield
    forget()


def forget() -> None:
    mamba_ssm._why_not_imported.cache_clear()
    mamba_ssm._function.cache_clear()


@pytest.fixture
def absent():
    forget()
    yield
    forget()


def lacking(case: dict, names: tuple[str, ...]) -> bool:
    return any(case.get(name) for name in names) or case.get("R", 1) != 1


ONE_QUERY = " by one query"  # the case but for its queries


def options_of(cases: dict[str, dict], case: str) -> dict:
    name, is_single, _ = case.partition(ONE_QUERY)
    return cases[name] | ({"R": 1} if is_single else {})


@pytest.mark.parametrize("case", [*selective_cases.CASES, f"D-z-softplus{ONE_QUERY}"])
def test_every_case_of_the_selective_scan(case, installed):
    """Outputs and gradients of what the package can do are the reference's; the rest is refused in one sentence."""
    options = options_of(selective_cases.CASES, case)
    arguments = selective_cases.make(37, **options, dtype=torch.float32)
    if lacking(options, ("state", "documents", "normalize")):
        with pytest.raises(ValueError, match=r"^impl='mamba_ssm' of selective_scan cannot run here: it has [^.]*\.$"):
            selective_scan(**arguments, impl="mamba_ssm")
        return
    expected, last = selective_scan(**arguments, return_last_state=True, impl="reference")
    found = selective_scan(**arguments, return_last_state=True, impl="mamba_ssm")
    assert_close(list(found), [expected, last], FLOAT32)
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    tensors = [v for v in leaves.values() if isinstance(v, Tensor)]
    gradients = [
        torch.autograd.grad(selective_scan(**leaves, impl=impl).square().sum(), tensors)
        for impl in ("mamba_ssm", "reference")
    ]
    assert_close(*gradients, FLOAT32)


@pytest.mark.parametrize("case", [*chunk_cases.CASES, f"D{ONE_QUERY}"])
@pytest.mark.parametrize("length", [1, 300])
def test_every_case_of_the_chunk_scan(case, length, installed):
    options = options_of(chunk_cases.CASES, case)
    arguments = chunk_cases.make(length, **options, dtype=torch.float32)
    if lacking(options, ("normalize",)):
        sentence = r"^impl='mamba_ssm' of chunk_scan cannot run here: it (has|takes) [^.]*\.$"
        with pytest.raises(ValueError, match=sentence):
            chunk_scan(**arguments, impl="mamba_ssm")
        return
    expected, expected_gradients = run(chunk_scan, arguments, "reference")
    found, gradients = run(chunk_scan, arguments, "mamba_ssm")
    assert_close(found, expected, FLOAT32)
    assert_close(gradients, expected_gradients, FLOAT32, floor=0.1 if length == 1 else 0.0)


def test_the_chunk_scan_of_bfloat16_hands_it_on_as_it_is(installed):
    arguments = chunk_cases.make(40, G=2, D="head", state=True, dtype=torch.bfloat16)
    y, S = chunk_scan(**arguments, return_final_states=True, impl="mamba_ssm")
    expected, last = chunk_scan(**arguments, return_final_states=True, impl="reference")
    assert y.dtype == torch.bfloat16 and S.dtype == torch.float32
    assert_close([y.float(), S], [expected.float(), last], 1e-2)


@pytest.mark.parametrize("options", selective_cases.UPDATE_CASES.values(), ids=selective_cases.UPDATE_CASES)
def test_every_case_of_the_decoding_step(options, installed):
    a, b = (selective_cases.make_update(**options, dtype=torch.float32) for _ in range(2))
    found, expected = selective_state_update(**a, impl="mamba_ssm"), selective_state_update(**b, impl="reference")
    assert_close([found, a["state"]], [expected, b["state"]], FLOAT32)


def test_what_it_cannot_do_is_refused(installed):
    arguments = selective_cases.make(5, dtype=torch.float32)
    leaf = {"u": arguments["u"].clone().requires_grad_()}
    for change, reason in (
        (selective_cases.make(5), "it computes in float32; for float64 there are"),
        (selective_cases.make(5, N=300, dtype=torch.float32), "it takes at most 256 states; A has 300"),
        (leaf | {"return_last_state": True}, "it gives the last state no gradient"),
    ):
        with pytest.raises(ValueError, match=f"cannot run here: {reason}"):
            selective_scan(**arguments | change, impl="mamba_ssm")
    with torch.no_grad():
        selective_scan(**arguments | leaf, return_last_state=True, impl="mamba_ssm")


def test_torch_compile_is_refused(installed):
    compiled = torch.compile(functools.partial(chunk_scan, impl="mamba_ssm"), backend="eager")
    with pytest.raises(Exception, match="torch.compile cannot trace it"):
        compiled(**chunk_cases.make(5, dtype=torch.float32))


def test_the_package_may_be_absent_or_broken(absent, monkeypatch):
    def reason(operator: str = "selective_scan") -> str:
        forget()
        return why_no_mamba_ssm("cuda", torch.float32, operator=operator, lacks=None)

    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Nothing(), *sys.meta_path])
    assert reason() == "mamba-ssm is not installed"
    place, name = FUNCTIONS["selective_scan"]
    module = ModuleType(place)
    monkeypatch.setitem(sys.modules, place, module)
    assert reason().startswith("mamba-ssm does not import (AttributeError: ")
    setattr(module, name, selective_scan_fn)
    assert "without its CUDA code" in reason()
    module.selective_scan_cuda = object()
    assert reason() is None


class Nothing:
    """Finds no mamba_ssm, whatever is installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == "mamba_ssm":
            raise ModuleNotFoundError(f"No module named {name!r}", name="mamba_ssm")


def test_a_cpu_has_none_of_it():
    with pytest.raises(ValueError, match="the tensors are on cpu, and mamba-ssm's kernels need a GPU"):
        chunk_scan(**chunk_cases.make(5), impl="mamba_ssm")
