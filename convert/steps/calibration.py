"""What a model's attention layers see: the statistics that some mixers start from.

B batch · T time · D width · H query heads · R rotary dimensions
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from convert.core.processes import rank, share, sum_in_place
from convert.data.batches import Batch
from convert.mixers.init.qkv import copy_qkv
from convert.mixers.parts import QKV
from convert.mixers.projections import CalibrationStats, Projections
from convert.models.access import hidden_states, layers_of
from convert.models.positions import documents_of
from convert.models.slot import Slot, attention_of


@torch.no_grad()
def inputs_of(model: PreTrainedModel, batches: list[Batch], look_back: bool = False) -> list[CalibrationStats]:
    """Return the statistics of the inputs of every attention layer over these batches, in float32. In the place of a
    mixer all pairs of tokens weigh the same.

    `look_back`: whether to measure how far the heads of each layer of attention look back, too."""
    blocks = layers_of(model)
    look_backs: list[Any] = [None] * len(blocks)
    means, moments, uniform, drifts = ([0.0] * len(blocks) for _ in range(4))
    documents, weight_of_batch = None, 1 / len(batches)

    def see(layer: int) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).float()
            cos, sin = (t.float() for t in kwargs["position_embeddings"])
            if isinstance(module, Slot):
                pairs = x.new_ones(len(x), x.shape[1], x.shape[1]).tril()
            else:
                pairs, distance = _squared_attention(Projections.of(module), x, cos, sin, documents, look_back)
                if distance is not None:
                    before = 0 if look_backs[layer] is None else look_backs[layer]
                    look_backs[layer] = before + weight_of_batch * distance
            pairs = pairs / pairs.sum()
            x, weight = x.flatten(0, 1), pairs.sum(1).flatten()
            weighted = x * ((weight + 1 / len(x)) / 2)[:, None]
            means[layer] = means[layer] + weight_of_batch * weighted.sum(0)
            moments[layer] = moments[layer] + weight_of_batch * weighted.T @ x
            uniform[layer] = uniform[layer] + weight_of_batch / len(x) * x.T @ x
            for t in (cos, sin):  # cos(a - b) = cos a cos b + sin a sin b
                half = t[..., : t.shape[-1] // 2]
                drifts[layer] = drifts[layer] + weight_of_batch * (half * (pairs @ half)).sum((0, 1))

        return hook

    hooks = [
        attention_of(block).register_forward_pre_hook(see(layer), with_kwargs=True)
        for layer, block in enumerate(blocks)
    ]
    try:
        for _, batch, counts in tqdm(
            share(batches), desc="calibrate", unit="batch", dynamic_ncols=True, disable=rank() > 0
        ):
            weight_of_batch = 1 / len(batches) if counts else 0.0
            batch = batch.to(model.device)
            documents = documents_of(batch.position_ids)
            hidden_states(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for found in (means, moments, uniform, drifts, look_backs):
        sum_in_place(*(tensor for tensor in found if tensor is not None))
    return [CalibrationStats(*parts) for parts in zip(means, moments, uniform, drifts, look_backs, strict=True)]


def _squared_attention(
    p: Projections, x: Tensor, cos: Tensor, sin: Tensor, documents: Tensor | None, look_back: bool
) -> tuple[Tensor, Tensor | None]:
    """[B, T, T]: of query t and key s the squared share of attention, summed over the heads. And, if asked, each head's
    mean of t - s over all queries, weighted by attention, [H]."""
    with torch.device(x.device):
        qkv = QKV(p.shape)
    copy_qkv(qkv, p)
    q, k, _ = qkv(x, cos, sin)
    times = torch.arange(x.shape[1], device=x.device)
    distance = times[:, None] - times
    hidden = (distance < 0)[None] if p.window is None else ((distance < 0) | (distance >= p.window))[None]
    if documents is not None:
        hidden = hidden | (documents[:, :, None] != documents[:, None])
    total, looks = x.new_zeros(len(x), x.shape[1], x.shape[1]), []
    for head in range(q.shape[2]):
        scores = p.scale * q[:, :, head] @ k[:, :, head * k.shape[2] // q.shape[2]].mT
        attention = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        total += attention.square()
        if look_back:
            looks.append((attention * distance).sum(-1).mean())
    return total, torch.stack(looks) if look_back else None
