"""Launch configurations: one table per op, one row for a kernel, an architecture and a class of shapes.

A row serves its architecture, and newer ones that it fits and that have no rows of their own; elements of up to its
size in bytes; and shapes of up to its size. `source` says where it came from: "compiled" is read off
benchmarks/results/codegen-3.6.md, and nothing but "measured" was run on a GPU.

`gpt-fast tune` measures rows on the user's GPU and writes them to a file of its own, which wins over TABLES here.
CANDIDATES are rows that a prediction favours and that no GPU has measured: they serve nobody until the tuner has.
"""

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .architectures import INTERPRETER, OLDEST, fits
from .user_tables import FOLDER, user_table

ANY = 1 << 30  # larger than every size


class Row(NamedTuple):
    """One launch configuration; what its numbers mean, the op's Config says."""

    kernel: str
    architecture: int  # capability from architectures.py, or INTERPRETER
    element: int  # bytes of the largest element that the row serves
    size: int  # largest size of a shape that the row serves
    config: tuple[int, ...]
    source: str


TABLES: dict[str, list[Row]] = {
    # kernels/attention.py: queries, keys, warps, stages, then registers and late if they are not 0. `size` is the head
    # size.
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
    # kernels/layer_norm.py, and add_layer_norm: rows and warps of forward, then rows, warps and programs of backward.
    # `size` is the width. Tiles of 2 to 16 KiB keep several loads in flight.
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
    # kernels/decode_attention.py: keys of a program and of a tile, warps, splits added at a time. `size` is the head
    # size. With 12 heads, 1,024 keys make 96 programs. A tile is 8 to 16 KiB in bfloat16.
    "decode_attention": [
        Row("keys", 80, 4, 64, (128, 64, 4, 16), "compiled, no spills"),
        Row("keys", 80, 4, 128, (128, 64, 4, 16), "compiled, no spills"),
        Row("keys", 80, 4, 256, (128, 32, 4, 16), "compiled, no spills"),
    ],
    # kernels/embedding.py: rows and columns of a tile, uses that one program adds up, warps
    "embedding": [
        Row("rows", 80, 4, ANY, (4, 256, 32, 4), "compiled, no spills"),
    ],
    # "product" (kernels/gemm.py): m, n, k, warps, stages, programs on a multiprocessor. "few" (Few in kernels/mlp.py):
    # the most rows, columns of a program, a step of K, warps, stages, programs that K is split for. 768 columns make 96
    # programs; splitting K for more would cost a second launch. "cublaslt": 1 if csrc/cuda/mlp.cpp serves, because it
    # was measured to be faster, else 0. `size` is the number of columns of x.
    "mlp": [
        Row("product", 0, 2, ANY, (64, 64, 32, 4, 1, 1), "small, for tests to have several tiles"),
        Row("product", 0, 4, ANY, (64, 64, 32, 4, 1, 1), "small, for tests to have several tiles"),
        Row("product", 80, 2, ANY, (128, 128, 32, 8, 4, 1), "compiled"),
        Row("product", 80, 4, ANY, (64, 64, 16, 8, 2, 2), "compiled"),
        Row("product", 90, 2, ANY, (128, 128, 64, 8, 3, 2), "compiled"),
        Row("product", 100, 2, ANY, (128, 128, 64, 8, 3, 1), "compiled"),
        Row("few", 0, 2, ANY, (16, 16, 32, 4, 1, 4), "small, for tests to split K"),
        Row("few", 0, 4, ANY, (16, 16, 32, 4, 1, 4), "small, for tests to split K"),
        Row("few", 80, 2, ANY, (16, 8, 256, 4, 4, 96), "computed"),
        Row("few", 80, 4, ANY, (16, 8, 128, 4, 3, 96), "computed"),
        Row("cublaslt relu", 80, 2, ANY, (0,), "default: cuBLASLt has not run on a GPU yet"),
        Row("cublaslt gelu_tanh", 80, 2, ANY, (0,), "default: cuBLASLt has not run on a GPU yet"),
    ],
    # "cublaslt": 1 where csrc/cuda/linear.cpp computes the backward, which is faster by a measurement, else 0. The size
    # is the number of columns of x.
    "linear": [
        Row("cublaslt", 80, 2, ANY, (0,), "default: cuBLASLt has not run on a GPU yet"),
    ],
    # "product": as for mlp. "chunk": rows of a chunk, for whole waves of dx's tiles on 132 multiprocessors.
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

# Rows that the codegen gate compiles, and that the tuner measures beside the neighbours of the rows that serve.
# docs/performance/what-a-gpu-should-show.md explains the predictions.
CANDIDATES: dict[str, list[Row]] = {
    "attention": [
        Row("fwd", 90, 2, 64, (128, 64, 8, 3, 0, 1), "predicted: 1.05 x, with dropout 1.03 x"),
        Row("fwd", 90, 2, 64, (64, 128, 4, 2, 0, 1), "predicted: 1.07 to 1.14 x, with dropout 1.07 to 1.11 x"),
        Row("fwd", 90, 2, 64, (128, 64, 8, 3, 128, 1), "predicted: two programs a multiprocessor with dropout"),
        Row("fwd", 90, 2, 64, (64, 64, 4, 2, 0, 1), "predicted: 1.08 to 1.16 x, with dropout 1.05 to 1.12 x"),
        Row("fwd", 90, 2, 128, (64, 64, 4, 2, 0, 1), "predicted: 1.04 to 1.11 x, with dropout 1.03 to 1.10 x"),
        Row("bwd_dq", 90, 2, 64, (64, 64, 4, 2, 0, 0), "predicted: 1.03 to 1.11 x with the next, with dropout too"),
        Row("bwd_dkdv", 90, 2, 64, (64, 64, 4, 2, 0, 0), "predicted: 1.03 to 1.11 x with the last, with dropout too"),
    ],
    "layer_norm": [
        Row("rows", 90, 4, 1024, (1, 1, 4, 4, 512), "predicted: forward, 0.75 x the instructions"),
    ],
    "linear_cross_entropy": [
        Row("chunk", 90, 2, 768, (5632,), "predicted: 0.23 ms less for 16,384 rows, twice the memory"),
        Row("chunk", 90, 2, 768, (8448,), "predicted: 0.31 ms less for 16,384 rows, three times the memory"),
    ],
}

FORMAT = 1  # version of the format of a user's table


@functools.cache
def architecture(device: torch.device) -> int:
    """Return the architecture of a device: its compute capability times ten, or INTERPRETER in Triton's interpreter.

    Raise `RuntimeError` for a GPU whose compute capability is below 8.0, the oldest that the kernels are compiled for.
    """
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
    """Return how many multiprocessors a CUDA device has: the programs that run at once if one fills a multiprocessor.

    In Triton's interpreter the result is 2. The result is cached.
    """
    if triton.knobs.runtime.interpret:
        return 2  # fewer than there are tiles, as on a GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


def read_table(path: Path) -> tuple[dict[str, str], dict[str, list[Row]]]:
    """Return (made_by, rows) of the file `path`, a user's table of launch configurations in JSON.

    `made_by` has the "device" and the "triton" version on which it was measured, and `rows` a list of `Row` for each
    op. Raise `ValueError` for a file that `written` cannot have made with this version of the library, and `OSError`
    for a file that cannot be read.
    """
    try:
        table = json.loads(path.read_text("utf-8"))
        if table["format"] != FORMAT:
            raise ValueError(f"format is {table['format']!r}; expected {FORMAT}")
        made_by = {name: str(table[name]) for name in ("device", "triton")}
        rows: dict[str, list[Row]] = {}
        for entry in table["rows"]:
            op, row = entry.pop("op"), Row(**entry)
            row = row._replace(config=tuple(row.config))
            check_row(op, row)
            rows.setdefault(op, []).append(row)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"gpt_fast: {path} has {what}; expected a table of launch configurations: remove it, or run gpt-fast tune"
        ) from error
    return made_by, rows


def check_row(op: str, row: Row) -> None:
    """Raise `ValueError` unless `row` has the form of the rows that are shipped for its kernel of `op`.

    TABLES has to have rows for that kernel. The configuration of `row` has to have the length of a configuration in
    the kernel's rows of TABLES or CANDIDATES. Its numbers, the architecture, the element size and the size have to be
    integers from 0 on. The message is a clause without the file's name.
    """
    shipped = [other for other in TABLES.get(op, ()) if other.kernel == row.kernel]
    if not shipped:
        raise ValueError(f"a row of {op} {row.kernel}, which has no such kernel")
    lengths = {len(other.config) for other in [*shipped, *CANDIDATES.get(op, ())] if other.kernel == row.kernel}
    whole = all(type(number) is int and number >= 0 for number in (*row.config, *row[1:4]))
    if not whole or len(row.config) not in lengths:
        raise ValueError(f"{list(row.config)} for {op} {row.kernel}")


def written(device: str, rows: dict[str, list[Row]]) -> dict[str, Any]:
    """Return the JSON content of a user's table: `rows` by op, measured on the GPU called `device`. Nothing is written.

    It is a dict with "format", "device", "triton" (the version that runs now) and "rows", a list of dicts with the
    fields of `Row` and the row's "op".
    """
    entries = [{"op": op, **row._asdict()} for op, of_op in rows.items() for row in of_op]
    return {"format": FORMAT, "device": device, "triton": triton.__version__, "rows": entries}


def with_row(rows: list[Row], new: Row) -> list[Row]:
    """Return `rows` with `new` in place of the row for the same kernel, architecture, element and size, or inserted.

    `rows` are those of one op, and the list itself is not changed. If the architecture of `new` had no rows for this
    kernel and element, the rows that served it are also copied for it. Otherwise shapes larger than those of `new`
    would have no row. The result has the kernels in their order, and the rows of a kernel sorted by architecture,
    element and size.
    """
    kernels = list(dict.fromkeys(row.kernel for row in rows))
    served = _serving(rows, new.kernel, new.architecture, new.element)
    copies = {row._replace(architecture=new.architecture) for row in served if row.element == new.element}
    kept = [row for row in dict.fromkeys((*rows, *sorted(copies))) if row[:4] != new[:4]]
    return sorted((*kept, new), key=lambda row: (kernels.index(row.kernel), *row[1:4]))


@functools.cache
def tables(architecture: int) -> dict[str, list[Row]]:
    """Return the rows for all architectures by op: TABLES, with the user's own rows for `architecture` inserted.

    The user's rows are left out, with a warning, if they were measured on another GPU or with another Triton. Triton's
    interpreter has none. Raise `ValueError` if the user's file is damaged. The dict is cached, and `trying` changes it.
    """
    rows = {op: list(shipped) for op, shipped in TABLES.items()}
    path = None if architecture == INTERPRETER else user_table(f"sm_{architecture}")
    if path is None or not path.is_file():
        return rows
    made_by, measured = read_table(path)
    here = {"device": torch.cuda.get_device_name(), "triton": triton.__version__}
    if made_by != here:
        warnings.warn(
            f"gpt_fast: {path} was measured on {made_by['device']} with Triton {made_by['triton']}; expected "
            f"{here['device']} with {here['triton']}, so the shipped configurations serve: run gpt-fast tune",
            stacklevel=2,
        )
        return rows
    for op, of_op in measured.items():
        for row in of_op:
            rows[op] = with_row(rows[op], row)
    return rows


@contextlib.contextmanager
def trying(op: str, row: Row) -> Iterator[None]:
    """Use `row` inside the block in place of the row for the same kernel of `op`, architecture, element and size.

    If there is no such row, `row` is added. The earlier rows are restored afterwards. Both hold for the whole process.
    """
    changed = tables(row.architecture)
    before = changed[op]
    changed[op] = with_row(before, row)
    forget_picks()
    try:
        yield
    finally:
        changed[op] = before
        forget_picks()


@contextlib.contextmanager
def shipped_alone() -> Iterator[None]:
    """Use only the shipped launch configurations inside the block, none of the user's own, in the whole process.

    The environment variable GPT_FAST_LAUNCH_CONFIGS is empty meanwhile and restored afterwards. Caches are cleared both
    times.
    """
    before = os.environ.get(FOLDER)
    os.environ[FOLDER] = ""
    forget()
    try:
        yield
    finally:
        del os.environ[FOLDER]
        if before is not None:
            os.environ[FOLDER] = before
        forget()


@functools.cache
def serving(op: str, kernel: str, architecture: int, element: int) -> tuple[Row, ...]:
    """Return the rows for a kernel of `op` on an architecture and elements of `element` bytes, sorted by `Row.size`.

    `architecture` is a compute capability times ten, or INTERPRETER. A row states the largest element that it is for.
    Among rows that allow `element` bytes, those with the smallest limit are taken. Among their architectures, the
    newest one that fits `architecture` (see `fits`) is taken, or the oldest one if none fits. The result is empty if no
    row of the kernel allows `element` bytes.
    """
    return _serving(tables(architecture)[op], kernel, architecture, element)


def _serving(rows: list[Row], kernel: str, architecture: int, element: int) -> tuple[Row, ...]:
    """Return those of an op's `rows` that serve a kernel on an architecture with elements of `element` bytes, by size.

    Among the kernel's rows that allow `element` bytes, those with the smallest limit are taken. Among their
    architectures, the newest one that fits `architecture` is taken, or the oldest one if none fits. The result is empty
    if no row allows `element` bytes.
    """
    rows = [row for row in rows if row.kernel == kernel and row.element >= element]
    if not rows:
        return ()
    rows = [row for row in rows if row.element == min(row.element for row in rows)]
    older = [row.architecture for row in rows if fits(row.architecture, architecture)]
    newest = max(older) if older else min(row.architecture for row in rows)
    return tuple(sorted((row for row in rows if row.architecture == newest), key=lambda row: row.size))


@functools.cache
def pick(op: str, kernel: str, architecture: int, element: int, size: int) -> tuple[int, ...]:
    """Return the numbers of a launch configuration for a shape: those of the first row of `serving` that allows `size`.

    `kernel` of `op` runs on `architecture` (compute capability times ten, or INTERPRETER) with elements of `element`
    bytes. The Config class of the kernel's module says what the numbers mean; TABLES says what the size is, such as the
    head size. Rows are tried from the smallest size up. Raise `StopIteration` if none is large enough.
    """
    return next(row.config for row in serving(op, kernel, architecture, element) if row.size >= size)


def forget() -> None:
    """Clear the caches of `tables`, `serving` and `pick`, so that TABLES and the user's table are read again."""
    tables.cache_clear()
    forget_picks()


def forget_picks() -> None:
    """Clear the caches of `serving` and `pick`, so that rows are chosen again."""
    serving.cache_clear()
    pick.cache_clear()
