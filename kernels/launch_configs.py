"""Launch configurations: one table per op, one row for a kernel, an architecture and a class of shapes.

A row serves its architecture, and newer ones that it fits and that have no rows of their own; elements of up to its
size in bytes; and shapes of up to its size. `source` says where it came from: "compiled" is read off
benchmarks/results/codegen-3.6.md, and nothing but "measured" was run on a GPU. `python -m tools.tune` measures there
and rewrites TABLES.
"""

import functools
from typing import NamedTuple

import torch
import triton

from .architectures import INTERPRETER, OLDEST, fits

ANY = 1 << 30  # a size that everything is below


class Row(NamedTuple):
    """One launch configuration; what its numbers mean, the op's Config says."""

    kernel: str
    architecture: int  # of architectures.py, or INTERPRETER
    element: int  # bytes, up to
    size: int  # of the shape, up to
    config: tuple[int, ...]
    source: str


TABLES: dict[str, list[Row]] = {
    # kernels/attention.py: queries, keys, warps, stages; by head size
    "attention": [
        Row("fwd", 80, 2, 64, (128, 64, 8, 3), "compiled, no spills"),
        Row("fwd", 80, 2, 128, (128, 32, 8, 3), "compiled, no spills without dropout, 8 bytes with it"),
        Row("fwd", 80, 2, 256, (64, 64, 8, 2), "compiled, no spills"),
        Row("fwd", 80, 4, 64, (32, 32, 4, 2), "compiled"),
        Row("fwd", 80, 4, 128, (32, 16, 8, 2), "compiled, no spills"),
        Row("fwd", 80, 4, 256, (16, 16, 4, 1), "compiled"),
        Row("fwd", 86, 2, 64, (128, 64, 8, 3), "compiled, no spills"),
        Row("fwd", 86, 2, 128, (128, 32, 8, 3), "compiled, no spills without dropout, 8 bytes with it"),
        Row("fwd", 86, 2, 256, (64, 32, 8, 2), "compiled, no spills without dropout, 16 bytes with it"),
        Row("fwd", 90, 2, 64, (128, 64, 8, 3), "compiled, no spills"),
        Row("fwd", 90, 2, 128, (128, 64, 8, 3), "compiled, no spills"),
        Row("fwd", 90, 2, 256, (128, 32, 8, 2), "compiled, 16 bytes spilled on sm_90"),
        Row("bwd_dq", 80, 2, 64, (128, 64, 8, 2), "compiled, no spills"),
        Row("bwd_dq", 80, 2, 128, (64, 64, 8, 2), "compiled, no spills"),
        Row("bwd_dq", 80, 2, 256, (64, 32, 8, 2), "compiled, no spills"),
        Row("bwd_dq", 80, 4, 64, (32, 16, 4, 1), "compiled"),
        Row("bwd_dq", 80, 4, 128, (16, 16, 8, 1), "compiled, no spills"),
        Row("bwd_dq", 80, 4, 256, (16, 16, 8, 1), "compiled"),
        Row("bwd_dq", 86, 2, 64, (128, 64, 8, 2), "compiled, no spills"),
        Row("bwd_dq", 86, 2, 128, (64, 64, 8, 2), "compiled, no spills"),
        Row("bwd_dq", 86, 2, 256, (64, 16, 8, 2), "compiled, no spills"),
        Row("bwd_dq", 90, 2, 64, (128, 64, 8, 2), "compiled, no spills"),
        Row("bwd_dq", 90, 2, 128, (128, 64, 8, 2), "compiled, no spills"),
        Row("bwd_dq", 90, 2, 256, (64, 32, 8, 2), "compiled, no spills"),
        Row("bwd_dkdv", 80, 2, 64, (64, 128, 8, 2), "compiled, no spills"),
        Row("bwd_dkdv", 80, 2, 128, (64, 64, 8, 2), "compiled, no spills"),
        Row("bwd_dkdv", 80, 2, 256, (32, 32, 8, 1), "compiled, no spills"),
        Row("bwd_dkdv", 80, 4, 64, (32, 32, 4, 1), "compiled"),
        Row("bwd_dkdv", 80, 4, 128, (16, 16, 4, 1), "compiled"),
        Row("bwd_dkdv", 80, 4, 256, (16, 16, 4, 1), "compiled"),
        Row("bwd_dkdv", 90, 2, 64, (64, 128, 8, 2), "compiled, no spills"),
        Row("bwd_dkdv", 90, 2, 128, (32, 128, 8, 2), "compiled, no spills without dropout"),
        Row("bwd_dkdv", 90, 2, 256, (32, 64, 8, 1), "compiled"),
    ],
    # kernels/layer_norm.py, add_layer_norm too: rows and warps forward, rows, warps and programs backward; by width.
    # Tiles of 2 to 16 KiB keep several loads in flight.
    "layer_norm": [
        Row("rows", 80, 4, 128, (16, 4, 16, 4, 512), "compiled, no spills"),
        Row("rows", 80, 4, 256, (8, 4, 8, 4, 512), "compiled, no spills"),
        Row("rows", 80, 4, 512, (4, 4, 4, 4, 512), "compiled, no spills"),
        Row("rows", 80, 4, 1024, (4, 4, 4, 4, 512), "compiled, no spills"),
        Row("rows", 80, 4, 2048, (2, 4, 2, 8, 256), "compiled, no spills"),
        Row("rows", 80, 4, 4096, (1, 4, 1, 8, 256), "compiled, no spills"),
        Row("rows", 80, 4, 8192, (1, 8, 1, 16, 128), "compiled, no spills"),
        Row("rows", 80, 4, 16384, (1, 16, 1, 32, 128), "compiled"),
        Row("rows", 80, 4, 65536, (1, 32, 1, 32, 128), "compiled"),
    ],
    # kernels/decode_attention.py: keys of a program and of a tile, warps, splits added at a time; by head size. Of 12
    # heads 1,024 keys make 96 programs, and a tile is 8 to 16 KiB in bfloat16.
    "decode_attention": [
        Row("keys", 80, 4, 64, (128, 64, 4, 16), "compiled, no spills"),
        Row("keys", 80, 4, 128, (128, 64, 4, 16), "compiled, no spills"),
        Row("keys", 80, 4, 256, (128, 32, 4, 16), "compiled, no spills"),
    ],
    # kernels/embedding.py: rows and columns of a tile, uses that one program adds up, warps
    "embedding": [
        Row("rows", 80, 4, ANY, (4, 256, 32, 4), "compiled, no spills"),
    ],
    # kernels/gemm.py: m, n, k, warps, stages, programs on a multiprocessor; by the columns of x. And for what
    # csrc/cuda/mlp.cpp can do: 1 where cuBLASLt serves, because it was measured to be faster, or 0.
    "mlp": [
        Row("product", 0, 2, ANY, (64, 64, 32, 4, 1, 1), "small, for tests to have several tiles"),
        Row("product", 0, 4, ANY, (64, 64, 32, 4, 1, 1), "small, for tests to have several tiles"),
        Row("product", 80, 2, ANY, (128, 128, 32, 8, 4, 1), "compiled"),
        Row("product", 80, 4, ANY, (64, 64, 16, 8, 2, 2), "compiled"),
        Row("product", 90, 2, ANY, (128, 128, 64, 8, 3, 2), "compiled"),
        Row("product", 100, 2, ANY, (128, 128, 64, 8, 3, 1), "compiled"),
        Row("cublaslt relu", 80, 2, ANY, (0,), "default: cuBLASLt has not run on a GPU yet"),
        Row("cublaslt gelu_tanh", 80, 2, ANY, (0,), "default: cuBLASLt has not run on a GPU yet"),
    ],
    # The same; and the rows of a chunk, for whole waves of dx's tiles on 132 multiprocessors
    "linear_cross_entropy": [
        Row("product", 0, 2, ANY, (64, 64, 32, 4, 1, 1), "small, for tests to have several tiles"),
        Row("product", 0, 4, ANY, (64, 64, 32, 4, 1, 1), "small, for tests to have several tiles"),
        Row("product", 80, 2, ANY, (128, 128, 32, 8, 4, 1), "compiled"),
        Row("product", 80, 4, ANY, (64, 64, 16, 8, 2, 2), "compiled"),
        Row("product", 90, 2, ANY, (128, 128, 64, 8, 3, 2), "compiled"),
        Row("product", 100, 2, ANY, (128, 128, 64, 8, 3, 1), "compiled"),
        Row("chunk", 0, 2, ANY, (64,), "small, for tests to have several chunks"),
        Row("chunk", 0, 4, ANY, (64,), "small, for tests to have several chunks"),
        Row("chunk", 80, 2, 768, (2816,), "computed"),
        Row("chunk", 80, 2, 1024, (4224,), "computed"),
        Row("chunk", 80, 2, 1280, (3328,), "computed"),
        Row("chunk", 80, 2, ANY, (2560,), "computed"),
        Row("chunk", 80, 4, ANY, (2048,), "computed"),
    ],
}


@functools.cache
def architecture(device: torch.device) -> int:
    """The architecture whose rows serve a device. Raises `RuntimeError` for a GPU too old for the kernels."""
    if triton.knobs.runtime.interpret:
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    if major * 10 + minor < OLDEST:
        raise RuntimeError(
            f"gpt_fast: {torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, the kernels want "
            f"{OLDEST // 10}.{OLDEST % 10} or newer; gpt_fast.use_reference() runs on any device"
        )
    return major * 10 + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, where one fills a multiprocessor."""
    if triton.knobs.runtime.interpret:
        return 2  # fewer than there are tiles, as on a GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def serving(op: str, kernel: str, architecture: int, element: int) -> tuple[Row, ...]:
    """The rows for elements of this size, of the newest architecture whose rows fit this one, by size."""
    rows = [row for row in TABLES[op] if row.kernel == kernel and row.element >= element]
    rows = [row for row in rows if row.element == min(row.element for row in rows)]
    older = [row.architecture for row in rows if fits(row.architecture, architecture)]
    newest = max(older) if older else min(row.architecture for row in rows)
    return tuple(sorted((row for row in rows if row.architecture == newest), key=lambda row: row.size))


@functools.cache
def pick(op: str, kernel: str, architecture: int, element: int, size: int) -> tuple[int, ...]:
    """The configuration of the row that serves: the least size that suffices."""
    return next(row.config for row in serving(op, kernel, architecture, element) if row.size >= size)


def forget() -> None:
    """To be called when TABLES has changed."""
    serving.cache_clear()
    pick.cache_clear()
