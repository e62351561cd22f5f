"""Latent attention in the native shape, of a llama-shaped teacher, as a `deepseek_v3` without experts.

H query heads · G key/value heads · K head size · P rotary dimensions · C latent
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from convert.mixers import MLA
from convert.mixers.projections import LLAMA_SHAPED, weight_of
from convert.models.student import ConvertedForCausalLM


def obstacle(student: ConvertedForCausalLM) -> str | None:
    """Why the architecture does not compute what this student does, whose mixers are all latent attention; or None."""
    if student.config.keeps_attention:
        return "its layers are attention and mla"
    host = student.host.config
    if host.model_type not in LLAMA_SHAPED:
        return f"latent attention exists for llama-shaped models, and this one is {host.model_type}"
    layers = [slot.mixer.options for slot in student.slots().values()]
    if layers[0].shape != "native":
        return "its latent attention has the exact shape; edit.shape=native has one"
    if len({(o.kv_rank, o.rope_dim, o.q_rank) for o in layers}) > 1:
        return "its layers have different ranks"
    if getattr(host, "mlp_bias", False):
        return "its MLPs have biases"
    if (kind := host.rope_parameters.get("rope_type", "default")) not in ("default", "linear", "llama3"):
        return f"its rotary positions are {kind!r}"
    return None


def config(student: ConvertedForCausalLM) -> PreTrainedConfig:
    """The configuration of the same model."""
    host, options = student.host.config, student.slots()[0].mixer.options
    shape = student.slots()[0].mixer.shape
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
        "tie_word_embeddings",
    )  # fmt: skip
    return AutoConfig.for_model(
        MLA.native_architecture,
        **{name: getattr(host, name) for name in same},
        rope_parameters=dict(host.rope_parameters),
        rope_interleave=True,
        num_key_value_heads=shape.num_heads,
        kv_lora_rank=options.kv_rank,
        q_lora_rank=options.q_rank,
        qk_rope_head_dim=options.rope_dim,
        qk_nope_head_dim=shape.head_dim,
        v_head_dim=shape.head_dim,
        first_k_dense_replace=host.num_hidden_layers,
        num_mtp_layers=0,
    )


def around(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the same model that are of no layer, of those that the student has."""
    return kept


def of_layer(student: ConvertedForCausalLM, layer: int, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a layer of the same model: what the student kept of its teacher, and what its mixer has."""
    attention = _attention(student.slots()[layer].mixer)
    return kept | {f"self_attn.{name}": tensor for name, tensor in attention.items()}


def in_full(names: Iterable[str]) -> list[str]:
    """Return those of these weights that keep their dtype on disk, which here are none."""
    return []


def _attention(mixer: MLA) -> dict[str, Tensor]:
    """The weights of one layer by DeepSeek's names: unrotated dimensions first, rotary pairs side by side, keys and
    values for every query head."""
    shape, rope = mixer.shape, mixer.rope_dim
    pairs = torch.arange(rope).view(2, -1).T.flatten()  # two halves -> pairs
    q = weight_of(mixer.q).unflatten(0, (shape.num_heads, -1))
    q = torch.cat([q[:, rope:], q[:, :rope][:, pairs]], 1).flatten(0, 1)
    up = [weight_of(t).unflatten(0, (shape.num_kv_heads, -1)) for t in (mixer.k_up, mixer.v_up)]
    up = torch.cat(up, 1).repeat_interleave(shape.num_heads // shape.num_kv_heads, 0).flatten(0, 1)
    found = {
        "kv_a_proj_with_mqa.weight": torch.cat([weight_of(mixer.latent), weight_of(mixer.k_rope)[pairs]]),
        "kv_a_layernorm.weight": mixer.latent_norm.weight,
        "kv_b_proj.weight": up,
        "o_proj.weight": weight_of(mixer.out),
    }
    if mixer.options.q_rank is None:
        return found | {"q_proj.weight": q}
    return found | {
        "q_a_proj.weight": weight_of(mixer.q_down),
        "q_a_layernorm.weight": mixer.q_latent_norm.weight,
        "q_b_proj.weight": q,
    }
