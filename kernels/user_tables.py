"""Where a user's own tables lie, which `gpt-fast tune` writes."""

import os
from pathlib import Path

FOLDER = "GPT_FAST_LAUNCH_CONFIGS"  # environment variable with the folder of a user's tables; empty for none


def user_table(name: str) -> Path | None:
    """Return the path of the user's table called `name`, such as "sm_90", or None if the user wants none.

    The file is <name>.json and need not exist. The environment variable GPT_FAST_LAUNCH_CONFIGS names its folder, by
    default gpt_fast/launch_configs in $XDG_CONFIG_HOME or ~/.config. If the variable is set but empty, the user wants
    none.
    """
    folder = os.environ.get(FOLDER)
    if folder is None:
        settings = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
        folder = os.path.join(settings, "gpt_fast", "launch_configs")
    return Path(folder) / f"{name}.json" if folder else None
