"""Backward passes: outside of autocast, and through a vocabulary in chunks.

N tokens · D width · V vocabulary
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def backward(*roots: Tensor, gradients: tuple[Tensor | None, ...] | None = None) -> None:
    """Backpropagate with autocast off, wherever it is called: operators then compute their gradients in the precision
    of their own tensors."""
    with torch.autocast(roots[0].device.type, enabled=False):
        torch.autograd.backward(roots, gradients)


def gradient_through_head(
    hidden_ND: Tensor, head: Callable[[Tensor], Tensor], loss_of_logits: Callable[[Tensor, slice], Tensor], chunk: int
) -> tuple[Tensor, Tensor]:
    """sum(loss_of_logits(head(hidden), rows)) and its gradient [N, D], without ever holding the logits of more than
    `chunk` tokens. Gradients of the head accumulate as a plain backward's would.

    `loss_of_logits(logits, rows)` gets a chunk's logits and the slice of its rows."""
    leaf = hidden_ND.detach().requires_grad_(hidden_ND.requires_grad)
    total = torch.zeros((), device=hidden_ND.device)
    for start in range(0, len(leaf), chunk):
        rows = slice(start, min(start + chunk, len(leaf)))
        loss = loss_of_logits(head(leaf[rows]).float(), rows)
        backward(loss)
        total += loss.detach()
    return total, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad  # of no tokens there is none


def backward_through_head(
    hidden_ND: Tensor, head: nn.Module, loss_of_logits: Callable[[Tensor, slice], Tensor], chunk: int
) -> Tensor:
    """Backpropagate the loss of `gradient_through_head` into what made `hidden_ND`, too. Returns the loss."""
    total, gradient = gradient_through_head(hidden_ND, head, loss_of_logits, chunk)
    if hidden_ND.requires_grad:
        backward(hidden_ND, gradients=(gradient,))
    return total
