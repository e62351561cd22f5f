"""The configuration of a converted model: the teacher's own, and which mixer is in which layer."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

# what the teacher's file says of itself, not of the host
OF_THE_FILE = ("architectures", "dtype", "transformers_version", "_name_or_path")


def _of_host(name: str) -> property:
    """A field of the host's configuration, which is read and written there: one fact has one place."""
    return property(lambda self: getattr(self.host, name), lambda self, value: setattr(self.host, name, value))


class ConvertedConfig(PreTrainedConfig):
    """`host`: the teacher's configuration, the live host's own; a dictionary of it in files. `mixers`: for each layer
    None (its attention is kept) or {"name", "shape", "options"}, from which the mixer is built. Layers may have
    different mixers."""

    model_type = "converted"
    sub_configs = {"host": AutoConfig}  # what is set for the attention of all layers reaches it

    vocab_size = _of_host("vocab_size")
    tie_word_embeddings = _of_host("tie_word_embeddings")
    use_cache = _of_host("use_cache")
    hidden_size = _of_host("hidden_size")
    num_hidden_layers = _of_host("num_hidden_layers")
    max_position_embeddings = _of_host("max_position_embeddings")
    bos_token_id = _of_host("bos_token_id")
    eos_token_id = _of_host("eos_token_id")
    pad_token_id = _of_host("pad_token_id")

    def __init__(
        self,
        host: dict[str, Any] | PreTrainedConfig | None = None,
        mixers: list[dict[str, Any] | None] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(host, dict):
            fields = {k: v for k, v in host.items() if k not in ("model_type", *OF_THE_FILE)}
            host = AutoConfig.for_model(host["model_type"], **fields)
        # transformers makes one without arguments, to compare with
        self.host: PreTrainedConfig = PreTrainedConfig() if host is None else host
        self.mixers = mixers or []
        kwargs.setdefault("attn_implementation", getattr(self.host, "_attn_implementation", None))
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as transformers gives it; a student just made and one that was read give the same."""
        found = super().to_dict()
        found["host"] = {k: v for k, v in found["host"].items() if k not in OF_THE_FILE}
        return found

    def host_config(self) -> PreTrainedConfig:
        """The teacher's configuration."""
        return self.host

    @property
    def keeps_attention(self) -> bool:
        """Whether some layer still has its attention."""
        return any(mixer is None for mixer in self.mixers)


AutoConfig.register("converted", ConvertedConfig, exist_ok=True)
