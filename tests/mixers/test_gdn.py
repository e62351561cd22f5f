"""Gated DeltaNet: the layer of transformers' qwen3_5_text, and what its start takes from the teacher."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu
from transformers import AutoConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from convert.core.errors import UserError
from convert.exporting.qwen3_5 import weights_of
from convert.mixers import GDN
from convert.mixers.init.gdn import GDNStart
from convert.mixers.projections import CalibrationStats
from tests.conftest import assert_close
from tests.mixers.small_layers import LENGTH, SHAPES, attention, context, inputs, mixer_of

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def seen(shape, steady: bool) -> tuple[torch.Tensor, CalibrationStats]:
    """Inputs, of which one direction is always 1 if `steady`, and the statistics of them."""
    x = inputs(shape, 4000)
    if steady:
        x[..., 0] = 1.0
    rows = x.flatten(0, 1)
    moment, look_back = rows.T @ rows / len(rows), torch.arange(1.0, 1 + shape.num_heads)
    return x[:, :LENGTH], CalibrationStats(rows.mean(0), moment, moment, torch.empty(0), look_back)


@every_shape
@pytest.mark.parametrize("conv", [1, 4])
@torch.no_grad()
def test_it_is_the_layer_of_transformers(shape, conv):
    """In float64; that layer makes its decays in float32."""
    mixer = mixer_of("gdn", shape, conv=conv).double()
    heads, size = shape.num_heads, shape.head_dim
    config = AutoConfig.for_model(
        "qwen3_5_text", hidden_size=shape.width, num_hidden_layers=1, layer_types=["linear_attention"],
        linear_conv_kernel_dim=conv, linear_num_key_heads=heads, linear_num_value_heads=heads,
        linear_key_head_dim=size, linear_value_head_dim=size,
    )  # fmt: skip
    layer = Qwen3_5GatedDeltaNet(config, 0).double()
    layer.load_state_dict(weights_of(mixer), strict=True)
    x = inputs(shape).double()
    assert_close(mixer(x, context(shape, torch.arange(LENGTH)))[0], layer(x), 1e-6)


@every_shape
@torch.no_grad()
def test_the_start_takes_projections_biases_and_norms(shape):
    """Keys and values for every query head; what is 1 in the inputs takes the place of biases."""
    p = attention(shape)
    x, stats = seen(shape, steady=True)
    mixer = GDNStart.from_projections(replace(p, stats=stats), GDN.Options(gate_start="open"))
    q, k, v = (torch.einsum("btd,hkd->bthk", x, w) for w in (p.q, p.k, p.v))
    if shape.qkv_bias:
        q, k, v = q + p.q_bias, k + p.k_bias, v + p.v_bias
    if shape.norm_eps is not None:
        q, k = q * p.q_norm, k * p.k_norm
    repeats = shape.num_heads // shape.num_kv_heads
    k, v = (t.repeat_interleave(repeats, 2) for t in (k, v))
    found = mixer.conv(mixer.qkv(x), context(shape, torch.arange(LENGTH)), None)[0]
    assert_close(found, torch.cat([t.flatten(2) for t in (q, k, v)], -1), 1e-2 if shape.qkv_bias else 1e-5)
    assert torch.equal(mixer.out.weight, p.o.flatten(1))
    assert not mixer.beta(x).any()
    assert_close(silu(mixer.gate(x)), torch.ones(2, LENGTH, mixer.gate.out_features), 1e-2)
    random = GDNStart.from_projections(p, GDN.Options())
    assert 0.01 < random.gate.weight.std() < 0.03


def test_what_a_start_must_have_seen():
    p = attention(SHAPES["mha"])
    for options, words in (
        (GDN.Options(gate_start="open"), "gate_start=open needs the layer's inputs"),
        (GDN.Options(decay_start="calibrated"), "decay_start=calibrated needs how far"),
    ):
        with pytest.raises(UserError, match=words):
            GDNStart.from_projections(p, options)
    nothing = replace(seen(p.shape, steady=False)[1], look_back=None)
    with pytest.raises(UserError, match="which a calibration of a layer of attention tells"):
        GDNStart.from_projections(replace(p, stats=nothing), GDN.Options(decay_start="calibrated"))


def test_what_its_state_holds():
    """Of a grouped teacher: a memory for each query head, and the convolution over keys and values of each."""
    shape = SHAPES["gqa-norms"]
    mixer = mixer_of("gdn", shape)
    _, state = mixer(inputs(shape), context(shape, torch.arange(LENGTH)))
    assert state.memory.shape == (2, 4, 6, 6) and state.conv.shape == (2, 3, 3 * 4 * 6)
    assert mixer.state_size().fixed_bytes == 4 * (4 * 6 * 6 + 3 * 3 * 4 * 6)
