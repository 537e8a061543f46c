"""The floors that figures are held against: a copy, a read, a matrix product. Nothing does such work faster here."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from benchmarks.measure.timing import Budget, Call, Stopwatch, quartiles, take_turns

_SOURCE = Path(__file__).with_name("read_all.cpp")
_BUILT = Path(__file__).resolve().parents[2] / "build" / "benchmarks"
_FLAGS = ["-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]


def bf16_products(device: str) -> bool:
    """Return True if the device ("cpu" or "cuda") has instructions for products of bfloat16 matrices.

    A GPU always has them. A CPU without them is many times slower in bfloat16 than in float32.
    """
    return device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def int8_products() -> bool:
    """Return True if the CPU adds products of four pairs of 8-bit integers in one instruction (VNNI).

    Return False without /proc/cpuinfo, as on systems other than Linux.
    """
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and not {"avx512_vnni", "avx_vnni"}.isdisjoint(cpuinfo.read_text("utf-8").split())


@dataclass(frozen=True)
class Floor:
    """Work whose rate is a speed limit."""

    name: str
    amount: int  # bytes or FLOPs of one call
    build: Callable[[], Call]


def floors(device: str) -> list[Floor]:
    """Return the workloads whose measured rates are the speed limits of a device: a copy, a read and matrix products.

    A `Floor` has `name`, `amount` (the bytes or FLOPs of one call), and `build`, a function that allocates the tensors
    and returns the call. `device` is "cpu" or "cuda". The products are in bfloat16 on a GPU. On a CPU they are in
    float32 and, if it has instructions for bfloat16, also in bfloat16.
    """
    size = (1 << 30) if device == "cuda" else (256 << 20)
    n = 8192 if device == "cuda" else 1536
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)[: 1 + bf16_products(device)]

    def values() -> torch.Tensor:
        return torch.randn(size // 4, device=device)

    def copy() -> Call:
        source, target = values(), torch.empty(size // 4, device=device)
        return lambda: target.copy_(source)

    def read() -> Call:
        return reader(values())

    def product(dtype: torch.dtype) -> Call:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return lambda: a @ b.t()  # as in a linear layer

    return [
        Floor("copy", 2 * size, copy),
        Floor("read", size, read),
        *(Floor(f"matmul {str(dtype).removeprefix('torch.')}", 2 * n**3, partial(product, dtype)) for dtype in dtypes),
    ]


def measure_floors(device: str, cpu_time: bool = False) -> Iterator[tuple[str, dict[str, float]]]:
    """Measure the speed limits of a device, "cpu" or "cuda". Yield (name, {"rate", "q1", "q3"}) for each.

    The names are "copy", "read" and "matmul <dtype>", such as "matmul float32". "rate" is the median, "q1" and "q3" are
    the quartiles, in bytes or FLOPs a second. With `cpu_time`, a CPU's rates are per second of the process's CPU time.
    """
    for floor in floors(device):
        watch = Stopwatch(device, [floor.build()], cpu_time=cpu_time)
        take_turns([watch], Budget(0.5, 5))
        q1, median, q3 = quartiles(watch.seconds)
        yield floor.name, {"rate": floor.amount / median, "q1": floor.amount / q3, "q3": floor.amount / q1}


# ---- reading memory


def reader(x: torch.Tensor) -> Call:
    """Return a call that reads the tensor `x` once and returns its sum. On a CPU it uses as many threads as PyTorch.

    On a CPU with a C++ compiler the call is compiled code and returns a float. Otherwise it is `x.sum`, which returns a
    tensor. Raise `ValueError` unless `x` is float32 and contiguous.
    """
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError(f"reader: x has dtype {x.dtype} and strides {x.stride()}; expected contiguous float32")
    library = read_library() if x.device.type == "cpu" else None
    if library is None:
        return x.sum
    return lambda: library.read_all(
        ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.numel()), ctypes.c_int(torch.get_num_threads())
    )


@cache
def read_library() -> ctypes.CDLL | None:
    """Load the shared library of read_all.cpp, and compile it first if build/benchmarks has none for this code and CPU.

    Its function `read_all` (pointer to float32, number of elements, number of threads) returns their sum. The
    environment variable CXX names the compiler, else it is "c++". Return None if there is no such program. Raise
    `subprocess.CalledProcessError` if the file cannot be compiled.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        return None
    machine = Path("/proc/cpuinfo").read_text("utf-8").partition("\n\n")[0] if Path("/proc/cpuinfo").exists() else ""
    flags = next((line for line in machine.splitlines() if line.startswith("flags")), "")
    key = hashlib.sha256(_SOURCE.read_bytes() + flags.encode() + " ".join([*compiler, *_FLAGS]).encode())
    path = _BUILT / f"read_all-{key.hexdigest()[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # renamed into place: others may build it too
            built = Path(folder, path.name)
            subprocess.run([*compiler, *_FLAGS, str(_SOURCE), "-o", str(built)], check=True)
            built.replace(path)
    library = ctypes.CDLL(str(path))
    library.read_all.restype = ctypes.c_double
    return library
