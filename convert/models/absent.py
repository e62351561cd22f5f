"""A teacher that is not needed for a while leaves the memory, and comes back from where it was loaded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from convert.core.errors import UserError
from convert.models.saving import fingerprint
from convert.models.sharding import is_shared_out


@contextmanager
def out_of_memory(model: PreTrainedModel, again: Callable[[], PreTrainedModel]) -> Iterator[None]:
    """Parameters and buffers of the model have no memory while this is open; then it gets those of the model that
    `again()` loads. Raises UserError where that has other weights. After an exception the model stays without. One that
    processes share out stays: each has its part alone."""
    if is_shared_out(model):
        yield
        return
    known, device = fingerprint(model), model.device
    model.to_empty(device=torch.device("meta"))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    yield
    loaded = again()
    if fingerprint(loaded) != known:
        raise UserError(
            "The teacher that is loaded again behind a step must be the one from before it; its files changed"
            " meanwhile. Put them back; the same command goes on from there."
        )
    for ours, theirs in zip(model.modules(), loaded.modules(), strict=True):
        ours._parameters, ours._buffers = theirs._parameters, theirs._buffers
