"""Settings of a .gguf file that transformers does not read. Those that a configuration can say are brought into it; the
others are refused."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from convert.core.errors import UserError
from convert.models.weights import refuse_left_over, rotary_of

FACTORS = "rope_freqs.weight"  # [rotary dimensions / 2]: what the frequencies are divided by
ROUNDING = 1e-5  # of frequencies in float32, after a few operations
NEUTRAL = {  # settings that change the function and that transformers does not read -> what changes nothing
    "rope.scaling.type": ("none", ""),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "expert_count": (0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "attention.clamp_kqv": (0.0,),
}


def complete(config: PreTrainedConfig, file: Path) -> PreTrainedConfig:
    """The configuration that transformers read, with the rotary scaling of the file. Raises UserError where the file
    has a setting that changes the function and that no configuration can say."""
    reader = _reader(file)
    arch = _setting(reader, "general.architecture")
    settings = {name: _setting(reader, f"{arch}.{name}") for name in (*NEUTRAL, "rope.scaling.factor")}
    rope = dict(config.rope_parameters)
    if settings["rope.scaling.type"] == "linear":
        rope |= {"rope_type": "linear", "factor": settings["rope.scaling.factor"] or 1.0}
        settings["rope.scaling.type"] = None
    for name, neutral in NEUTRAL.items():
        if settings[name] is not None and settings[name] not in neutral:
            raise UserError(
                f"A .gguf file's settings must be ones that transformers reads; {file} has"
                f" {arch}.{name}={settings[name]}."
            )
    factors = next((torch.tensor(t.data).double() for t in reader.tensors if t.name == FACTORS), None)
    if factors is not None and bool((factors != 1).any()):
        if rope.get("rope_type", "default") != "default":
            raise UserError(
                f"Rotary positions are scaled in one way; {file} has {FACTORS} beside"
                f" rope.scaling.type={rope['rope_type']}."
            )
        rope = _llama3(config, factors, file)
    config.rope_parameters = rope
    return config


def _llama3(config: PreTrainedConfig, factors: Tensor, file: Path) -> dict:
    """The parameters of Llama 3's scaling that these factors were made from (llama.cpp's converter keeps the factors
    alone)."""
    theta, pairs = config.rope_parameters["rope_theta"], len(factors)
    plain = theta ** -(torch.arange(pairs).double() / pairs)
    for slowed, kept in _bounds(factors, plain / (2 * math.pi)):
        for original in (round(1 / slowed), 8192):  # only ratios matter: first as Llama's own configurations say them
            low = 1.0 if original != 8192 else original * slowed
            rope = {
                "rope_type": "llama3", "rope_theta": theta, "factor": factors.max().item(), "low_freq_factor": low,
                "high_freq_factor": low * kept / slowed, "original_max_position_embeddings": original,
            }  # fmt: skip
            made = type(config)(**config.to_dict() | {"rope_parameters": rope})
            frequencies = ROPE_INIT_FUNCTIONS["llama3"](made, torch.device("cpu"))[0].double()
            if torch.allclose(frequencies * factors, plain, rtol=ROUNDING, atol=0):
                return rope
    raise UserError(
        f"Rotary factors must be those of Llama 3's scaling, the one that a configuration can say; {FACTORS} of {file}"
        " holds others."
    )


def _bounds(factors: Tensor, rates: Tensor) -> Iterator[tuple[float, float]]:
    """Candidates for the two rates (turns per token): up to the first a wave is slowed by the whole factor, from the
    second it is kept, and between them the share that it keeps grows along a line."""
    factor = factors.max().item()
    if factor <= 1:
        return
    share = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (share > ROUNDING) & (share < 1 - ROUNDING)
    slowed = rates[share <= ROUNDING].max().item()
    kept = rates[share >= 1 - ROUNDING].min().item() if bool((share >= 1 - ROUNDING).any()) else math.inf
    if not bool(between.any()):
        ratio = min(kept / slowed, 64.0)
        yield slowed * ratio ** (1 / 3), slowed * ratio ** (2 / 3)
        return
    x, y = rates[between], share[between]
    first = (x / (1 + 3 * y)).mean().item()
    yield first, 4 * first  # as in every Llama 3
    # the line may not bend before its ends
    slope = max((y / (x - slowed)).max().item(), ((1 - y) / (kept - x)).max().item())
    if len(x) > 1:
        slope = ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()
    yield ((x - y / slope).mean().item(), (x + (1 - y) / slope).mean().item())


def check_whole(model: PreTrainedModel, file: Path) -> None:
    """Raises UserError where a tensor of the file is not in the model, because transformers' map of names leaves it
    out."""
    import gguf

    reader = _reader(file)
    arch = next(
        arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == _setting(reader, "general.architecture")
    )
    places = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    taken = {places.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.state_dict()}
    left_over = {tensor.name for tensor in reader.tensors} - taken
    factors = next((torch.tensor(tensor.data).double() for tensor in reader.tensors if tensor.name == FACTORS), None)
    if factors is not None:
        plain = model.config.rope_parameters["rope_theta"] ** -(torch.arange(len(factors)).double() / len(factors))
        if torch.allclose(rotary_of(model).inv_freq.cpu().double() * factors, plain, rtol=ROUNDING, atol=0):
            left_over.discard(FACTORS)
    refuse_left_over(sorted(left_over), str(file))


def _reader(file: Path) -> Any:
    """A gguf.GGUFReader; the package is optional."""
    import gguf

    return gguf.GGUFReader(file)


def _setting(reader: Any, name: str) -> Any:
    """The value of a setting of the file, None where it has none of that name."""
    field = reader.get_field(name)
    return None if field is None else field.contents()
