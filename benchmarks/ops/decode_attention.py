"""Benchmark of decode_attention: one query a sequence against full caches, against PyTorch and torch.compile."""

from collections.abc import Iterator
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops._shared import compiled, meta, normal, ours, reference, short
from benchmarks.topic import Case, Function, Launches, Peer, Topic, Work, every, main_dtype

OP = "decode_attention"


def inputs(case: Case) -> tuple:
    """Return normal random q [B, H, D], k_cache and v_cache [B, H, S, D], and lengths [B], as a tuple of four tensors.

    All lengths are S, so the caches are full. Nothing requires grad. B, H, S, D are the case's sizes.
    """
    B, H, S, D = case.size.values()
    caches = [normal(case, B, H, S, D, grad=False) for _ in range(2)]
    return normal(case, B, H, D, grad=False), *caches, torch.full((B,), S, device=case.device)


def work(case: Case, passes: str) -> Work:
    """Return the least bytes and FLOPs of one call, for comparison with the device's read bandwidth.

    `passes` is not used. A call reads q and all S rows of both caches, and writes the output. It has two matrix
    products, with keys and values.
    """
    B, H, S, D = case.size.values()
    return Work(case.dtype.itemsize * (2 * B * H * S * D + 2 * B * H * D), 2 * 2 * B * H * S * D, "read")


def cases(device: str) -> Iterator[Case]:
    """Yield the cases to benchmark on a device, "cpu" or "cuda": batch sizes 1 and 8 with caches of 256 and 1024 rows.

    All have GPT-2's 12 heads of size 64, in bfloat16 on a GPU and float32 on a CPU. Those with 1024 rows have the field
    `quick` set, so that a quick run measures them too.
    """
    for B in (1, 8):
        for S in (256, 1024):
            yield from every(OP, device, [{"B": B, "H": 12, "S": S, "D": 64}], main_dtype(device), quick=S == 1024)


def torch_decode_attention(case: Case) -> Function:
    """Return a function (q, k_cache, v_cache, lengths) → out [B, H, D] that calls PyTorch's SDPA.

    A mask excludes each sequence's cache rows from its entry of `lengths` on. `case` is not used.
    """

    def run(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
        there = torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None, None, None]
        return F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache, attn_mask=there)[:, :, 0]

    return run


def launches(kernels: ModuleType) -> Launches:
    """Yield (label, call without arguments) for each head size that has a launch configuration, in bfloat16.

    Head size 64 also comes in float16 and float32, and 256 in float32. Each shape gives two calls. The first attends
    from one query of each sequence to its cache. The second, with " append" after its label, stores a new key and value
    before. A label is such as "D=64 bfloat16 append". The tensors are on the device `meta`, so no kernel runs:
    tools/record_launches.py records the types and constants of each launch, with which tools/codegen.py compiles the
    kernel. `kernels` is the module kernels/decode_attention.py.
    """
    from kernels import launch_configs

    shapes = [(row.size, torch.bfloat16) for row in launch_configs.TABLES["decode_attention"]]
    for D, dtype in [*shapes, (64, torch.float16), (64, torch.float32), (256, torch.float32)]:
        B, H, S = 2, 12, 1024
        q, cache = meta(B, 1, 3, H, D, dtype=dtype)[:, 0, 0], meta(B, H, S, D, dtype=dtype)
        lengths = meta(B, dtype=torch.int64)
        yield f"D={D} {short(dtype)}", partial(kernels.forward, q, cache, cache, lengths)
        yield f"D={D} {short(dtype)} append", partial(kernels.append_forward, q, q, q, cache, cache, lengths)


TOPIC = Topic(
    OP, "ops", inputs, work, cases,
    peers=(
        ours(OP),
        Peer("torch", torch_decode_attention),
        compiled(torch_decode_attention),
        reference(OP),
    ),
    passes=("inference",),
    small=({"B": 3, "H": 2, "S": 77, "D": 64},),
    tiny={"B": 1, "H": 1, "S": 4, "D": 8},
    launches=launches,
)  # fmt: skip
