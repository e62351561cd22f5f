"""A student as a Hugging Face model folder that needs nothing of ours: weights, tokenizer, card, and where transformers
does not have the architecture itself, the code."""

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from convert.core.errors import UserError
from convert.core.fields import Place, checked
from convert.core.processes import on_first, rank
from convert.exporting.code import CONFIG, MODEL, flat, model_code
from convert.exporting.portability import make_rotary_portable, make_tokenizer_portable
from convert.models.sharding import reshard
from convert.models.student import ConvertedForCausalLM
from convert.models.weight_files import write_files

NO_CODE = ".converted"  # an empty file that says who wrote a folder, of those without this model's code
MARKS = (NO_CODE, f"{flat(MODEL)}.py")  # one of these is in every export
AUTO_MAP = {
    "AutoConfig": f"{flat(CONFIG)}.ConvertedConfig",
    "AutoModelForCausalLM": f"{flat(MODEL)}.ConvertedForCausalLM",
}


@checked
def export(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Place,
    *,
    card: str,
    dtype: torch.dtype | None = None,
    in_full: Sequence[str] = (),
) -> None:
    """Write `folder`, with the weights in `dtype` (None: as they are), but for those named by `in_full`, which stay as
    they are; the student does, too.

    A converted student brings its code along. A student whose architecture transformers has loads without
    trust_remote_code."""
    config, is_converted = copy.deepcopy(student.config), isinstance(student, ConvertedForCausalLM)
    if is_converted:
        config.auto_map = dict(AUTO_MAP)
        code = model_code(mixer["name"] for mixer in config.mixers if mixer is not None)
    else:
        code = {NO_CODE: ""}

    def write(side: Path) -> None:
        on_first(_write_facts, student, config, tokenizer, side, card, dtype, code)
        write_weights(student, side, dtype, in_full)
        if not is_converted:
            on_first(make_rotary_portable, side)

    replace_folder(Path(folder), write)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill the folder, which must be empty, absent or an earlier export.

    All is written beside it first. An earlier export in its place goes only when the new one is complete, by two
    renames: killed exactly between them, the old one is `NAME.replaced` and the next export starts by putting it back.
    """
    side, replaced = (folder.with_name(folder.name + end) for end in (".writing", ".replaced"))
    on_first(_make_room, folder, side, replaced)
    try:
        write(side)
        on_first(_put_in_place, folder, side, replaced)
    except BaseException:
        if rank() == 0:
            if replaced.exists() and not folder.exists():
                replaced.rename(folder)
            shutil.rmtree(side, ignore_errors=True)
        raise


def _make_room(folder: Path, side: Path, replaced: Path) -> None:
    """An empty folder `side`. Raises UserError where the folder holds what is no export."""
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_free and not any((folder / mark).exists() for mark in MARKS):
        raise UserError(
            f"An export replaces its folder, and {folder} is not an earlier export. Name another, or move it away."
        )
    shutil.rmtree(side, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    side.mkdir(parents=True)


def _put_in_place(folder: Path, side: Path, replaced: Path) -> None:
    if folder.exists():
        folder.rename(replaced)
    side.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_facts(
    model: PreTrainedModel, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path, card: str,
    dtype: torch.dtype | None, code: dict[str, str],
) -> None:  # fmt: skip
    """Write everything but the weights."""
    for name, source in code.items():
        (folder / name).write_text(source, encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    tokenizer.save_pretrained(folder)
    make_tokenizer_portable(folder, tokenizer)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = dtype or model.dtype
    config.save_pretrained(folder)
    # not save_pretrained, which refuses settings of a published teacher that transformers itself only warns about
    model.generation_config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])


def write_weights(model: PreTrainedModel, folder: Path, dtype: torch.dtype | None, in_full: Sequence[str]) -> None:
    """Write the state, cast, without the tensors that loading ties to others again. Of several processes the first one
    writes."""
    state, tied = reshard(model).state_dict(keep_vars=True), model.get_expanded_tied_weights_keys(all_submodels=True)

    def dtype_of(name: str) -> torch.dtype:
        is_cast = dtype is not None and name not in in_full and state[name].is_floating_point()
        return dtype if is_cast else state[name].dtype

    tensors = {name: t for name, t in state.items() if name not in tied or not _are_one(t, state[tied[name]])}
    write_files(folder, tensors, {name: dtype_of(name) for name in tensors})


def _are_one(a: Tensor, b: Tensor) -> bool:
    return a is b or (not isinstance(a, DTensor) and a.data_ptr() == b.data_ptr())
