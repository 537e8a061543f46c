"""`gpt-fast`: the command line. Its commands are in `gpt_fast.commands`, one file each."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        print(f"gpt-fast: {' and '.join(missing)} not installed; pip install gpt-fast[train]", file=sys.stderr)
        sys.exit(2)
    from gpt_fast.commands import run

    run()


if __name__ == "__main__":
    main()
