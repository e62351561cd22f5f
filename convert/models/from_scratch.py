"""Students of a language family with sizes of their own: what a model that was never converted would look like."""

from dataclasses import dataclass
from typing import Annotated, Any

from transformers import AutoConfig, PreTrainedConfig

from convert.core.errors import UserError
from convert.core.fields import Checked, Range, require
from convert.mixers.projections import family_refusal

SHARE = 2 / 3  # of the teacher's layers and width, where none are given (ours)


@dataclass(frozen=True)
class Sizes(Checked):
    """Sizes of a student; None: two thirds of the teacher's layers and width, and what the family makes of those."""

    layers: Annotated[int, Range(1, 1000)] | None = None
    width: Annotated[int, Range(8, 2**18)] | None = None
    heads: Annotated[int, Range(1, 2**12)] | None = None
    kv_heads: Annotated[int, Range(1, 2**12)] | None = None
    # width of the MLP; None: 8/3 of the width (Llama), in steps of 32
    inner: Annotated[int, Range(8, 2**20)] | None = None


def build_config(family: str, sizes: Sizes, teacher: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of a student with the teacher's vocabulary, special tokens and positions.

    Raises UserError for a family that is not known, and for sizes that do not fit each other."""
    require(Sizes, sizes, "The sizes of a student")
    if reason := family_refusal(family):
        raise UserError(f"A student from scratch: {reason}")
    heads = sizes.heads or teacher.num_attention_heads
    head_dim = max(2, 2 * round(SHARE * teacher.hidden_size / heads / 2))
    width = sizes.width or heads * head_dim
    if width % heads or width // heads % 2:
        raise UserError(
            f"A student's width must be its heads times an even number; got {width} for {heads} heads. Set width or"
            " heads."
        )
    kv_heads = sizes.kv_heads or heads
    if heads % kv_heads:
        raise UserError(f"A student's heads must share kv_heads evenly; got {heads} for {kv_heads}. Set kv_heads.")
    inner = sizes.inner or 32 * max(1, round(width * 8 / 3 / 32))
    found: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": sizes.layers or max(1, round(SHARE * teacher.num_hidden_layers)),
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    if family != "gpt_neox":
        found |= {"num_key_value_heads": kv_heads, "head_dim": width // heads}
    same = (
        "vocab_size",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
    )  # a pad token's embedding never learns
    found |= {name: getattr(teacher, name) for name in same}
    return AutoConfig.for_model(family, **found, tie_word_embeddings=False)
