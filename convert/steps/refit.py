"""Refit of output projections: before any step of training, each new mixer's is solved for what its layer's attention
gives.

N tokens · C channels that enter the output projection · D width
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from convert.core.processes import rank, share, sum_in_place
from convert.data.batches import Batch
from convert.mixers.base import Context, Mixer
from convert.models.access import hidden_states, layers_of, slots_of
from convert.models.positions import documents_of
from convert.models.sharding import fill, unsharded
from convert.models.slot import attention_of

RIDGE = 0.1  # of the mean square of the channels (ours: as good at once as 1e-3, and after 40 steps of align better)


@torch.no_grad()
def refit_outputs(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Batch], layers: Sequence[int]
) -> None:
    """Set the output projections of the mixers in these layers, in place, to those whose outputs on these batches are
    closest to the teacher's attention outputs, on its own inputs: ridge regression, solved in float64.

    A mixer that weighs the tokens otherwise than softmax does also answers at another scale, so the projection that it
    inherits fits it badly (the value amplitudes of Taylor-Calibrate, arXiv 2606.16429, solved for whole layers)."""
    slots, blocks = slots_of(student), list(layers_of(teacher))
    squares: dict[int, Tensor] = {}
    products: dict[int, Tensor] = {}

    def see(layer: int, documents: Tensor | None, counts: bool) -> Callable[[nn.Module, tuple, dict, tuple], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
            mixer: Mixer = slots[layer].mixer
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            cos, sin = kwargs["position_embeddings"]
            entering = _entering(mixer.out, lambda: mixer(x, Context(cos, sin, None, documents)))
            with unsharded(mixer):
                wanted = output[0] if mixer.out.bias is None else output[0] - mixer.out.bias
            h_NC, y_ND = entering.float().flatten(0, 1), wanted.float().flatten(0, 1)
            h_NC = h_NC if counts else torch.zeros_like(h_NC)
            squares[layer] = squares.get(layer, 0) + (h_NC.T @ h_NC).double()
            products[layer] = products.get(layer, 0) + (h_NC.T @ y_ND).double()

        return hook

    for _, batch, counts in tqdm(share(batches), desc="refit", unit="batch", dynamic_ncols=True, disable=rank() > 0):
        batch = batch.to(next(teacher.parameters()).device)
        documents = documents_of(batch.position_ids)
        hooks = [
            attention_of(blocks[layer]).register_forward_hook(see(layer, documents, counts), with_kwargs=True)
            for layer in layers
        ]
        try:
            hidden_states(teacher, batch)
        finally:
            for hook in hooks:
                hook.remove()
    for layer in layers:
        sum_in_place(squares[layer], products[layer])
        square = squares[layer]
        square.diagonal().add_(RIDGE * square.diagonal().mean())
        solved = torch.linalg.solve(square, products[layer])
        fill(slots[layer].mixer.out.weight, lambda rows, whole=solved.T: whole[rows])


def _entering(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """Return what enters the module while `run` runs."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        run()
    finally:
        hook.remove()
    return seen[0]
