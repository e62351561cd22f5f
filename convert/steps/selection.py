"""Which layers keep what they have: the ones whose replacement alone changes the model most.

Ranking by the KL that one edited layer costs: HALO (arXiv 2601.22156), KL-guided selection
(fla-org/hybrid-distillation)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from convert.data.batches import Batch
from convert.mixers.families import attention_name
from convert.models.access import hidden_states, layer_outputs, layers_of
from convert.models.slot import attention_of
from convert.models.student import ConvertedForCausalLM
from convert.objectives.divergences import forward_kl

HEAD_CHUNK = 512  # tokens whose logits are held at once
# layer -> what is in the place of attention, and its entry in the configuration
Parts = Mapping[int, tuple[nn.Module, dict | None]]


def parts_of(model: PreTrainedModel) -> Parts:
    """Return the part of every layer as it is now."""
    specs = model.config.mixers if isinstance(model, ConvertedForCausalLM) else [None] * model.config.num_hidden_layers
    return {i: (attention_of(block), spec) for i, (block, spec) in enumerate(zip(layers_of(model), specs, strict=True))}


def restore_layers(student: ConvertedForCausalLM, parts: Parts) -> None:
    """Put these parts into their places."""
    for layer, (module, spec) in parts.items():
        setattr(student.blocks[layer], attention_name(student.config.host.model_type), module)
        student.config.mixers[layer] = spec


@torch.no_grad()
def sensitivity(student: ConvertedForCausalLM, before: Parts, batches: list[Batch]) -> list[float]:
    """Return for each layer the KL in nats per token between the model with all of `before` in place, and the same with
    the student's own part in this layer. The student is left as it came. Layers below the edited one are recalled, not
    run again. In float32: half precision alone moves neox-nano by 1e-4 nats, and more in earlier layers."""
    edited, change = parts_of(student), [0.0] * len(before)
    tokens = sum(batch.input_ids.numel() for batch in batches)
    with tqdm(total=len(batches) * len(before), desc="rank layers", unit="layer", dynamic_ncols=True) as bar:
        try:
            for batch in (batch.to(student.device) for batch in batches):
                restore_layers(student, before)
                with layer_outputs(student) as outputs:
                    reference = hidden_states(student, batch)
                for layer in before:
                    restore_layers(student, {layer: edited[layer]})
                    with _recalled(student, outputs[:layer]):
                        change[layer] += _sum_of_kl(student, hidden_states(student, batch), reference) / tokens
                    restore_layers(student, {layer: before[layer]})
                    bar.update()
        finally:
            restore_layers(student, edited)
    return change


@contextmanager
def _recalled(student: ConvertedForCausalLM, outputs: list[Tensor]) -> Iterator[None]:
    """The first layers return these, whatever comes in."""
    blocks = student.blocks[: len(outputs)]
    for block, output in zip(blocks, outputs, strict=True):
        block.forward = lambda *_, output=output, **__: output
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _sum_of_kl(student: ConvertedForCausalLM, hidden: Tensor, reference: Tensor) -> float:
    total, head = 0.0, student.get_output_embeddings()
    for h, r in zip(hidden.flatten(0, 1).split(HEAD_CHUNK), reference.flatten(0, 1).split(HEAD_CHUNK), strict=True):
        total += forward_kl(head(h).float(), head(r).float()).sum().item()
    return total
