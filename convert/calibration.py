"""What a model's attention layers see: the statistics that some mixers start from.

B batch · T time · D width · H query heads · R rotary dimensions
"""

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from convert.data import Batch
from convert.mixers.parts import QKV
from convert.model import Slot, attention_of, documents_of
from convert.projections import Inputs, Projections
from convert.stages import hidden_states, layers_of


@torch.no_grad()
def inputs_of(model: PreTrainedModel, batches: list[Batch]) -> list[Inputs]:
    """Of every attention layer, over these batches; in float32. In the place of a mixer all tokens weigh the same."""
    blocks = layers_of(model)
    moments, attended, weights, drifts = ([0.0] * len(blocks) for _ in range(4))
    tokens, documents = sum(batch.input_ids.numel() for batch in batches), None

    def see(layer: int):
        def hook(module, args, kwargs):
            x = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).float()
            cos, sin = (t.float() for t in kwargs["position_embeddings"])
            got = torch.ones_like(x[..., 0]) if isinstance(module, Slot) else _attention_got(Projections.of(module), x, cos, sin, documents)
            moments[layer] = moments[layer] + x.flatten(0, 1).T @ x.flatten(0, 1) / tokens
            attended[layer] = attended[layer] + (x * got[..., None]).flatten(0, 1).T @ x.flatten(0, 1)
            weights[layer] = weights[layer] + got.sum()
            half = cos.shape[-1] // 2  # |mean of e^(i angle)|^2 is the mean over all pairs
            drifts[layer] = drifts[layer] + sum(t[..., :half].mean(1).square() for t in (cos, sin)).mean(0) / len(batches)

        return hook

    hooks = [attention_of(block).register_forward_pre_hook(see(layer), with_kwargs=True) for layer, block in enumerate(blocks)]
    try:
        for batch in tqdm(batches, desc="calibrate", unit="batch", dynamic_ncols=True):
            batch = batch.to(model.device)
            documents = documents_of(batch.position_ids)
            hidden_states(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [Inputs(m, a / w, d) for m, a, w, d in zip(moments, attended, weights, drifts, strict=True)]


def _attention_got(p: Projections, x: Tensor, cos: Tensor, sin: Tensor, documents: Tensor | None) -> Tensor:
    """[B, T]: of each token, the sum over later tokens and all heads of the squared share of attention it gets."""
    with torch.device(x.device):
        qkv = QKV(p.shape)
    qkv.copy_(p)
    q, k, _ = qkv(x, cos, sin)
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)[None]
    if documents is not None:
        hidden = hidden | (documents[:, :, None] != documents[:, None])
    got = torch.zeros_like(x[..., 0])
    for head in range(q.shape[2]):  # one at a time: T x T
        scores = p.scale * q[:, :, head] @ k[:, :, head * k.shape[2] // q.shape[2]].mT
        got += scores.masked_fill(hidden, -torch.inf).softmax(-1).square().sum(1)
    return got
