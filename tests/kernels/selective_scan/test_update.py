"""One decoding step is one step of the scan, in place."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from kernels.selective_scan import selective_scan, selective_state_update
from kernels.selective_scan.cases import UPDATE_CASES, make_update
from tests.conftest import assert_close
from tests.kernels.conftest import CPU, needs_compiler


@pytest.mark.parametrize("impl", [CPU, "reference"])
@pytest.mark.parametrize("options", UPDATE_CASES.values(), ids=UPDATE_CASES)
def test_is_a_scan_of_one_step(options, impl):
    a = make_update(**options)
    state = a["state"].clone()
    y = selective_state_update(**a | dict(state=state), impl=impl)
    flat = {
        k: v.flatten(-2) if k in ("x", "dt", "z", "D", "dt_bias") and options.get("heads") else v for k, v in a.items()
    }
    B, C = (t if t.ndim == 3 else t[:, None] for t in (a["B"], a["C"]))
    expected, last = selective_scan(
        flat["x"][..., None],
        flat["dt"][..., None],
        a["A"].flatten(0, -2),
        B[..., None],
        C[..., None],
        flat.get("D"),
        None if "z" not in flat else flat["z"][..., None],
        flat.get("dt_bias"),
        True,
        True,
        initial_state=a["state"].flatten(1, -2),
        impl="reference",
    )
    assert_close(y.flatten(1), expected[..., 0], 1e-12)
    assert_close(state.flatten(1, -2), last, 1e-12)


@needs_compiler
@pytest.mark.parametrize("options", UPDATE_CASES.values(), ids=UPDATE_CASES)
def test_float32_is_close_to_float64(options):
    a, single = make_update(**options), make_update(**options, dtype=torch.float32)
    assert_close(selective_state_update(**single, impl="cpu"), selective_state_update(**a, impl="reference"), 1e-5)
    assert_close(single["state"], a["state"], 1e-5)


@needs_compiler
def test_expanded_views_and_bfloat16_inputs():
    a = make_update(heads=4, dtype=torch.float32)
    a["dt"], a["A"] = a["dt"][..., :1].expand(2, 4, 3), a["A"][:, :1, :1].expand(4, 3, 16)
    b = {k: v.bfloat16() if k in ("x", "B", "C") else v for k, v in a.items()} | dict(state=a["state"].clone())
    wanted, found = selective_state_update(**a, impl="reference"), selective_state_update(**b, impl="cpu")
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), wanted, 1e-2)


@needs_compiler
@pytest.mark.parametrize("options", UPDATE_CASES.values(), ids=UPDATE_CASES)
def test_a_remembered_layout_computes_the_same(options):
    """The second call of a layout skips what the first one checked."""
    a = make_update(**options)
    for _ in range(2):
        wanted_state = a["state"].clone()
        wanted = selective_state_update(**a | dict(state=wanted_state), impl="reference")
        assert_close(selective_state_update(**a, impl="cpu"), wanted, 1e-12)
        assert_close(a["state"], wanted_state, 1e-12)
    for name, wrong in dict(x=a["x"][..., :-1], A=a["A"][..., :-1], B=a["B"][..., :-1]).items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            selective_state_update(**a | {name: wrong}, impl="cpu")


@pytest.mark.parametrize("impl", [CPU, "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_decay_that_is_not_finite_is_refused(impl, value):
    a = make_update(dtype=torch.float32)
    wrong = a["A"].clone()
    wrong[3, 5] = value
    for _ in range(2):
        with pytest.raises(ValueError, match="A must be finite"):
            selective_state_update(**a | dict(A=wrong, state=a["state"].clone()), impl=impl)
        selective_state_update(**a, impl=impl)  # from here on the layout is known


WRONG = {
    "list": (dict(x=[1.0]), "x must be a tensor; got list"),
    "groups of C": (dict(B=torch.ones(2, 1, 16)), r"C must be .* as the other"),
    "no groups": (dict(B=torch.ones(2, 0, 16), C=torch.ones(2, 0, 16)), r"with G dividing the heads; got \(2, 0, 16\)"),
    "integers": (dict(A=torch.ones(6, 16, dtype=torch.int64)), "A must be floating-point; got torch.int64"),
    "devices": (dict(A=torch.ones(6, 16, device="meta")), "on one device; got state on cpu and A on meta"),
    "state": (dict(state=torch.ones(2, 6)), r"state must be .*; got \(2, 6\)"),
    "x": (dict(x=torch.ones(2, 5)), r"x must be \(2, 6\); got \(2, 5\)"),
    "A": (dict(A=torch.ones(6, 5)), r"A must be \(6, 16\); got \(6, 5\)"),
    "B": (dict(B=torch.ones(2, 5)), r"B must be \(2, 16\) or .*; got \(2, 5\)"),
    "groups": (dict(B=torch.ones(2, 2, 16), C=torch.ones(2, 2, 16)), r"G dividing the heads; got \(2, 2, 16\)"),
    "strided state": (dict(state=torch.ones(2, 16, 6).mT), r"state must be contiguous"),
    "gradients": (dict(x=torch.ones(2, 6, requires_grad=True)), r"no gradients"),
    "impl": (dict(impl="cuda"), r"'auto' or one of 'triton', 'cpu', 'reference', 'mamba_ssm'; got 'cuda'"),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        selective_state_update(**make_update() | changes)


def test_torch_compile_sees_one_operator():
    a = make_update(dtype=torch.float32)
    wanted = selective_state_update(**a | dict(state=a["state"].clone()))
    compiled = torch.compile(lambda **k: selective_state_update(**k), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(**a), wanted, 1e-6)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for N in (2, 3, 4):  # what is remembered of other layouts is no reason to compile again
            selective_state_update(**make_update(N=N, dtype=torch.float32))
            compiled(**a)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@needs_compiler
def test_layouts_under_a_fake_mode(monkeypatch):
    """Its new tensors have no memory to write to, whether or not the arguments have."""
    monkeypatch.setattr("kernels.selective_scan.update.KNOWN_CALLS", {})
    for a in (make_update(dtype=torch.float32), make_update(heads=4, G=2, dtype=torch.float32)):
        for known in (False, True):
            if known:
                selective_state_update(**a)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                for x in (a["x"], mode.from_tensor(a["x"])):
                    assert selective_state_update(**a | dict(x=x)).shape == x.shape


@needs_compiler
def test_fake_tensors_have_shapes_only():
    with FakeTensorMode() as mode:
        a = {
            k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
            for k, v in make_update(dtype=torch.float32).items()
        }
        assert selective_state_update(**a).shape == (2, 6)


def test_a_backward_pass_notices_that_the_state_changed():
    a, w = make_update(), torch.ones(2, 6, 16, dtype=torch.float64, requires_grad=True)
    product = (w * a["state"]).sum()
    with torch.no_grad():
        selective_state_update(**a)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
