"""Which layers keep what they have, by measurement: those whose replacement alone changes the model most, or, once all
are replaced and aligned, those that bring it closest to its teacher when they are given back.

Ranking by KL: HALO (arXiv 2601.22156), KL-guided selection (fla-org/hybrid-distillation)."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from convert.core.processes import rank, share, summed
from convert.data.batches import Batch
from convert.mixers.families import attention_name
from convert.models.access import hidden_states, layer_outputs, layers_of
from convert.models.sharding import give_memory, is_shared_out, outline_of, reshard, shared_out, take_over
from convert.models.slot import attention_of
from convert.models.student import ConvertedForCausalLM
from convert.objectives.divergences import forward_kl

HEAD_CHUNK = 512  # tokens whose logits are held at once
Part = tuple[nn.Module, dict | None]  # what is in the place of attention, and its entry in the configuration
Parts = Mapping[int, Part]  # by layer


class Copies(Parts):
    """What a model that is shared out has in its layers, for another one to try: each time that a layer is asked for, a
    copy of it that is whole in each process."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.outline, self.parts = model, outline_of(model), parts_of(reshard(model))

    def __getitem__(self, layer: int) -> Part:
        module, spec = self.parts[layer]
        made = copy.deepcopy(attention_of(layers_of(self.outline)[layer]))
        give_memory(made, self.model.device)
        take_over(made, module)
        return made.train(self.model.training), spec

    def __iter__(self) -> Iterator[int]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def copies_of(model: PreTrainedModel) -> Parts:
    """Return the part of every layer, as another model can try it."""
    return Copies(model) if is_shared_out(model) else parts_of(model)


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
def sensitivity(student: ConvertedForCausalLM, before: Parts | PreTrainedModel, batches: list[Batch]) -> list[float]:
    """Return for each layer the KL in nats per token between the model with all of `before` in place, and the same with
    the student's own part in this layer. The student is left as it came. `before`: parts, or, of models that are shared
    out, the model that has them."""
    if isinstance(before, PreTrainedModel):
        layers = range(len(layers_of(before)))
        resting = give_back(student, before, layers)
        return _kl_of_each(resting, parts_of(resting), Copies(student), layers, batches)[:-1]
    return _kl_of_each(student, before, parts_of(student), tuple(before), batches)[:-1]


@torch.no_grad()
def kl_when_given_back(
    student: ConvertedForCausalLM,
    parts: Parts,
    layers: Collection[int],
    teacher: PreTrainedModel,
    batches: list[Batch],
) -> list[float]:
    """Return for each of `layers` the KL in nats per token between the teacher and the student with the part of this
    layer in place; the last number is that of the student as it is, and it is left so."""
    return _kl_of_each(student, parts_of(student), parts, layers, batches, teacher)


def _kl_of_each(
    student: ConvertedForCausalLM,
    at_rest: Parts,
    exchanged: Parts,
    layers: Collection[int],
    batches: list[Batch],
    teacher: PreTrainedModel | None = None,
) -> list[float]:
    """The KL from the teacher (None: the student with `at_rest` in place) of the student with `at_rest` in place but
    for one of `layers`, which has what is `exchanged`; and at the end that of the student with none exchanged. Layers
    below the exchanged one are recalled, not run again. In float32: half precision alone moves neox-nano by 1e-4 nats,
    and more in earlier layers."""
    found, kl = parts_of(student), torch.zeros(len(layers) + 1, dtype=torch.float64, device=student.device)
    tokens = sum(batch.input_ids.numel() for batch in batches)
    head = student.get_output_embeddings()
    goal = head if teacher is None else teacher.get_output_embeddings()
    own = share(batches)
    with tqdm(
        total=len(own) * len(layers), desc="rank layers", unit="layer", dynamic_ncols=True, disable=rank() > 0
    ) as bar:
        try:
            for _, batch, counts in own:
                batch, weight = batch.to(student.device), counts / tokens
                restore_layers(student, at_rest)
                with layer_outputs(student) as outputs:
                    resting = hidden_states(student, batch)
                reference = resting if teacher is None else hidden_states(teacher, batch)
                if teacher is not None:
                    kl[-1] += _sum_of_kl(head, resting, goal, reference) * weight
                for i, layer in enumerate(layers):
                    restore_layers(student, {layer: exchanged[layer]})
                    with _recalled(student, outputs[:layer]):
                        kl[i] += _sum_of_kl(head, hidden_states(student, batch), goal, reference) * weight
                    restore_layers(student, {layer: at_rest[layer]})
                    bar.update()
        finally:
            restore_layers(student, found)
    return summed(*kl.tolist())


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


def _sum_of_kl(head: nn.Module, hidden: Tensor, goal: nn.Module, reference: Tensor) -> Tensor:
    """The KL of the logits that the head makes of `hidden` from those that `goal` makes of `reference`, over tokens: a
    number on their device, in float64."""
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for h, r in zip(hidden.flatten(0, 1).split(HEAD_CHUNK), reference.flatten(0, 1).split(HEAD_CHUNK), strict=True):
        total += forward_kl(head(h).float(), goal(r).float()).sum()
    return total


@torch.no_grad()
def score_when_given_back(
    student: ConvertedForCausalLM,
    parts: Parts,
    layers: Collection[int],
    score: Callable[[PreTrainedModel], float],
) -> list[float]:
    """Return the score of the student with the part of each of `layers` in place, one at a time; the last number is
    that of the student as it is, and it is left so."""
    own, found = parts_of(student), []
    try:
        for layer in tqdm(layers, desc="rank layers", unit="layer", dynamic_ncols=True):
            restore_layers(student, {layer: parts[layer]})
            found.append(score(student))
            restore_layers(student, {layer: own[layer]})
    finally:
        restore_layers(student, own)
    return [*found, score(student)]


def give_back(student: ConvertedForCausalLM, teacher: PreTrainedModel, layers: Collection[int]) -> ConvertedForCausalLM:
    """Put copies of what the teacher has in these layers into their places; return the student. Of one that is shared
    out another one is made."""
    if is_shared_out(student):
        outline = give_back(copy.deepcopy(outline_of(student)), outline_of(teacher), layers)
        made, parts = shared_out(outline, student.device), parts_of(reshard(teacher))
        own = {layer: attention_of(made.blocks[layer]) for layer in layers}
        take_over(made, reshard(student), but=own.values())
        for layer, module in own.items():
            take_over(module, parts[layer][0])
        return made
    parts, host = parts_of(teacher), getattr(teacher.config, "host", teacher.config)
    for layer in layers:
        module, spec = parts[layer]
        # attention asks its configuration how to compute: the copy must ask the student's
        copied = copy.deepcopy(module, {id(host): student.config.host}).train(student.training)
        restore_layers(student, {layer: (copied, copy.deepcopy(spec))})
    return student
