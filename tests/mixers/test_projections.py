"""Attention recomputed by hand from Projections is the teacher's own; what cannot be read so is refused by name."""

import dataclasses
import re

import pytest
import torch
from transformers import AutoConfig

from convert.mixers.projections import Projections, refusal
from convert.models.slot import attention_of
from tests.conftest import FAMILIES, assert_close, rms, tiny_teacher, token_ids

FLOAT32 = 2e-6  # measured: 3.5e-7
LENGTH = 40

TEACHERS = {family: (family, {}) for family in FAMILIES} | {
    "gpt_neox-half-rotated": ("gpt_neox", dict(rotary_pct=0.5)),
    "gpt_neox-no-biases": ("gpt_neox", dict(attention_bias=False)),
    "llama-biases": ("llama", dict(attention_bias=True)),
    "llama-one-kv-head": ("llama", dict(num_key_value_heads=1)),
    "mistral-window": ("mistral", dict(sliding_window=8)),
    "qwen2-window-from-layer-1": ("qwen2", dict(sliding_window=8, use_sliding_window=True, max_window_layers=1)),
    "qwen3-window-from-layer-1": ("qwen3", dict(sliding_window=8, use_sliding_window=True, max_window_layers=1)),
}


def recompute(p: Projections, x, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in float64 from a Projections: outputs [B, T, D], weights [B, H, T, T]."""
    p = dataclasses.replace(
        p,
        **{
            f.name: getattr(p, f.name).double()
            for f in dataclasses.fields(p)
            if isinstance(getattr(p, f.name), torch.Tensor)
        },
    )
    x, cos, sin = x.double(), cos.double()[:, :, None], sin.double()[:, :, None]
    q, k, v = (
        torch.einsum("btd,hkd->bthk", x, w) + (0 if b is None else b)
        for w, b in ((p.q, p.q_bias), (p.k, p.k_bias), (p.v, p.v_bias))
    )
    if p.shape.norm_eps is not None:
        q, k = (
            t * (t.square().mean(-1, keepdim=True) + p.shape.norm_eps).rsqrt() * w
            for t, w in ((q, p.q_norm), (k, p.k_norm))
        )
    half = p.shape.rotary_dim // 2
    turn = lambda t: torch.cat([-t[..., half : 2 * half], t[..., :half]], -1)  # noqa: E731
    q, k = (torch.cat([t[..., : 2 * half] * cos + turn(t) * sin, t[..., 2 * half :]], -1) for t in (q, k))
    found_projections = p.shape.num_heads // p.shape.num_kv_heads
    k, v = k.repeat_interleave(found_projections, 2), v.repeat_interleave(found_projections, 2)
    distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    seen = (distance >= 0) if p.window is None else (distance >= 0) & (distance < p.window)
    weights = torch.softmax((torch.einsum("bthk,bshk->bhts", q, k) * p.scale).masked_fill(~seen, -torch.inf), -1)
    y = torch.einsum("bhts,bshk,dhk->btd", weights, v, p.o)
    return (y if p.o_bias is None else y + p.o_bias), weights


@torch.no_grad()
def layers_of(family: str, changes: dict) -> list[tuple]:
    """(projections, input, cos, sin, output) of each attention layer of one pass of the teacher."""
    teacher, seen = tiny_teacher(family, **changes), []

    def record(module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        seen.append((Projections.of(module), x, *kwargs["position_embeddings"], output[0]))

    for block in teacher.base_model.layers:
        attention_of(block).register_forward_hook(record, with_kwargs=True)
    teacher(token_ids(2, LENGTH), use_cache=False)
    assert len(seen) == 3
    return seen


@pytest.mark.parametrize("family, changes", TEACHERS.values(), ids=TEACHERS)
def test_attention_recomputed_is_the_teachers(family, changes):
    for layer, (p, x, cos, sin, expected) in enumerate(layers_of(family, changes)):
        assert cos.shape[-1] == p.shape.rotary_dim
        actual, weights = recompute(p, x, cos, sin)
        assert_close(actual, expected, FLOAT32)
        assert p.window == (
            8 if family == "mistral" and changes or changes.get("max_window_layers") and layer else None
        )
        assert weights[:, :, 20:].amax(-1).mean() > 0.3, (
            "the tiny teacher's attention is nearly uniform: this test would see little"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_each_part_of_the_record_matters(family):
    """Leaving out or changing any field moves the outputs well beyond the tolerance."""
    p, x, cos, sin, expected = layers_of(family, {})[1]
    changes = dict(scale=1.01 * p.scale, window=16, q=p.q.flip(0), k=p.k.flip(1), v=p.v.flip(1), o=p.o.flip(1))
    changes |= {name: None for name in ("q_bias", "v_bias", "o_bias") if getattr(p, name) is not None}
    changes |= {name: 1.01 * getattr(p, name) for name in ("q_norm", "k_norm") if getattr(p, name) is not None}
    for name, value in changes.items():
        assert rms(recompute(dataclasses.replace(p, **{name: value}), x, cos, sin)[0] - expected) > 100 * FLOAT32 * rms(
            expected
        ), name


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes(family):
    teacher = tiny_teacher(family)
    p = Projections.of(attention_of(teacher.base_model.layers[0]))
    heads, kv_heads, head_dim = p.shape.num_heads, p.shape.num_kv_heads, p.shape.head_dim
    assert p.shape.width == 32 and heads == 4
    assert kv_heads == (4 if family == "gpt_neox" else 2) and head_dim == (12 if family == "qwen3" else 8)
    expected = [(heads, head_dim, 32), (kv_heads, head_dim, 32), (kv_heads, head_dim, 32), (32, heads, head_dim)]
    assert [t.shape for t in (p.q, p.k, p.v, p.o)] == expected
    assert (p.shape.qkv_bias, p.shape.out_bias) == (p.q_bias is not None, p.o_bias is not None)
    assert (p.q_norm is not None) == (family == "qwen3")


def config(kind: str = "llama", **fields):
    return AutoConfig.for_model(kind, **fields)


def scaled(kind: str, **fields):
    return config(
        rope_parameters=dict(rope_type=kind, rope_theta=1e4, factor=2.0, **fields), max_position_embeddings=4096
    )


REFUSED = {
    "gpt2": (lambda: config("gpt2"), r"families gpt_neox, llama, mistral, qwen2, qwen3; this one is 'gpt2'"),
    "bert": (lambda: config("bert"), r"this one is 'bert'"),
    "soft-capping": (
        lambda: config(attn_logit_softcapping=50.0),
        r"soft-capped attention logits \(attn_logit_softcapping=50.0\)",
    ),
    "alibi": (
        lambda: config(alibi=True),
        r"plain causal softmax attention; this teacher has ALiBi positions \(alibi=True\)",
    ),
    "looking-ahead": (lambda: config(is_causal=False), r"looks ahead \(is_causal=False\)"),
    "cross-attention": (lambda: config(add_cross_attention=True), r"cross-attention"),
    "chunked": (lambda: config(attention_chunk_size=64), r"chunked attention \(attention_chunk_size=64\)"),
    "quantised": (
        lambda: config(quantization_config=dict(quant_method="gptq", bits=4)),
        r"plain weights; this one is quantised. Take the unquantised",
    ),
    "dynamic-rope": (
        lambda: scaled("dynamic"),
        r"must not depend on the length of the text; this teacher's are 'dynamic'",
    ),
    "longrope": (
        lambda: scaled(
            "longrope", short_factor=[1.0] * 64, long_factor=[2.0] * 64, original_max_position_embeddings=2048
        ),
        r"are 'longrope'",
    ),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_by_name(make, message):
    reason = refusal(make())
    assert reason is not None and re.search(message, reason), reason
    assert "\n" not in reason


ACCEPTED = {family: lambda family=family: tiny_teacher(family).config for family in FAMILIES} | {
    "linear-rope": lambda: scaled("linear"),
    "yarn": lambda: scaled("yarn", original_max_position_embeddings=2048),
    "llama3": lambda: scaled(
        "llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=2048
    ),
}


@pytest.mark.parametrize("make", ACCEPTED.values(), ids=ACCEPTED)
def test_what_can_be_read_is_not_refused(make):
    assert refusal(make()) is None


def test_the_rotary_table_is_read_where_it_lives():
    """What a configuration says and the model does not do counts for nothing; what scales the table is in the
    record."""
    teacher = tiny_teacher("llama")
    teacher.config.rope_parameters["partial_rotary_factor"] = 0.5  # a llama rotates whole heads
    attention, rotary = teacher.model.layers[0].self_attn, teacher.model.rotary_emb
    for p in (Projections.of(attention), Projections.of(attention, rotary)):
        assert p.shape.rotary_dim == 8 and p.rotary_scale == 1
    half = tiny_teacher("gpt_neox", rotary_pct=0.5)
    assert Projections.of(half.gpt_neox.layers[0].attention).shape.rotary_dim == 4
    yarn = tiny_teacher(
        "llama", rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
    )
    for p in (
        Projections.of(yarn.model.layers[0].self_attn),
        Projections.of(yarn.model.layers[0].self_attn, yarn.model.rotary_emb),
    ):
        assert p.rotary_scale == yarn.model.rotary_emb.attention_scaling > 1.1
