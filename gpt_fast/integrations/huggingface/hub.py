"""Names of models on the Hugging Face hub: found where there is a network, refused at once where there is none."""

import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 0.8  # seconds until a hub that does not answer counts as out of reach


def is_local(source: Any) -> bool:
    """Return True if transformers should use no network for `source`: a folder, or a name while the hub is out of
    reach, which only the cache can serve. transformers itself would retry for 23 seconds."""
    return Path(source).is_dir() or is_path(source) or not _reaches_hub()


def is_path(source: Any) -> bool:
    """Return True if `source` can be no name on the hub, which are "gpt2" or "openai-community/gpt2"."""
    return not isinstance(source, str) or source.count("/") > 1 or source.startswith((".", "/", "~")) or "\\" in source


def not_found(source: Any, local: bool, error: OSError) -> OSError:
    """Return the error, in one line, for a model whose configuration transformers did not find."""
    if is_path(source):
        return FileNotFoundError(f"gpt_fast.from_hf: {source} is no folder; expected one, or a name on the hub")
    if local:
        return OSError(
            f"gpt_fast.from_hf: {source} is neither a folder nor in the cache of transformers, and "
            f"{_address()[0]} is out of reach; expected a network, or a folder"
        )
    return OSError(f"gpt_fast.from_hf: {source} is no folder and not on the hub ({str(error).splitlines()[0]})")


def _address() -> tuple[str, int]:
    """Return host and port of the hub, or of the proxy to it."""
    from huggingface_hub.constants import ENDPOINT

    url = urlsplit(ENDPOINT)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    return url.hostname or "", url.port or (80 if url.scheme == "http" else 443)


def _reaches_hub() -> bool:
    """Return True if the hub accepts a connection. A thread asks, as the look-up of a name has no time limit."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            socket.create_connection(_address(), timeout=PATIENCE).close()
            answered.set()
        except OSError:
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answered.is_set()
