"""The implementations that `kernels.bench` measured to be the fastest on a GPU, kept in a file of the cache.

"auto" takes them for calls that they can run. A choice belongs to a card and to the versions that it was measured with.
"""

import functools
import importlib.metadata
import json
import os
from pathlib import Path

import torch

from kernels.trust import cache_folder

PACKAGES = ("torch", "triton", "mamba-ssm")


def fastest(operator: str) -> str | None:
    """Return the implementation that was the fastest on this GPU, or None where none was measured."""
    choices = _choices(_file())
    return choices.get(_here(), {}).get(operator) if choices else None  # a GPU is asked its name by who has a choice


def keep_fastest(operator: str, implementation: str) -> None:
    """Let "auto" take this implementation of the operator, on this GPU with these versions."""
    file = _file()
    choices = dict(_choices(file))
    choices[_here()] = choices.get(_here(), {}) | {operator: implementation}
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    aside.write_text(json.dumps(choices, indent=1), encoding="utf-8")
    aside.replace(file)
    _choices.cache_clear()


def _file() -> Path:
    return cache_folder() / "measured.json"


@functools.cache
def _choices(file: Path) -> dict[str, dict[str, str]]:
    """Card and versions -> operator -> implementation; nothing where no bench has written it, or it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_sound = isinstance(found, dict) and all(isinstance(choices, dict) for choices in found.values())
    return found if is_sound else {}


@functools.cache
def _here() -> str:
    """The card and the versions that decide how fast an implementation is."""
    return ", ".join([torch.cuda.get_device_name(), *(f"{name} {_version(name)}" for name in PACKAGES)])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
