"""Compile every C++ file for instruction sets this machine may lack: `make compile-isa`.

The levels are those of gpt_fast/_levels.py. Nothing is optimised, linked or run: this finds code that one of the paths
no longer has, not code that computes something else there.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import get_cxx_compiler, include_paths

from gpt_fast._levels import LEVELS

ROOT = Path(__file__).resolve().parent.parent
INCLUDED = (*include_paths(), sysconfig.get_paths()["include"])


def compiles(source: Path, level: str) -> str:
    """Compile the C++ file `source` for the instruction set `level`, a key of `LEVELS`, without optimisation or output.

    `source` lies in this repository. Return "" if it compiles, else its path, the instruction set and the compiler's
    errors as text.
    """
    vector = "AVX2" if level == "avx2" else "AVX512"  # of at::vec
    command = [
        *shlex.split(get_cxx_compiler()), "-std=c++20", "-O0", "-g0", "-fopenmp", *LEVELS[level],
        f"-DCPU_CAPABILITY={vector}", f"-DCPU_CAPABILITY_{vector}", "-w",
        f"-I{ROOT / 'csrc'}", *(flag for path in INCLUDED for flag in ("-isystem", path)),
        "-S", "-o", os.devnull, str(source),
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"{source.relative_to(ROOT)} for {level}\n{done.stderr}"


def main() -> None:
    """Compile each C++ file below csrc/cpu for each instruction set of `LEVELS`, and print the failures and a count.

    Exit with code 1 if there is a failure, else 0. The environment variable MAX_JOBS limits how many compilers run at
    once; by default there is one for each CPU of the process.
    """
    work = [(path, level) for path in sorted((ROOT / "csrc/cpu").rglob("*.cpp")) for level in LEVELS]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", len(os.sched_getaffinity(0))))) as pool:
        failures = [output for output in pool.map(lambda item: compiles(*item), work) if output]
    print("\n".join([*failures, f"{len(work) - len(failures)} of {len(work)} compile, for {', '.join(LEVELS)}"]))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
