"""Gated DeltaNet beside kept attention, of a Qwen3 teacher, as a `qwen3_5_text`.

Its norms multiply by 1 + weight, and its attention has an output gate, sigmoid(W x): one half where W is 0.

H query heads · K head size · D width
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from convert.mixers import GDN
from convert.mixers.families import layer_window
from convert.mixers.projections import weight_of
from convert.models.student import ConvertedForCausalLM

NORM = "norm.weight"  # how the name of an RMSNorm's weight ends
OF_HEADS = ".linear_attn.norm.weight"  # the one norm that multiplies by its weight


def obstacle(student: ConvertedForCausalLM) -> str | None:
    """Why the architecture does not compute what this student does, whose mixers are all Gated DeltaNet; or None."""
    host, slots = student.host.config, student.slots()
    if host.model_type != "qwen3":
        return (
            f"Gated DeltaNet exists beside attention with normed queries and keys, Qwen3's; this is {host.model_type}"
        )
    if not student.config.keeps_attention:
        return "without a layer of attention, transformers' cache counts no tokens"
    if any(layer_window(host, layer) for layer in range(host.num_hidden_layers) if layer not in slots):
        return "its attention has windows"
    if host.hidden_act != "silu":
        return f"its MLPs have {host.hidden_act}, and its convolutions silu"
    if len({slot.mixer.options.conv for slot in slots.values()}) > 1:
        return "its layers have convolutions of different sizes"
    return None


def config(student: ConvertedForCausalLM) -> PreTrainedConfig:
    """The configuration of the same model."""
    host, slots = student.host.config, student.slots()
    mixer = next(iter(slots.values())).mixer
    heads, size = mixer.shape.num_heads, mixer.shape.head_dim
    rotated = mixer.shape.rotary_dim
    pairs = rotated // 2
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "attention_bias",
        "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
    )  # fmt: skip
    # positions in time, height and width, which are one in text; llama.cpp asks how many pairs of channels each has
    sections = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    return AutoConfig.for_model(
        GDN.native_architecture,
        **{name: getattr(host, name) for name in same},
        rope_parameters={
            **host.rope_parameters,
            "partial_rotary_factor": rotated / size,
            "mrope_section": sections,
            "mrope_interleaved": True,
        },
        layer_types=[
            "linear_attention" if layer in slots else "full_attention" for layer in range(host.num_hidden_layers)
        ],
        linear_conv_kernel_dim=mixer.options.conv,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=size,
        linear_value_head_dim=size,
    )


def around(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the same model that are of no layer, of those that the student has."""
    return {name: tensor - 1 if name.endswith(NORM) else tensor for name, tensor in kept.items()}


def of_layer(student: ConvertedForCausalLM, layer: int, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a layer of the same model: what the student kept of its teacher, and what its mixer has."""
    found, slot = around(kept), student.slots().get(layer)
    if slot is not None:
        return found | {f"linear_attn.{name}": tensor for name, tensor in weights_of(slot.mixer).items()}
    for part in ("self_attn.q_proj.weight", "self_attn.q_proj.bias"):
        if part in found:
            q = found[part].unflatten(0, (student.host.config.num_attention_heads, -1))
            found[part] = torch.cat([q, torch.zeros_like(q)], 1).flatten(0, 1)
    found["self_attn.o_proj.weight"] = 2 * found["self_attn.o_proj.weight"]
    return found


def in_full(names: Iterable[str]) -> list[str]:
    """Return those of these weights that keep their dtype on disk. A small weight of a norm, minus one, loses its bits
    where it is rounded."""
    return [name for name in names if name.endswith(NORM) and not name.endswith(OF_HEADS)]


def weights_of(mixer: GDN) -> dict[str, Tensor]:
    """The weights of one layer of Gated DeltaNet, by the names of the architecture."""
    return {
        "in_proj_qkv.weight": weight_of(mixer.qkv),
        "in_proj_z.weight": weight_of(mixer.gate),
        "in_proj_a.weight": weight_of(mixer.time_step),
        "in_proj_b.weight": weight_of(mixer.beta),
        "conv1d.weight": mixer.conv.weight[:, None],
        "dt_bias": mixer.time_step_bias,
        "A_log": mixer.log_rate,
        "norm.weight": mixer.norm.weight,
        "out_proj.weight": weight_of(mixer.out),
    }
