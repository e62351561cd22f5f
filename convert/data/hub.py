"""Data sets of the Hugging Face hub, streamed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convert.core.errors import UserError
from convert.core.network import hub_offline, is_hub_reachable


@contextmanager
def hub_data(name: str, config: str | None, instead: str, split: str | None = None) -> Iterator[Any]:
    """The rows of a split, or all splits by name. What goes wrong while they are found, or read inside the `with`,
    becomes a UserError; `instead` says what to do without network."""
    with _asked(name, instead, lambda library: library.load_dataset(name, config, split=split, streaming=True)) as rows:
        yield rows


def hub_files(name: str, config: str | None, instead: str) -> list[str]:
    """What tells the files of a data set from those of another one, or of another revision: their addresses on the hub,
    of files on this machine names and sizes."""
    with _asked(name, instead, lambda library: library.load_dataset_builder(name, config)) as builder:
        found = builder.config.data_files or {}
    files = [Path(file) for split in sorted(found) for file in found[split]]
    return [f"{file.name} {file.stat().st_size}" if file.is_file() else str(file) for file in files]


@contextmanager
def _asked(name: str, instead: str, what: Callable[[Any], Any]) -> Iterator[Any]:
    """The answer of the package `datasets`, which looks into its cache alone where the hub gives no answer."""
    try:
        import datasets
        from huggingface_hub.errors import HTTPError  # here, because this module must import quickly
    except ImportError:
        raise UserError("Hub data sets need the `datasets` package: pip install -e '.[data]'.") from None
    unreachable = not is_hub_reachable()
    try:
        with hub_offline(datasets.config, when=unreachable):
            found = what(datasets)
        yield found
    except UserError:
        raise
    except (OSError, ValueError, HTTPError, datasets.exceptions.DatasetsError) as error:
        # ValueError: no such configuration
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = "the local cache lacks it and the hub gives no answer" if unreachable else reason
        raise UserError(f"The data set {name!r} could not be read ({reason}). {instead}") from None
