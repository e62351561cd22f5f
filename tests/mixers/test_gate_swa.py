"""Gated sliding-window attention against plain masked attention, and against the teacher it starts from."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from convert.mixers import GateSWA
from convert.models.cache import StudentCache
from convert.models.student import swap
from tests.conftest import FAMILIES, assert_close, options_of, tiny_teacher, token_ids
from tests.mixers.test_promises import SHAPES, attention, context, in_pieces, inputs, mixer_of

EXACT = 1e-5


def plain(mixer: GateSWA, x, c) -> torch.Tensor:
    """The definition: a T x T mask over one document."""
    q, k, v = mixer.qkv(x, c.cos, c.sin)
    t, window, sinks = torch.arange(x.shape[1]), mixer.options.window, mixer.options.sinks
    back = t[:, None] - t[None, :]
    visible = (back >= 0) & ((back < window) | (t[None, :] < sinks))
    k, v = (s.repeat_interleave(q.shape[2] // s.shape[2], 2) for s in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    y = torch.einsum("bhts,bshk->bthk", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)
    gate = torch.sigmoid(mixer.gate(x)).unflatten(-1, (q.shape[2], -1))
    return mixer.out((y * gate).flatten(2))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gate", ["element", "head"])
@pytest.mark.parametrize("window, sinks", [(1, 0), (1, 2), (5, 0), (16, 3), (64, 4), (500, 4)])
@torch.no_grad()
def test_is_masked_attention(shape, gate, window, sinks):
    """300 tokens: more than two blocks of queries unless the window is long."""
    mixer, x = mixer_of("gate-swa", shape, window=window, sinks=sinks, gate=gate), inputs(shape, 300)
    c = context(shape, torch.arange(300))
    expected = plain(mixer, x, c)
    assert_close(mixer(x, c)[0], expected, 2e-6)
    assert_close(in_pieces(mixer, x, c, (150, 1, 140, 1, 8))[0], expected, 2e-6)


@torch.no_grad()
def test_padding_between_the_tokens_of_a_long_text():
    """It takes no place in the window, in whichever block it lies."""
    shape = SHAPES["gqa-norms"]
    mixer, x = mixer_of("gate-swa", shape), inputs(shape, 300)
    real = torch.ones(2, 300, dtype=torch.bool)
    real[0, 140:180], real[1, :7] = False, False
    y, state = mixer(x, context(shape, (real.cumsum(1) - 1).clamp(min=0), real))
    for row in range(2):
        short = x[row : row + 1, real[row]]
        c = context(shape, torch.arange(short.shape[1]))
        expected, expected_state = mixer(short, type(c)(c.cos[:1], c.sin[:1]))
        assert_close(y[row : row + 1, real[row]], expected, 2e-6)
        assert_close([s[row : row + 1] for s in state], expected_state, 2e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, dict(gate="head"), dict(gate="none"), dict(gate_bias=4.0)], ids=str)
@torch.no_grad()
def test_starts_as_its_teacher_where_the_window_is_long_enough(family, options):
    teacher, ids = tiny_teacher(family), token_ids(2, 300)
    expected = teacher(ids, use_cache=False).logits
    student = swap(teacher, "gate-swa", options_of("gate-swa", window=300, **options))
    assert_close(student(ids, use_cache=False).logits, expected, EXACT)


@torch.no_grad()
def test_a_shorter_window_changes_what_lies_beyond_it_only():
    teacher, ids = tiny_teacher("llama"), token_ids(1, 60)
    expected = teacher(ids, use_cache=False).logits
    found = swap(teacher, "gate-swa", options_of("gate-swa", window=16, sinks=4), layers=(2,))(
        ids, use_cache=False
    ).logits
    assert_close(found[:, :20], expected[:, :20], EXACT)  # the window and the sinks cover the first 20
    assert ((found - expected)[:, 20:].abs().amax(-1) > 1e-3).all()


@torch.no_grad()
def test_a_teachers_shorter_window_stays():
    teacher, ids = tiny_teacher("mistral", sliding_window=10), token_ids(1, 60)
    expected = teacher(ids, use_cache=False).logits
    student = swap(teacher, "gate-swa", options_of("gate-swa", sinks=0))
    assert student.config.mixers[0]["options"]["window"] == 10
    assert_close(student(ids, use_cache=False).logits, expected, EXACT)


@torch.no_grad()
def test_the_cache_is_the_window():
    student, sizes = swap(tiny_teacher("llama"), "gate-swa", options_of("gate-swa", window=16, sinks=4)), []
    for length in (8, 100, 400):
        cache = StudentCache(student.config)
        student(token_ids(1, length), past_key_values=cache)
        sizes.append(cache.num_bytes())
    places, keys, head_dim, layers = 16 - 1 + 4, 2, 8, 3
    assert sizes == [layers * min(length, places) * (2 * keys * head_dim + 1) * 4 for length in (8, 100, 400)]


def test_other_softmax_scales_are_refused():
    with pytest.raises(ValueError, match="scale 1 / sqrt"):
        GateSWA.from_projections(replace(attention(SHAPES["mha"]), scale=1.0), GateSWA.Options())


def test_uses_torchs_attention(monkeypatch):
    """A well-kept path: every score goes through scaled_dot_product_attention."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: torch.zeros_like(q))
    mixer = mixer_of("gate-swa", SHAPES["mha"])
    y, _ = mixer(inputs(SHAPES["mha"]), context(SHAPES["mha"], torch.arange(70)))
    assert torch.equal(y, torch.zeros_like(y))
