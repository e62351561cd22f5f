"""Whether the hub answers is known within seconds, through a proxy or without."""

import socket

import huggingface_hub

from convert.core.network import is_hub_reachable


def test_is_hub_reachable(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.create_server(("127.0.0.1", 0)) as there, socket.create_server(("127.0.0.1", 0)) as gone:
        url, closed = (f"http://127.0.0.1:{s.getsockname()[1]}" for s in (there, gone))
        gone.close()
        for endpoint, proxy, expected in (
            (url, "", True),
            (closed, "", False),
            (closed, url, True),
            (url, closed, False),
        ):
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
            monkeypatch.setenv("http_proxy", proxy)
            assert is_hub_reachable() is expected
        monkeypatch.setenv("http_proxy", "")
        monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
        assert not is_hub_reachable()
