"""Positions of the tokens of a call, which of them are padding, and which document each is in.

B batch · T tokens of this call · S tokens of a mask
"""

import torch
from torch import Tensor

from convert.models.cache import StudentCache


def locate(
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: StudentCache | None,
    keeps_attention: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Positions [B, T]; the padding mask bool [B, T], True at real tokens, or None where nothing is padded; and
    document ids [B, T], or None where no row has two. `x`: [B, T, ...].

    Positions go on from the cache's count of each row's real tokens. A mask covers all tokens so far or, where no layer
    keeps its attention, this call's. As in transformers, positions that jump in a call without mask or cache are packed
    documents."""
    B, T = x.shape[:2]
    seen = 0 if cache is None else cache.seen
    padding_mask = None if attention_mask is None else _padding_mask(attention_mask, B, T, seen, keeps_attention)
    document_ids = None
    if position_ids is None:
        steps = torch.ones(B, T, dtype=torch.long, device=x.device) if padding_mask is None else padding_mask.long()
        position_ids = (steps.cumsum(1) - 1).clamp(min=0)
        if cache is not None and cache.rows is not None:
            position_ids = position_ids + cache.rows[:, None]
    else:
        position_ids = position_ids.expand(B, T)
        if attention_mask is None and cache is None:
            document_ids = documents_of(position_ids)
    return position_ids, padding_mask, document_ids


def _padding_mask(mask: Tensor, B: int, T: int, seen: int, keeps_attention: bool) -> Tensor | None:
    """The mask of this call's tokens, bool [B, T]; None where all are real. Kept attention needs the mask of every
    key."""
    lengths = {seen + T} if keeps_attention else {T, seen + T}
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    if shape not in {(B, length) for length in lengths}:
        wanted = " or ".join(f"[{B}, {length}]" for length in sorted(lengths))
        raise ValueError(
            "An attention mask says of each token whether it is one (1) or padding (0), and mixers honour no other:"
            f" with {T} tokens after {seen} it must be {wanted}, and is"
            f" {list(shape) if isinstance(shape, tuple) else f'a {shape}'}. Packed documents are told by position_ids"
            " that start anew."
        )
    real = mask[:, -T:].bool()
    if mask.dtype == torch.bool:
        everywhere, sound = real.all(), True
    else:  # one look at the device for both
        everywhere, sound = torch.stack([real.all(), ((mask == 0) | (mask == 1)).all()]).tolist()
    if not sound:
        raise ValueError(
            "An attention mask must hold 1 for tokens and 0 for padding, and this one holds other values. Packed"
            " documents are told by position_ids that start anew."
        )
    return None if everywhere else real


def documents_of(position_ids: Tensor) -> Tensor | None:
    """Document ids [B, T] of packed rows, whose positions start anew in each document; None where no row has two."""
    jumps = position_ids.diff(dim=1) != 1
    return torch.nn.functional.pad(jumps.long().cumsum(1), (1, 0)) if bool(jumps.any()) else None


def follows(cache_position: Tensor, x: Tensor, cache: StudentCache | None) -> bool:
    """Whether it numbers the tokens `x` [B, T, ...] from those on that the cache has seen, padding counted."""
    seen, T = 0 if cache is None else cache.seen, x.shape[1]
    return torch.equal(
        cache_position, torch.arange(seen, seen + T, device=cache_position.device, dtype=cache_position.dtype)
    )
