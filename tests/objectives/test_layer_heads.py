"""One-for-All over the vocabulary, with all but a few tokens as one."""

import pytest
import torch

from convert.objectives.layer_heads import bucketed_cross_entropy, told_apart
from convert.objectives.one_for_all import enhanced_cross_entropy
from tests.objectives.test_divergences import logits
from tests.objectives.test_one_for_all import one_hot


@pytest.mark.parametrize("gamma", [1.0, 1.4])
@pytest.mark.parametrize("top_k", [1, 3, 6, 7])
def test_it_is_the_loss_of_the_merged_distributions(top_k, gamma):
    s, t, targets = logits(5, 7).requires_grad_(), logits(5, 7, seed=1), torch.tensor([0, 6, 2, 2, 5])
    tokens, p = told_apart(t, targets, top_k)
    found = bucketed_cross_entropy(s, tokens, p, gamma)
    for i, target in enumerate(targets.tolist()):
        kept = sorted({target, *t[i].topk(top_k).indices.tolist()})
        rest = [c for c in range(7) if c not in kept]

        def merged(z, kept=kept, rest=rest):
            p = z.softmax(-1)
            return torch.cat([p[kept], p[rest].sum()[None]]).log()[: len(kept) + bool(rest)][None]

        e = one_hot([kept.index(target)], len(kept) + bool(rest))
        torch.testing.assert_close(found[i : i + 1], enhanced_cross_entropy(merged(s[i]), merged(t[i]), e, gamma))
    assert torch.autograd.gradcheck(lambda z: bucketed_cross_entropy(z, tokens, p, gamma), (s,))
