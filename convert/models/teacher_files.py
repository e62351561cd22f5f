"""The JSON files of a stranger's model folder, checked before transformers reads them.

The folder may be damaged, senseless or hostile: nothing in it is believed further than the records here say. Bounds are
ours, several times beyond the largest published model, so that what passes fits a computer's memory and arithmetic."""

import copy
import inspect
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto import CONFIG_MAPPING

from convert.core.errors import UserError
from convert.core.fields import Range, Written, require, shown
from convert.core.files import parse_json
from convert.mixers import MIXERS
from convert.mixers.base import AttentionShape
from convert.mixers.families import FAMILIES
from convert.mixers.projections import family_refusal
from convert.models.config import ConvertedConfig

# bytes
LARGEST = {
    "config.json": 2**24,
    "generation_config.json": 2**24,
    "preprocessor_config.json": 2**24,
    "tokenizer_config.json": 2**26,
    "tokenizer.json": 2**28,
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "hidden_act",
    "sliding_window",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
Positive = Annotated[float, Range(1e-9, 1e12)]
Share = Annotated[float, Range(0, 1)]
Token = Annotated[int, Range(-1, 2**24)]  # published configurations say -1 for none


@dataclass(frozen=True)
class Rotation:
    """The entries of `rope_parameters`, in every form that transformers has had."""

    rope_type: Annotated[str, Written(r"[a-z0-9_]{1,32}", "a short name")]
    type: Annotated[str, Written(r"[a-z0-9_]{1,32}", "a short name")]
    rope_theta: Annotated[float, Range(1.0001, 1e15)] | None
    factor: Annotated[float, Range(1, 1e6)] | None
    partial_rotary_factor: Annotated[float, Range(1e-6, 1)] | None
    original_max_position_embeddings: Annotated[int, Range(1, 2**24)] | None
    low_freq_factor: Positive | None
    high_freq_factor: Positive | None
    beta_fast: Positive | None
    beta_slow: Positive | None
    attention_factor: Annotated[float, Range(1e-6, 1e6)] | None
    mscale: Annotated[float, Range(0, 1e6)] | None
    mscale_all_dim: Annotated[float, Range(0, 1e6)] | None
    truncate: bool | None


@dataclass(frozen=True)
class Facts:
    """The entries of config.json that are used, whatever the family; each may be missing."""

    vocab_size: Annotated[int, Range(1, 2**24)]
    hidden_size: Annotated[int, Range(1, 2**17)]
    intermediate_size: Annotated[int, Range(1, 2**20)]
    num_hidden_layers: Annotated[int, Range(1, 1000)]
    num_attention_heads: Annotated[int, Range(1, 2**12)]
    num_key_value_heads: Annotated[int, Range(1, 2**12)] | None
    head_dim: Annotated[int, Range(1, 2**13)] | None
    max_position_embeddings: Annotated[int, Range(2, 2**24)]
    hidden_act: Literal[tuple(ACT2FN)]  # type: ignore[valid-type]
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None
    torch_dtype: Literal["float64", "float32", "float16", "bfloat16"] | None
    rms_norm_eps: Annotated[float, Range(0, 1)]
    layer_norm_eps: Annotated[float, Range(0, 1)]
    initializer_range: Annotated[float, Range(0, 1)]
    attention_dropout: Share | None
    hidden_dropout: Share
    classifier_dropout: Share | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    use_parallel_residual: bool
    use_sliding_window: bool
    sliding_window: Annotated[int, Range(1, 2**24)] | None
    max_window_layers: Annotated[int, Range(0, 2**24)]
    layer_types: list[Literal["full_attention", "sliding_attention", "attention"]] | None
    bos_token_id: Token | None
    eos_token_id: Token | list[Token] | None
    pad_token_id: Token | None
    rope_parameters: dict[str, Any] | None
    rope_scaling: dict[str, Any] | None
    original_max_position_embeddings: Annotated[int, Range(1, 2**24)] | None
    rope_theta: Annotated[float, Range(1.0001, 1e15)] | None
    rotary_emb_base: Annotated[float, Range(1.0001, 1e15)]
    rotary_pct: Annotated[float, Range(1e-6, 1)]
    partial_rotary_factor: Annotated[float, Range(1e-6, 1)] | None
    per_layer_config: None  # layers that differ from each other
    quantization_config: dict[str, Any] | None
    attn_logit_softcapping: float | None
    alibi: bool | None
    add_cross_attention: bool | None
    attention_chunk_size: Annotated[int, Range(1, 2**24)] | None
    is_decoder: bool | None
    use_cache: bool | None
    architectures: list[str] | None
    pretraining_tp: Annotated[int, Range(0, 2**12)] | None


@dataclass(frozen=True)
class Generation:
    """The entries of generation_config.json that every generation needs."""

    bos_token_id: Token | None
    eos_token_id: Token | list[Token] | None
    pad_token_id: Token | list[Token] | None


Special = str | dict[str, Any] | None  # a token, or how it is matched beside its content


@dataclass(frozen=True)
class Tokenization:
    """The entries of tokenizer_config.json that are used."""

    tokenizer_class: str | None
    bos_token: Special
    eos_token: Special
    pad_token: Special
    unk_token: Special
    chat_template: str | list[dict[str, Any]] | dict[str, str] | None
    model_max_length: Annotated[float, Range(1, 1e31)] | None  # 1e30: transformers' own for none
    added_tokens_decoder: dict[str, dict[str, Any]] | None
    add_bos_token: bool | None
    add_eos_token: bool | None
    clean_up_tokenization_spaces: bool | None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a stranger's file; raises UserError where it is anything else, too large or too deep."""
    largest = LARGEST[file.name]
    if file.stat().st_size > largest:
        raise UserError(
            f"{file} must be at most {largest:,} bytes; it has {file.stat().st_size:,}. Take the original file."
        )
    try:
        content = parse_json(file.read_bytes(), "it")
    except UserError as error:
        raise UserError(f"{file} must be a JSON object; {str(error).rstrip('.')}. Take the original file.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} must be a JSON object; it holds {shown(content)}. Take the original file.")
    return content


def check_folder(folder: Path) -> None:
    """Raises UserError where the folder holds anything but plain files (a pipe would never end), or where the files of
    its tokenizer or its generation settings are not what they should be."""
    for file in folder.iterdir():
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise UserError(f"A teacher's folder holds plain files; {file} is a pipe, a socket or a device. Remove it.")
    for name, record in (
        ("tokenizer_config.json", Tokenization),
        ("generation_config.json", Generation),
        ("tokenizer.json", None),
    ):
        if (folder / name).is_file():
            content = read_json(folder / name)
            if record is not None:
                check_fields(content, record, f"{folder / name}")


def check_fields(content: dict[str, Any], record: type, where: str) -> dict[str, Any]:
    """The entries of `content` that the record knows; raises UserError where one does not fit its type."""
    known = {field.name: field.type for field in fields(record)}
    for name in known.keys() & content.keys():
        require(known[name], content[name], f"{where}: {name}")
    return {name: content[name] for name in content if name in known}


def config_of(raw: dict[str, Any], where: str) -> PreTrainedConfig:
    """The configuration of a teacher's config.json; raises UserError at what no model can be made of, or the exception
    of whatever fails."""
    kind: Any = raw.get("model_type")
    if kind != ConvertedConfig.model_type and (reason := family_refusal(kind)):
        raise UserError(f"{where} cannot be a teacher's. {reason}")
    config = CONFIG_MAPPING[kind].from_dict(_plain(raw, where))
    check_config(config, where)
    return config


def check_config(config: PreTrainedConfig, where: str) -> None:
    """Raises UserError at what only shows when all defaults are in place. Makes a model without memory, and its rotary
    frequencies."""
    host = config.host_config() if config.model_type == ConvertedConfig.model_type else config
    check_fields({name: getattr(host, name) for name in SIZES if hasattr(host, name)}, Facts, where)
    heads, kv_heads = host.num_attention_heads, getattr(host, "num_key_value_heads", None) or host.num_attention_heads
    if heads % kv_heads:
        raise UserError(
            f"{where}: num_attention_heads must be a multiple of num_key_value_heads; got {heads} and {kv_heads}."
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(host, name)
        if any(i >= host.vocab_size for i in (ids if isinstance(ids, list) else [ids]) if i is not None):
            raise UserError(f"{where}: {name} must be below vocab_size, {host.vocab_size}; got {shown(ids)}.")
    if config is not host:
        _check_layers(config, host, where)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # it notes its attention there
    host_model = model.host if config is not host else model
    rotary = type(host_model.base_model.rotary_emb)(config=host)
    for layer, mixer in enumerate(config.mixers if config is not host else ()):
        if mixer and mixer["shape"]["rotary_dim"] != 2 * rotary.inv_freq.numel():
            raise UserError(
                f"{where}: mixers[{layer}].shape.rotary_dim must be its host's, {2 * rotary.inv_freq.numel()}; got"
                f" {mixer['shape']['rotary_dim']}."
            )
    if not (rotary.inv_freq.isfinite().all() and math.isfinite(rotary.attention_scaling) and rotary.inv_freq.numel()):
        raise UserError(
            f"{where}: rotary positions must have finite frequencies; those of {shown(host.rope_parameters)} are not."
        )


def _check_layers(config: PreTrainedConfig, host: PreTrainedConfig, where: str) -> None:
    """Raises UserError where a student's mixers do not fit its host."""
    if len(config.mixers) != host.num_hidden_layers:
        raise UserError(
            f"{where}: mixers must be one for each of {host.num_hidden_layers} layers; got {len(config.mixers)}."
        )
    heads = host.num_attention_heads
    sizes = {
        "width": host.hidden_size,
        "num_heads": heads,
        "num_kv_heads": getattr(host, "num_key_value_heads", None) or heads,
        "head_dim": getattr(host, "head_dim", None) or host.hidden_size // heads,
    }
    for layer, mixer in enumerate(config.mixers):
        for name, size in sizes.items() if mixer else ():
            if mixer["shape"][name] != size:
                raise UserError(
                    f"{where}: mixers[{layer}].shape.{name} must be that of its host, {size}; got"
                    f" {mixer['shape'][name]}."
                )


def _plain(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The part that is used of a configuration of one of FAMILIES, or of a student; raises UserError at what no model
    can be made of."""
    if raw.get("model_type") == ConvertedConfig.model_type:
        return _converted(raw, where)
    facts = check_fields(raw, Facts, where)
    for name in ("rope_parameters", "rope_scaling"):
        if facts.get(name):
            facts[name] = check_fields(facts[name], Rotation, f"{where}: {name}")
    return {"model_type": raw["model_type"]} | facts


def _converted(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The part that is used of a student's configuration: `host`, its teacher's configuration, and a mixer or None for
    each layer."""
    own = check_fields(raw, Facts, where)
    host: Any = raw.get("host")
    mixers: Any = raw.get("mixers")
    require(dict[str, Any], host, f"{where}: host")
    require(Literal[FAMILIES], host.get("model_type"), f"{where}: host.model_type")
    require(list[dict[str, Any] | None], mixers, f"{where}: mixers")
    host = _plain(host, f"{where}: host")
    for layer, mixer in enumerate(mixers):
        if mixer is not None:
            _check_mixer(mixer, f"{where}: mixers[{layer}]")
    own |= {name: raw[name] for name in inspect.signature(ConvertedConfig.__init__).parameters if name in raw}
    return own | {"model_type": ConvertedConfig.model_type, "host": host, "mixers": mixers}


def _check_mixer(mixer: dict[str, Any], where: str) -> None:
    if mixer.keys() != {"name", "shape", "options"}:
        raise UserError(
            f"{where} must have name, shape and options; it has {shown(sorted(mixer))}. Repeat the run that made it."
        )
    require(Literal[tuple(MIXERS)], mixer["name"], f"{where}.name")
    for part, record in (("shape", AttentionShape), ("options", MIXERS[mixer["name"]].Options)):
        require(dict[str, Any], mixer[part], f"{where}.{part}")
        known = {field.name for field in fields(record)}
        if not mixer[part].keys() <= known:
            raise UserError(
                f"{where}.{part} may have {', '.join(sorted(known))}; it has {shown(sorted(mixer[part]))}. Repeat the"
                " run that made it."
            )
        if missing := {field.name for field in fields(record) if field.default is MISSING} - mixer[part].keys():
            raise UserError(f"{where}.{part} must have {', '.join(sorted(missing))} too. Repeat the run that made it.")
        try:
            record(**mixer[part])
        except UserError as error:
            raise UserError(f"{where}.{part}: {error}") from None
