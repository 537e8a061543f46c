"""The Hugging Face hub: is it there? Its own libraries retry for half a minute where it is not."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 0.8  # seconds until a hub that does not answer counts as out of reach


def address() -> tuple[str, int]:
    """Return (host, port) of the Hugging Face hub, or of the proxy through which it is reached.

    The hub is huggingface_hub's ENDPOINT. The proxy is the system's, by environment variables such as HTTPS_PROXY,
    unless NO_PROXY excludes the hub. Without a port in the address it is 80 for http, else 443.
    """
    from huggingface_hub.constants import ENDPOINT

    url = urlsplit(ENDPOINT)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    return url.hostname or "", url.port or (80 if url.scheme == "http" else 443)


def is_reachable() -> bool:
    """Return True if the hub, or the proxy in front of it, accepts a TCP connection within `PATIENCE` (0.8) seconds.

    Return False without trying in huggingface_hub's offline mode. A thread connects, because the look-up of a host name
    has no time limit of its own. It may outlive the call.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        """Connect to the hub or its proxy.

        Set `answered`, the event of `is_reachable`, if it accepts; ignore an `OSError`.
        """
        try:
            socket.create_connection(address(), timeout=PATIENCE).close()
            answered.set()
        except OSError:
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answered.is_set()


@contextmanager
def only_cached() -> Iterator[None]:
    """Let `datasets` and `huggingface_hub` use their caches alone, without the network, inside the block.

    Their switch HF_HUB_OFFLINE is set to True for the whole process, and restored afterwards.
    """
    import datasets.config
    import huggingface_hub.constants

    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
