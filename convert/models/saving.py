"""The students of finished steps on disk: weights and configuration, whether converted or of one family."""

import copy
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from convert.core.processes import rank
from convert.models import student as _registers  # noqa: F401  # AutoConfig knows "converted" by it
from convert.models.sharding import reshard, shared_out, whole
from convert.models.weight_files import read_files, write_file

FILE = "model.safetensors"


def save_student(student: PreTrainedModel, folder: Path) -> None:
    """Write the student's weights and configuration into an existing folder. All processes call it; the first one
    writes."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}  # of tensors with several names, as safetensors' own `save_model` has them
    first: dict[int, str] = {}
    for name, tensor in sorted(reshard(student).state_dict(keep_vars=True).items()):
        if id(tensor) in first:
            metadata[name] = first[id(tensor)]
        else:
            first[id(tensor)], tensors[name] = name, tensor
    write_file(folder / FILE, tensors, {name: t.dtype for name, t in tensors.items()}, metadata)
    if rank() == 0:
        config = copy.deepcopy(student.config)
        config.dtype = None  # a student that was read back has one, and the weights have theirs
        config.save_pretrained(folder)


def load_student(
    folder: Path, teacher: PreTrainedModel, empty: Callable[[PreTrainedConfig], PreTrainedModel]
) -> PreTrainedModel:
    """Read a student back, frozen, on the teacher's device, and where they share layers with its kind of attention.
    `empty` makes the model of a configuration."""
    config = _config_of(folder, teacher)
    with torch.device(teacher.device):
        student = empty(config)
    load_model(student, str(folder / FILE))
    if hasattr(teacher, "generation_config"):  # a classifier has none
        student.generation_config = teacher.generation_config
    return student.requires_grad_(False).eval()


def load_in_parts(folder: Path, teacher: PreTrainedModel) -> PreTrainedModel:
    """Read a student back likewise, shared out among the processes."""
    student = shared_out(outline_of_config(_config_of(folder, teacher), teacher.dtype), teacher.device)
    read_files(student, [folder / FILE], str(folder))
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def _config_of(folder: Path, teacher: PreTrainedModel) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type in ("converted", teacher.config.model_type):  # another family may not have the teacher's kind
        config._attn_implementation = teacher.config._attn_implementation
    return config


def outline_of_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a configuration, frozen, without memory but for its table of rotary frequencies,
    which is in no file."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).to(dtype)
    body = getattr(model, "host", model).base_model
    body.rotary_emb = type(body.rotary_emb)(config=body.config)
    return model.requires_grad_(False).eval()


def weights_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the state by its name, whole, one after another; every process must ask for all."""
    for name, tensor in reshard(model).state_dict().items():
        yield name, whole(tensor)


def fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of all weights: a run that goes on with another teacher under the same name would mix the two. All
    processes call it where the model is shared out."""
    digest = hashlib.sha256()
    for name, value in weights_of(model):
        digest.update(f"{name} {tuple(value.shape)} {torch.hash_tensor(value).item()}".encode())
    return digest.hexdigest()[:16]
