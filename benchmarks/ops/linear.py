"""Benchmark of linear: the products of a training step on the CPU, where a C++ kernel serves, against PyTorch."""

from collections.abc import Iterator

import torch.nn.functional as F

from benchmarks.ops._shared import normal, ours
from benchmarks.topic import Case, Peer, Topic, Work, every, product_dtypes

OP = "linear"


def inputs(case: Case) -> tuple:
    """Return normal random tensors (x [M, K], weight [N, K]), which both require grad; M, N, K are the case's sizes.

    The weight is scaled by 1/√K.
    """
    M, N, K = case.size.values()
    return normal(case, M, K), normal(case, N, K, scale=K**-0.5)


def work(case: Case, passes: str) -> Work:
    """Return the least bytes and FLOPs of one pass over the case; `passes` is "forward" or "backward".

    Forward reads x and weight, writes y [M, N], and has one matrix product. Backward reads the gradient of y, x and
    weight, writes the gradients of x and weight, and has two.
    """
    M, N, K = case.size.values()
    element = case.dtype.itemsize
    if passes == "forward":  # reads x and weight; writes y
        return Work(element * (M * K + N * K + M * N), 2 * M * N * K)
    return Work(element * (M * N + 2 * M * K + 2 * N * K), 2 * 2 * M * N * K)  # reads dy, x, weight; writes dx, dweight


def cases(device: str) -> Iterator[Case]:
    """Yield the cases to benchmark on a CPU: the four matrix products of a GPT-2 block and a square one.

    The products have 1024 rows, in float32, and in bfloat16 if the CPU has instructions for it. The cases of the
    smallest product have the field `quick` set, so that a quick run measures them too. `device` is "cpu" or "cuda";
    "cuda" has no cases, because PyTorch's kernel runs there.
    """
    if device == "cpu":
        C = 768
        shapes = ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C), (4 * C, 4 * C))
        for N, K in shapes:
            yield from every(OP, device, [{"M": 1024, "N": N, "K": K}], product_dtypes(device), quick=(N, K) == (C, C))


TOPIC = Topic(
    OP, "ops", inputs, work, cases,
    peers=(ours(OP), Peer("torch", lambda case: F.linear)),
    small=({"M": 7, "N": 19, "K": 33},),
)  # fmt: skip
