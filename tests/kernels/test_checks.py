"""Wrong arguments of every operator: a ValueError of one sentence or the right result, and no other error."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from kernels.checks import check_decay
from kernels.chunk_scan import cases as chunk_cases
from kernels.chunk_scan import chunk_scan
from kernels.selective_scan import cases as selective_cases
from kernels.selective_scan import selective_scan, selective_state_update
from tests.kernels.conftest import CPU

OPERATORS = {
    "selective_scan": (
        selective_scan,
        lambda: selective_cases.make(8, **selective_cases.CASES["everything"], dtype=torch.float32),
    ),
    "chunk_scan": (chunk_scan, lambda: chunk_cases.make(8, **chunk_cases.CASES["everything"], dtype=torch.float32)),
    "selective_state_update": (
        selective_state_update,
        lambda: selective_cases.make_update(D=True, z=True, dt_bias=True, dtype=torch.float32),
    ),
}
OBJECTS = {"list": lambda t: t.tolist(), "numpy": lambda t: t.numpy(), "tuple": lambda t: (t,)} | {
    type(value).__name__: lambda t, value=value: value for value in ("x", 3, 0.5, {}, True, Tensor)
}
TENSORS = {
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "another device": lambda t: t.to("meta"),
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "no batch": lambda t: t[:0],
    "nothing in a row": lambda t: t[..., :0],
    "one dimension more": lambda t: t[None],
    "one dimension less": lambda t: t[0],
    "one number": lambda t: t.flatten()[0],
    "one row less": lambda t: t[:-1],
    "shorter": lambda t: t[..., :-1],
    "sparse": lambda t: t.to_sparse(),
    "rows of a sparse one": lambda t: torch.eye(3).to_sparse_csr(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t.flatten(), t.flatten()]),
    "negated when read": lambda t: torch._neg_view(t.float()),
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape),
}
FLOATS_ONLY = {str(dtype): lambda t, dtype=dtype: t.to(dtype) for dtype in (torch.int64, torch.bool, torch.uint8)}
IDS_ONLY = {str(dtype): lambda t, dtype=dtype: t.to(dtype) for dtype in (torch.bool, torch.uint64, torch.float16)}
TRIALS = [
    pytest.param(operator, name, change, id=f"{operator}-{name}-{kind}")
    for operator, (_, make) in OPERATORS.items()
    for name, value in make().items()
    if isinstance(value, Tensor)
    for kind, change in (OBJECTS | TENSORS | (FLOATS_ONLY if value.is_floating_point() else IDS_ONLY)).items()
]


def refused(operator: str, changes: dict) -> str:
    """Return the message of the ValueError, which must be the same from each implementation."""
    call, make = OPERATORS[operator]
    messages = set()
    for impl in ("cpu", "reference"):
        with pytest.raises(ValueError) as caught:
            call(**make() | dict(impl=impl) | changes)
        messages.add(str(caught.value))
    (sentence,) = messages
    assert sentence[-1] == "." and len(sentence) < 250
    return sentence


@pytest.mark.filterwarnings("ignore")  # torch's, of the prototypes among these
@pytest.mark.parametrize("impl", [CPU])
@pytest.mark.parametrize("operator, name, change", TRIALS)
def test_a_wrong_tensor_is_refused_by_name(operator, name, change, impl):
    _, make = OPERATORS[operator]
    sentence = refused(operator, {name: change(make()[name])})
    if "fake or none" not in sentence and "one device" not in sentence:
        assert name in sentence.split(";")[0].replace("The groups of B", "B C") or name in (
            "u",
            "x",
            "A",
            "state",
            "delta",
            "dt",
            "B",
        ), sentence


@pytest.mark.parametrize(
    "operator, name", [(operator, name) for operator, (_, make) in OPERATORS.items() for name in list(make())[:5]]
)
def test_a_missing_tensor_is_refused(operator, name):
    assert refused(operator, {name: None}) == f"{name} must be a tensor; got NoneType."


FLAGS = [
    ("selective_scan", ("delta_softplus", "return_last_state", "normalize")),
    ("chunk_scan", ("return_final_states", "normalize")),
    ("selective_state_update", ("dt_softplus",)),
]


@pytest.mark.parametrize("value", [None, 1, 0, "yes", [], torch.tensor([True, False]), np.bool_(True), 0.5], ids=repr)
@pytest.mark.parametrize("operator, name", [(operator, name) for operator, names in FLAGS for name in names])
def test_flags_are_true_or_false(operator, name, value):
    assert refused(operator, {name: value}) == f"{name} must be True or False; got {type(value).__name__}."


@pytest.mark.parametrize(
    "impl", [None, 3, [], ["cpu"], {}, b"cpu", "", "CPU", object(), torch.tensor(1)], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_an_implementation_is_one_of_their_names(operator, impl):
    assert refused(operator, dict(impl=impl)).startswith("impl is 'auto' or one of 'triton', 'cpu'")


PAIRS = {
    "one": lambda p: (p[0],),
    "three": lambda p: (*p, p[0]),
    "stacked": torch.stack,
    "number": lambda p: 3,
    "text": lambda p: "ab",
    "set": set,
    "iterator": iter,
    "texts": lambda p: ("a", "b"),
    "numpy": lambda p: tuple(h.numpy() for h in p),
    "without one": lambda p: (p[0], None),
    "whole numbers": lambda p: (p[0].long(), p[1]),
    "complex": lambda p: (p[0].to(torch.complex64), p[1]),
    "devices": lambda p: (p[0], p[1].to("meta")),
    "sparse": lambda p: (p[0].to_sparse(), p[1]),
}


@pytest.mark.parametrize("change", PAIRS.values(), ids=PAIRS)
def test_a_wrong_pair_of_states_is_refused(change):
    pair = OPERATORS["selective_scan"][1]()["initial_state"]
    assert "initial_state" in refused("selective_scan", dict(initial_state=change(pair)))


SAME = {
    "strides": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "transposed memory": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "an offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False) if t.is_floating_point() else t,
    "doubles": lambda t: t.double() if t.is_floating_point() else t.int(),
}


@pytest.mark.parametrize("impl", [CPU, "reference"])
@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("operator", OPERATORS)
def test_other_layouts_and_dtypes_change_nothing(operator, kind, impl):
    call, make = OPERATORS[operator]
    wanted = call(**make(), impl=impl)
    for name, value in make().items():
        # refused: changed in place
        if isinstance(value, Tensor) and not (name == "state" and kind in ("strides", "transposed memory")):
            torch.testing.assert_close(
                call(**make() | {name: SAME[kind](value)}, impl=impl), wanted, rtol=1e-4, atol=1e-4, check_dtype=False
            )


@pytest.mark.parametrize("dtype, value", [(torch.float16, -40.0), (torch.float32, -1e36)])
def test_finite_rates_whose_sum_is_not_are_taken(dtype, value):
    """The rates of 2,048 channels in half precision, as an ordinary Mamba has them, sum to less than -65,504."""
    A = torch.full((2048,), value).to(dtype)
    check_decay(A)
    assert not A.sum().isfinite()
    A[7] = -torch.inf
    with pytest.raises(ValueError, match="A must be finite; got 0 NaN and 1 infinities of 2048"):
        check_decay(A)
