"""The record of an attention layer that every teacher family is read into, and every mixer starts from.

H query heads · G key/value heads · K head size · D width
"""

import sys
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from convert.core.errors import UserError
from convert.mixers.base import AttentionShape
from convert.mixers.families import FAMILIES, layer_window

LLAMA_SHAPED = ("llama", "mistral")  # attention that transformers' deepseek_v3 can be made from


FeatureMaps = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # (weight [heads, K, K], bias [heads, K]) of q, k


@dataclass(frozen=True)
class CalibrationStats:
    """Statistics of what goes into an attention layer, over the tokens of a calibration.

    mean [D], moment [D, D]: the means of x and x x^T, half over all tokens alike and half weighted by the squared
    attention they get, which is how much an error in their keys and values matters if errors are independent (ours).
    uniform [D, D]: over all tokens alike. drift [R / 2]: for each rotary frequency the mean of cos(angle) between query
    and key, weighted by squared attention, times the squared scale of the rotary table: what is left of a product of
    two rotated pairs if neither is. look_back [H]: of each query head the mean distance to its keys in tokens, weighted
    by attention, where a start asks for it and the layer is attention."""

    mean: Tensor
    moment: Tensor
    uniform: Tensor
    drift: Tensor
    look_back: Tensor | None = None


@dataclass(frozen=True)
class Projections:
    """Weights in [heads, K, D], so that nothing downstream knows how a family packs them.

    q [H, K, D], k, v [G, K, D], o [D, H, K]; biases q [H, K], k, v [G, K], o [D]; norms [K]. `feature_maps`: (weight
    [H, K, K], bias [H, K]) for q and the same [G, ...] for k, where the layer is linear attention. `stats`: what a
    calibration saw of the layer's inputs, where there was one."""

    shape: AttentionShape
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    scale: float = 1.0  # of the softmax
    rotary_scale: float = 1.0  # of the rotary table: queries and keys are longer by it where they are rotated (YaRN)
    window: int | None = None
    feature_maps: FeatureMaps | None = None
    stats: CalibrationStats | None = None

    @classmethod
    def of(cls, attention: nn.Module, rotary: nn.Module | None = None) -> "Projections":
        """The record of a transformers attention module of one of FAMILIES.

        `rotary`: the model's rotary embedding; None: as its class makes it of the configuration, whose words alone say
        too little (a llama's partial_rotary_factor is not read there)."""
        if rotary is None:
            kind = type(attention).__name__.replace("Attention", "RotaryEmbedding")
            rotary = getattr(sys.modules[type(attention).__module__], kind)(attention.config)
        read = cls._of_gpt_neox if attention.config.model_type == "gpt_neox" else cls._of_llama_like
        return replace(read(attention, 2 * rotary.inv_freq.shape[0]), rotary_scale=rotary.attention_scaling)

    @classmethod
    def _of_gpt_neox(cls, attention: Any, rotary_dim: int) -> "Projections":
        config, fused = attention.config, attention.query_key_value
        heads = config.num_attention_heads
        head_dim = config.hidden_size // heads
        q, k, v = weight_of(fused).unflatten(0, (heads, 3, head_dim)).unbind(1)
        biases = fused.bias.unflatten(0, (heads, 3, head_dim)).unbind(1) if fused.bias is not None else (None,) * 3
        shape = AttentionShape(
            config.hidden_size,
            heads,
            heads,
            head_dim,
            rotary_dim,
            fused.bias is not None,
            attention.dense.bias is not None,
        )
        o = weight_of(attention.dense).unflatten(1, (heads, head_dim))
        return cls(shape, q, k, v, o, *biases, attention.dense.bias, scale=attention.scaling)  # type: ignore[misc, call-arg]

    @classmethod
    def _of_llama_like(cls, attention: Any, rotary_dim: int) -> "Projections":
        config, head_dim = attention.config, attention.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        normed = config.model_type == "qwen3"
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        shape = AttentionShape(
            config.hidden_size, heads, kv_heads, head_dim, rotary_dim, projections[0].bias is not None,
            attention.o_proj.bias is not None, attention.q_norm.variance_epsilon if normed else None,
        )  # fmt: skip
        weights = [weight_of(p).unflatten(0, (-1, head_dim)) for p in projections]
        biases = [None if p.bias is None else p.bias.unflatten(0, (-1, head_dim)) for p in projections]
        return cls(  # type: ignore[misc, call-arg]
            shape,
            *weights,
            weight_of(attention.o_proj).unflatten(1, (heads, head_dim)),
            *biases,
            attention.o_proj.bias,
            attention.q_norm.weight if normed else None,
            attention.k_norm.weight if normed else None,
            scale=attention.scaling,
            window=layer_window(config, attention.layer_idx),
        )


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a linear layer as torch has it; what an adapter adds to it, or a quantiser makes of it, is not in
    its weight."""
    if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
        raise UserError(
            f"A layer is converted by its plain weights; this one is a {type(linear).__name__}. Merge its adapter"
            " (merge_and_unload), or load the model without quantisation."
        )
    return linear.weight


def family_refusal(kind: str) -> str | None:
    """Why a model type is no teacher, or None."""
    return (
        None if kind in FAMILIES else f"Teachers must be of the families {', '.join(FAMILIES)}; this one is {kind!r}."
    )


def refusal(config: Any) -> str | None:
    """Why no layer of a model with this configuration can be read, or None. Reads the configuration alone."""
    if reason := family_refusal(config.model_type):
        return reason
    if config.to_dict().get("quantization_config"):
        return "Teachers must have plain weights; this one is quantised. Take the unquantised checkpoint."
    features = {
        "attn_logit_softcapping": "soft-capped attention logits", "alibi": "ALiBi positions",
        "add_cross_attention": "cross-attention", "attention_chunk_size": "chunked attention",
    }  # fmt: skip
    for field, name in features.items():
        if config.to_dict().get(field):
            return (
                f"Attention must be plain causal softmax attention; this teacher has {name}"
                f" ({field}={config.to_dict()[field]})."
            )
    if config.to_dict().get("is_causal") is False:
        return "Attention must be plain causal softmax attention; this teacher looks ahead (is_causal=False)."
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in ("default", "linear", "llama3", "yarn"):
        return f"Rotary positions must not depend on the length of the text; this teacher's are {rope!r}."
    return None
