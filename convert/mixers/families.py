"""The families of teachers, and what differs between their configurations and their decoder layers."""

from typing import Any

FAMILIES = ("gpt_neox", "llama", "mistral", "qwen2", "qwen3")


def layer_window(config: Any, layer: int) -> int | None:
    """The sliding window of one layer of a teacher in tokens, or None where it sees everything."""
    if config.model_type == "mistral":
        return config.sliding_window
    if config.model_type in ("qwen2", "qwen3") and config.layer_types[layer] == "sliding_attention":
        return config.sliding_window
    return None


def attention_name(model_type: str) -> str:
    """What a decoder layer of the family calls its attention module."""
    return "attention" if model_type == "gpt_neox" else "self_attn"
