"""Kimi Delta Attention: what its start takes from the teacher, and the starts of its decays and gates."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from convert.mixers import KDA
from convert.mixers.init.kda import KDAStart
from convert.mixers.parts import HeadNorm
from tests.conftest import assert_close
from tests.mixers.small_layers import LENGTH, SHAPES, attention, context, inputs

NORMS_AND_BIASES = {"norms-and-biases": replace(SHAPES["gqa-norms"], qkv_bias=True)}  # Qwen3's attention_bias
every_shape = pytest.mark.parametrize(
    "shape", (SHAPES | NORMS_AND_BIASES).values(), ids=(SHAPES | NORMS_AND_BIASES).keys()
)


def start(shape, seed: int = 0, **options) -> KDA:
    torch.manual_seed(seed)
    return KDAStart.from_projections(attention(shape), KDA.Options(**options))


@every_shape
@torch.no_grad()
def test_the_start_is_the_formula_on_the_teachers_projections(shape):
    """A convolution that is the identity, half of each value written, an open gate, and no other weights."""
    p, x = attention(shape), inputs(shape)
    mixer = start(shape, decay_start="half-lives")
    q, k, v = (torch.einsum("btd,hkd->bthk", x, w) for w in (p.q, p.k, p.v))
    if shape.qkv_bias:
        q, k, v = q + p.q_bias, k + p.k_bias, v + p.v_bias
    if shape.norm_eps is not None:
        q, k = q * p.q_norm, k * p.k_norm
    groups = shape.num_heads // shape.num_kv_heads
    q, k, v = normalize(q, dim=-1), *(t.repeat_interleave(groups, 2) for t in (normalize(k, dim=-1), v))
    half_lives = torch.linspace(math.log(8), math.log(512), shape.num_heads).exp()
    decay = 2 ** (-1 / half_lives)[:, None, None]
    S, y = torch.zeros(2, shape.num_heads, shape.head_dim, shape.head_dim), []
    for t in range(LENGTH):
        S = decay * S
        S = S + k[:, t, :, :, None] * 0.5 * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t]))[:, :, None]
        y.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / shape.head_dim**0.5)
    expected = torch.einsum("bthk,dhk->btd", torch.stack(y, 1), p.o)
    expected = expected + p.o_bias if shape.out_bias else expected
    assert_close(mixer(x, context(shape, torch.arange(LENGTH)))[0], expected, 1e-5)


@torch.no_grad()
def test_both_gates_start_as_the_same_function():
    shape = SHAPES["mha"]
    x, c = inputs(shape), context(shape, torch.arange(LENGTH))
    assert_close(start(shape, gate="sigmoid")(x, c)[0], start(shape)(x, c)[0], 1e-5)


@torch.no_grad()
def test_a_head_norm_takes_the_length_of_each_head():
    shape = SHAPES["mha"]
    x, c = inputs(shape), context(shape, torch.arange(LENGTH))
    mixer = start(shape, head_norm=True)
    assert isinstance(mixer.head_norm, HeadNorm)
    longer = start(shape, head_norm=True)
    longer.qkv.v.weight.mul_(100)
    assert_close(longer(x, c)[0], mixer(x, c)[0], 1e-2)


def test_decays_at_the_start():
    """Nats per token: rate times step."""
    shape = replace(SHAPES["mha"], num_heads=64, num_kv_heads=64)
    x, c = inputs(shape), context(shape, torch.arange(LENGTH))
    half_lives = math.log(2) / start(shape, decay_start="half-lives").decay_per_token(x, c).unflatten(0, (64, -1))
    assert_close(half_lives[0], torch.full((8,), 8.0), 1e-4)
    assert_close(half_lives[-1], torch.full((8,), 512.0), 1e-4)
    g6 = start(shape, decay_start="g6").decay_per_token(x, c) / math.log(2)
    assert 0.03 <= g6.min() < 0.05 and 0.2 < g6.max() <= 0.3
    mamba = start(shape, decay_start="mamba").decay_per_token(x, c)
    assert 1e-3 <= mamba.min() < 0.01 and 0.5 < mamba.max() <= 1.6


def test_what_its_state_holds():
    """Of a grouped teacher: a memory for each query head, and the convolution over fewer keys and values."""
    shape = SHAPES["gqa-norms"]
    mixer = start(shape)
    _, state = mixer(inputs(shape), context(shape, torch.arange(LENGTH)))
    assert state.memory.shape == (2, 4, 6, 6) and state.conv.shape == (2, 3, (4 + 2 + 2) * 6)
    assert mixer.state_size().fixed_bytes == 4 * (4 * 6 * 6 + 3 * 8 * 6)
