"""A mixer in the place where a decoder layer of transformers expects its attention.

B batch · T tokens of this call
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from convert.mixers.base import Context, Mixer
from convert.models.cache import StudentCache


@dataclass(frozen=True)
class Call:
    """What one call of the model tells each of its mixers; through the host, whose own arguments change their names.

    `padding_mask` bool [B, T], `document_ids` [B, T], `found`: as in Context."""

    padding_mask: Tensor | None = None
    document_ids: Tensor | None = None
    cache: StudentCache | None = None
    found: dict[Hashable, Any] = field(default_factory=dict, repr=False)


class Slot(nn.Module):
    """A mixer where a decoder layer expects its attention: the one place that speaks transformers' calling
    convention."""

    def __init__(self, mixer: Mixer, layer: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.layer = layer

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        call: Call | None = None,
        cache: StudentCache | None = None,
        past_key_values: StudentCache | None = None,
        layer_past: StudentCache | None = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        use_cache: Any = None,
        is_causal: Any = True,
        output_hidden_states: Any = None,
        output_attentions: Any = None,
    ) -> tuple[Tensor, None]:
        """The cache has another name in each version of transformers. Masks and positions are in `call` and the rotary
        table, the other names mean nothing to a mixer, and what has none here is refused: it may mean something."""
        if call is None:
            raise TypeError(
                "A mixer is told by ConvertedForCausalLM where padding and documents are: call that, not the host"
                " inside of it."
            )
        if is_causal is False:
            raise TypeError("A mixer cannot look ahead, as is_causal=False asks.")
        given = next((c for c in (cache, past_key_values, layer_past) if c is not None), None)
        if given is not call.cache:
            raise TypeError(
                f"Layer {self.layer} must be given the cache of the call, and was given {given!r}: transformers handed"
                " it on otherwise."
            )
        x, layer = hidden_states, None if given is None else given.layers[self.layer]
        mask, document_ids = (None if t is None else t.to(x.device) for t in (call.padding_mask, call.document_ids))
        context = Context(*position_embeddings, mask, document_ids, call.found)
        y, state = self.mixer(x, context, None if layer is None else layer.state)
        if layer is not None:
            layer.state = state
        return y, None


def attention_of(block: nn.Module) -> nn.Module:
    """The attention module, or the slot, of a decoder layer."""
    return block.attention if "attention" in block._modules else block.self_attn
