"""Measures launch configurations on a GPU and rewrites kernels/launch_configs.py: python -m tools.tune [OP ...]

For every class of shapes in an op's table a climb starts at the configuration that serves it here: its neighbours, one
number changed, are measured, the fastest becomes the next start, until none is faster. What does not compile or fit is
passed over. The row is written for this architecture with device, Triton and date as its source. Tuning keeps what a
kernel computes but not its bits, because tiles order sums: run the tests and `make codegen` after it. cuBLASLt's mlp is
passed over unless its tests pass here first.

`--compare FILE` rewrites nothing: it measures the configuration that serves and its neighbours, and appends one line of
JSON for each to FILE. `--part 2/8` takes every eighth class of shapes from the second on. Processes that share the work
compile side by side and time one after the other.
"""

import argparse
import datetime
import fcntl
import functools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.errors import TritonError

import gpt_fast.ops  # noqa: F401  defines the operators
from kernels import (
    attention,
    decode_attention,
    embedding,
    gemm,
    launch_configs,
    layer_norm,
    linear_cross_entropy,
    mlp,
)
from kernels.launch_configs import ANY, Row

PATH = Path(launch_configs.__file__)
DTYPES = {2: torch.bfloat16, 4: torch.float32}
GAIN = 0.98  # a neighbour has to be this much faster, or noise would move the table
DROPOUT = (6554, 65536 / (65536 - 6554))
Config = tuple[int, ...]

# What each number of a configuration is, and its range: doubled and halved; stages, programs, switches one up and down.
LIMITS: dict[str, dict[str, tuple[int, int]]] = {
    "product": dict(
        zip(gemm.Config._fields, ((32, 256), (32, 256), (16, 128), (4, 8), (1, 5), (1, 2)), strict=True)
    ),
    "chunk": {"rows": (512, 8192)},
    "cublaslt relu": {"cublaslt": (0, 1)},
    "cublaslt gelu_tanh": {"cublaslt": (0, 1)},
    "attention": dict(zip(attention.Config._fields, ((16, 256), (16, 256), (4, 8), (1, 4)), strict=True)),
    "layer_norm": dict(
        zip(layer_norm.Config._fields, ((1, 32), (1, 32), (1, 32), (1, 32), (64, 1024)), strict=True)
    ),
    "decode_attention": dict(
        zip(decode_attention.Config._fields, ((64, 1024), (16, 128), (1, 8), (4, 64)), strict=True)
    ),
    "embedding": dict(zip(embedding.Config._fields, ((1, 32), (64, 1024), (8, 128), (1, 8)), strict=True)),
}  # fmt: skip


def limits(row: Row, op: str) -> dict[str, tuple[int, int]]:
    return LIMITS.get(row.kernel) or LIMITS[op]


def neighbours(config: Config, ranges: dict[str, tuple[int, int]]) -> Iterator[Config]:
    """Every configuration with one number changed by a step, inside its range."""
    for index, (name, (low, high)) in enumerate(ranges.items()):
        value = config[index]
        steps = (value - 1, value + 1) if name in ("stages", "programs", "cublaslt") else (value // 2, value * 2)
        for step in steps:
            if low <= step <= high:
                yield (*config[:index], step, *config[index + 1 :])


def climb(start: Config, ranges: dict[str, tuple[int, int]], measure: Callable[[Config], float]) -> Config:
    """The best configuration that steps downhill reach; each is measured once. `measure` gives inf for what fails."""
    times = {start: measure(start)}
    best = start
    while True:
        for candidate in neighbours(best, ranges):
            if candidate not in times:
                times[candidate] = measure(candidate)
        fastest = min((*neighbours(best, ranges), best), key=lambda config: times[config])
        if not times[fastest] < GAIN * times[best]:
            return best
        best = fastest


def work(op: str, row: Row, device: str) -> Callable[[], object]:
    """What to time for a class of shapes: the largest of it, or GPT-2's smallest where it has no end."""
    dtype = DTYPES[row.element]
    size = row.size if row.size < ANY else 768
    seed = torch.zeros(1, dtype=torch.int64, device=device)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    if op == "attention":
        q, k, v, dout = (random(8, 12, 1024, size) for _ in range(4))
        options = attention.Options(None, None, None, None, True, None, 0.1, seed, 0, size**-0.5)
        if row.kernel == "fwd":
            return lambda: attention.forward(q, k, v, options, *DROPOUT)
        out, lse = attention.forward(q, k, v, options, *DROPOUT)
        return lambda: attention.backward(dout, q, k, v, out, lse, options, *DROPOUT)
    if op == "layer_norm":
        x, weight, bias = random(max(2**25 // size, 64), size), random(size), random(size)

        def both() -> None:
            _, mean, rstd = layer_norm.forward(x, weight, bias, 1e-5)
            layer_norm.backward(x, x, weight, mean, rstd, True, True)

        return both
    if op == "decode_attention":
        q, k_cache, v_cache = random(1, 12, size), random(1, 12, 1024, size), random(1, 12, 1024, size)
        lengths = torch.full((1,), 1024, device=device)
        return lambda: decode_attention.forward(q, k_cache, v_cache, lengths)
    if op == "embedding":
        tokens = torch.randint(0, 50257, (32, 1024), device=device)
        positions = torch.arange(1024, device=device)
        token_weight, position_weight, dout = random(50257, size), random(1024, size), random(32, 1024, size)
        arguments = (tokens, token_weight, position_weight, positions, *DROPOUT, seed, 0)

        def both_tables() -> None:
            embedding.forward(*arguments)
            embedding.backward(dout, *arguments, True, True)

        return both_tables
    if op == "mlp":
        x, dy, fc_weight, proj_weight = (
            random(*s) for s in ((16384, size), (16384, size), (4 * size, size), (size, 4 * size))
        )
        fc_bias, proj_bias, rule = random(4 * size), random(size), ("gelu_tanh", *DROPOUT, seed, 0)
        if row.kernel.startswith("cublaslt "):
            return either_mlp(row, dy, x, fc_weight, fc_bias, proj_weight, proj_bias)

        def layer() -> None:
            _, hidden = mlp.forward(x, fc_weight, fc_bias, proj_weight, proj_bias, *rule, True)
            mlp.backward(dy, x, fc_weight, fc_bias, proj_weight, hidden, *rule, [True] * 5)

        return layer
    x, weight = random(16384, size), random(50257, size)
    target = torch.randint(0, 50257, (16384,), device=device)
    return lambda: linear_cross_entropy.forward(x, weight, target, None, -100, 0.0, "mean", True, True, False)


def either_mlp(row: Row, dy: torch.Tensor, *inputs: torch.Tensor) -> Callable[[], object]:
    """mlp without dropout by cuBLASLt or by Triton, as the table has it when it runs."""
    ops, activation, needs = torch.ops.gpt_fast, row.kernel.removeprefix("cublaslt "), [True] * 5

    def run() -> None:
        if launch_configs.pick("mlp", row.kernel, launch_configs.architecture(dy.device), row.element, row.size) == (
            0,
        ):
            rule = (activation, 0, 1.0, None, 0)
            _, hidden = mlp.forward(*inputs, *rule, True)
            mlp.backward(dy, *inputs[:4], hidden, *rule, needs)
        elif cublaslt_tests_pass():
            _, hidden, mask = ops.mlp_cublaslt_forward(*inputs, activation, True)
            ops.mlp_cublaslt_backward(dy, *inputs[:4], hidden, mask, activation, needs)
        else:
            raise RuntimeError("cuBLASLt's mlp does not pass its tests")

    return run


@functools.cache
def cublaslt_tests_pass() -> bool:
    """Whether cuBLASLt's mlp was built and passes its tests on this GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/ops/test_mlp_cublaslt.py"]
    tests = subprocess.run(command, capture_output=True, text=True, check=False)
    print(tests.stdout.splitlines()[-1] if tests.stdout else tests.stderr, flush=True)
    return tests.returncode == 0 and " passed" in tests.stdout


def with_row(rows: list[Row], new: Row) -> list[Row]:
    """The rows with one replaced, or put in, kernels in their order and then by architecture, element and size."""
    kept = [row for row in rows if row[:4] != new[:4]]
    kernels = list(dict.fromkeys(row.kernel for row in rows))
    return sorted((*kept, new), key=lambda row: (kernels.index(row.kernel), *row[1:4]))


Timer = Callable[[Callable[[], object]], float]


def measurer(op: str, row: Row, architecture: int, timer: Timer, device: str = "cuda") -> Callable[[Config], float]:
    """Return a function that times a configuration for the class of shapes of `row`, inf where it does not run."""
    run = work(op, row, device)

    def measure(config: Config) -> float:
        candidate = row._replace(architecture=architecture, config=config)
        table = launch_configs.TABLES | {op: with_row(launch_configs.TABLES[op], candidate)}
        launch_configs.forget()
        try:
            with mock.patch.object(launch_configs, "TABLES", table):
                return timer(run)
        except (TritonError, triton.CompilationError, RuntimeError):
            return math.inf
        finally:
            launch_configs.forget()

    return measure


def serving(op: str, row: Row, architecture: int) -> Config:
    """Return the configuration that serves the class of shapes of `row`."""
    return launch_configs.pick(op, row.kernel, architecture, row.element, row.size)


def tuned(op: str, row: Row, architecture: int, source: str, timer: Timer) -> Row:
    """The row of this architecture for the class of shapes of `row`."""
    best = climb(serving(op, row, architecture), limits(row, op), measurer(op, row, architecture, timer))
    return row._replace(architecture=architecture, config=best, source=source)


def compared(op: str, row: Row, architecture: int, timer: Timer, device: str = "cuda") -> Iterator[dict[str, Any]]:
    """Yield the time of the configuration that serves, then of each neighbour, as a share of the first."""
    measure = measurer(op, row, architecture, timer, device)
    shipped = serving(op, row, architecture)
    first = measure(shipped)
    what = {"op": op, "kernel": row.kernel, "element": row.element, "size": row.size, "architecture": architecture}
    for config in (shipped, *neighbours(shipped, limits(row, op))):
        time = first if config == shipped else measure(config)
        known = {"ms": time, "of_shipped": time / first} if math.isfinite(time) else {"ms": None}
        yield what | {"config": config, "shipped": config == shipped} | known


def classes(op: str) -> list[Row]:
    """Return one row for each class of shapes in the table of an op."""
    rows = (row for row in launch_configs.TABLES[op] if row.architecture != launch_configs.INTERPRETER)
    return list({(row.kernel, row.element, row.size): row for row in rows}.values())


def one_at_a_time(timer: Timer, lock: Path) -> Timer:
    """Return `timer` that runs the work once, which compiles it, and times it while no other process does."""

    def timed(run: Callable[[], object]) -> float:
        run()
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return timer(run)

    return timed


def compare(ops: list[str], part: str, path: Path, architecture: int) -> None:
    """Measure the candidates of a part of all classes, 16-bit and most used first, and append them to a file."""
    number, parts = (int(value) for value in part.split("/"))
    every = [(op, row) for op in ops for row in classes(op)]
    every.sort(key=lambda each: each[1].element)  # stable: the ops keep their order
    timer = one_at_a_time(median, path.with_suffix(".lock"))
    for op, row in every[number - 1 :: parts]:
        for record in compared(op, row, architecture, timer):
            print(*record.values(), flush=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def rewritten(text: str, op: str, rows: list[Row]) -> str:
    """The text of kernels/launch_configs.py with the rows of an op replaced."""
    lines = []
    for row in rows:
        size = "ANY" if row.size == ANY else str(row.size)
        config = f"({', '.join(map(str, row.config))}{',' if len(row.config) == 1 else ''})"
        lines.append(
            f'        Row("{row.kernel}", {row.architecture}, {row.element}, {size}, {config}, "{row.source}"),\n'
        )
    pattern = re.compile(rf'(    "{op}": \[\n).*?(    \],\n)', re.DOTALL)
    new, count = pattern.subn(lambda match: match[1] + "".join(lines) + match[2], text)
    if count != 1:
        raise ValueError(f"{PATH}: found {count} tables of {op}; expected 1")
    return new


def median(run: Callable[[], object]) -> float:
    return triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(launch_configs.TABLES)}; all by default")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="append the times of the neighbours, tune nothing")
    parser.add_argument("--part", default="1/1", help="with --compare: 2/8 is every eighth class from the second on")
    arguments = parser.parse_args()
    unknown = set(arguments.ops) - set(launch_configs.TABLES)
    if unknown:
        parser.error(f"no table of {', '.join(sorted(unknown))}; there are {', '.join(launch_configs.TABLES)}")
    if not torch.cuda.is_available():
        sys.exit("tools.tune: no CUDA device")
    architecture = launch_configs.architecture(torch.device("cuda"))
    if arguments.compare:
        compare(arguments.ops or list(launch_configs.TABLES), arguments.part, arguments.compare, architecture)
        return
    source = f"measured: {torch.cuda.get_device_name()}, Triton {triton.__version__}, {datetime.date.today()}"
    for op in arguments.ops or launch_configs.TABLES:
        for row in classes(op):
            new = tuned(op, row, architecture, source, median)
            print(op, *new, flush=True)
            launch_configs.TABLES[op] = with_row(launch_configs.TABLES[op], new)
        PATH.write_text(rewritten(PATH.read_text("utf-8"), op, launch_configs.TABLES[op]), encoding="utf-8")


if __name__ == "__main__":
    main()
