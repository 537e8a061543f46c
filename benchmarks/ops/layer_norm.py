"""Benchmark of layer_norm: GPT-2's widths, against PyTorch, torch.compile and Liger."""

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.ops._shared import compiled, cuda_only, meta, normal, ours, reference, short
from benchmarks.topic import BF16, F32, FLOOR, Case, Function, Launches, Peer, Target, Topic, Work, every

OP = "layer_norm"
WIDTHS = (768, 1024, 1280, 1600)  # of GPT-2's four sizes


def inputs(case: Case) -> tuple:
    """Return normal random tensors (x [M, N], weight [N], bias [N]), which all require grad.

    M and N are the case's sizes. The case also gives device and dtype.
    """
    M, N = case.size.values()
    return normal(case, M, N), normal(case, N), normal(case, N)


def work(case: Case, passes: str) -> Work:
    """Return the least bytes of one pass over the case, with 0 FLOPs; `passes` is "forward" or "backward".

    Forward reads x, weight and bias, and writes y and each row's mean and rstd in float32. Backward reads the gradient
    of y, x, weight, mean and rstd, and writes the gradients of x, weight and bias.
    """
    M, N = case.size.values()
    element, statistics = case.dtype.itemsize, 2 * 4 * M
    if passes == "forward":  # reads x, weight, bias; writes y, mean, rstd
        return Work(element * (2 * M * N + 2 * N) + statistics)
    return Work(element * (3 * M * N + 3 * N) + statistics)  # reads dy, x, weight; writes dx, dweight, dbias


def cases(device: str) -> Iterator[Case]:
    """Yield the cases to benchmark on a device, "cpu" or "cuda": M rows of each of GPT-2's four widths N.

    On a GPU, M is 32768, in bfloat16. On a CPU, M is 1024, and for width 768 also 32768, each in float32 and bfloat16.
    The cases of width 768, on a CPU those with 1024 rows, have the field `quick` set, so that a quick run measures them
    too.
    """
    if device == "cuda":
        for N in WIDTHS:
            yield from every(OP, device, [{"M": 32768, "N": N}], series="N", quick=N == 768)
        return
    yield from every(OP, device, [{"M": 1024, "N": 768}], (F32, BF16), quick=True)  # stays in the cache
    yield from every(OP, device, [{"M": 1024, "N": N} for N in WIDTHS[1:]], (F32, BF16))
    yield from every(OP, device, [{"M": 32768, "N": 768}], (F32, BF16))


def targets(case: Case) -> Iterator[Target]:
    """Yield the speed targets of a case.

    On a GPU, forward and backward must each reach 85 % of the device's measured speed limit. Both together must be as
    fast as the faster of torch.compile and Liger. On a CPU, both together must be as fast as PyTorch.
    """
    if case.device == "cuda":
        yield Target(FLOOR, 0.85, ("forward",))
        yield Target(FLOOR, 0.85, ("backward",))
        yield Target(("torch.compile", "Liger"), 1.0)
    else:
        yield Target("torch", 1.0)


def torch_layer_norm(case: Case) -> Function:
    """Return a function (x, weight, bias) → y: PyTorch's layer norm over the last dimension. `case` is not used."""
    return lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias)


def liger_layer_norm(case: Case) -> Function:
    """Return a function (x, weight, bias) → y: Liger's layer norm with eps = 1e-5.

    Raise `ImportError` if Liger is not installed. `case` is not used.
    """
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-5)


def launches(kernels: ModuleType) -> Launches:
    """Yield (label, call without arguments) for the layer norm kernels, for each shape first forward, then backward.

    The shapes are the greatest width of each launch configuration in bfloat16, and GPT-2's width 768 in three dtypes. A
    label is such as "N=768 bfloat16". Then come candidates, which are launch configurations that no GPU has measured
    yet: one forward call each, which does nothing on another architecture than the candidate's. The tensors are on the
    device `meta`, so no kernel runs: tools/record_launches.py records the types and constants of each launch, with
    which tools/codegen.py compiles the kernel. `kernels` is the module kernels/layer_norm.py.
    """
    from kernels import launch_configs

    shapes = [(N, torch.bfloat16) for N in sorted({row.size for row in launch_configs.TABLES["layer_norm"]})]
    shapes += [(768, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    for N, dtype in shapes:
        x, weight, bias = meta(4096, N, dtype=dtype), meta(N, dtype=dtype), meta(N, dtype=dtype)
        rows = meta(4096, dtype=torch.float32)
        label = f"N={N} {short(dtype)}"
        yield label, partial(kernels.forward, x, weight, bias, 1e-5)
        yield label, partial(kernels.backward, x, x, weight, rows, rows, True, True)
    for row in launch_configs.CANDIDATES[OP]:
        config = kernels.Config(*row.config)
        label = f"N={row.size} bfloat16 candidate {config.fwd_rows}x{row.size} w{config.fwd_warps}"
        x, weight = meta(4096, row.size, dtype=torch.bfloat16), meta(row.size, dtype=torch.bfloat16)
        yield label, partial(trying, row, partial(kernels.forward, x, weight, weight, 1e-5))


def trying(row: Any, call: Callable[[], object]) -> None:
    """Run `call` with the launch configuration `row` in place of the shipped one for the same kernel and size.

    `row` is a `launch_configs.Row` of `launch_configs.CANDIDATES`. If the current GPU architecture is not the row's,
    `call` does not run. Afterwards the configuration from before is in use again.
    """
    from kernels import launch_configs

    if launch_configs.architecture(torch.device("meta")) == row.architecture:
        with launch_configs.trying(OP, row):
            call()


TOPIC = Topic(
    OP, "ops", inputs, work, cases,
    peers=(
        ours(OP),
        Peer("torch", torch_layer_norm),
        compiled(torch_layer_norm),
        Peer("Liger", liger_layer_norm, cuda_only("liger_kernel")),
        reference(OP),
    ),
    targets=targets,
    small=({"M": 5, "N": 100}, {"M": 67, "N": 768}, {"M": 3, "N": 2050}),
    tiny={"M": 4, "N": 8},
    launches=launches,
)  # fmt: skip
