"""`gpt-fast bench`: hands over to the benchmark suite of the checkout in which it is called."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import typer

# The suite parses its own options, --help among them.
PASSES_ON: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "options_metavar": "[OPTIONS OF python -m benchmarks]",
}


def bench(context: typer.Context) -> None:
    """Time every operation, training steps and generation, in a checkout: the same as python -m benchmarks.

    All options are passed on to the benchmark suite, which replaces this process. Outside of a checkout the command
    fails.
    """
    if not Path("benchmarks", "catalogue.py").exists():
        raise ValueError(
            "the benchmark suite is in a checkout of gpt_fast, with the tests that it runs first; clone the "
            "repository, and there: make install, python -m benchmarks"
        )
    sys.stdout.flush()
    # exec, not a child: Ctrl-C has to reach the suite alone, which saves what it has measured.
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *context.args])
