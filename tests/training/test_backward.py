"""The backward pass through a vocabulary in chunks."""

import pytest
import torch

from convert.objectives.divergences import cross_entropy
from convert.training.backward import backward_through_head
from tests.objectives.test_divergences import logits


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_backward_through_head_equals_one_plain_backward(chunk):
    """Same loss and gradients, of the head and of what is below it, whatever the size of the chunks."""
    x, targets = logits(11, 6), torch.arange(11) % 9
    grads = []
    for chunked in (True, False):
        torch.manual_seed(0)
        below, head = torch.nn.Linear(6, 6, dtype=torch.float64), torch.nn.Linear(6, 9, dtype=torch.float64)
        hidden = below(x)
        if chunked:
            loss = backward_through_head(hidden, head, lambda z, rows: cross_entropy(z, targets[rows]).sum(), chunk)
        else:
            loss = cross_entropy(head(hidden).float(), targets).sum()
            loss.backward()
        grads.append([loss.detach(), *(p.grad for p in (*below.parameters(), *head.parameters()))])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)
    assert grads[0][1].abs().max() > 1e-3


def test_backward_through_head_never_holds_more_logits_than_a_chunk():
    seen = []
    hidden, head = logits(10, 4).float().requires_grad_(), torch.nn.Linear(4, 50)

    def loss(z, rows):
        seen.append(z.shape)
        return z.sum()

    backward_through_head(hidden, head, loss, 3)
    assert seen == [(3, 50), (3, 50), (3, 50), (1, 50)]
