"""Helpers that several benchmarks share: random inputs, the implementations of every op, reasons to be missing."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.memory import available_memory
from benchmarks.topic import OURS, Case, Function, Peer
from gpt_fast import ops
from gpt_fast import reference as definitions

SITE = 1  # of dropout: any number, if it is the same in ours and the reference
# dropout_p = 0.1 as launchers take it: the threshold and the scale of DESIGN's dropout contract.
DROPOUT_RULE = (6554, 65536 / (65536 - 6554))
Options = Callable[[Case], dict[str, Any]]
Missing = Callable[[Case], str | None]


def normal(case: Case, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
    """Return normal random values times `scale`, in the case's dtype; they require grad if `grad`."""
    values = torch.randn(shape, device=case.device) * scale
    return values.to(case.dtype).requires_grad_(grad)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor on the device `meta`, which has no memory, for launches that are only recorded."""
    return torch.empty(shape, dtype=dtype, device="meta")


def short(dtype: torch.dtype) -> str:
    """Return the dtype as text, such as "float32"."""
    return str(dtype).removeprefix("torch.")


# ---- implementations


def ours(op: str, options: Options = lambda case: {}) -> Peer:
    """Return gpt_fast's implementation of an op. It counts as missing on a device where the op has no kernel.

    `options` returns the keyword arguments of the op for a case.
    """

    def missing(case: Case) -> str | None:
        return "no kernel here: the reference serves" if ops.serving(op, case.device) == "reference" else None

    return Peer(OURS, lambda case: partial(getattr(ops, op), **options(case)), missing)


def reference(op: str, options: Options = lambda case: {}, memory: Callable[[Case], int] = lambda case: 0) -> Peer:
    """Return the reference implementation of an op in plain PyTorch, which does not count as a rival.

    `options` returns the keyword arguments of the op for a case. `memory` returns the bytes that the case needs. The
    implementation counts as missing if it needs more than half of the available memory.
    """
    return Peer(
        "reference", lambda case: partial(getattr(definitions, op), **options(case)), fits(memory), rival=False
    )  # fmt: skip


def compiled(build: Callable[[Case], Function]) -> Peer:
    """Return the implementation that compiles the function of `build` by `torch.compile`, with static shapes."""
    return Peer("torch.compile", lambda case: torch.compile(build(case), dynamic=False), compiles=True)


def dropout(case: Case) -> dict[str, Any]:
    """Return the dropout arguments of gpt_fast's ops for a case: `dropout_p`, `seed` and `site`; {} without dropout.

    The site is the number that tells the dropout calls of one model apart, so that their masks differ.
    """
    seed = torch.tensor([1234567], device=case.device)
    return {"dropout_p": case.dropout, "seed": seed, "site": SITE} if case.dropout else {}


# ---- reasons to be missing


def fits(memory: Callable[[Case], int]) -> Missing:
    """Return a check for `Peer.missing`: a reason if `memory(case)` bytes exceed half of the free memory, else None."""

    def missing(case: Case) -> str | None:
        need = memory(case)
        return f"needs about {need / 2**30:.0f} GiB" if need > available_memory(case.device) / 2 else None

    return missing


def cuda_only(package: str | None = None) -> Missing:
    """Return a check for `Peer.missing`: a reason on a CPU, and if `package` is given and not installed; else None."""

    def missing(case: Case) -> str | None:
        if package and importlib.util.find_spec(package) is None:
            return f"{package.replace('_', '-')} is not installed"
        return None if case.device == "cuda" else "runs on GPUs only"

    return missing
