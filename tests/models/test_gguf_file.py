"""A .gguf file is read whole: its rotary factors become a configuration, and what transformers leaves unread is refused
by name."""

import contextlib

import gguf
import numpy as np
import pytest
import torch

from convert.core.errors import UserError
from convert.models.loading import _load_model, read_config, resolve
from convert.models.student import swap
from tests.conftest import LAYERS, VOCAB, assert_close, tiny_teacher, token_ids
from tests.models.test_student import logits_of

FLOAT32 = 1e-5
SUBLAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(file, model, tensors: dict | None = None, settings: dict | None = None) -> None:
    """A llama as llama.cpp's converter writes it: rows of queries and keys with rotary pairs side by side."""
    config, state = model.config, model.state_dict()
    with contextlib.closing(gguf.GGUFWriter(file, "llama")) as writer:
        writer.add_context_length(512)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_vocab_size(VOCAB)
        for name, value in (settings or {}).items():
            {float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool, str: writer.add_string}[
                type(value)
            ](name, value)
        names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        names |= {
            f"model.layers.{i}.{ours}": f"blk.{i}.{theirs}" for i in range(LAYERS) for ours, theirs in SUBLAYERS.items()
        }
        for ours, theirs in names.items():
            t, heads = state[f"{ours}.weight"], {"attn_q": 4, "attn_k": 2}.get(theirs.split(".")[-1])
            writer.add_tensor(
                f"{theirs}.weight",
                (t.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(t.shape) if heads else t).numpy().copy(),
            )
        for name, t in (tensors or {}).items():
            writer.add_tensor(name, np.asarray(t, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def read(file):
    source = resolve(str(file))
    return _load_model(source, read_config(source), torch.float32, False, True)


def llama(rope: dict | None = None, **changes):
    return tiny_teacher("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5} | (rope or {}), **changes)


def factors_of(model) -> torch.Tensor:
    pairs = len(model.model.rotary_emb.inv_freq)
    return 5e5 ** -(torch.arange(pairs) / pairs) / model.model.rotary_emb.inv_freq


LLAMA3 = {
    "Llama 3.1's": dict(factor=8.0, original_max_position_embeddings=8192),
    "Llama 3.2's": dict(factor=32.0, original_max_position_embeddings=8192),
    "for short texts": dict(factor=32.0, original_max_position_embeddings=64),
    "other bounds": dict(factor=4.0, low_freq_factor=0.5, high_freq_factor=9.0, original_max_position_embeddings=256),
    "none is between": dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=1.001, original_max_position_embeddings=100
    ),
}


@pytest.mark.parametrize("scaling", LLAMA3.values(), ids=LLAMA3)
@pytest.mark.parametrize("head_dim", [8, 64])
def test_rotary_factors_are_a_configuration(scaling, head_dim, tmp_path):
    """What is read has the logits of what was written, far beyond the original length, and so has the student saved
    from it."""
    model = llama({"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0} | scaling, head_dim=head_dim)
    write(tmp_path / "model.gguf", model, {"rope_freqs.weight": factors_of(model)})
    found, ids = read(tmp_path / "model.gguf"), token_ids(1, 300)
    assert_close(logits_of(found, ids), logits_of(model, ids), FLOAT32)
    plain = llama(head_dim=head_dim)
    scale = (factors_of(model) != 1).any()
    assert not scale or (logits_of(plain, ids) - logits_of(model, ids)).abs().max() > 100 * FLOAT32
    swap(found, "linear", layers=(1,)).save_pretrained(tmp_path / "student")
    again = type(swap(llama(head_dim=head_dim), "linear", layers=())).from_pretrained(tmp_path / "student")
    assert_close(again.host.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, FLOAT32)


def test_a_file_without_factors_or_with_ones(tmp_path):
    model, ids = llama(), token_ids(1, 300)
    for name, tensors in (("plain", {}), ("ones", {"rope_freqs.weight": torch.ones(4)})):
        write(tmp_path / f"{name}.gguf", model, tensors)
        assert_close(logits_of(read(tmp_path / f"{name}.gguf"), ids), logits_of(model, ids), FLOAT32)


@pytest.mark.parametrize("factors", [[1.0, 3.0, 2.0, 8.0], [1.0, 1.0, 1.0, 0.5], [2.0, 2.0, 2.0, 2.0]])
def test_factors_of_another_kind_are_refused_or_exact(factors, tmp_path):
    write(tmp_path / "model.gguf", llama(), {"rope_freqs.weight": factors})
    try:
        frequencies = read(tmp_path / "model.gguf").model.rotary_emb.inv_freq
    except UserError as refusal:
        assert "rope_freqs.weight" in str(refusal)
    else:
        assert_close(frequencies * torch.tensor(factors), llama().model.rotary_emb.inv_freq, FLOAT32)


def test_linear_scaling_is_read(tmp_path):
    model, ids = llama({"rope_type": "linear", "factor": 4.0}), token_ids(1, 300)
    write(
        tmp_path / "model.gguf", model, settings={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    )
    assert_close(logits_of(read(tmp_path / "model.gguf"), ids), logits_of(model, ids), FLOAT32)


UNREAD = {
    "yarn": ({"llama.rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type=yarn"),
    "a scale": ({"llama.attention.scale": 0.5}, r"llama\.attention\.scale=0\.5"),
    "a window": ({"llama.attention.sliding_window": 64}, r"sliding_window=64"),
    "looking ahead": ({"llama.attention.causal": False}, r"causal=False"),
    "experts": ({"llama.expert_count": 4}, r"expert_count=4"),
}


@pytest.mark.parametrize("settings, words", UNREAD.values(), ids=UNREAD)
def test_settings_that_nobody_reads_are_refused(settings, words, tmp_path):
    write(tmp_path / "model.gguf", llama(), settings=settings)
    with pytest.raises(UserError, match=words):
        read(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "name",
    [
        "blk.1.attn_q.bias",
        "blk.0.attn_q_norm.weight",
        "blk.3.attn_norm.weight",
        "rope_factors_long.weight",
        "cls.weight",
    ],
)
def test_tensors_that_nobody_reads_are_refused(name, tmp_path):
    write(tmp_path / "model.gguf", llama(), {name: torch.ones(32)})
    with pytest.raises(UserError, match=f"read whole; .*holds 1 tensors .* first {name}"):
        read(tmp_path / "model.gguf")
