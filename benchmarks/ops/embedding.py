"""Benchmark of embedding: GPT-2's tables, with and without dropout, against PyTorch and torch.compile."""

from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._shared import DROPOUT_RULE, compiled, dropout, meta, normal, ours, reference, short
from benchmarks.topic import F32, Case, Function, Launches, Peer, Target, Topic, Work, every, ids, main_dtype

OP = "embedding"


def inputs(case: Case) -> tuple:
    """Return random (tokens [B, T], token_weight [V, C], position_weight [T, C]); B, T, V, C are the case's sizes.

    The tokens are int64 ids below V. The weights are normal in the case's dtype and require grad.
    """
    B, T, V, C = case.size.values()
    return ids(case, V, B, T), normal(case, V, C), normal(case, T, C)


def work(case: Case, passes: str) -> Work:
    """Return the least bytes of one pass over the case, with 0 FLOPs; `passes` is "forward" or "backward".

    Forward reads the token ids, a row of the token table for each token and each position's row once, and writes the
    sums. Backward reads the token ids and the gradient of the output, and writes the gradients of both whole tables.
    """
    B, T, V, C = case.size.values()
    element, rows, token_ids = case.dtype.itemsize, B * T * C, 8 * B * T
    if passes == "forward":  # reads a row of the table for each token, the positions once; writes the sums
        return Work(element * (2 * rows + T * C) + token_ids)
    return Work(element * (rows + V * C + T * C) + token_ids)  # reads dout; writes both tables' gradients


def cases(device: str) -> Iterator[Case]:
    """Yield the cases to benchmark on a device, "cpu" or "cuda", each with dropout 0 and 0.1.

    All have GPT-2's vocabulary. A GPU gets 16 sequences of 1024 tokens at width 768, in bfloat16. A CPU gets 4
    sequences of 256 tokens at GPT-2's four widths, in float32. The cases of width 768 have the field `quick` set, so
    that a quick run measures them too.
    """
    B, T = (16, 1024) if device == "cuda" else (4, 256)
    size = {"B": B, "T": T, "V": 50257, "C": 768}
    yield from every(OP, device, [size], main_dtype(device), (0.0, 0.1), quick=True)
    if device == "cpu":
        yield from every(OP, device, [size | {"C": C} for C in (1024, 1280, 1600)], (F32,), (0.0, 0.1))


def targets(case: Case) -> Iterator[Target]:
    """Yield the speed target of a case: forward and backward together as fast as PyTorch on a CPU, none on a GPU."""
    if case.device == "cpu":
        yield Target("torch", 1.0)


def torch_embedding(case: Case) -> Function:
    """Return a function (tokens, token_weight, position_weight) → x [B, T, C] that calls PyTorch's functions.

    x is the sum of each token's row and its position's row, with the case's dropout.
    """
    p = case.dropout

    def run(tokens: Tensor, token_weight: Tensor, position_weight: Tensor) -> Tensor:
        x = F.embedding(tokens, token_weight) + position_weight[: tokens.shape[1]]
        return F.dropout(x, p) if p else x

    return run


def launches(kernels: ModuleType) -> Launches:
    """Yield (label, call without arguments) for GPT-2's embedding tables with dropout, in bfloat16, then in float32.

    Each dtype gives two calls with one label, first forward, then backward. A label is such as "C=768 bfloat16
    dropout". The tensors are on the device `meta`, so no kernel runs: tools/record_launches.py records the types and
    constants of each launch, with which tools/codegen.py compiles the kernel. `kernels` is the module
    kernels/embedding.py.
    """
    for dtype in (torch.bfloat16, torch.float32):
        V, P, C, T = 50257, 1024, 768, 1024
        tokens, positions = meta(8, T, dtype=torch.int64), meta(T, dtype=torch.int64)
        tables, seed = (meta(V, C, dtype=dtype), meta(P, C, dtype=dtype)), meta(1, dtype=torch.int64)
        rule = (*DROPOUT_RULE, seed, 0)
        label = f"C={C} {short(dtype)} dropout"
        yield label, partial(kernels.forward, tokens, *tables, positions, *rule)
        dout = meta(8, T, C, dtype=dtype)
        yield label, partial(kernels.backward, dout, tokens, *tables, positions, *rule, True, True)


TOPIC = Topic(
    OP, "ops", inputs, work, cases,
    peers=(
        ours(OP, dropout),
        Peer("torch", torch_embedding),
        compiled(torch_embedding),
        reference(OP, dropout),
    ),
    targets=targets,
    small=({"B": 2, "T": 19, "V": 53, "C": 72},),
    tiny={"B": 1, "T": 4, "V": 16, "C": 8},
    dropouts=(0.0, 0.1),
    launches=launches,
)  # fmt: skip
