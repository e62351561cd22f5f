"""Teachers: short names of known models, what a name stands for, and loading it with every refusal before the weights are read.

Sizes are from the models' own configuration files; the tests check each against its exact parameter count.
"""

import contextlib
import copy
import difflib
import importlib.util
import os
import re
import socket
import struct
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase,
)  # fmt: skip

from convert.errors import UserError
from convert.model import ConvertedConfig
from convert.projections import refusal

EMBEDDED = "neox-nano"
EMBEDDED_FOLDER = Path(__file__).parent / "nano"
PILE_LIKE = "hub:Skylion007/openwebtext"  # the paper's
WEB = "hub:HuggingFaceFW/fineweb-edu:sample-10BT"  # ours


@dataclass(frozen=True)
class KnownTeacher:
    """`fields` rebuild the hub's configuration without asking it; None: the package's folder has it. `data`: the default text."""

    hub: str | None
    data: str
    model_type: str = "gpt_neox"
    fields: dict | None = None


def _pythia(size: str, width: int, layers: int, heads: int, vocab_size: int = 50304) -> KnownTeacher:
    fields = dict(
        vocab_size=vocab_size, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width,
        max_position_embeddings=2048, layer_norm_eps=1e-5, use_parallel_residual=True, attention_bias=True, hidden_act="gelu",
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25),
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, dtype="float16",
    )  # fmt: skip
    return KnownTeacher(f"EleutherAI/pythia-{size}", PILE_LIKE, "gpt_neox", fields)


def _llama_like(hub: str, model_type: str, sizes: tuple[int, int, int, int, int], head_dim: int, **fields) -> KnownTeacher:
    width, layers, heads, kv_heads, inner = sizes
    fields |= dict(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        intermediate_size=inner, attention_bias=False, hidden_act="silu", dtype="bfloat16",
    )  # fmt: skip
    return KnownTeacher(hub, WEB, model_type, fields)
