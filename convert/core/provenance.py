"""The versions of the software that made a report."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path


def versions() -> dict[str, str | None]:
    """The versions of Python and of the libraries that change results; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "safetensors", "numpy", "timm", "wandb"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The commit of this repository, with "-dirty" where files changed since; None outside a repository."""
    try:
        here = Path(__file__).parent
        asked = subprocess.run(  # the optional lock would be a file of ours in somebody's repository
            ["git", "--no-optional-locks", "describe", "--always", "--dirty"],
            cwd=here,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError:
        return None
    return asked.stdout.strip() or None
