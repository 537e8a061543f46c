"""Benchmark of mlp: GPT-2's widths with gelu_tanh, against PyTorch, torch.compile and the two products alone."""

from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._shared import DROPOUT_RULE, compiled, dropout, meta, normal, ours, reference, short
from benchmarks.topic import (
    BF16,
    F32,
    Case,
    Function,
    Launches,
    Peer,
    Target,
    Topic,
    Work,
    every,
    is_slow,
    main_dtype,
)

OP = "mlp"
WIDTHS = (768, 1024, 1280, 1600)  # of GPT-2's four sizes


def inputs(case: Case) -> tuple:
    """Return random (x [M, C], fc_weight [4C, C], fc_bias [4C], proj_weight [C, 4C], proj_bias [C]).

    All are normal and require grad; each weight is scaled by 1/√(its input width). M and C are the case's sizes.
    """
    M, C = case.size.values()
    F = 4 * C
    return (
        normal(case, M, C),
        normal(case, F, C, scale=C**-0.5),
        normal(case, F),
        normal(case, C, F, scale=F**-0.5),
        normal(case, C),
    )


def work(case: Case, passes: str) -> Work:
    """Return the least bytes and FLOPs of one pass over the case; `passes` is "forward" or "backward".

    Forward reads x, the weights and biases, writes y, and has two matrix products. Backward reads x, the gradient of y,
    the weights and the first bias. It writes the gradients of all five inputs, and has four products.
    """
    M, C = case.size.values()
    F = 4 * C
    element, weights = case.dtype.itemsize, 2 * C * F + F + C
    if passes == "forward":  # reads x and the weights; writes y
        return Work(element * (2 * M * C + weights), 2 * 2 * M * C * F)
    return Work(element * (3 * M * C + 2 * weights - C), 4 * 2 * M * C * F)  # reads x, dy, weights; writes gradients


def cases(device: str) -> Iterator[Case]:
    """Yield the cases to benchmark on a device, "cpu" or "cuda": M rows of each of GPT-2's four widths C.

    On a GPU, M is 16384, in bfloat16; width 768 also comes with dropout 0.1. On a CPU, M is 512 and 1024, in float32;
    width 768 also comes with dropout 0.1 for each M. The case to measure in a quick run is marked by its field `quick`:
    width 768 without dropout, on a CPU with 512 rows.

    On a CPU there are also cases in bfloat16, at width 768 only. If the CPU has instructions for bfloat16, there is one
    such case: 512 rows with dropout. If the CPU lacks them, there are two, for gpt_fast and PyTorch only: 1024 rows
    without dropout, and 1024 rows with it.
    """
    M = 16384 if device == "cuda" else 512
    for C in WIDTHS:
        yield from every(OP, device, [{"M": M, "C": C}], main_dtype(device), series="C", quick=C == 768)
    yield from every(OP, device, [{"M": M, "C": 768}], dropouts=(0.1,))
    if device == "cpu":  # the rows of a training step
        yield from every(OP, device, [{"M": 1024, "C": C} for C in WIDTHS], (F32,))
        yield from every(OP, device, [{"M": 1024, "C": 768}], (F32,), (0.1,))
    if is_slow(device, BF16):
        yield from every(OP, device, [{"M": 1024, "C": 768}], (BF16,), (0.0, 0.1), peers=("gpt_fast", "torch"))


def targets(case: Case) -> Iterator[Target]:
    """Yield the speed target of a case, for forward and backward together.

    On a GPU, gpt_fast may take 5 % more time than the two matrix products alone. On a CPU it must be as fast as
    PyTorch.
    """
    yield Target("products alone", 1 / 1.05) if case.device == "cuda" else Target("torch", 1.0)


def torch_mlp(case: Case) -> Function:
    """Return a function (x, fc_weight, fc_bias, proj_weight, proj_bias) → y [M, C] that calls PyTorch's functions.

    y is the second linear layer of the tanh-approximated GELU of the first one. The case's dropout acts between the
    GELU and the second layer.
    """
    p = case.dropout

    def run(x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(x, fc_weight, fc_bias), approximate="tanh")
        return F.linear(F.dropout(hidden, p) if p else hidden, proj_weight, proj_bias)

    return run


def bare_products(case: Case) -> Function:
    """Return a function that computes only the op's two matrix products, as a bound for its speed.

    It takes (x, fc_weight, fc_bias, proj_weight, proj_bias) and returns [M, C]. Biases, activation and dropout are left
    out. `case` is not used.
    """

    def run(x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor) -> Tensor:
        return F.linear(F.linear(x, fc_weight), proj_weight)

    return run


def launches(kernels: ModuleType) -> Launches:
    """Yield (label, call without arguments) for GPT-2's sizes, for each variant first forward, then backward.

    First comes each activation with and without dropout in bfloat16. Then come four variants of gelu_tanh with dropout:
    the transposed weights of a Conv1D, a width that tensor descriptors cannot take, float16 and float32. The last are
    decode steps: one row, forward only. A label is such as "gelu_tanh bfloat16 dropout". The tensors are on the device
    `meta`, so no kernel runs: tools/record_launches.py records the types and constants of each launch, with which
    tools/codegen.py compiles the kernel. `kernels` is the module kernels/mlp.py.
    """
    shapes = [(activation, p, "", torch.bfloat16) for activation in ("relu", "gelu", "gelu_tanh") for p in (0.0, 0.1)]
    shapes += [("gelu_tanh", 0.1, layout, torch.bfloat16) for layout in ("Conv1D", "odd")]
    shapes += [("gelu_tanh", 0.1, "", dtype) for dtype in (torch.float16, torch.float32)]
    for activation, p, layout, dtype in shapes:
        M, C = 8192, 763 if layout == "odd" else 768
        x, fc_bias, proj_bias = meta(M, C, dtype=dtype), meta(4 * C, dtype=dtype), meta(C, dtype=dtype)
        fc_weight, proj_weight = meta(4 * C, C, dtype=dtype), meta(C, 4 * C, dtype=dtype)
        if layout == "Conv1D":
            fc_weight, proj_weight = meta(C, 4 * C, dtype=dtype).t(), meta(4 * C, C, dtype=dtype).t()
        seed = meta(1, dtype=torch.int64) if p else None
        rule = (activation, *(DROPOUT_RULE if p else (0, 1.0)), seed, 3)
        label = " ".join((activation, *layout.split(), short(dtype), *(["dropout"] if p else [])))
        yield label, partial(kernels.forward, x, fc_weight, fc_bias, proj_weight, proj_bias, *rule, True)
        hidden = meta(M, 4 * C, dtype=dtype)
        yield label, partial(kernels.backward, x, x, fc_weight, fc_bias, proj_weight, hidden, *rule, [True] * 5)
    # A decode step. The narrower model's second product is split.
    for C, dtype in ((768, torch.bfloat16), (768, torch.float16), (768, torch.float32), (256, torch.bfloat16)):
        x, fc_bias, proj_bias = meta(1, C, dtype=dtype), meta(4 * C, dtype=dtype), meta(C, dtype=dtype)
        weights = meta(4 * C, C, dtype=dtype), fc_bias, meta(C, 4 * C, dtype=dtype), proj_bias
        rule = ("gelu_tanh", 0, 1.0, None, 3)
        yield f"gelu_tanh {short(dtype)} one row", partial(kernels.forward, x, *weights, *rule, False)


TOPIC = Topic(
    OP, "ops", inputs, work, cases,
    peers=(
        ours(OP, dropout),
        Peer("torch", torch_mlp),
        compiled(torch_mlp),
        Peer("products alone", bare_products, same=False, rival=False),
        reference(OP, dropout),
    ),
    targets=targets,
    small=({"M": 37, "C": 72}, {"M": 130, "C": 64}),
    tiny={"M": 4, "C": 8},
    dropouts=(0.0, 0.1),
    launches=launches,
)  # fmt: skip
