"""Find, choose and load `gpt_fast._C`, the optional C++ extension.

A build from source is one library for this machine, `_C*.so`. A wheel holds one for each instruction set of `LEVELS`,
`_isa/<level>/_C*.so`. Each library has its record `_C.json` beside it.
"""

import importlib.util
import json
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._levels import LEVELS

_FOLDER = Path(__file__).resolve().parent
_NAME = "gpt_fast._C"
NATIVE = "native"  # the instruction set of a build from source: this machine's
FORCED = "GPT_FAST_ISA"
# Later minor releases that run an extension of an earlier one: the op tests passed, and the layouts of tensors agree.
# PyTorch promises no such thing, so that each pair is measured before it is listed.
_LATER = {"2.13": ("2.14",)}


class Choice(NamedTuple):
    """A build of the C++ extension: its instruction set, its record, and why it was chosen."""

    isa: str
    record: dict[str, Any]
    reason: str


def build_info() -> dict[str, Any] | None:
    """Return what the C++ extension for this CPU was built with and for, without loading it.

    Returns:
        The record of the build, or None if there is none. It has the keys "torch" (version), "compiler", "flags",
        "cpu_flags" (instruction sets that the build needs) and others.

    Raises:
        ImportError: The environment variable `GPT_FAST_ISA` names an instruction set that is not built.

    Example:
        ```python
        import gpt_fast

        info = gpt_fast.build_info()
        built_for = info and info["torch"]  # the version of PyTorch
        ```
    """
    found = choice()
    return found and found.record


def choice() -> Choice | None:
    """Choose the build of the C++ extension for this CPU, without loading it.

    The instruction set in `GPT_FAST_ISA` comes first, if the variable is set and not empty. Next is a build from
    source. Otherwise it is the best build of the wheel whose instructions this CPU has. If the CPU can run none,
    or /proc/cpuinfo lists no instruction sets, it is the build that needs the fewest. `load` raises `ImportError` for a
    build whose instructions the CPU is known to lack.

    Returns:
        The `Choice` (instruction set, record of the build as a dict, reason as text), or None if no build is there.

    Raises:
        ImportError: `GPT_FAST_ISA` names an instruction set that is not built.
    """
    records = {isa: _record(isa) for isa in (NATIVE, *reversed(LEVELS)) if _find(isa) is not None}
    if not records:
        return None
    forced = os.environ.get(FORCED, "")
    if forced and forced not in records:
        raise ImportError(f"{FORCED} is '{forced}'; expected one that is built: {', '.join(records)}")
    if forced:
        return Choice(forced, records[forced], f"{FORCED} forces it")
    if NATIVE in records:
        return Choice(NATIVE, records[NATIVE], "built from source for this machine")
    smallest = list(records)[-1]
    if not _cpu_flags():
        return Choice(smallest, records[smallest], "the smallest: /proc/cpuinfo lists no instruction sets")
    reason = f"the best of {', '.join(records)} that this CPU runs"
    for isa, record in records.items():
        missing = _missing(record)
        if not missing or isa == smallest:  # `load` refuses the smallest if this CPU lacks even that
            return Choice(isa, record, reason)
        reason += f"; {isa} needs {', '.join(missing)}"
    raise AssertionError("unreachable: the smallest is always returned")


def load() -> bool:
    """Load the C++ extension, which registers the C++ kernels with PyTorch, as the module `gpt_fast._C`.

    Returns:
        True if it was loaded. False if it is not built, or if TRITON_INTERPRET=1 lets Triton's interpreter run on the
        CPU.

    Raises:
        ImportError: The extension was built for a PyTorch of another ABI or for instructions that this CPU lacks, or
            `GPT_FAST_ISA` names an instruction set that is not built.
    """
    # Under the interpreter the Triton kernels serve the CPU, so that one test file checks either implementation;
    # an operator takes one kernel for a device, and ours would be the second.
    if os.environ.get("TRITON_INTERPRET") == "1":
        return False
    chosen = choice()
    if chosen is None:
        return False
    _check(chosen.record)  # before the library is opened: its static initialisers may already use the instructions
    spec = _find(chosen.isa)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module
    spec.loader.exec_module(module)
    vars(sys.modules["gpt_fast"])["_C"] = module
    return True


def _find(isa: str) -> ModuleSpec | None:
    """Return the import spec of this package's library for the instruction set `isa`, or None if it is not built."""
    # Searched for in this folder alone: an editable install of another checkout would offer its own `_C`.
    return PathFinder.find_spec(_NAME, [str(_place(isa))])


def _place(isa: str) -> Path:
    """Return the folder of the library for the instruction set `isa`: the package for "native", else one in `_isa`."""
    return _FOLDER if isa == NATIVE else _FOLDER / "_isa" / isa


def _record(isa: str) -> dict[str, Any]:
    """Return the dict in `_C.json`, the record of how the library for the instruction set `isa` was built.

    It has the keys "torch", "compiler", "flags", "cpu_flags" and others. A missing file raises `FileNotFoundError`.
    """
    return json.loads((_place(isa) / "_C.json").read_text(encoding="utf-8"))


def _missing(record: dict[str, Any]) -> list[str]:
    """Return the sorted names in `record["cpu_flags"]`, the instruction sets that a library needs, that this CPU lacks.

    The list is empty if nothing is missing, or if the instruction sets of the CPU are unknown.
    """
    cpu = _cpu_flags()
    return sorted(set(record["cpu_flags"]) - cpu) if cpu else []


def _minor(version: str) -> str:
    """Return the major and minor version of a version string: "2.13" for "2.13.1+cpu"."""
    return ".".join(version.partition("+")[0].split(".")[:2])


def _serves(built: str, running: str) -> bool:
    """Return True if an extension built against the PyTorch version `built` runs with the version `running`.

    It does if both have the same major and minor version, or if `_LATER` lists the minor of `running` for that of
    `built`. Patch releases and builds for CPU or CUDA of one minor release have the same headers and C++ symbols.
    """
    return _minor(running) in (_minor(built), *_LATER.get(_minor(built), ()))


def _check(record: dict[str, Any]) -> None:
    """Raise `ImportError` if the library with this `record` cannot run with this PyTorch or on this CPU.

    The record's "torch" is the version it was built against, and its "cpu_flags" are the instruction sets that it
    needs. The message tells how to build the library again.
    """
    mend = f"in {_FOLDER.parent}: make install" if (_FOLDER.parent / "setup.py").exists() else _REINSTALL
    if not _serves(record["torch"], torch.__version__):
        minors = " or ".join((_minor(record["torch"]), *_LATER.get(_minor(record["torch"]), ())))
        raise ImportError(
            f"gpt_fast._C was built against torch {record['torch']}, but this is torch {torch.__version__}; "
            f"expected torch {minors}. Build it again {mend}"
        )
    missing = _missing(record)
    if missing:
        raise ImportError(
            f"gpt_fast._C was built for a CPU with {', '.join(missing)}, which this one lacks. "
            f"Build it again {mend} (GPT_FAST_PORTABLE=1 builds for any CPU with AVX2)"
        )


_REINSTALL = "with: pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation gpt-fast"


def _cpu_flags() -> set[str]:
    """Return the instruction sets of this CPU by Linux's names, or an empty set if /proc/cpuinfo does not list them."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return set()
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()
