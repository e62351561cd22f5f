"""A language model that the processes of a run share out among them, by FSDP2: each has its rows of every parameter,
and a layer is gathered when it runs. No process ever holds such a model whole.

It is made of an outline, which is the same model without memory for its parameters, and keeps it: others like it are
made of that. Each mixer is a unit that gathers by itself, because `align` calls it alone; so is each layer. Embeddings
and head are the root's: they are gathered by the first pass, and stay so until `reshard`.
"""

import copy
import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from convert.core.processes import world
from convert.models.access import layers_of, slots_of

Rows = tuple[slice, ...]  # of a tensor, those of one process: a slice for each dimension


def is_shared_out(model: nn.Module) -> bool:
    """Whether the processes share this model out among them."""
    return isinstance(model, FSDPModule)


def outline_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model without memory for its parameters; its buffers are copies. One that is shared out has it."""
    if is_shared_out(model):
        return model.outline
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), False) for p in model.parameters()}
    return copy.deepcopy(model, dict(empty))  # copies that deepcopy finds made already


def shared_out(outline: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A model like the outline that is shared out, frozen, with memory for the rows of this process, all zero. Buffers
    are those of the outline."""
    model = copy.deepcopy(outline)
    model.__dict__["outline"] = outline  # not a part of the model
    if not hasattr(model, "hidden_states"):
        model.hidden_states = functools.partial(_hidden_states, model)
    mesh = init_device_mesh(device.type, (world(),))
    for module in (*(slot.mixer for slot in slots_of(model).values()), *layers_of(model), model):
        fully_shard(module, mesh=mesh)
    for module in _units(model):
        # losses are divided by the tokens of the whole batch, so gradients are sums
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # or gloo lacks the operation
    give_memory(model, device)
    register_fsdp_forward_method(model, "hidden_states")
    with torch.no_grad():  # whatever runs first becomes the root: the model, not one of its mixers
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    return reshard(model)


def copied(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model of its own with the same weights, in this dtype (None: the same one); among several processes it is
    shared out, whether the other is or not."""
    if world() == 1:
        return copy.deepcopy(model) if dtype is None else copy.deepcopy(model).to(dtype)
    outline = outline_of(model)
    made = shared_out(outline if dtype is None else copy.deepcopy(outline).to(dtype), model.device)
    take_over(made, reshard(model))
    return made


@torch.no_grad()
def take_over(module: nn.Module, source: nn.Module, but: Collection[nn.Module] = ()) -> None:
    """Set the parameters and buffers of a module to those of the same names in another, but for what is inside of these
    modules. Rows of what both share out stay where they are."""
    left_out = {id(t) for part in but for t in (*part.parameters(), *part.buffers())}
    theirs = dict(source.named_parameters()) | dict(source.named_buffers())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if id(tensor) not in left_out:
            fill(tensor, functools.partial(_rows, theirs[name], isinstance(tensor, DTensor)))


def _rows(tensor: Tensor, is_shared: bool, rows: Rows) -> Tensor:
    return tensor.to_local() if is_shared and isinstance(tensor, DTensor) else whole(tensor)[rows]


@torch.no_grad()
def fill(tensor: Tensor, read: Callable[[Rows], Tensor]) -> None:
    """Set a tensor to what `read` gives of its rows; of one that is shared out, it is asked for those of this
    process."""
    shape, start, own = tensor.shape, (0,) * tensor.ndim, tensor
    if isinstance(tensor, DTensor):
        shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        own = tensor.to_local()
    own.copy_(read(tuple(slice(first, first + length) for first, length in zip(start, shape, strict=True))))


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Give each process all rows of this module's parameters, to be read, while this is open."""
    try:
        for unit in _units(module):
            unit.unshard()
        yield
    finally:
        reshard(module)


def reshard(model: Any) -> Any:
    """Let each process keep its rows alone: what a gathered copy is told is lost, and an optimizer that is given one
    trains nothing. Goes before a stage, before weights are read or written, and after a measurement in a stage."""
    for module in _units(model):
        module.reshard()
    return model


def whole(tensor: Tensor) -> Tensor:
    """A tensor of all rows; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """The last hidden states [B, T, D] of a model that has no such method."""
    return model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state


def _units(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def give_memory(model: nn.Module, device: torch.device) -> None:
    """Zeros in the place of what has no memory; parameters that were tied still are."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                places.setdefault(p, []).append((module, name))
    model._apply(lambda t: torch.zeros_like(t, device=device) if t.is_meta else t.to(device))
    for (first, its_name), *others in places.values():
        for module, name in others:
            module._parameters[name] = first._parameters[its_name]
