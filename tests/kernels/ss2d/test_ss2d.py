"""Every implementation equals the reference, and the reference equals VMamba's formula, whatever the image's size."""

import pytest
import torch

from kernels.selective_scan import selective_scan
from kernels.ss2d import ss2d
from kernels.ss2d.cases import CASES, SIZES, make
from tests.conftest import assert_close
from tests.kernels.conftest import CPU, FLOAT32, FLOAT64, assert_threads_change_nothing, needs_compiler


def run(arguments: dict, impl: str, scan=ss2d) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The output, and the gradients of a random projection of it."""
    leaves = {k: v.detach().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    y = scan(**leaves, impl=impl)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return y, torch.autograd.grad((y * weights).sum(), [v for v in leaves.values() if isinstance(v, torch.Tensor)])


def as_vmamba(x, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False):
    """CrossScan, one selective scan of four groups, CrossMerge, as in VMamba's vmamba.py."""
    batch, channels, H, W = x.shape
    cross = lambda t: torch.stack([t[:, 0].flatten(-2), t[:, 1].mT.flatten(-2), t[:, 2].flatten(-2).flip(-1), t[:, 3].mT.flatten(-2).flip(-1)], 1)  # noqa: E501,E731  # fmt: skip
    xs = cross(x[:, None].expand(-1, 4, -1, -1, -1))
    ys = selective_scan(
        xs.flatten(1, 2), cross(delta).flatten(1, 2), A.flatten(0, 1), cross(B), cross(C),
        None if D is None else D.flatten(), None, None if delta_bias is None else delta_bias.flatten(), delta_softplus,
        impl="reference",
    ).view(batch, 4, channels, H * W)  # fmt: skip
    ys = ys[:, :2] + ys[:, 2:].flip(-1)
    return (ys[:, 0] + ys[:, 1].view(batch, channels, W, H).mT.flatten(-2)).view(batch, channels, H, W)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_reference_is_vmambas_formula(options):
    arguments = make(5, 7, **options)
    assert_close(ss2d(**arguments, impl="reference"), as_vmamba(**arguments), 1e-13)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("impl", [CPU, "chunked", "doubling"])
def test_each_is_the_reference(options, size, impl):
    (y, gradients), (wanted, wanted_gradients) = (run(make(*size, **options), i) for i in (impl, "reference"))
    assert_close(y, wanted, FLOAT64)
    assert_close(gradients, wanted_gradients, FLOAT64, floor=0.01)


@pytest.mark.parametrize("impl", [CPU, "chunked", "doubling"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_float32_is_close_to_float64(options, impl):
    y, gradients = run(make(11, 13, **options, dtype=torch.float32), impl)
    wanted, wanted_gradients = run(make(11, 13, **options), "reference")
    assert y.dtype == torch.float32
    assert_close(y, wanted, FLOAT32)
    assert_close(gradients, wanted_gradients, FLOAT32)


@needs_compiler
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
@pytest.mark.parametrize("layout", ["channels first", "channels last", "neither"])
def test_any_layout_gives_the_same(layout, dtype, tolerance):
    arguments = make(9, 14, channels=70, N=16, dtype=dtype)
    y, gradients = run(make(9, 14, channels=70, N=16), "reference")
    for name in ("x", "delta"):
        if layout == "channels last":
            arguments[name] = arguments[name].movedim(-3, -1).contiguous().movedim(-1, -3)
        if layout == "neither":
            arguments[name] = arguments[name].repeat_interleave(2, -1)[..., ::2]
    found, found_gradients = run(arguments, "cpu")
    assert_close(found, y, tolerance)
    assert_close(found_gradients, gradients, tolerance)


@pytest.mark.parametrize("impl", [CPU, "chunked", "doubling", "reference"])
def test_turning_the_image_exchanges_directions(impl):
    """A transposed image exchanges rows and columns; one turned by half a circle exchanges forwards and backwards."""
    a = make(6, 9)
    y = ss2d(**a, impl=impl)

    def turned(turn, order):
        b = {k: turn(v) if k in ("x", "delta", "B", "C") else v for k, v in a.items()}
        return ss2d(**b | {k: b[k][:, order] for k in ("delta", "B", "C")} | dict(A=a["A"][order]), impl=impl)

    assert_close(turned(lambda t: t.mT, [1, 0, 3, 2]), y.mT, FLOAT64)
    assert_close(turned(lambda t: t.flip(-1, -2), [2, 3, 0, 1]), y.flip(-1, -2), FLOAT64)


@needs_compiler
def test_threads_change_nothing():
    """Sums over channels have one order, else a resumed run would not be bit-identical."""
    a = make(13, 12, N=16, channels=150, dtype=torch.float32)

    def of_all() -> list[torch.Tensor]:
        y, gradients = run(a, "cpu")
        return [y, *gradients]

    assert_threads_change_nothing(of_all)


def test_gradients_by_finite_differences():
    a = make(2, 3, N=2, channels=2, batch=1)
    tensors = [v.requires_grad_() for v in a.values() if isinstance(v, torch.Tensor)]
    assert torch.autograd.gradcheck(lambda *t: ss2d(*t, impl="chunked"), tensors)


@pytest.mark.parametrize("impl", [CPU, "chunked"])
def test_no_copy_of_the_image_is_kept_for_each_direction(impl):
    a = make(24, 24, N=1, channels=64, dtype=torch.float32)
    a = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in a.items()}
    storages: dict[int, int] = {}

    def keep(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = ss2d(**a, impl=impl)
    given = sum(4 * v.numel() for v in a.values() if isinstance(v, torch.Tensor))
    assert y.requires_grad and sum(storages.values()) < 1.2 * given


def test_bfloat16_is_computed_in_float32_and_autocast_changes_nothing():
    a = make(6, 7, dtype=torch.bfloat16)
    assert ss2d(**a).dtype == torch.bfloat16
    a = make(6, 7, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ss2d(**a)
    assert torch.equal(inside, ss2d(**a))


@needs_compiler
def test_torch_compile_sees_one_operator():
    a = make(6, 7, dtype=torch.float32)
    compiled = torch.compile(ss2d, backend="aot_eager", fullgraph=True)
    (y, gradients), (wanted, wanted_gradients) = run(a, "cpu", compiled), run(a, "cpu")
    assert_close(y, wanted, 1e-6)
    assert_close(gradients, wanted_gradients, 1e-6)


@needs_compiler
def test_operators_keep_torchs_rules():
    a = make(6, 7, dtype=torch.float32)
    tensors = [v.requires_grad_() for v in a.values() if isinstance(v, torch.Tensor)]
    ss2d(**a)  # registers
    torch.library.opcheck(torch.ops.workbench.ss2d.default, (*tensors, True))


WRONG = {
    "a list": (dict(A=[[1.0]]), "A must be a tensor; got list"),
    "no image": (dict(x=torch.ones(2, 6, 8)), r"x must be \[batch, D, H, W\]; got \(2, 6, 8\)"),
    "three directions": (dict(A=-torch.ones(3, 6, 5)), r"A must be \[4, D, N\] with D = 6; got \(3, 6, 5\)"),
    "delta": (dict(delta=torch.ones(2, 6, 4, 5)), r"delta must be \(2, 4, 6, 4, 5\) to fit .*; got \(2, 6, 4, 5\)"),
    "B": (dict(B=torch.ones(2, 4, 4, 4, 5)), r"B must be \(2, 4, 5, 4, 5\) to fit .*; got \(2, 4, 4, 4, 5\)"),
    "D": (dict(D=torch.ones(6)), r"D must be \(4, 6\) to fit .*; got \(6,\)"),
    "infinite": (dict(A=torch.full((4, 6, 5), -torch.inf)), "A must be finite; got 0 NaN and 120 infinities of 120"),
    "integers": (dict(A=torch.ones(4, 6, 5, dtype=torch.int64)), "A must be floating-point; got torch.int64"),
    "empty": (dict(x=torch.ones(2, 6, 0, 5)), r"x must not be empty; got \(2, 6, 0, 5\)"),
    "impl": (
        dict(impl="cuda"),
        r"'auto' or one of 'triton', 'cpu', 'chunked', 'doubling', 'reference'; got 'cuda'",
    ),
    "flag": (dict(delta_softplus=1), "delta_softplus must be True or False; got int"),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ss2d(**(make(4, 5) | changes))
