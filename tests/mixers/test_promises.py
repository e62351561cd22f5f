"""The promises every mixer keeps, on the mixer alone. A new mixer gets them by being in MIXERS."""

import dataclasses

import pytest
import torch

import kernels.chunk_scan
import kernels.delta_rule
import kernels.selective_scan
from convert.mixers import MIXERS, GateSWA, Mixer
from convert.mixers.base import Context
from tests.conftest import assert_close
from tests.mixers.small_layers import BATCH, LENGTH, SHAPES, context, in_pieces, inputs, mixer_of

FLOAT32 = 2e-6  # measured: 3.4e-7
FLOAT64 = 1e-12  # measured: 4e-15

every_mixer = pytest.mark.parametrize("name", MIXERS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)

SPLITS = {
    "one-by-one": (1,) * LENGTH,
    "prompt-then-one-by-one": (65, 1, 1, 1, 1, 1),
    "uneven": (3, 64, 2, 1),
    "at-the-chunk": (64, 6),
}


@every_mixer
@every_shape
@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@torch.no_grad()
def test_any_split_is_the_full_pass(name, shape, sizes):
    mixer, x, c = mixer_of(name, shape), inputs(shape), context(shape, torch.arange(LENGTH))
    y, state = mixer(x, c)
    y_pieces, state_pieces = in_pieces(mixer, x, c, sizes)
    assert type(state) is type(state_pieces) is mixer.State
    assert_close(y_pieces, y, FLOAT32)
    assert_close(state_pieces, state, FLOAT32)


@pytest.mark.parametrize(
    "name", [name for name, kind in MIXERS.items() if "conv" in {f.name for f in dataclasses.fields(kind.Options)}]
)
@pytest.mark.parametrize("conv", [1, 2])
@torch.no_grad()
def test_split_with_a_shorter_convolution(name, conv):
    shape = SHAPES["mha"]
    mixer, x, c = mixer_of(name, shape, conv=conv), inputs(shape), context(shape, torch.arange(LENGTH))
    y, state = mixer(x, c)
    y_pieces, state_pieces = in_pieces(mixer, x, c, SPLITS["uneven"])
    assert_close(y_pieces, y, FLOAT32)
    assert_close([s for s in state_pieces if s.numel()], [s for s in state if s.numel()], FLOAT32)


@every_mixer
@every_shape
@pytest.mark.parametrize("moment", [1, 33, 64, 69])
@torch.no_grad()
def test_causal(name, shape, moment):
    """Whatever happens from `moment` on changes nothing before it, and does change something from it on."""
    mixer, x, c = mixer_of(name, shape), inputs(shape), context(shape, torch.arange(LENGTH))
    other = torch.cat([x[:, :moment], 100 * inputs(shape, LENGTH - moment, seed=2)], 1)
    y, changed = mixer(x, c)[0], mixer(other, c)[0]
    assert torch.equal(changed[:, :moment], y[:, :moment])
    assert bool((changed[:, moment:] != y[:, moment:]).any(-1).all())


@every_mixer
@every_shape
@pytest.mark.parametrize("sizes", [(LENGTH,), (20, 10, 39, 1)], ids=["whole", "in-pieces"])
@torch.no_grad()
def test_left_padding_changes_nothing(name, shape, sizes):
    """Row 0 has 25 padded tokens, so that the first piece of it is all padding; row 1 has none."""
    pad = 25
    mixer, x = mixer_of(name, shape), inputs(shape)
    steps = torch.arange(LENGTH)
    mask = torch.stack([steps >= pad, steps >= 0])
    padded = context(shape, torch.stack([(steps - pad).clamp(min=0), steps]), mask)
    y, state = in_pieces(mixer, x, padded, sizes)
    assert bool(y.isfinite().all())
    expected, expected_state = mixer(x, context(shape, steps))
    assert_close(y[1:], expected[1:], FLOAT32)
    assert_close([s[1:] for s in state], [s[1:] for s in expected_state], FLOAT32)
    alone, alone_state = mixer(x[:, pad:], context(shape, steps[:-pad]))
    assert_close(y[:1, pad:], alone[:1], FLOAT32)
    assert_close(latest([s[:1] for s in state], alone_state), [s[:1] for s in alone_state], FLOAT32)


@every_mixer
@every_shape
@pytest.mark.parametrize(
    "sizes", [(LENGTH,), (31, 39), (29, 41), (33, 1, 36), (30, 1, 1, 38)], ids=lambda s: "+".join(map(str, s))
)
@torch.no_grad()
def test_packed_documents_are_separate_runs(name, shape, sizes):
    """Documents of 30 and 40 tokens, split anywhere but at the border: there a caller starts with state=None."""
    if sizes[0] == 30:
        sizes = (31, 1, 38)
    mixer, x = mixer_of(name, shape), inputs(shape)
    packed = context(shape, torch.cat([torch.arange(30), torch.arange(40)]), documents=[3] * 30 + [5] * 40)
    y, state = in_pieces(mixer, x, packed, sizes)
    first, _ = mixer(x[:, :30], context(shape, torch.arange(30)))
    second, last = mixer(x[:, 30:], context(shape, torch.arange(40)))
    assert_close(y, torch.cat([first, second], 1), FLOAT32)
    assert_close(latest(state, last), last, FLOAT32)


def latest(state, other) -> list[torch.Tensor]:
    """Of a state that has a place for each token, as many places as the other has; what comes before is empty."""
    assert all(
        not s[:, : -o.shape[1]].clamp(min=0).any() for s, o in zip(state, other, strict=True) if s.shape[1] > o.shape[1]
    )
    return [s[:, -o.shape[1] :] if s.shape[1] > o.shape[1] else s for s, o in zip(state, other, strict=True)]


@every_mixer
@torch.no_grad()
def test_short_documents(name):
    """One to three tokens each, shorter than the convolution, and others in the second row."""
    shape = SHAPES["mha"]
    mixer, x = mixer_of(name, shape), inputs(shape, 9)
    lengths = [[1, 1, 2, 3, 2], [4, 1, 1, 1, 2]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    documents = torch.stack([torch.repeat_interleave(torch.arange(5), torch.tensor(row)) for row in lengths])
    y, state = mixer(x, context(shape, positions, documents=documents))
    for row, sizes in enumerate(lengths):
        parts = [mixer(part, context(shape, torch.arange(part.shape[1]))) for part in x.split(sizes, 1)]
        assert_close(y[row], torch.cat([p[0][row] for p in parts]), FLOAT32)
        assert_close([s[row] for s in latest(state, parts[-1][1])], [s[row] for s in parts[-1][1]], FLOAT32)


def gradients(mixer: Mixer, x, c: Context) -> dict[str, torch.Tensor]:
    """Of a random projection of outputs and states, for the input and every parameter."""
    x = x.clone().requires_grad_()
    y, state = mixer(x, c)
    g = torch.Generator().manual_seed(3)
    loss = sum(
        (t * torch.randn(t.shape, generator=g, dtype=t.dtype)).mean()
        for t in (y, *state)
        if t.dtype != torch.bool and t.numel()
    )
    names = ["x", *(n for n, _ in mixer.named_parameters())]
    return dict(zip(names, torch.autograd.grad(loss, [x, *mixer.parameters()]), strict=True))


@every_mixer
@every_shape
def test_every_parameter_gets_a_gradient(name, shape):
    for parameter, gradient in gradients(
        mixer_of(name, shape), inputs(shape), context(shape, torch.arange(LENGTH))
    ).items():
        assert bool(gradient.isfinite().all()), parameter
        assert bool((gradient != 0).any()), parameter


@pytest.fixture
def float64(monkeypatch):
    """Mixers compute in float32 whatever their input; here their every .float() is a .double()."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@every_mixer
@every_shape
@pytest.mark.parametrize("documents", [None, [0] * 30 + [1] * 40], ids=["one-document", "two-documents"])
def test_gradients_are_those_of_the_reference_kernels(name, shape, documents, float64, monkeypatch):
    mixer, x, c = (
        mixer_of(name, shape).double(),
        inputs(shape).double(),
        context(shape, torch.arange(LENGTH), documents=documents),
    )
    actual = gradients(mixer, x, c)
    for kernel in (kernels.chunk_scan, kernels.delta_rule, kernels.selective_scan):
        monkeypatch.setattr(kernel, "_choose", lambda *_: "reference")
    expected = gradients(mixer, x, c)
    assert_close(actual.values(), expected.values(), FLOAT64, floor=1e-3)


@every_mixer
@every_shape
def test_gradients_by_finite_differences(name, shape, float64):
    """Along random directions of the input and all parameters."""
    mixer, x, c = mixer_of(name, shape).double(), inputs(shape, 9).double(), context(shape, torch.arange(9))
    with torch.no_grad():
        y, _ = mixer(x, c)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=y.dtype)
    for seed in range(3):
        points = [x, *mixer.parameters()]
        g = torch.Generator().manual_seed(seed)
        directions = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in points]

        def loss_at(step, points=points, directions=directions):
            x, *parameters = (p + step * d for p, d in zip(points, directions, strict=True))
            named = dict(zip((n for n, _ in mixer.named_parameters()), parameters, strict=True))
            return (torch.func.functional_call(mixer, named, (x, c))[0] * weights).sum()

        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss_at(step), step)
        with torch.no_grad():
            difference = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
        # measured: 8e-7, of slopes about 100
        assert difference.item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-5)


@every_mixer
@every_shape
@torch.no_grad()
def test_state_size(name, shape):
    """It does not grow with the text; or stops at the window; or grows by one row of latents a token. The storages
    behind it do as it does: a view of the whole text would keep all of it."""
    mixer, sizes = mixer_of(name, shape), {}
    for length in (1, 8, 40, LENGTH):
        _, state = mixer(inputs(shape, length), context(shape, torch.arange(length)))
        sizes[length] = sum({s.untyped_storage().data_ptr(): s.untyped_storage().nbytes() for s in state}.values())
        assert all(s.dtype in (torch.float32, torch.bool) and s.shape[0] == BATCH for s in state)
    if name == "mla":
        keys = shape.num_kv_heads * mixer.options.rope_dim
        norms = shape.num_kv_heads if shape.norm_eps is not None else 0
        row = 4 * (mixer.options.kv_rank + keys + norms) + 1
        assert sizes == {length: BATCH * length * row for length in sizes}
    elif name == "gate-swa":
        row = 4 * (2 * shape.num_kv_heads * shape.head_dim + 1)
        assert sizes == {length: BATCH * min(length, 16 - 1 + 3) * row for length in sizes}
    else:
        assert len(set(sizes.values())) == 1


@every_mixer
@every_shape
@pytest.mark.parametrize("how", ["weights", "autocast"])
@torch.no_grad()
def test_bfloat16_keeps_float32_states(name, shape, how):
    mixer, x, c = mixer_of(name, shape), inputs(shape), context(shape, torch.arange(LENGTH))
    expected = mixer(x, c)[0]
    if how == "weights":
        mixer, x = mixer.bfloat16(), x.bfloat16()
        y, state = in_pieces(mixer, x, c, (64, 5, 1))
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, state = in_pieces(mixer, x, c, (64, 5, 1))
    assert y.dtype == torch.bfloat16
    for field, t in state._asdict().items():
        expected_dtypes = (torch.bfloat16,) if field in mixer.model_dtype_fields else (torch.float32, torch.bool)
        assert t.dtype in expected_dtypes, field
    assert_close(y, expected, 0.05)  # measured: 0.009


@every_mixer
@torch.no_grad()
def test_a_decay_is_set_and_told(name):
    """By the mixers that have one; the others say that they have none."""
    shape = SHAPES["gqa-norms"]
    mixer, x, c = mixer_of(name, shape), inputs(shape), context(shape, torch.arange(LENGTH))
    if not mixer.decays:
        assert mixer.scan_updates() == 0
        for call in (lambda: mixer.set_decay(0.1), lambda: mixer.decay_per_token(x, c)):
            with pytest.raises(TypeError, match="has no decay"):
                call()
        return
    before = mixer(x, c)[0]
    mixer.set_decay(0.1)
    told = mixer.decay_per_token(x, c)
    if name == "kda":
        expected = (0.1 * mixer.time_step(x)).mean((0, 1))
    elif name == "gdn":
        expected = (0.1 * torch.nn.functional.softplus(mixer.time_step(x) + mixer.time_step_bias)).mean((0, 1))
    else:
        steps = mixer.block.time_step(mixer.block.conv(x, c, None)[0])  # [B, T, num_steps]
        rate = 0.1 * torch.arange(1, mixer.rate.s.shape[-1] + 1)
        expected = (
            (steps[..., None] * rate).mean((0, 1)).flatten() if mixer.rate.s.ndim == 2 else (steps * rate).mean((0, 1))
        )
    assert_close(told, expected, FLOAT32)
    assert (mixer(x, c)[0] - before).abs().max() > 1e-3
    if not mixer.lowest_rate:
        mixer.set_decay(0.0)
        assert not mixer.decay_per_token(x, c).any()
        return
    with pytest.raises(ValueError, match="a rate must be at least 1e-06; got 0"):
        mixer.set_decay(0.0)  # log(0) would learn nothing
    mixer.set_decay(mixer.lowest_rate)
    with torch.enable_grad():
        gradient = gradients(mixer, x, c)["log_rate"]
    assert bool(gradient.isfinite().all()) and bool(gradient.any())


def test_state_updates_of_an_elementwise_scan():
    """A numerator and a denominator for each channel and state; others are matrix products."""
    shape = SHAPES["mha"]
    assert {name: mixer_of(name, shape).scan_updates() for name in MIXERS if mixer_of(name, shape).decays} == {
        "mamba": 2 * (3 * 8) * (2 * 8),
        "mamba2": 0,
        "kda": 0,
        "gdn": 0,
    }


def test_operations_of_a_delta_rule():
    """Of small heads twice 32 (K + V) and six times K V each; mixers without a delta rule have none."""
    shape = SHAPES["mha"]
    found = {name: mixer_of(name, shape).rule_operations() for name in MIXERS}
    H, K = shape.num_heads, shape.head_dim
    assert found == dict.fromkeys(MIXERS, 0) | dict.fromkeys(("kda", "gdn"), H * (2 * 32 * 2 * K + 6 * K * K))


def test_options_for_short_sequences():
    """`--tiny` halves a window that would not fit; a window that training never fills is a problem."""
    window = GateSWA.Options(window=512)
    assert GateSWA.tiny(window, 64).window == 32 and GateSWA.tiny(GateSWA.Options(window=8), 64).window == 8
    assert "it is 512, they are 512. Lower window" in GateSWA.sequence_problem(window, 512)
    assert GateSWA.sequence_problem(window, 513) is None
    for kind in (kind for kind in MIXERS.values() if kind is not GateSWA):
        options = kind.Options()
        assert kind.tiny(options, 64) is options and kind.sequence_problem(options, 2) is None
