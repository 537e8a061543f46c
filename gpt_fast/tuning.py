"""The tuner: measures launch configurations on a GPU and writes them to the user's own table.

For every class of shapes in an op's table a climb starts at the fastest of two kinds of configurations: the one that
serves here, and the candidates of `launch_configs.CANDIDATES`. Its neighbours, one number changed, are measured; the
fastest becomes the next start, until none is faster. What does not compile or fit is passed over. Tuning keeps what a
kernel computes but not its bits, because tiles order sums. cuBLASLt is passed over unless the tests of the op by it,
which are in a checkout, pass here first.
"""

import datetime
import fcntl
import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.errors import TritonError

from . import _files, ops  # noqa: F401  ops defines the operators
from .kernels import (
    attention,
    decode_attention,
    embedding,
    gemm,
    launch_configs,
    layer_norm,
    linear_cross_entropy,
    mlp,
)
from .kernels.launch_configs import ANY, Row

DTYPES = {2: torch.bfloat16, 4: torch.float32}
GAIN = 0.98  # a neighbour has to be this much faster, or noise would move the table
DROPOUT = (6554, 65536 / (65536 - 6554))
Config = tuple[int, ...]

# Names and ranges of a configuration's numbers: doubled and halved; stages, programs, switches one up and down.
LIMITS: dict[str, dict[str, tuple[int, int]]] = {
    "product": dict(
        zip(gemm.Config._fields, ((32, 256), (32, 256), (16, 128), (4, 8), (1, 5), (1, 2)), strict=True)
    ),
    "chunk": {"rows": (512, 16384)},
    "few": dict(zip(mlp.Few._fields, ((0, 16), (8, 64), (32, 512), (1, 8), (1, 5), (48, 768)), strict=True)),
    "cublaslt": {"cublaslt": (0, 1)},
    "cublaslt relu": {"cublaslt": (0, 1)},
    "cublaslt gelu_tanh": {"cublaslt": (0, 1)},
    "attention": dict(
        zip(attention.Config._fields, ((16, 256), (16, 256), (4, 8), (1, 4), (0, 128), (0, 0)), strict=True)
    ),
    "layer_norm": dict(
        zip(layer_norm.Config._fields, ((1, 32), (1, 32), (1, 32), (1, 32), (64, 1024)), strict=True)
    ),
    "decode_attention": dict(
        zip(decode_attention.Config._fields, ((64, 1024), (16, 128), (1, 8), (4, 64)), strict=True)
    ),
    "embedding": dict(zip(embedding.Config._fields, ((1, 32), (64, 1024), (8, 128), (1, 8)), strict=True)),
}  # fmt: skip


def limits(row: Row, op: str) -> dict[str, tuple[int, int]]:
    """Return name → (lowest, highest) for each number of a launch configuration, in their order in the tuple.

    A configuration is a tuple of integers such as tile sizes, warps and stages. `row` is a `Row` of the table of the op
    named `op`; its kernel decides which numbers there are. The tuner tries values in these ranges, both ends included.
    """
    ranges = LIMITS.get(row.kernel) or LIMITS[op]
    return ranges | {"late": (0, 1)} if op == "attention" and row.kernel == "fwd" else ranges


def complete(config: Config, ranges: dict[str, tuple[int, int]]) -> Config:
    """Return the tuple `config` with zeros added at its end, so that it has as many numbers as `ranges` has entries.

    A row of the table may leave out its last numbers if they are 0. `ranges` is a result of `limits`.
    """
    return (*config, *(0,) * (len(ranges) - len(config)))


def neighbours(config: Config, ranges: dict[str, tuple[int, int]]) -> Iterator[Config]:
    """Yield each configuration that differs from `config` in one number by one step, inside `ranges`.

    `ranges`, a result of `limits`, maps the name of each number to (lowest, highest), both included, in the order of
    `config`. Comments in `launch_configs.TABLES` explain the names. A step adds or subtracts 1 for "stages",
    "programs", "cublaslt" and "late". It switches between 0 and the highest value for "registers", and for "rows" if
    its highest value is 16 (`mlp.FEW_ROWS`). It doubles or halves any other number.
    """
    for index, (name, (low, high)) in enumerate(ranges.items()):
        value = config[index]
        steps: tuple[int, ...]
        if name in ("stages", "programs", "cublaslt", "late"):
            steps = (value - 1, value + 1)
        elif name == "registers" or (high == mlp.FEW_ROWS and name == "rows"):
            steps = (0 if value else high,)
        else:
            steps = (value // 2, value * 2)
        for step in steps:
            if low <= step <= high:
                yield (*config[:index], step, *config[index + 1 :])


def candidates(op: str, row: Row, architecture: int) -> list[Config]:
    """Return launch configurations for the tuner to try, for the kernel, element size and `size` of `row`.

    They come from `launch_configs.CANDIDATES[op]`, for GPUs of this `architecture` (80 is sm_80) or an earlier one.
    docs/performance/what-a-gpu-should-show.md explains why they may be faster. The list may be empty.
    """
    place = (row.kernel, row.element, row.size)
    return [
        other.config
        for other in launch_configs.CANDIDATES.get(op, ())
        if (other.kernel, other.element, other.size) == place and other.architecture <= architecture
    ]


def climb(
    start: Config, others: list[Config], ranges: dict[str, tuple[int, int]], measure: Callable[[Config], float]
) -> Config:
    """Return the fastest launch configuration that a search in steps finds.

    The search begins at the fastest of `others` if its time is less than `GAIN` (0.98) times the time of `start`, and
    at `start` otherwise. Each step measures all `neighbours` of the best configuration, inside `ranges`, a result of
    `limits`. The search moves to the fastest neighbour if its time is less than `GAIN` times the best time, and ends
    otherwise. `measure` is called once for each configuration, and returns its time, or inf for one that does not run.
    The result is `start` if none runs.
    """
    times = {start: measure(start)}
    best, following = start, others
    while True:
        for candidate in following:
            if candidate not in times:
                times[candidate] = measure(candidate)
        fastest = min((*following, best), key=lambda config: times[config])
        if times[fastest] < GAIN * times[best]:
            best = fastest
        elif following is not others:
            return best
        following = list(neighbours(best, ranges))


def work(op: str, row: Row, device: str) -> Callable[[], object]:
    """Return a function without arguments that runs the kernels of `op` to be timed for a `row` of its table.

    For attention's kernel "fwd", mlp's "few" and decode_attention it runs the forward pass alone, for attention's other
    kernels and linear the backward pass alone, and else both. The tensors are random and made now, on `device`. They
    have the row's element size and the largest size that it serves, or GPT-2's width of 768 if it serves all. The
    forward pass that attention's backward needs runs now, once.
    """
    dtype = DTYPES[row.element]
    size = row.size if row.size < ANY else 768
    seed = torch.zeros(1, dtype=torch.int64, device=device)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    if op == "attention":
        q, k, v, dout = (random(8, 12, 1024, size) for _ in range(4))
        dropping = attention.Options(None, None, None, None, True, None, 0.1, seed, 0, size**-0.5)
        rules = [(dropping, *DROPOUT), (dropping._replace(dropout_p=0.0, seed=None), 0, 1.0)]
        if row.kernel == "fwd":
            return lambda: [attention.forward(q, k, v, *rule) for rule in rules]
        saved = [attention.forward(q, k, v, *rule) for rule in rules]
        return lambda: [
            attention.backward(dout, q, k, v, *kept, *rule) for kept, rule in zip(saved, rules, strict=True)
        ]
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
        if row.kernel == "few":
            few = random(1, size)
            return lambda: mlp.forward(
                few, fc_weight, fc_bias, proj_weight, proj_bias, "gelu_tanh", 0, 1.0, None, 0, False
            )
        if row.kernel.startswith("cublaslt "):
            return either_mlp(row, dy, x, fc_weight, fc_bias, proj_weight, proj_bias)

        def layer() -> None:
            _, hidden = mlp.forward(x, fc_weight, fc_bias, proj_weight, proj_bias, *rule, True)
            mlp.backward(dy, x, fc_weight, fc_bias, proj_weight, hidden, *rule, [True] * 5)

        return layer
    if op == "linear":
        return either_linear(row, random(16384, 3 * size), random(16384, size), random(3 * size, size))
    x, weight = random(16384, size), random(50257, size)
    target = torch.randint(0, 50257, (16384,), device=device)
    return lambda: linear_cross_entropy.forward(x, weight, target, None, -100, 0.0, "mean", True, True, False)


def either_mlp(row: Row, dy: torch.Tensor, *inputs: torch.Tensor) -> Callable[[], object]:
    """Return a function that runs forward and backward of the MLP without dropout, by cuBLASLt or by Triton.

    Each call of the returned function looks up the launch configuration that the tables hold then for `row`. It uses
    cuBLASLt if this is (1,), a tuple of one number, and Triton otherwise. `row.kernel`, "cublaslt relu" or
    "cublaslt gelu_tanh", names the activation. `dy` is the upstream gradient, and `inputs` are x, fc_weight, fc_bias,
    proj_weight and proj_bias. The function raises `RuntimeError` if cuBLASLt is chosen and its tests do not pass here.
    """
    operators, activation, needs = torch.ops.gpt_fast, row.kernel.removeprefix("cublaslt "), [True] * 5

    def run() -> None:
        """Run forward and backward once on the tensors given to `either_mlp`, by what the table chooses for `row` now.

        Raises `RuntimeError` if that is cuBLASLt and its tests do not pass.
        """
        if cublaslt_serves("mlp", row, dy.device):
            _, hidden, mask = operators.mlp_cublaslt_forward(*inputs, activation, True)
            operators.mlp_cublaslt_backward(dy, *inputs[:4], hidden, mask, activation, needs)
        else:
            rule = (activation, 0, 1.0, None, 0)
            _, hidden = mlp.forward(*inputs, *rule, True)
            mlp.backward(dy, *inputs[:4], hidden, *rule, needs)

    return run


def either_linear(row: Row, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    """Return a function that runs the backward of a linear layer, by cuBLASLt or by PyTorch's `mm` and `sum`.

    It computes the gradients of x, weight and bias. Each call of the returned function looks up the launch
    configuration that the tables hold then for `row`, a row for the op "linear". It uses cuBLASLt if this is (1,), a
    tuple of one number, and PyTorch otherwise. `dy` is the upstream gradient, `x` the layer's input and `weight` the
    layer's weight, all matrices. The function raises `RuntimeError` if cuBLASLt is chosen and its tests do not pass
    here.
    """

    def run() -> None:
        if cublaslt_serves("linear", row, dy.device):
            torch.ops.gpt_fast.linear_cublaslt_backward(dy, x, weight, True, True, True)
        else:
            dy.mm(weight), dy.t().mm(x), dy.sum(0)

    return run


def cublaslt_serves(op: str, row: Row, device: torch.device) -> bool:
    """Return True if the table chooses cuBLASLt for the op and the shapes of `row` on the GPU `device`.

    The table chooses cuBLASLt by the launch configuration (1,), a tuple of one number. Raise `RuntimeError` if it does
    and the tests of the op by cuBLASLt do not pass here. The first such call for an op in a process runs these tests.
    """
    config = launch_configs.pick(op, row.kernel, launch_configs.architecture(device), row.element, row.size)
    if config == (1,) and not cublaslt_tests_pass(op):
        raise RuntimeError(f"{op} by cuBLASLt does not pass its tests")
    return config == (1,)


@functools.cache
def cublaslt_tests_pass(op: str) -> bool:
    """Return True if pytest passes at least one test of `op` by cuBLASLt on this GPU, and none fails.

    The tests are tests/ops/test_<op>_cublaslt.py, which only a checkout has, in the current folder. They run in a
    process of their own, once for each op; the result is cached. The last line of their output is printed.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", f"tests/ops/test_{op}_cublaslt.py"]
    tests = subprocess.run(command, capture_output=True, text=True, check=False)
    print(tests.stdout.splitlines()[-1] if tests.stdout else tests.stderr, flush=True)
    return tests.returncode == 0 and " passed" in tests.stdout


Timer = Callable[[Callable[[], object]], float]


def measurer(op: str, row: Row, architecture: int, timer: Timer, device: str = "cuda") -> Callable[[Config], float]:
    """Return a function that times a launch configuration for the kernel, element size and `size` of `row`.

    The function takes the configuration, a tuple. It returns the time in the unit of `timer`, or inf if the
    configuration does not compile or run. Each call puts the configuration, for `architecture` (80 is sm_80), into the
    tables, and restores them at its end. `timer` is called with the function that `work(op, row, device)` returns, and
    returns the time of that function.
    """
    run = work(op, row, device)

    def measure(config: Config) -> float:
        """Return the time of the kernels with the launch configuration `config`, or inf if they do not compile or run.

        The kernels and the timer are those of the enclosing `measurer`. The tables are as before afterwards.
        """
        try:
            with launch_configs.trying(op, row._replace(architecture=architecture, config=config)):
                return timer(run)
        except (TritonError, triton.CompilationError, RuntimeError):
            return math.inf

    return measure


def serving(op: str, row: Row, architecture: int) -> Config:
    """Return the launch configuration that the tables choose for the kernel, element size and `size` of `row`.

    `row.size` is the largest width or head size that the row serves. `op` is the name of the op, and `architecture` the
    number of the GPU's architecture (80 is sm_80). Numbers at the end that the table leaves out are 0. The `config` of
    `row` itself is not used.
    """
    config = launch_configs.pick(op, row.kernel, architecture, row.element, row.size)
    return complete(config, limits(row, op))


def tuned(op: str, row: Row, architecture: int, source: str, timer: Timer) -> Row:
    """Return a copy of `row` with the fastest configuration that a search finds, and this `architecture` and `source`.

    The search (`climb`) measures on the current GPU. It starts from the configuration that the tables choose for the
    row, or from one of its `candidates`. `architecture` is that of the GPU (80 is sm_80), and `source` is a text that
    says how the row was found. `timer` returns the time of a function that runs kernels.
    """
    measure = measurer(op, row, architecture, timer)
    best = climb(serving(op, row, architecture), candidates(op, row, architecture), limits(row, op), measure)
    return row._replace(architecture=architecture, config=best, source=source)


def tune(names: list[str], path: Path, architecture: int, device: str, timer: Timer) -> Iterator[tuple[str, Row, bool]]:
    """Measure all classes of shapes of the ops in `names`, and yield (op, row, is_new) for each.

    A class is a kernel with an element size and a largest size, as `classes` describes it. `row` holds the fastest
    configuration, and `is_new` is True if it is not the shipped one. Whenever an op is done, the file `path` is written
    with its rows that are new; the folder is made if needed. Rows of other ops in that file stay if they are of the
    same `device` and Triton. `device` is the name of the GPU and `architecture` its number (80 is sm_80). `timer`
    returns the time of a function that runs kernels. While this generator is under way, the whole process uses shipped
    configurations alone. Raises `ValueError` if the file is damaged.
    """
    rows: dict[str, list[Row]] = {}
    if path.is_file():
        made_by, found = launch_configs.read_table(path)
        if made_by == {"device": device, "triton": triton.__version__}:
            rows = found
    source = f"measured: {device}, Triton {triton.__version__}, {datetime.date.today()}"
    with launch_configs.shipped_alone():
        for op in names:
            rows[op] = []
            for row in classes(op):
                shipped, new = serving(op, row, architecture), tuned(op, row, architecture, source, timer)
                if new.config != shipped:
                    rows[op].append(new)
                yield op, new, new.config != shipped
            path.parent.mkdir(parents=True, exist_ok=True)
            _files.write_json(path, launch_configs.written(device, rows))
    launch_configs.forget()


def compared(op: str, row: Row, architecture: int, timer: Timer, device: str = "cuda") -> Iterator[dict[str, Any]]:
    """Time launch configurations for the kernel, element size and `size` of `row`, and yield a record for each.

    The first configuration is the one that the tables choose. The row's `candidates` and the first configuration's
    `neighbours` follow. A record has the keys "op", "kernel", "element", "size", "architecture", "config", "shipped"
    (True for the first one), "ms" and "of_shipped", the time divided by that of the first record. For a configuration
    that does not run "ms" is None, and "of_shipped" is missing. `architecture` is that of the GPU (80 is sm_80), and
    `timer` returns the milliseconds of a function that runs kernels on `device`.
    """
    measure = measurer(op, row, architecture, timer, device)
    shipped = serving(op, row, architecture)
    first = measure(shipped)
    what = {"op": op, "kernel": row.kernel, "element": row.element, "size": row.size, "architecture": architecture}
    others = (*candidates(op, row, architecture), *neighbours(shipped, limits(row, op)))
    for config in dict.fromkeys((shipped, *others)):
        time = first if config == shipped else measure(config)
        known = {"ms": time, "of_shipped": time / first} if math.isfinite(time) else {"ms": None}
        yield what | {"config": config, "shipped": config == shipped} | known


def classes(op: str) -> list[Row]:
    """Return one row of the shipped table of `op` for each class of shapes in it.

    A class is a kernel, an element size in bytes, and the largest head size (for attention) or width that a row serves.
    Rows for Triton's interpreter are left out. If several architectures have a row for a class, the last one in the
    table is returned.
    """
    rows = (row for row in launch_configs.TABLES[op] if row.architecture != launch_configs.INTERPRETER)
    return list({(row.kernel, row.element, row.size): row for row in rows}.values())


def one_at_a_time(timer: Timer, lock: Path) -> Timer:
    """Return a timer that runs its argument once, to compile it, and then times it while it locks the file `lock`.

    The file is made if needed. Other processes with the same file wait for the lock, so that one process at a time is
    measured. `timer` does the timing, and its result is returned.
    """

    def timed(run: Callable[[], object]) -> float:
        """Run the function `run` once, then return `timer(run)`, measured while this process holds the file lock.

        `timer` and the lock's path are the arguments of the enclosing `one_at_a_time`.
        """
        run()
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return timer(run)

    return timed


def compare(names: list[str], part: str, path: Path, architecture: int) -> None:
    """Time launch configurations of the ops in `names` on this GPU, and append the times to the file `path`.

    The work is a list of classes of shapes: each is a kernel with an element size and a largest size (see `classes`).
    16-bit classes come first, and the ops keep the order of `names`. `part` chooses this process's share of the list:
    "2/8" is every eighth class from the second on. `architecture` is that of the GPU (80 is sm_80).

    For each configuration a line is appended: a JSON object with the keys that `compared` lists. Its values are printed
    too. Processes that share the work compile side by side. They time one after the other, by a lock on `path` with the
    suffix ".lock".
    """
    number, parts = (int(value) for value in part.split("/"))
    every = [(op, row) for op in names for row in classes(op)]
    every.sort(key=lambda each: each[1].element)  # stable: the ops keep their order
    timer = one_at_a_time(median, path.with_suffix(".lock"))
    for op, row in every[number - 1 :: parts]:
        for record in compared(op, row, architecture, timer):
            print(*record.values(), flush=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def median(run: Callable[[], object]) -> float:
    """Return the median time of `run`, a function that runs kernels on a GPU, in milliseconds.

    Triton's `do_bench` calls it for about 10 ms to warm up and 50 ms to measure.
    """
    return triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")
