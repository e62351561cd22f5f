"""safetensors files, written a tensor at a time and read by rows: no process holds a whole model to save or load it."""

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from convert.core.errors import UserError
from convert.core.processes import on_first, raise_first, rank, summed
from convert.models.sharding import Rows, fill, outline_of, whole
from convert.models.weights import MASKS, check_frequencies, refuse_left_over, refuse_misfits, refuse_untied

DTYPES = {  # torch's -> the file's, in the order in which tensors of different dtypes follow each other there
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
FORMAT = {"format": "pt"}  # of an export, by which transformers knows whose tensors they are
LARGEST_FILE = "5GB"  # of an export; Hugging Face's


# --- writing


def write_files(folder: Path, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Write tensors in these dtypes as `model.safetensors`, or as several files with an index where they are large, as
    Hugging Face's save_torch_state_dict does. All processes call it, and the first one writes."""
    described = {name: torch.empty(t.shape, dtype=dtypes[name], device="meta") for name, t in tensors.items()}
    split = split_torch_state_dict_into_shards(described, max_shard_size=LARGEST_FILE)
    for file, names in split.filename_to_tensors.items():
        write_file(folder / file, {name: tensors[name] for name in names}, dtypes, FORMAT)
    if split.is_sharded and rank() == 0:
        index = {"metadata": split.metadata | FORMAT, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_file(
    file: Path, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], metadata: Mapping[str, str]
) -> None:
    """Write one file; its bytes are those of safetensors' own `save_file`. All processes call it, the first one writes.
    Raises OSError there, and UserError in the others."""
    order = sorted(tensors, key=lambda name: (list(DTYPES).index(dtypes[name]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        shape, dtype = tensors[name].shape, dtypes[name]
        end = at + shape.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    failed: list[OSError] = []  # the others go on until all have heard of it

    def attempt(work: Callable[[], Any]) -> None:
        try:
            if rank() == 0 and not failed:
                work()
        except OSError as error:
            failed.append(error)

    with contextlib.ExitStack() as held:
        opened: list[Any] = []
        attempt(lambda: opened.append(held.enter_context(file.open("wb"))))
        attempt(lambda: opened[0].write(len(text).to_bytes(8, "little") + text))
        for name in order:
            tensor = whole(tensors[name].detach()).to("cpu", dtypes[name]).contiguous()
            attempt(lambda t=tensor: opened[0].write(t.flatten().view(torch.uint8).numpy()))  # type: ignore[misc]
        attempt(lambda: opened[0].flush())
    on_first(raise_first, failed)


# --- reading


class Slices:
    """The tensors of some files, by name; any rows of one can be read."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files: dict[str, Any] = {}
        for file in files:
            opened = safe_open(file, "pt")
            self.files |= dict.fromkeys(opened.keys(), opened)

    def shape(self, name: str) -> torch.Size:
        """The shape of the whole tensor."""
        return torch.Size(self.files[name].get_slice(name).get_shape())

    def read(self, name: str, rows: Rows) -> Tensor:
        """These rows of a tensor, in the dtype of the file."""
        found: Tensor = self.files[name].get_slice(name)[rows] if rows else self.files[name].get_tensor(name)
        return found


def read_files(model: PreTrainedModel, files: Iterable[Path], where: str) -> None:
    """Fill a model that is shared out from the files of such a model, each process its rows; `where` names them in
    errors. Raises UserError where a tensor is missing, misshapen, left over, or to be made of others."""
    slices = Slices(files)
    places = _places(outline_of(model), slices.files, where)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    wanted = {name: tensors[name] for name in model.state_dict()}
    by_tensor: dict[int, list[str]] = {}  # tied ones have several names
    for name, tensor in wanted.items():
        by_tensor.setdefault(id(tensor), []).append(name)
    found = {names[0]: [n for n in names if n in places] for names in by_tensor.values()}
    refuse_misfits(
        {
            "missing_keys": [name for name, stored in found.items() if not stored],
            "mismatched_keys": [(n,) for n in places if n in wanted and slices.shape(places[n]) != wanted[n].shape],
        },
        where,
    )
    rotary = [name for name in places if name.endswith("rotary_emb.inv_freq") and name not in wanted]
    left = [name for name in places if name not in wanted and name not in rotary]
    refuse_left_over([name for name in left if not MASKS.search(name)], where)
    for name in rotary:
        check_frequencies(model, slices.read(places[name], ()), name, where)
    for first, (stored, *others) in found.items():
        differ = 0

        def read(rows: Rows, stored: str = stored, others: list[str] = others) -> Tensor:
            nonlocal differ
            value = slices.read(places[stored], rows)
            differ += sum(not torch.equal(value, slices.read(places[other], rows)) for other in others)
            return value

        fill(wanted[first], read)
        if others and summed(differ)[0]:
            refuse_untied(where)


def _places(outline: PreTrainedModel, stored: Iterable[str], where: str) -> dict[str, str]:
    """The model's name of a tensor -> its name in the files, by transformers' rules."""
    rules = get_model_conversion_mapping(outline)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    known, found = outline.state_dict(), {}
    for name in stored:
        place, made_of = rename_source_key(name, renamings, converters, outline.base_model_prefix, known)
        if made_of is not None:
            raise UserError(
                f"Several processes read rows of a model's tensors as its files have them; {name} of {where} has to be"
                " made of others first. Load it in one process, save it anew (save_pretrained), and give that folder."
            )
        found[place] = name
    return found
