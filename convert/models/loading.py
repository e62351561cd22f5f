"""Loading a teacher: configuration, tokenizer and weights, with every refusal before the weights are read."""

import contextlib
import copy
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TokenizersBackend,
)
from transformers.models.auto import CONFIG_MAPPING
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from convert.core import manifest
from convert.core.errors import UserError
from convert.core.fields import Place, checked, shown
from convert.core.files import parse_json
from convert.core.network import hub_offline, is_hub_reachable
from convert.core.processes import in_turn
from convert.mixers.projections import refusal
from convert.models import gguf_file, teacher_files
from convert.models import student as _registers  # noqa: F401  # transformers knows converted models by it
from convert.models.cache import check_cache
from convert.models.catalog import TEACHERS, Source, resolve
from convert.models.config import ConvertedConfig
from convert.models.devices import check_device
from convert.models.failures import explained, first_line
from convert.models.saving import outline_of_config
from convert.models.sharding import shared_out
from convert.models.tokenizer import load_tokenizer
from convert.models.weight_files import read_files
from convert.models.weights import check_size, check_whole


@checked
def read_config(source: Source, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The teacher's configuration. Known names and local folders need no network, and the code in a folder that this
    project exported is never run."""
    known = TEACHERS[source.name] if source.kind in ("alias", "package") else None
    if known and known.fields:
        return AutoConfig.for_model(**copy.deepcopy(known.fields))
    return _strangers_config(source, trust_remote_code)


def _strangers_config(source: Source, trust_remote_code: bool) -> PreTrainedConfig:
    """The configuration beside the weights, read as data and checked before anything is made of it."""
    if source.gguf:
        _check_gguf_packages()
        with explained(source):
            config = gguf_file.complete(
                AutoConfig.from_pretrained(source.gguf.parent, gguf_file=str(source.gguf)), source.gguf
            )
            teacher_files.check_config(config, source.where)
            return config
    with explained(source):
        local = not (source.is_remote and is_hub_reachable())
        if source.is_remote:
            raw, _ = PreTrainedConfig.get_config_dict(source.where, local_files_only=local)
        else:
            teacher_files.check_folder(Path(source.where))
            raw = teacher_files.read_json(Path(source.where, "config.json"))
        kind, brings_code = raw.get("model_type"), "auto_map" in raw
        if not isinstance(kind, str) or (kind not in CONFIG_MAPPING and not (brings_code and trust_remote_code)):
            remedy = " It brings its own code; to run that, pass --trust-remote-code." if brings_code else ""
            raise UserError(
                f"A config.json must name a model type that transformers knows; that of {source.where} has"
                f" {shown(kind)}.{remedy}"
            )
        if brings_code and trust_remote_code and kind != ConvertedConfig.model_type:
            return AutoConfig.from_pretrained(source.where, trust_remote_code=True, local_files_only=local)
        return teacher_files.config_of(raw, f"{source.where}/config.json")


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher. `model` is frozen and in eval mode; `dtype` is that of the weights on disk, or the requested
    one where no file says (.gguf)."""

    source: Source
    model: PreTrainedModel
    tokenizer: TokenizersBackend
    dtype: torch.dtype


@checked
def load_teacher(
    name: Place | Source,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    shared: bool = False,
) -> Teacher:
    """Load the model and the tokenizer of a teacher. `trust_remote_code` also allows pickled weights. The tokenizer has
    a pad token and pads on the left. Several processes load it together; `shared`: they share it out among them, and
    each reads its rows. Raises UserError where the name, its files or the device cannot be used."""
    place = check_device(device)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UserError(f"A teacher's dtype must be float32, bfloat16, float16 or float64; got {dtype}.")
    source = name if isinstance(name, Source) else resolve(name)
    config = _strangers_config(source, trust_remote_code)
    is_ours = config.model_type == ConvertedConfig.model_type
    if reason := refusal(config.host_config() if is_ours else config):
        raise UserError(f"{source.where} cannot be a teacher. {reason}")
    trust = trust_remote_code and not is_ours
    if source.gguf:
        _check_gguf_packages()
    elif not source.is_remote:
        manifest.check_model(Path(source.where))
        if files := weight_files(Path(source.where), trust):
            check_size(config, files, source.where)

    def read() -> tuple[TokenizersBackend, PreTrainedModel, list[Path]]:
        """The tokenizer, and the model; of one to share out its outline and its files."""
        with explained(source), quiet(bars=source.is_remote):
            local = not (source.is_remote and is_hub_reachable())
            with hub_offline(huggingface_hub.constants, when=local):  # some look-ups ignore local_files_only
                tokenizer = load_tokenizer(source, config.vocab_size, trust, local)
                if shared:
                    return tokenizer, *_outline(source, config, dtype, local)
                return tokenizer, _load_model(source, config, dtype, trust, local).requires_grad_(False).to(place), []

    tokenizer, model, files = in_turn(read)
    if shared:
        model = shared_out(model, place)
        read_files(model, files, source.where)
        if is_ours:
            check_cache(model)
    return Teacher(source, model, tokenizer, dtype if source.gguf else config.dtype or dtype)


def _outline(
    source: Source, config: PreTrainedConfig, dtype: torch.dtype, local: bool
) -> tuple[PreTrainedModel, list[Path]]:
    """The model without its weights, and the safetensors files that have them."""
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    model, where = outline_of_config(config, dtype), source.where
    with contextlib.suppress(OSError):  # not every model has settings of its own
        model.generation_config = GenerationConfig.from_pretrained(where, local_files_only=local)
    index = cached_file(
        where, SAFE_WEIGHTS_INDEX_NAME, local_files_only=local, _raise_exceptions_for_missing_entries=False
    )
    names = [SAFE_WEIGHTS_NAME]
    if index is not None:
        names = sorted(set(parse_json(Path(index).read_bytes(), index)["weight_map"].values()))
    return model, [Path(cached_file(where, name, local_files_only=local)) for name in names]


def _load_model(
    source: Source, config: PreTrainedConfig | None, dtype: torch.dtype, trust: bool, local: bool
) -> PreTrainedModel:
    """The model with its weights. `config` is the one already read, or None where the one that is downloaded with the
    weights decides."""
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # else a bot of the hub is asked, in public, to convert pickles
    where: str | Path = source.where
    how: dict[str, Any] = {
        "use_safetensors": None if trust else True,
        "trust_remote_code": trust,
        "local_files_only": local,
    }
    if source.gguf:
        from transformers import GgufConfig

        # without `dequantize` weights may stay packed where Hugging Face's `kernels` is installed
        where, how = (
            source.gguf.parent,
            {
                "gguf_file": str(source.gguf),
                "quantization_config": GgufConfig(dequantize=True),
            },
        )
    model, found = AutoModelForCausalLM.from_pretrained(
        where, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, ignore_mismatched_sizes=True,
        **how, **({} if config is None else {"config": config}),
    )  # fmt: skip
    files: list[Path] = []
    if not source.gguf:
        files = list(Path(cached_file(source.where, CONFIG_NAME, local_files_only=True)).parent.glob("*.safetensors"))
    check_whole(model, found, source.where, files)
    if source.gguf:
        gguf_file.check_whole(model, source.gguf)
        # forget that the weights were quantised, or the model refuses .float() and save_pretrained
        model.config.__dict__.pop("quantization_config", None)
        for trace in ("is_quantized", "quantization_method", "hf_quantizer"):
            model.__dict__.pop(trace, None)
    return model


def _check_gguf_packages() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"Reading a .gguf file needs gguf and accelerate; missing: {', '.join(missing)}. pip install -e"
            " '.[smollm2]'"
        )


def weight_files(folder: Path, trust: bool) -> list[Path]:
    """The safetensors files of a folder, whose headers say how long each file must be; raises UserError where one is
    cut short, or where there is none."""
    files = sorted(folder.glob("*.safetensors"))
    pickles = sorted(p.name for end in ("*.bin", "*.pt", "*.pth") for p in folder.glob(end))
    if not files and not pickles:
        raise UserError(f"A teacher's folder holds its weights (*.safetensors); {folder} has none.")
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"A teacher is one set of weights; {folder} has an adapter beside them. Merge it (peft's merge_and_unload)"
            " and save that."
        )
    if not files and not trust:
        raise UserError(
            f"Weights must be safetensors, because a pickle can run code; {folder} has only {pickles[0]}. Convert it"
            " (from_pretrained, then save_pretrained, where you trust its author), or pass --trust-remote-code."
        )
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"The weight file {file} is damaged ({first_line(error)}). Copy or download it again."
            ) from error
    return files


@contextlib.contextmanager
def quiet(bars: bool) -> Iterator[None]:
    """Silence transformers' warnings and, unless `bars`, its progress bars."""
    verbosity, hide = logging.get_verbosity(), logging.is_progress_bar_enabled() and not bars
    logging.set_verbosity_error()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if hide:
            logging.enable_progress_bar()
