"""Backward passes: outside of autocast, and through a vocabulary in chunks.

N tokens · D width · V vocabulary
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from convert.core.processes import world


def backward(*roots: Tensor, gradients: tuple[Tensor | None, ...] | None = None) -> None:
    """Backpropagate with autocast off, wherever it is called: operators then compute their gradients in the precision
    of their own tensors."""
    with torch.autocast(roots[0].device.type, enabled=False):
        torch.autograd.backward(roots, gradients)


def backward_through_head(
    hidden_ND: Tensor,
    head: nn.Module,
    loss_of_logits: Callable[[Tensor, slice], Tensor],
    chunk: int,
    also: Tensor | None = None,
) -> Tensor:
    """Backpropagate sum(loss_of_logits(head(hidden), rows)) without ever holding the logits of more than `chunk`
    tokens.

    `loss_of_logits(logits, rows)` gets a chunk's logits and the slice of its rows. Gradients of the head and of what
    made `hidden_ND` accumulate as a plain backward's would. `also`: another loss from the same graph. Returns the
    loss."""
    leaf = hidden_ND.detach().requires_grad_(hidden_ND.requires_grad)
    total = torch.zeros((), device=hidden_ND.device)
    # among several processes, one without a target takes part in the sum of the head's gradients all the same
    for start in range(0, max(len(leaf), int(world() > 1)), chunk):
        rows = slice(start, min(start + chunk, len(leaf)))
        loss = loss_of_logits(head(leaf[rows]).float(), rows)
        backward(loss)
        total += loss.detach()
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad  # of no tokens there is none
    if also is not None:
        backward(hidden_ND, also, gradients=(gradient, None))
        return total + also.detach()
    if hidden_ND.requires_grad:
        backward(hidden_ND, gradients=(gradient,))
    return total
