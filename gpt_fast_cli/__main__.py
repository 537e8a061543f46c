"""The entry point of `gpt-fast`, of `python -m gpt_fast` and of `python -m gpt_fast_cli`."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line, or name the packages that it needs and are not installed."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        print(f"gpt-fast: {' and '.join(missing)} not installed; pip install gpt-fast[train]", file=sys.stderr)
        sys.exit(2)
    from .app import run

    run()


if __name__ == "__main__":
    main()
