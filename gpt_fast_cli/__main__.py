"""The entry point of `gpt-fast`, of `python -m gpt_fast` and of `python -m gpt_fast_cli`."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130  # the exit code that shells give for Ctrl-C


def main() -> None:
    """Run the command line `gpt-fast`. If packages that it needs are not installed, name them and exit with code 2.

    It also exits with code 2 if standard output is closed. Ctrl-C exits with code 130, unless the caller ignores it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the caller ignores Ctrl-C
        signal.signal(signal.SIGINT, _interrupt)
    try:
        _require_standard_output()
        _require_packages()
        from .app import run

        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _require_standard_output() -> None:
    """Print an error and exit with code 2 if the caller of this process closed standard output.

    Otherwise a result would be lost, and the next file to be opened would take the place of standard output.
    """
    if sys.stdout is None:
        print("gpt-fast: standard output: closed; expected a file, pipe or terminal", file=sys.stderr)
        sys.exit(2)


def _require_packages() -> None:
    """Exit with code 2, and name the missing packages, if typer, rich or pydantic is not installed."""
    from importlib.util import find_spec

    missing = [name for name in ("typer", "rich", "pydantic") if find_spec(name) is None]
    if missing:
        print(f"gpt-fast: {' and '.join(missing)} not installed; pip install gpt-fast[train]", file=sys.stderr)
        sys.exit(2)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Handle SIGINT: end the process with code 130 if it is importing a module, else raise `KeyboardInterrupt`.

    `frame` is the stack frame that the signal interrupted, from which the import is recognised. Inside an import the
    exception may not arrive: C code that initialises a module turns it into an ImportError, and callbacks of the import
    system print and drop it. An import has nothing to clean up.
    """
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
