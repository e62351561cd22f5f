"""How mixers start: as exactly what they replace where theory says so, with every part able to learn from there."""

import dataclasses

import pytest
import torch

from convert.mixers import MIXERS, LinearAttention
from convert.mixers.base import AttentionShape
from convert.mixers.init import STARTS
from convert.mixers.init.hedgehog import LinearStart
from convert.mixers.mamba_block import DecayRate, project_gradients
from convert.mixers.projections import Projections
from tests.conftest import SOFTMAX, assert_close, perturb
from tests.mixers.small_layers import BATCH, LENGTH, SHAPES, attention, context, inputs

EXACT = 1e-5  # of the exact start over 300 tokens; measured: 2.4e-7

every_mixer = pytest.mark.parametrize("name", MIXERS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def linear_of(shape: AttentionShape) -> LinearAttention:
    """Away from its start."""
    return perturb(LinearStart.from_projections(attention(shape), LinearAttention.Options()))


def test_every_mixer_has_a_start():
    assert {name: start.mixer for name, start in STARTS.items()} == MIXERS


def test_what_cannot_be_replaced_hands_nothing_on():
    for name, kind in MIXERS.items():
        mixer = STARTS[name].from_projections(attention(SHAPES["mha"]), kind.Options())
        if kind.can_be_replaced:
            assert STARTS[name].projections(mixer).shape == SHAPES["mha"]
        else:
            with pytest.raises(TypeError, match="no other mixer can start from it"):
                STARTS[name].projections(mixer)


EXACT_SUCCESSORS = ("mamba", "mamba2")  # of linear attention


@pytest.mark.parametrize("name", EXACT_SUCCESSORS)
@every_shape
@torch.no_grad()
def test_starts_as_the_linear_attention_it_replaces(name, shape):
    linear = linear_of(shape)
    mixer = STARTS[name].from_projections(LinearStart.projections(linear), MIXERS[name].Options())
    x, c = inputs(shape, 300), context(shape, torch.arange(300))
    expected = linear(x, c)[0]
    assert_close(mixer(x, c)[0], expected, EXACT)
    padded = context(shape, torch.arange(300), padding_mask=torch.arange(300).expand(BATCH, -1) >= 40)
    assert_close(mixer(x, padded)[0][:, 40:], linear(x, padded)[0][:, 40:], EXACT)


@pytest.mark.parametrize("name", EXACT_SUCCESSORS)
@pytest.mark.parametrize("part", ["conv", "gate", "rate", "time_step", "skip"])
@torch.no_grad()
def test_each_part_can_leave_the_exact_start(name, part):
    """None of them is dead: moving it alone moves the outputs a thousand times beyond the exact start's tolerance."""
    shape = SHAPES["gqa-norms"]
    linear = linear_of(shape)
    mixer = STARTS[name].from_projections(LinearStart.projections(linear), MIXERS[name].Options())
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
    mixer = STARTS[name].from_projections(attention(shape), MIXERS[name].Options())
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


@pytest.mark.parametrize("name", [name for name, kind in MIXERS.items() if kind.can_be_replaced])
@every_shape
@torch.no_grad()
def test_projections_round_trip(name, shape):
    """What the mixer hands on is what it was made from, bit for bit, feature maps included."""
    before = LinearStart.projections(linear_of(shape))
    if name in SOFTMAX:
        before = dataclasses.replace(before, feature_maps=None)
    after = STARTS[name].projections(STARTS[name].from_projections(before, MIXERS[name].Options()))
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
    perturb(STARTS[name].from_projections(p, MIXERS[name].Options()))
    assert all(torch.equal(getattr(p, field), value) for field, value in before.items())
