"""The promises every mixer keeps, on the mixer alone. A new mixer gets them by being in MIXERS."""

import dataclasses

import pytest
import torch

import kernels.chunk_scan
import kernels.selective_scan
from convert.mixers import MIXERS, Context, LinearAttention, Mixer
from convert.mixers.base import AttentionShape
from convert.mixers.mamba_block import DecayRate, project_gradients
from convert.mixers.projections import Projections
from tests.conftest import SOFTMAX, assert_close, options_of, perturb

FLOAT32 = 2e-6  # measured: 3.4e-7
FLOAT64 = 1e-12  # measured: 4e-15
EXACT = 1e-5  # of the exact start over 300 tokens; measured: 2.4e-7

SHAPES = {
    "mha": AttentionShape(24, 3, 3, 8, rotary_dim=8, qkv_bias=False, out_bias=False),
    "gqa-norms": AttentionShape(20, 4, 2, 6, rotary_dim=6, qkv_bias=False, out_bias=False, norm_eps=1e-6),
    "partial-rotary-biases": AttentionShape(24, 3, 3, 8, rotary_dim=4, qkv_bias=True, out_bias=True),
}
BATCH, LENGTH = 2, 70  # more than one chunk

every_mixer = pytest.mark.parametrize("name", MIXERS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def attention(shape: AttentionShape, seed: int = 0) -> Projections:
    """An attention layer's weights."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=g)  # noqa: E731
    H, G, K, D = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.width
    weights = [1.5 * normal(heads, K, D) / D**0.5 for heads in (H, G, G)] + [normal(D, H, K) / (H * K) ** 0.5]
    biases = [0.3 * normal(heads, K) if shape.qkv_bias else None for heads in (H, G, G)]
    norms = [1 + 0.1 * normal(K) if shape.norm_eps is not None else None for _ in range(2)]
    return Projections(shape, *weights, *biases, 0.3 * normal(D) if shape.out_bias else None, *norms, scale=K**-0.5)


def mixer_of(name: str, shape: AttentionShape, **options) -> Mixer:
    """Away from its exact start."""
    return perturb(MIXERS[name].from_projections(attention(shape), options_of(name, **options)))


def inputs(shape: AttentionShape, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randn(BATCH, length, shape.width, generator=torch.Generator().manual_seed(seed))


def context(shape: AttentionShape, positions, real=None, documents=None) -> Context:
    """`positions` and `documents` [B, T], or [T] for every row."""
    positions = torch.as_tensor(positions).expand(BATCH, -1)
    frequencies = 10000.0 ** (-torch.arange(0, shape.rotary_dim, 2) / shape.rotary_dim)
    angles = (positions[..., None] * frequencies).repeat(1, 1, 2)
    return Context(
        angles.cos(), angles.sin(), real, None if documents is None else torch.as_tensor(documents).expand(BATCH, -1)
    )


def piece(c: Context, s: slice) -> Context:
    return Context(*(None if t is None else t[:, s] for t in (c.cos, c.sin, c.real, c.document_ids)))


def in_pieces(mixer: Mixer, x, c: Context, sizes) -> tuple[torch.Tensor, tuple]:
    y, state, start = [], None, 0
    for size in sizes:
        s = slice(start, start + size)
        part, state = mixer(x[:, s], piece(c, s), state)
        y.append(part)
        start += size
    assert start == x.shape[1]
    return torch.cat(y, 1), state


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
    real = torch.stack([steps >= pad, steps >= 0])
    padded = context(shape, torch.stack([(steps - pad).clamp(min=0), steps]), real)
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
    assert_close(state, last, FLOAT32)


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
        (t * torch.randn(t.shape, generator=g, dtype=t.dtype)).mean() for t in (y, *state) if t.dtype != torch.bool
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
    for kernel in (kernels.chunk_scan, kernels.selective_scan):
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
        assert difference.item() == pytest.approx(
            slope.item(), rel=1e-6, abs=1e-5
        )  # measured: 8e-7, of slopes about 100


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


EXACT_SUCCESSORS = ("mamba", "mamba2")  # of linear attention


@pytest.mark.parametrize("name", EXACT_SUCCESSORS)
@every_shape
@torch.no_grad()
def test_starts_as_the_linear_attention_it_replaces(name, shape):
    linear = perturb(LinearAttention.from_projections(attention(shape), LinearAttention.Options()))
    mixer = MIXERS[name].from_projections(linear.projections(), MIXERS[name].Options())
    x, c = inputs(shape, 300), context(shape, torch.arange(300))
    expected = linear(x, c)[0]
    assert_close(mixer(x, c)[0], expected, EXACT)
    padded = context(shape, torch.arange(300), real=torch.arange(300).expand(BATCH, -1) >= 40)
    assert_close(mixer(x, padded)[0][:, 40:], linear(x, padded)[0][:, 40:], EXACT)


@pytest.mark.parametrize("name", EXACT_SUCCESSORS)
@pytest.mark.parametrize("part", ["conv", "gate", "rate", "time_step", "skip"])
@torch.no_grad()
def test_each_part_can_leave_the_exact_start(name, part):
    """None of them is dead: moving it alone moves the outputs a thousand times beyond the exact start's tolerance."""
    shape = SHAPES["gqa-norms"]
    linear = perturb(LinearAttention.from_projections(attention(shape), LinearAttention.Options()))
    mixer = MIXERS[name].from_projections(linear.projections(), MIXERS[name].Options())
    g = torch.Generator().manual_seed(5)
    for parameter_name, parameter in mixer.named_parameters():
        if part in parameter_name.split("."):
            parameter.add_(0.1 * torch.rand(parameter.shape, generator=g))
    x, c = inputs(shape, 300), context(shape, torch.arange(300))
    assert rms_of(mixer(x, c)[0] - linear(x, c)[0]) > 1000 * EXACT * rms_of(linear(x, c)[0])


def rms_of(t: torch.Tensor) -> float:
    return t.square().mean().sqrt().item()


@pytest.mark.parametrize("name", EXACT_SUCCESSORS)
def test_decay_learns_from_its_exact_start(name):
    """Towards a target that forgets: at rate 0 the gradient is there, and one step along it makes decay and lowers the
    loss."""
    shape = SHAPES["mha"]
    mixer = MIXERS[name].from_projections(attention(shape), MIXERS[name].Options())
    x, c = inputs(shape), context(shape, torch.arange(LENGTH))
    with torch.no_grad():
        mixer.rate.s.fill_(0.02)
        target = mixer(x, c)[0]
        mixer.rate.s.zero_()
    loss = (mixer(x, c)[0] - target).square().mean()
    loss.backward()
    project_gradients(mixer)
    assert bool((mixer.rate.s.grad < 0).any()), "raising no rate would lower the loss"
    assert bool((mixer.rate.s.grad <= 0).all()), "at 0 a gradient that would lower the rate must not pass"
    with torch.no_grad():
        mixer.rate.s -= 0.005 * mixer.rate.s.grad / mixer.rate.s.grad.abs().max()
        assert bool((mixer.rate() > 0).any())
        assert (mixer(x, c)[0] - target).square().mean() < loss


def test_decay_rate_is_never_negative_and_never_stuck():
    rate = DecayRate(3, 4)
    with torch.no_grad():
        rate.s.copy_(torch.tensor([[-1.0], [0.0], [2.0]]).expand(3, 4))
    spread = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(rate(), torch.stack([0 * spread, 0 * spread, 2 * spread]))
    rate().sum().backward()  # descent would lower s: passes only where there is room
    project_gradients(rate)
    assert torch.equal(rate.s.grad, torch.stack([0 * spread, 0 * spread, spread]))
    rate.zero_grad()
    (-rate()).sum().backward()
    project_gradients(rate)
    assert torch.equal(rate.s.grad, -spread.expand(3, 4))


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "mla"])
@every_shape
@torch.no_grad()
def test_projections_round_trip(name, shape):
    """What the mixer hands on is what it was made from, bit for bit, feature maps included."""
    before = perturb(LinearAttention.from_projections(attention(shape), LinearAttention.Options())).projections()
    if name in SOFTMAX:
        before = dataclasses.replace(before, feature_maps=None)
    after = MIXERS[name].from_projections(before, MIXERS[name].Options()).projections()
    assert after.shape == before.shape
    for field in dataclasses.fields(Projections):
        a, b = getattr(after, field.name), getattr(before, field.name)
        if isinstance(b, torch.Tensor):
            assert torch.equal(a, b), field.name
        elif field.name == "feature_maps" and b:
            assert all(torch.equal(s, t) for x, y in zip(a, b, strict=True) for s, t in zip(x, y, strict=True))
        else:
            assert a == b, field.name


@every_mixer
@torch.no_grad()
def test_projections_are_copied(name):
    """Training the mixer leaves the teacher's weights alone."""
    p = attention(SHAPES["partial-rotary-biases"])
    before = {
        f.name: getattr(p, f.name).clone()
        for f in dataclasses.fields(p)
        if isinstance(getattr(p, f.name), torch.Tensor)
    }
    perturb(MIXERS[name].from_projections(p, MIXERS[name].Options()))
    assert all(torch.equal(getattr(p, field), value) for field, value in before.items())


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
    narrow = [torch.bfloat16] * mixer.narrow + [torch.float32] * (len(state) - mixer.narrow)
    assert [torch.float32 if s.dtype == torch.bool else s.dtype for s in state] == narrow
    assert_close(y, expected, 0.05)  # measured: 0.009
