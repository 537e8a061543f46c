"""Builds gpt_fast._C, the C++ extension; everything else about the package is in pyproject.toml. The CUDA C++ kernels
are part of it where PyTorch has CUDA and its toolkit is installed.

GPT_FAST_NO_CPP=1    build no extension: a pure-Python install, where the reference serves the CPU
GPT_FAST_PORTABLE=1  compile for any x86-64-v3 CPU (AVX2, FMA) instead of for this one
GPT_FAST_SANITIZE=1  compile with the address and undefined-behaviour sanitizers
"""

import importlib.util
import json
import os
import platform
import runpy
import shlex
import subprocess
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NAME = "gpt_fast._C"

# What the compiler may use, by predefined macro, and what Linux calls it in /proc/cpuinfo.
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

NVCC_FLAGS = runpy.run_path(str(ROOT / "gpt_fast" / "kernels" / "architectures.py"))["NVCC_FLAGS"]

CUBLAS_SOURCES = ("cublaslt.cpp", "mlp.cpp")  # of csrc/cuda

NO_TORCH = """
gpt-fast: the C++ extension is built against the PyTorch it will run with, and this environment has none.
  pip builds in an empty environment of its own unless told not to. Install PyTorch first, then either
      make install
  or  pip install --no-build-isolation .
  For a pure-Python install without the extension, set GPT_FAST_NO_CPP=1.
"""


def enabled(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def machine_flags() -> list[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    return ["-march=x86-64-v3"] if enabled("GPT_FAST_PORTABLE") else ["-march=native"]


def predefined_macros(compiler: list[str], flags: list[str]) -> set[str]:
    command = [*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {line.split()[1] for line in output.splitlines()}


def capability(macros: set[str]) -> str:
    """The vector width that at::vec is to use: its headers look at CPU_CAPABILITY_*, not at the compiler's macros."""
    if {"__AVX512F__", "__AVX512BW__", "__AVX512DQ__", "__AVX512VL__"} <= macros:
        return "AVX512"
    return "AVX2" if {"__AVX2__", "__FMA__"} <= macros else "DEFAULT"


def jobs() -> int:
    """Return how many compilers run side by side: MAX_JOBS, as PyTorch reads it, or one a core."""
    given = os.environ.get("MAX_JOBS", "")
    return int(given) if given.isdigit() and int(given) > 0 else len(os.sched_getaffinity(0))


def translation_units(sources: list[str], folder: Path) -> list[str]:
    """Deal the files of csrc/cpu over one translation unit a job, and leave all other files as they are.

    A unit includes its files. Each unit reads PyTorch's headers once, which costs a small file most of its time.
    """
    dealt = [source for source in sources if not source.startswith("csrc/cuda/")]
    units = []
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(min(jobs(), len(dealt))):
        unit = folder / f"unit{first}.cpp"
        text = "".join(f'#include "{ROOT / source}"\n' for source in dealt[first :: jobs()])
        if not unit.exists() or unit.read_text(encoding="utf-8") != text:  # ninja compiles again what is newer
            unit.write_text(text, encoding="utf-8")
        units.append(str(unit))
    return [*units, *(source for source in sources if source not in dealt)]


class MissingTorch(build_ext):
    """Metadata and source distributions need no torch; compiling does."""

    def run(self) -> None:
        raise SystemExit(NO_TORCH)


def cublas_include(toolkit: str) -> str | None:
    """Where cublasLt.h is: in the toolkit, or in the package that comes with PyTorch's own wheel."""
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    places = [
        Path(toolkit, "include"),
        *(found.parent for root in packages for found in root.glob("*/include/cublasLt.h")),
    ]
    return next((str(place) for place in places if (place / "cublasLt.h").exists()), None)


def extension_arguments() -> dict[str, Any]:
    if enabled("GPT_FAST_NO_CPP"):
        return {}
    if importlib.util.find_spec("torch") is None:
        return {"ext_modules": [Extension(NAME, [])], "cmdclass": {"build_ext": MissingTorch}}

    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler

    compiler = shlex.split(get_cxx_compiler())
    flags = ["-std=c++20", "-O3", "-g0", "-fopenmp", *machine_flags()]
    macros = predefined_macros(compiler, flags)
    vector = capability(macros)
    flags += [f"-DCPU_CAPABILITY={vector}", f"-DCPU_CAPABILITY_{vector}", "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-Wno-maybe-uninitialized"]  # GCC 12 raises it falsely, hundreds of times, in its own AVX-512 headers
    link = ["-fopenmp"]
    if enabled("GPT_FAST_SANITIZE"):
        sanitize = ["-fsanitize=address,undefined"]
        flags += [*sanitize, "-fno-omit-frame-pointer", "-O1", "-g1"]
        link += sanitize

    class BuildWithRecord(BuildExtension):
        """Writes `_C.json` beside the extension: what a process has to know before it may load it."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.force = True  # ninja decides what to compile again: it also knows the headers and the flags

        def build_extensions(self) -> None:
            for extension in self.extensions:
                extension.sources = translation_units(extension.sources, Path(self.build_temp, "units"))
            super().build_extensions()
            version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
            record = {
                "torch": torch.__version__,
                "compiler": version.splitlines()[0],
                "flags": flags,
                "vector": vector,
                "cpu_flags": sorted(name for macro, name in CPU_FLAGS.items() if macro in macros),
            }
            path = Path(self.build_lib, "gpt_fast", "_C.json")
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

        def copy_extensions_to_source(self) -> None:
            super().copy_extensions_to_source()
            self.copy_file(str(Path(self.build_lib, "gpt_fast", "_C.json")), str(ROOT / "gpt_fast" / "_C.json"))

    cpu_sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/**/*.cpp"))
    sources = ["csrc/bindings.cpp", *cpu_sources]
    arguments: dict[str, Any] = {"include_dirs": [str(ROOT / "csrc")], "extra_link_args": link}
    compile_args = {"cxx": flags}
    make_extension = CppExtension
    if torch.version.cuda and CUDA_HOME and Path(CUDA_HOME, "bin", "nvcc").exists():
        make_extension = CUDAExtension
        cuda_sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.c*"))
        cublas = cublas_include(CUDA_HOME)  # its functions are in what PyTorch's own library links
        if cublas is None:
            print("gpt-fast: no cublasLt.h, mlp is built without cuBLASLt")
            cuda_sources = [source for source in cuda_sources if Path(source).name not in CUBLAS_SOURCES]
        elif cublas != str(Path(CUDA_HOME, "include")):
            arguments["include_dirs"].append(cublas)
        sources += cuda_sources
        compile_args["nvcc"] = ["-O3", *NVCC_FLAGS]  # without them PyTorch would ask the GPU that happens to be here
    extension = make_extension(NAME, sources, extra_compile_args=compile_args, **arguments)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildWithRecord}}


setup(**extension_arguments())
