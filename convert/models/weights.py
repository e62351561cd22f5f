"""Checks that the weights of a teacher were read whole. transformers only logs tensors that it has no place for; here
they are a reason to refuse the teacher."""

import copy
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from convert.core.errors import UserError

# causal masks that old checkpoints hold, Pythia's among them
MASKS = re.compile(r"\.(attention|self_attn)\.(bias|masked_bias)$")


def check_whole(model: PreTrainedModel, found: dict, where: str, files: Iterable[Path]) -> None:
    """Raises UserError where a tensor is missing, misshapen or left over. `found` is the loading info of
    from_pretrained, `files` are the safetensors files that were read, and `where` names the teacher."""
    refuse_misfits(found, where)
    if (
        model.config.tie_word_embeddings
        and model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    ):
        refuse_untied(where)
    refuse_left_over([name for name in found["unexpected_keys"] if not MASKS.search(name)], where)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"A teacher is one set of weights; {where} has an adapter beside them. Merge it (peft's merge_and_unload)"
            " and save that."
        )
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in (name for name in tensors.keys() if name.endswith("rotary_emb.inv_freq")):  # noqa: SIM118
                check_frequencies(model, tensors.get_tensor(name), name, where)


def check_size(
    config: PreTrainedConfig, files: Sequence[Path], where: str, auto: type[Any] = AutoModelForCausalLM
) -> None:
    """Raises UserError where the configuration describes a model more than twice as large as its files, before memory
    for it is taken. `auto` is the class that makes it."""
    with torch.device("meta"):
        wanted = auto.from_config(copy.deepcopy(config)).num_parameters()
    held = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            held += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    if wanted > 2 * held:
        raise UserError(
            f"Weights must fit config.json; that of {where} describes {wanted:,} parameters, and its files hold"
            f" {held:,}. Take the configuration that these weights were made with."
        )


def refuse_misfits(found: dict, where: str) -> None:
    """Raises UserError where a tensor is missing or misshapen, by the loading info of from_pretrained."""
    wrong = sorted(found["missing_keys"]) + sorted(name for name, *_ in found["mismatched_keys"])
    if wrong:
        raise UserError(
            f"Weights must fit config.json; in {where} {len(wrong)} tensors are missing or misshapen, first {wrong[0]}."
        )


def refuse_untied(where: str) -> None:
    """Raises UserError: the head of these files is not the embedding that it should be."""
    raise UserError(
        f"A head that config.json ties to the embedding must equal it; {where} holds another beside it. Say"
        " tie_word_embeddings: false if the head is what the model was trained with, or take it out of the file."
    )


def refuse_left_over(names: list[str], where: str) -> None:
    """Raises UserError where these names of tensors that no parameter took are not none."""
    if names:
        raise UserError(
            f"Weights are read whole; {where} holds {len(names)} tensors that its configuration has no"
            f" place for, first {min(names)}. Give the configuration that these weights were made with."
        )


def rotary_of(model: nn.Module) -> nn.Module:
    """The module with the rotary frequencies of all layers."""
    return next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))


def check_frequencies(model: PreTrainedModel, stored: torch.Tensor, name: str, where: str) -> None:
    """Raises UserError where stored rotary frequencies (in old checkpoints) are not those of the configuration, from
    which transformers makes them."""
    made, precision = rotary_of(model).inv_freq.cpu().double(), torch.finfo(stored.dtype)
    if stored.shape != made.shape or not torch.allclose(
        stored.double(), made, rtol=4 * precision.eps, atol=precision.tiny
    ):
        raise UserError(
            f"Rotary frequencies must be those of config.json (rope_theta, rope_scaling); {name} in {where} holds"
            " others. Mend config.json."
        )
