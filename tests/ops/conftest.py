"""cuBLASLt for the tests of the ops that it can serve: the library on a GPU, an emulation of it elsewhere.

The emulation does what cuBLASLt's header says on the host's memory, so it tests what we ask of the library: layouts,
transposes, leading dimensions, epilogues, what is kept and the gradients that follow; not the library.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Build the operators of csrc/cuda/linear.cpp and mlp.cpp for CPU tensors, over an emulation of cuBLASLt."""
    from tools import cublas_headers  # a copy of the tree for planted faults has no tools

    headers, compiler = cublas_headers.find(), shutil.which("c++")
    if torch.version.cuda:
        pytest.skip("PyTorch has CUDA: the real operators are under test")
    if headers is None or compiler is None:
        pytest.skip("no cublasLt.h (`make codegen` fetches it) or no compiler")
    from torch.utils import cpp_extension

    library = tmp_path_factory.mktemp("cublaslt") / "libemulation.so"
    folders = [ROOT / "tests" / "cublaslt", *cpp_extension.include_paths(), headers]
    folders.append(cublas_headers.toolkit() / "include")
    sources = [ROOT / "tests" / "cublaslt" / "emulation.cpp", ROOT / "csrc" / "cuda" / "cublaslt.cpp"]
    flags = ["-std=c++20", "-O1", "-g0", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    link = [*(f"-L{folder}" for folder in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
    command = [compiler, *flags, *(f"-isystem{folder}" for folder in folders), *map(str, sources), *link]
    command += ["-o", str(library)]
    subprocess.run(command, check=True)
    torch.ops.load_library(library)
    return ctypes.CDLL(str(library))


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def cublaslt_device(request: pytest.FixtureRequest) -> str:
    """Return "cpu", where the emulation serves, and "cuda", where cuBLASLt itself does."""
    if request.param == "emulated":
        request.getfixturevalue("emulation")
        return "cpu"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("gpt_fast::mlp_cublaslt_forward", "CUDA"):
        pytest.skip("csrc/cuda was not built with cuBLASLt: it needs PyTorch with CUDA, nvcc and cublasLt.h")
    return "cuda"
