"""On a device the host runs ahead; what makes it wait there is done once a call, by the first layer."""

import sys

import pytest
import torch

from convert.mixers import MIXERS
from tests.mixers.small_layers import SHAPES, context, inputs, mixer_of
from tests.training.stages import Reads

LENGTH = 160  # more than two blocks of a window
aten = torch.ops.aten
COUNTING = {
    aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten._unique2.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Waits(Reads):
    """Counts how often the host would wait: for a number, or for how many there are."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function in INDEXING and any(at is not None and at.dtype == torch.bool for at in args[1])
        self.count += function in COUNTING or by_mask
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_only_the_first_layer_of_a_call_waits_for_the_device(name, packed, monkeypatch):
    for module in list(sys.modules.values()):  # operators read values where that costs nothing
        if module.__name__.startswith("kernels.") and hasattr(module, "can_read_values"):
            monkeypatch.setattr(module, "can_read_values", lambda t: False)
    shape = SHAPES["gqa-norms"]
    layers = [mixer_of(name, shape, **({"window": 8} if name == "gate-swa" else {})) for _ in range(3)]
    x = inputs(shape, LENGTH).requires_grad_()
    documents = torch.arange(LENGTH) // 50 if packed else None
    c = context(shape, torch.arange(LENGTH) % 50 if packed else torch.arange(LENGTH), documents=documents)
    counts = []
    for layer in layers:
        with Waits() as waits:
            layer(x, c)[0].square().sum().backward()
        counts.append(waits.count)
    assert counts[1:] == [0, 0] and counts[0] <= 2
