"""Names of models on the Hugging Face hub: found where there is a network, refused at once where there is none."""

from pathlib import Path
from typing import Any

from ... import _hub


def is_local(source: Any) -> bool:
    """Return True if transformers should use no network: for a folder, and for a name while the hub is out of reach.

    Only the cache can serve that name. transformers itself would retry for 23 seconds.
    """
    return Path(source).is_dir() or is_path(source) or not _hub.is_reachable()


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
            f"{_hub.address()[0]} is out of reach; expected a network, or a folder"
        )
    return OSError(f"gpt_fast.from_hf: {source} is no folder and not on the hub ({str(error).splitlines()[0]})")
