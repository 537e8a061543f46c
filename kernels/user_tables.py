"""Where a user's own tables lie, which `gpt-fast tune` writes."""

import os
from pathlib import Path

FOLDER = "GPT_FAST_LAUNCH_CONFIGS"  # environment variable with the folder of a user's tables; empty for none


def user_table(name: str) -> Path | None:
    """Return the path of a table that `gpt-fast tune` writes, or None if the user has switched these tables off.

    A table holds what is fastest on the user's machine. `name` is "cpu", or a GPU's architecture such as "sm_90", whose
    table has launch configurations. The file is <name>.json and need not exist. The environment variable
    GPT_FAST_LAUNCH_CONFIGS names the folder, by default gpt_fast/launch_configs in $XDG_CONFIG_HOME or ~/.config. A
    variable that is set but empty switches the tables off.
    """
    folder = os.environ.get(FOLDER)
    if folder is None:
        settings = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
        folder = os.path.join(settings, "gpt_fast", "launch_configs")
    return Path(folder) / f"{name}.json" if folder else None
