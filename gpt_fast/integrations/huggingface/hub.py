"""Names of models on the Hugging Face hub: found where there is a network, refused at once where there is none."""

from pathlib import Path
from typing import Any

from ... import _hub


def is_local(source: Any) -> bool:
    """Return True if transformers should use no network to find `source`, a path or a name on the hub.

    This holds for a path, and for a name while the hub is out of reach. transformers then looks for the name in its
    cache alone. With the network allowed, transformers would retry for 23 seconds.
    """
    return Path(source).is_dir() or is_path(source) or not _hub.is_reachable()


def is_path(source: Any) -> bool:
    """Return True if `source` cannot be a name on the hub, such as "gpt2" or "openai-community/gpt2".

    It cannot be a name if it is no string, has a backslash or more than one slash, or begins with ".", "/" or "~".
    """
    return not isinstance(source, str) or source.count("/") > 1 or source.startswith((".", "/", "~")) or "\\" in source


def not_found(source: Any, local: bool, error: OSError) -> OSError:
    """Return a one-line error for a `source` (path or name) whose configuration transformers did not find.

    It is a `FileNotFoundError` for a path, and another `OSError` for a name. `local` is True if transformers was told
    to use no network, and `error` is what transformers raised.
    """
    if is_path(source):
        return FileNotFoundError(f"gpt_fast.from_hf: {source} is no folder; expected one, or a name on the hub")
    if local:
        return OSError(
            f"gpt_fast.from_hf: {source} is neither a folder nor in the cache of transformers, and "
            f"{_hub.address()[0]} is out of reach; expected a network, or a folder"
        )
    return OSError(f"gpt_fast.from_hf: {source} is no folder and not on the hub ({str(error).splitlines()[0]})")
