"""Which library multiplies the matrices of `linear` on a CPU: this one, or PyTorch where it was measured to be faster.

The rule is measured once for a machine, by `gpt-fast tune`, and kept in the user's table "cpu". Without that table the
C++ kernel serves. Nothing is measured while a model runs, because a noisy second would then change the bits of its
results.
"""

import functools
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import _files, _transforms
from ..kernels.user_tables import user_table

FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS = (16, 128, 1024)  # the numbers of rows that are measured, each for all numbers from the one before
SIZES = (768, 2304)  # C and N of the weight that is measured
GAIN = 0.95  # PyTorch's time has to be this much shorter, or noise would decide


class Rule(NamedTuple):
    """What was measured for one dtype and number of rows: forward and backward of `linear` by both libraries."""

    dtype: str  # of the products, a key of DTYPES
    is_autocast: bool  # whether the weight is float32 and the dtype that of autocast
    rows: int  # one of ROWS
    gpt_fast: float  # seconds
    torch: float  # seconds

    @property
    def by_torch(self) -> bool:
        """Return True if PyTorch's products were faster."""
        return self.torch < GAIN * self.gpt_fast


def cpu_model() -> str:
    """Return the name of the CPU's model, such as "AMD EPYC 9654", or its architecture if the system tells no name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, str]:
    """Return the description of this machine. A table of `gpt-fast tune` with another description is not used.

    The keys are "device" (the CPU's model and instruction set), "torch" (PyTorch's version) and "threads" (the number
    of PyTorch's threads, as a text).
    """
    return {
        "device": f"{cpu_model()}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }


def serves_torch(x: torch.Tensor, rounds: bool) -> bool:
    """Return True if PyTorch's products were measured to be faster for `linear` of x [..., C] on this CPU.

    `rounds` says whether the weight is float32 and x has the 16-bit dtype of autocast.
    """
    classes = _classes(x.dtype, rounds)
    if not any(by_torch for _, by_torch in classes) or x.numel() == 0:
        return False
    rows = x.numel() // x.shape[-1]
    return next((by_torch for most, by_torch in classes if rows <= most), classes[-1][1])


@_transforms.constant_in_graphs
def _classes(dtype: torch.dtype, is_autocast: bool) -> tuple[tuple[int, bool], ...]:
    """Return (rows, by_torch) for each class of inputs x of `linear` in `dtype`, ascending by `rows`.

    A class has every number of rows above that of the class before, up to `rows`. The last class has larger numbers
    too. `by_torch` is True if PyTorch was faster than the C++ kernel, by the table that `gpt-fast tune` wrote on this
    machine. Without such a table the result is empty. `is_autocast` says whether the weight is float32 while `dtype` is
    autocast's 16-bit dtype.
    """
    return _table().get((dtype, is_autocast), ())


@functools.cache
def _table() -> dict[tuple[torch.dtype, bool], tuple[tuple[int, bool], ...]]:
    """Return `_read` of the table that `gpt-fast tune` wrote, and cache it, because finding the file takes 10 µs."""
    return _read(user_table("cpu"))


def _read(path: Path | None) -> dict[tuple[torch.dtype, bool], tuple[tuple[int, bool], ...]]:
    """Return the table that `gpt-fast tune` wrote to `path`, as {(dtype, is_autocast): ((rows, by_torch), …)}.

    `dtype` is the dtype of x, the input of `linear`. `is_autocast` is True if the weight is float32 while `dtype` is
    autocast's 16-bit dtype. The pairs ascend by `rows`. A pair holds for every number of rows of x above that of the
    pair before, up to `rows`. The last pair holds for larger numbers too. `by_torch` is True if PyTorch was faster than
    the C++ kernel. The result is empty if `path` is None or no file. It is also empty, with a warning, if the file was
    measured on another machine.

    Raises:
        ValueError: The file is damaged.
    """
    if path is None or not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text("utf-8"))
        made_by = {name: table[name] for name in machine()}
        if table["format"] != FORMAT:
            raise ValueError(f"format {table['format']!r}")
        rules = [Rule(**entry) for entry in table["rules"]]
        known: dict[tuple[torch.dtype, bool], tuple[tuple[int, bool], ...]] = {}
        for rule in sorted(rules, key=lambda rule: rule.rows):
            key = DTYPES[rule.dtype], bool(rule.is_autocast)
            known[key] = (*known.get(key, ()), (rule.rows, rule.by_torch))
    except (ValueError, KeyError, TypeError) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"gpt_fast: {path} has {what}; expected a table of products: remove it, or run gpt-fast tune --device cpu"
        ) from error
    if made_by != machine():
        warnings.warn(
            f"gpt_fast: {path} was measured on {made_by}; expected {machine()}, so the C++ kernel serves: "
            "run gpt-fast tune --device cpu",
            stacklevel=2,
        )
        return {}
    return known


def forget() -> None:
    """Drop the cached table, so that the next call reads the file of `gpt-fast tune` again."""
    _table.cache_clear()


def tune(path: Path) -> Iterator[Rule]:
    """Yield a measured `Rule` for each dtype and number of rows, then write all of them to `path`, the user's table."""
    rules = []
    for name, dtype in DTYPES.items():
        for is_autocast in (False, True) if dtype != torch.float32 else (False,):
            for rows in ROWS:
                rules.append(Rule(name, is_autocast, rows, *_seconds(*_contenders(dtype, is_autocast, rows))))
                yield rules[-1]
    content: dict[str, Any] = {"format": FORMAT, **machine(), "rules": [rule._asdict() for rule in rules]}
    path.parent.mkdir(parents=True, exist_ok=True)
    _files.write_json(path, content)
    forget()


def _contenders(dtype: torch.dtype, is_autocast: bool, rows: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return two functions that run forward and backward of a linear layer: by the C++ kernel, and by PyTorch.

    The layer's input has `rows` rows. The operands have `dtype`, but with `is_autocast` the weight and its gradient are
    float32.
    """
    C, N = SIZES
    x, dy, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, C), (rows, N), (N,)))
    weight = torch.randn(N, C).to(torch.float32 if is_autocast else dtype)

    def ours() -> None:
        torch.ops.gpt_fast.linear_forward(x, weight, bias)
        torch.ops.gpt_fast.linear_backward(dy, x, weight, True, True, True)

    def theirs() -> None:
        cast = weight.to(dtype)
        F.linear(x, cast, bias)
        dy.mm(cast), dy.t().mm(x).to(weight.dtype), dy.sum(0)

    return ours, theirs


def _seconds(*contenders: Callable[[], object], most: float = 1.0) -> list[float]:
    """Return the median time in seconds of a call of each function in `contenders`.

    The functions take turns: a first round is not timed, and 3 to 15 timed rounds follow. After the third one, no new
    round starts if more than `most` seconds have passed since the beginning.
    """
    times: list[list[float]] = [[] for _ in contenders]
    started = time.perf_counter()
    for turn in range(16):
        if turn > 3 and time.perf_counter() - started > most:
            break
        for run, of_run in zip(contenders, times, strict=True):
            start = time.perf_counter()
            run()
            if turn:
                of_run.append(time.perf_counter() - start)
    return [sorted(of_run)[len(of_run) // 2] for of_run in times]
