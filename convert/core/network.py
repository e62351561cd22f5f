"""Whether a server answers, asked within seconds: libraries would try for minutes."""

import contextlib
import socket
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit


def answers(address: str, timeout: float = 5.0) -> bool:
    """Whether the host of this URL, or the proxy before it, takes a connection within `timeout` seconds."""
    url, proxies = urlsplit(address), urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    place = url.hostname, url.port or (80 if url.scheme == "http" else 443)
    reached = []

    def knock() -> None:
        with contextlib.suppress(OSError), socket.create_connection(place, timeout):
            reached.append(True)

    # a thread, because a name look-up and several addresses know no common time limit
    thread = threading.Thread(target=knock, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(reached)


def is_hub_reachable() -> bool:
    """Whether the Hugging Face hub may be asked and answers. huggingface_hub itself would try for 23 seconds."""
    import huggingface_hub  # here, because this module must import quickly

    return not huggingface_hub.is_offline_mode() and answers(huggingface_hub.constants.ENDPOINT)


@contextlib.contextmanager
def hub_offline(settings: Any, when: bool) -> Iterator[None]:
    """Have a library look into its cache at once. By itself it would first try the hub, for up to a minute.

    `settings`: the library's module that has HF_HUB_OFFLINE, as `datasets.config` or `huggingface_hub.constants`."""
    before = settings.HF_HUB_OFFLINE
    settings.HF_HUB_OFFLINE = before or when
    try:
        yield
    finally:
        settings.HF_HUB_OFFLINE = before
