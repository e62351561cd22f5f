"""The files of a checkpoint: PyTorch's distributed format, the same for one process and for many.

FOLDER/state.json       numbers, words, and where which tensor belongs; written by the first process
FOLDER/.metadata        which rows of which tensor are in which file
FOLDER/__0_0.distcp     tensors, of each process those that it has

A tensor that is shared out among processes is written by all of them, each its rows, and read by however many there
are then. Nothing that is read can run code: tensors are loaded as weights alone, `.metadata` by a list of classes.
"""

import json
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from convert.core.files import parse_json, write_text
from convert.core.processes import on_first, waiting_group, world

STATE, METADATA = "state.json", ".metadata"
TENSOR = "tensor at"  # the key of an object of state.json that stands for a tensor
PLAIN = {  # what the description of tensors is made of
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


def save_parts(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a state of numbers, words and tensors, lists and dictionaries of them, into a folder that is there. All
    processes call it, each with its own rows of what is shared out. Raises OSError or RuntimeError."""
    tensors: dict[str, Tensor] = {}
    plain = _without_tensors(state, "", tensors)
    on_first(write_text, folder / STATE, json.dumps(plain))
    writer = dcp.FileSystemWriter(str(folder), sync_files=True)
    try:
        with _in_one_process_without_a_warning():
            dcp.save(tensors, storage_writer=writer, process_group=waiting_group(), no_dist=world() == 1)
    except CheckpointException as error:
        process, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"process {process}: {cause}" if world() > 1 else str(cause)) from error


def load_parts(folder: Path, like: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Read a state. Tensors are on the CPU, but for those of state["parts"][name] that have the size of a tensor
    `like[name]` which is shared out: they are shared out likewise, and each process reads its rows.

    Raises OSError, ValueError, RuntimeError or UnpicklingError for what is no checkpoint."""
    reader = _Reader(str(folder))
    described = reader.read_metadata().state_dict_metadata
    tensors = {key: _empty(key, found, like or {}) for key, found in described.items()}
    try:
        with _in_one_process_without_a_warning():
            dcp.load(tensors, storage_reader=reader, process_group=waiting_group(), no_dist=world() == 1)
    except CheckpointException as error:
        raise RuntimeError(str(next(iter(error.failures.values()))[0])) from error
    plain = parse_json((folder / STATE).read_bytes(), str(folder / STATE))
    state: dict[str, Any] = _with_tensors(plain, tensors)
    return state


def files_named(folder: Path) -> set[str]:
    """The files that a checkpoint must have, by its own description."""
    stored = _Reader(str(folder)).read_metadata().storage_data.values()
    return {STATE, METADATA} | {info.relative_path for info in stored}


@contextmanager
def _in_one_process_without_a_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _empty(key: str, found: Any, like: Mapping[str, Tensor]) -> Tensor:
    """Room for a stored tensor."""
    if not hasattr(found, "size"):
        raise ValueError(f"{key} is no tensor")
    kind, name, *_ = [*key.split("/"), ""]
    parameter = like.get(name) if kind == "parts" else None
    if isinstance(parameter, DTensor) and parameter.shape == found.size:
        return torch.empty_like(parameter.detach(), dtype=found.properties.dtype)
    return torch.empty(found.size, dtype=found.properties.dtype)


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON holds it; its tensors, by their paths, in `tensors`."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {TENSOR: path}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) and "/" not in key for key in value):
            raise TypeError(f"keys of a checkpoint are words without a slash; {path or 'it'} has {list(value)[:5]}")
        return {key: _without_tensors(v, f"{path}/{key}".lstrip("/"), tensors) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(v, f"{path}/{i}".lstrip("/"), tensors) for i, v in enumerate(value)]
    return value


def _with_tensors(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(plain, dict):
        if TENSOR in plain:
            return tensors[plain[TENSOR]]
        return {key: _with_tensors(value, tensors) for key, value in plain.items()}
    return [_with_tensors(value, tensors) for value in plain] if isinstance(plain, list) else plain


class _Unpickler(pickle.Unpickler):
    """Reads the description of tensors, and nothing else: a pickle may name any function to call."""

    def find_class(self, module: str, name: str) -> Any:
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype) or value is torch.Size or name in PLAIN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint has")


class _Reader(dcp.FileSystemReader):
    """PyTorch's reader with an unpickler that runs nothing."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with (Path(self.path) / METADATA).open("rb") as opened:
            metadata = _Unpickler(opened).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata
