"""Build gpt_fast._C, the C++ extension. The rest of the package is described in pyproject.toml.

The CUDA C++ kernels are part of the extension if PyTorch has CUDA and its toolkit is installed.

GPT_FAST_CUDA=0|1    leave the CUDA C++ kernels out, or fail where they cannot be built
GPT_FAST_NO_CPP=1    build no extension: a pure-Python install, where the reference serves the CPU
GPT_FAST_PORTABLE=1  compile once for each instruction set in gpt_fast/_levels.py instead of once for this machine;
                     GPT_FAST_PORTABLE=avx2 compiles for that one alone
GPT_FAST_SANITIZE=1  compile with the address and undefined-behaviour sanitizers
"""

import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NAME = "gpt_fast._C"

# Instruction sets that a compiler may use, by the macro that it predefines for them, with their names in Linux's
# /proc/cpuinfo.
CPU_FLAGS = {
    "__SSE3__": "pni",
    "__SSSE3__": "ssse3",
    "__SSE4_1__": "sse4_1",
    "__SSE4_2__": "sse4_2",
    "__SSE4A__": "sse4a",
    "__POPCNT__": "popcnt",
    "__LZCNT__": "abm",
    "__MOVBE__": "movbe",
    "__BMI__": "bmi1",
    "__BMI2__": "bmi2",
    "__ADX__": "adx",
    "__AES__": "aes",
    "__PCLMUL__": "pclmulqdq",
    "__SHA__": "sha_ni",
    "__GFNI__": "gfni",
    "__VAES__": "vaes",
    "__VPCLMULQDQ__": "vpclmulqdq",
    "__F16C__": "f16c",
    "__FMA__": "fma",
    "__AVX__": "avx",
    "__AVX2__": "avx2",
    "__AVXVNNI__": "avx_vnni",
    "__AVX512F__": "avx512f",
    "__AVX512CD__": "avx512cd",
    "__AVX512BW__": "avx512bw",
    "__AVX512DQ__": "avx512dq",
    "__AVX512VL__": "avx512vl",
    "__AVX512IFMA__": "avx512ifma",
    "__AVX512VBMI__": "avx512vbmi",
    "__AVX512VBMI2__": "avx512_vbmi2",
    "__AVX512VNNI__": "avx512_vnni",
    "__AVX512BITALG__": "avx512_bitalg",
    "__AVX512VPOPCNTDQ__": "avx512_vpopcntdq",
    "__AVX512BF16__": "avx512_bf16",
    "__AVX512FP16__": "avx512_fp16",
    "__AMX_TILE__": "amx_tile",
    "__AMX_BF16__": "amx_bf16",
    "__AMX_INT8__": "amx_int8",
}

LEVELS = runpy.run_path(str(ROOT / "gpt_fast" / "_levels.py"))["LEVELS"]
NVCC_FLAGS = runpy.run_path(str(ROOT / "gpt_fast" / "kernels" / "architectures.py"))["NVCC_FLAGS"]

CPU_SOURCES = [
    "csrc/bindings.cpp",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/**/*.cpp")),
]
# With these flags a write past a buffer on the stack ends the process, and the table of library functions is read-only.
HARDENING = ["-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]
HARDENING_LINK = ["-Wl,-z,relro,-z,now"]
SANITIZE = ["-fsanitize=address,undefined"]

CUBLAS_SOURCES = ("cublaslt.cpp", "linear.cpp", "mlp.cpp")  # files of csrc/cuda that need cublasLt.h

NO_TORCH = """
gpt-fast: the C++ extension is built against the PyTorch it will run with, and this environment has none.
  pip builds in an empty environment of its own unless told not to. Install PyTorch first, then either
      make install
  or  pip install --no-build-isolation .
  For a pure-Python install without the extension, set GPT_FAST_NO_CPP=1.
"""


NO_COMPILER = """gpt-fast: the C++ compiler '{}' was not found; install one (Debian and Ubuntu: apt install g++), \
or set GPT_FAST_NO_CPP=1 for a pure-Python install without the extension"""

NO_HEADERS = """gpt-fast: Python's header {} was not found; install it (Debian and Ubuntu: apt install python3-dev), \
or set GPT_FAST_NO_CPP=1 for a pure-Python install without the extension"""


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def machine_flags() -> dict[str, list[str]]:
    """Return the compiler's flags for each module to build, by the module's name."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {NAME: []}
    if not enabled("GPT_FAST_PORTABLE"):
        return {NAME: ["-march=native"]}
    chosen = os.environ["GPT_FAST_PORTABLE"]
    if chosen not in ("1", *LEVELS):
        raise SystemExit(f"gpt-fast: GPT_FAST_PORTABLE is '{chosen}'; expected 1 or one of {', '.join(LEVELS)}")
    return {f"gpt_fast._isa.{level}._C": [*flags] for level, flags in LEVELS.items() if chosen in ("1", level)}


def predefined_macros(compiler: list[str], flags: list[str]) -> set[str]:
    command = [*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {line.split()[1] for line in output.splitlines()}


def capability(macros: set[str]) -> str:
    """Return the vector width for at::vec, whose headers read CPU_CAPABILITY_* and not the compiler's macros."""
    if {"__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__"} <= macros:
        return "AVX512"
    return "AVX2" if {"__AVX2__", "__FMA__"} <= macros else "DEFAULT"


def jobs() -> int:
    """Return how many compilers run side by side: MAX_JOBS, as PyTorch reads it, or one a core."""
    given = os.environ.get("MAX_JOBS", "")
    return int(given) if given.isdigit() and int(given) > 0 else len(os.sched_getaffinity(0))


def translation_units(sources: list[str], folder: Path) -> list[str]:
    """Divide the files of csrc/cpu among translation units, one for each job, and return the units and all other files.

    A unit is a file that includes its share. Each unit reads PyTorch's headers once, which takes most of the time of a
    small file.
    """
    dealt = [source for source in sources if not source.startswith("csrc/cuda/")]
    units = []
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(min(jobs(), len(dealt))):
        unit = folder / f"unit{first}.cpp"
        text = "".join(f'#include "{ROOT / source}"\n' for source in dealt[first :: jobs()])
        if not unit.exists() or unit.read_text(encoding="utf-8") != text:  # ninja compiles a newer file again
            unit.write_text(text, encoding="utf-8")
        units.append(str(unit))
    return [*units, *(source for source in sources if source not in dealt)]


def record_of(compiler: list[str], machine: list[str]) -> dict[str, Any]:
    """Return the flags for one module, the vector width they give, and the features that the CPU must have."""
    flags = ["-std=c++20", "-O3", "-g0", "-fopenmp", *HARDENING, *machine]
    macros = predefined_macros(compiler, flags)
    vector = capability(macros)
    flags += [f"-DCPU_CAPABILITY={vector}", f"-DCPU_CAPABILITY_{vector}", "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-Wno-maybe-uninitialized"]  # GCC 12 warns falsely, hundreds of times, in its own AVX-512 headers
    if "__clang__" not in macros:
        # GCC stops inlining when a large translation unit has grown by 40 %, and a few functions use up that allowance.
        # A higher threshold leaves enough for the other functions where a unit holds several files.
        flags += [f"--param=large-unit-insns={15_000 * -(-len(CPU_SOURCES) // jobs())}"]
    if enabled("GPT_FAST_SANITIZE"):
        flags += [*SANITIZE, "-fno-omit-frame-pointer", "-O1", "-g1"]
    cpu_flags = sorted(name for macro, name in CPU_FLAGS.items() if macro in macros)
    return {"flags": flags, "vector": vector, "cpu_flags": cpu_flags}


def remove_builds(package: Path) -> None:
    """Remove the libraries of an earlier build, which may have been for other instruction sets."""
    for path in package.glob("_C.*"):
        path.unlink()
    shutil.rmtree(package / "_isa", ignore_errors=True)


def refuse_to_compile(message: str) -> dict[str, Any]:
    """Return arguments that raise when the extension is compiled; metadata and source distributions still work."""

    class Refuse(build_ext):
        def run(self) -> None:
            raise SystemExit(message)

    return {"ext_modules": [Extension(NAME, [])], "cmdclass": {"build_ext": Refuse}}


def cublas_include(toolkit: str) -> str | None:
    """Return the folder of cublasLt.h: in the toolkit, or in the package that comes with PyTorch's own wheel."""
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    places = [
        Path(toolkit, "include"),
        *(found.parent for root in packages for found in root.glob("*/include/cublasLt.h")),
    ]
    return next((str(place) for place in places if (place / "cublasLt.h").exists()), None)


def why_no_cuda(cuda: str | None, toolkit: str | None) -> str | None:
    """Return why the CUDA C++ kernels cannot be built for PyTorch's CUDA version with this toolkit, or None."""
    if cuda is None:
        return "this PyTorch is built without CUDA"
    nvcc = Path(toolkit or "", "bin", "nvcc")
    if toolkit is None or not nvcc.exists():
        return f"no nvcc in {toolkit or 'CUDA_HOME, which is not set'}; expected the toolkit of CUDA {cuda}"
    if not Path(toolkit, "include", "cuda_runtime.h").exists():
        return f"{nvcc} is there, {toolkit}/include/cuda_runtime.h is not; expected CUDA_HOME to be a whole toolkit"
    done = subprocess.run([str(nvcc), "--version"], check=False, capture_output=True, text=True)
    release = re.search(r"release (\d+)\.(\d+)", done.stdout)
    if release is None:
        return f"{nvcc} --version does not say its release: {(done.stderr or done.stdout).strip()[:200] or 'no output'}"
    if release[1] != cuda.partition(".")[0]:
        return (
            f"{nvcc} is of CUDA {release[1]}.{release[2]}; expected CUDA {cuda.partition('.')[0]}, as this PyTorch has"
        )
    return None


def chosen_cuda(cuda: str | None, toolkit: str | None) -> str | None:
    """Return why the CUDA C++ kernels are left out, or None. Raise `SystemExit` where GPT_FAST_CUDA=1 forbids that."""
    choice = os.environ.get("GPT_FAST_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"gpt-fast: GPT_FAST_CUDA is {choice}; expected 0 or 1")
    if choice == "0":
        return "GPT_FAST_CUDA=0"
    reason = why_no_cuda(cuda, toolkit)
    if reason and choice == "1":
        raise SystemExit(f"gpt-fast: GPT_FAST_CUDA=1, but {reason}")
    if reason and cuda:  # no message for a PyTorch without CUDA
        print(f"gpt-fast: built without the CUDA C++ kernels: {reason}")
    return reason


def extension_arguments() -> dict[str, Any]:
    if enabled("GPT_FAST_NO_CPP"):
        return {}
    if importlib.util.find_spec("torch") is None:
        return refuse_to_compile(NO_TORCH)

    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler

    compiler = shlex.split(get_cxx_compiler())
    if shutil.which(compiler[0]) is None:
        return refuse_to_compile(NO_COMPILER.format(compiler[0]))
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        return refuse_to_compile(NO_HEADERS.format(header))
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
    records = {name: record_of(compiler, machine) for name, machine in machine_flags().items()}
    link = ["-fopenmp", *HARDENING_LINK]
    if enabled("GPT_FAST_SANITIZE"):
        link += SANITIZE

    class BuildWithRecord(BuildExtension):
        """Build that writes `_C.json` beside each module, which a process reads before it loads the module."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.force = True  # ninja decides what to compile again, because it also knows the headers and the flags

        def build_extensions(self) -> None:
            remove_builds(Path(self.build_lib, "gpt_fast"))
            for extension in self.extensions:
                folder = Path(self.build_temp, "units", extension.name)
                extension.sources = translation_units(extension.sources, folder)
            super().build_extensions()
            for name, record in records.items():
                whole = {"torch": torch.__version__, "compiler": version.splitlines()[0], "no_cuda": no_cuda, **record}
                path = Path(self.build_lib, *name.split(".")[:-1], "_C.json")
                path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")

        def copy_extensions_to_source(self) -> None:
            remove_builds(ROOT / "gpt_fast")
            for name in records:
                folder = Path(*name.split(".")[:-1])
                (ROOT / folder).mkdir(parents=True, exist_ok=True)
                self.copy_file(str(Path(self.build_lib, folder, "_C.json")), str(ROOT / folder / "_C.json"))
            super().copy_extensions_to_source()

    sources = CPU_SOURCES
    arguments: dict[str, Any] = {"include_dirs": [str(ROOT / "csrc")], "extra_link_args": link}
    nvcc: dict[str, list[str]] = {}
    make_extension = CppExtension
    no_cuda = chosen_cuda(torch.version.cuda, CUDA_HOME)
    if no_cuda is None:
        make_extension = CUDAExtension
        cuda_sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.c*"))
        cublas = cublas_include(CUDA_HOME)  # the header is enough: PyTorch's own library links the functions
        if cublas is None:
            print("gpt-fast: no cublasLt.h, linear and mlp are built without cuBLASLt")
            cuda_sources = [source for source in cuda_sources if Path(source).name not in CUBLAS_SOURCES]
        elif cublas != str(Path(CUDA_HOME, "include")):
            arguments["include_dirs"].append(cublas)
        sources = [*sources, *cuda_sources]
        nvcc["nvcc"] = ["-O3", *NVCC_FLAGS]  # without these flags PyTorch compiles for the GPU of this machine
    extensions = [
        make_extension(name, sources, extra_compile_args={"cxx": record["flags"], **nvcc}, **arguments)
        for name, record in records.items()
    ]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildWithRecord}}


setup(**extension_arguments())
