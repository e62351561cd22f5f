"""Data sets of the Hugging Face hub, streamed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from convert.core.errors import UserError
from convert.core.network import hub_offline, is_hub_reachable


@contextmanager
def hub_data(name: str, config: str | None, instead: str, split: str | None = None) -> Iterator[Any]:
    """The rows of a split, or all splits by name. What goes wrong while they are found, or read inside the `with`,
    becomes a UserError; `instead` says what to do without network."""
    try:
        import datasets
    except ImportError:
        raise UserError("Hub data sets need the `datasets` package: pip install -e '.[data]'.") from None
    unreachable = not is_hub_reachable()
    try:
        with hub_offline(datasets.config, when=unreachable):
            found = datasets.load_dataset(name, config, split=split, streaming=True)
        yield found
    except UserError:
        raise
    except (
        OSError,
        ValueError,
        datasets.exceptions.DatasetNotFoundError,
    ) as error:  # ValueError: no such configuration
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = "the local cache lacks it and the hub gives no answer" if unreachable else reason
        raise UserError(f"The data set {name!r} could not be read ({reason}). {instead}") from None
