"""Benchmark of add_layer_norm: GPT-2's widths, with and without dropout, against PyTorch and torch.compile."""

from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._shared import DROPOUT_RULE, compiled, dropout, meta, normal, ours, reference
from benchmarks.topic import BF16, F32, FLOOR, Case, Function, Launches, Peer, Target, Topic, Work, every

OP = "add_layer_norm"
WIDTHS = (768, 1024, 1280, 1600)  # of GPT-2's four sizes


def inputs(case: Case) -> tuple:
    """Return normal random tensors (x [M, N], residual [M, N], weight [N], bias [N]), which all require grad.

    M and N are the case's sizes. The case also gives device and dtype.
    """
    M, N = case.size.values()
    return normal(case, M, N), normal(case, M, N), normal(case, N), normal(case, N)


def work(case: Case, passes: str) -> Work:
    """Return the least bytes of one pass over the case, with 0 FLOPs; `passes` is "forward" or "backward".

    Forward reads x, residual, weight and bias, and writes the two outputs and the float32 statistics (mean and rstd of
    each row). Backward reads both outputs' gradients, the sum, the weight and the statistics. It writes the gradients
    of residual, weight and bias, and with dropout also that of x, which otherwise equals that of residual.
    """
    M, N = case.size.values()
    element, statistics = case.dtype.itemsize, 2 * 4 * M
    if passes == "forward":  # reads x, residual, weight, bias; writes normed, summed, mean, rstd
        return Work(element * (4 * M * N + 2 * N) + statistics)
    # Reads dnormed, dsummed, summed, weight; writes dresidual, dweight, dbias, and dx if dropout makes it differ.
    matrices = 5 if case.dropout else 4
    return Work(element * (matrices * M * N + 3 * N) + statistics)


def cases(device: str) -> Iterator[Case]:
    """Yield the cases to benchmark on a device, "cpu" or "cuda": M rows of each of GPT-2's four widths N.

    On a GPU, M is 32768, in bfloat16, each with dropout 0 and 0.1. On a CPU, M is 1024, in float32 and bfloat16, each
    with dropout 0 and 0.1. One more CPU case has M = 32768 and N = 768, in float32 with dropout 0.1. The cases of width
    768 (on a CPU those in float32 with 1024 rows) have the field `quick` set, so that a quick run measures them too.
    """
    if device == "cuda":
        for N in WIDTHS:
            sizes = [{"M": 32768, "N": N}]
            yield from every(OP, device, sizes, dropouts=(0.0, 0.1), series="N", quick=N == 768)
        return
    yield from every(OP, device, [{"M": 1024, "N": 768}], (F32,), (0.0, 0.1), quick=True)
    yield from every(OP, device, [{"M": 1024, "N": 768}], (BF16,), (0.0, 0.1))
    yield from every(OP, device, [{"M": 1024, "N": N} for N in WIDTHS[1:]], (F32, BF16), (0.0, 0.1))
    yield from every(OP, device, [{"M": 32768, "N": 768}], (F32,), (0.1,))


def targets(case: Case) -> Iterator[Target]:
    """Yield the speed targets of a case.

    On a GPU, forward and backward must each reach 85 % of the device's measured speed limit. Both together must be as
    fast as torch.compile. On a CPU, both together must be as fast as PyTorch.
    """
    if case.device == "cuda":
        yield Target(FLOOR, 0.85, ("forward",))
        yield Target(FLOOR, 0.85, ("backward",))
        yield Target("torch.compile", 1.0)
    else:
        yield Target("torch", 1.0)


def torch_add_layer_norm(case: Case) -> Function:
    """Return a function (x, residual, weight, bias) → (normed, summed) that calls PyTorch's functions.

    summed = residual + dropout(x) with the case's dropout probability, and normed is the layer norm of summed.
    """
    p = case.dropout

    def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        summed = residual + F.dropout(x, p) if p else residual + x
        return F.layer_norm(summed, x.shape[-1:], weight, bias), summed

    return run


def launches(kernels: ModuleType) -> Launches:
    """Yield (label, call without arguments) for each width with a launch configuration, first forward, then backward.

    Both calls of a width have one label, such as "N=768 bfloat16 dropout". They launch the kernels as training does:
    with dropout 0.1, in bfloat16, and with a gradient for both outputs. The tensors are on the device `meta`, so no
    kernel runs: tools/record_launches.py records the types and constants of each launch, with which tools/codegen.py
    compiles the kernel. `kernels` is the module kernels/add_layer_norm.py.
    """
    from kernels import launch_configs

    for N in sorted({row.size for row in launch_configs.TABLES["layer_norm"]}):
        x, weight, bias = (meta(*shape, dtype=torch.bfloat16) for shape in ((4096, N), (N,), (N,)))
        rows, seed = meta(4096, dtype=torch.float32), meta(1, dtype=torch.int64)
        rule = (*DROPOUT_RULE, seed, 3)
        label = f"N={N} bfloat16 dropout"
        yield label, partial(kernels.forward, x, x, weight, bias, 1e-5, *rule)
        dtypes = (torch.bfloat16, torch.bfloat16)
        yield label, partial(kernels.backward, x, x, x, weight, rows, rows, *dtypes, *rule, True, True)


TOPIC = Topic(
    OP, "ops", inputs, work, cases,
    peers=(
        ours(OP, dropout),
        Peer("torch", torch_add_layer_norm),
        compiled(torch_add_layer_norm),
        reference(OP, dropout),
    ),
    targets=targets,
    small=({"M": 5, "N": 100}, {"M": 67, "N": 768}),
    tiny={"M": 4, "N": 8},
    dropouts=(0.0, 0.1),
    launches=launches,
)  # fmt: skip
