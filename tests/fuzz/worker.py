"""Run draws of one target and print a line of JSON for each. This process may crash or hang.

    python -m tests.fuzz.worker TARGET SEED FIRST LAST

Lines: {"draw": index} before a draw, then {"kind": text} or {"error": text}. The last line is {"end": true}.
"""

import importlib
import importlib.util
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable

import torch

MODULES = ("tests.fuzz.ops", "tests.fuzz.sessions")


def targets() -> dict[str, Callable[[int, int], object]]:
    """Return every target: a function of a seed and an index that raises AssertionError on a difference."""
    found = {}
    for name in MODULES:
        if importlib.util.find_spec(name) is not None:
            found |= importlib.import_module(name).TARGETS
    return found


def main(target: str, seed: int, first: int, last: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    run_one = targets()[target]
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")  # anything that a draw prints goes to stderr
    os.dup2(2, 1)

    def tell(**line: object) -> None:
        print(json.dumps(line), file=lines, flush=True)

    for index in range(first, last):
        tell(draw=index)
        try:
            tell(kind=str(run_one(seed, index) or "computed"))
        except Exception as error:  # noqa: BLE001  each is a finding, which the parent process reports
            text = "".join(traceback.format_exception(error, limit=-3)).strip()
            tell(error=f"{type(error).__name__}: {error}" if isinstance(error, AssertionError) else text)
    tell(end=True)


if __name__ == "__main__":
    name, *numbers = sys.argv[1:]
    main(name, *map(int, numbers))
