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
# dropout_p = 0.1 as launchers take it: the threshold and the scale of the dropout contract, docs/reference/dropout.md.
DROPOUT_RULE = (6554, 65536 / (65536 - 6554))
Options = Callable[[Case], dict[str, Any]]
Missing = Callable[[Case], str | None]


def normal(case: Case, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
    """Return a tensor of `shape` with normal random values times `scale`, on the case's device and in its dtype.

    `shape` is given as separate integers. The tensor is a leaf that requires grad if `grad`.
    """
    values = torch.randn(shape, device=case.device) * scale
    return values.to(case.dtype).requires_grad_(grad)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor on the device `meta`, for kernel launches that are only recorded, never run.

    It has shape and dtype, but no memory and no values. `shape` is given as separate integers.
    """
    return torch.empty(shape, dtype=dtype, device="meta")


def short(dtype: torch.dtype) -> str:
    """Return the dtype's name without "torch.", such as "float32"."""
    return str(dtype).removeprefix("torch.")


# ---- implementations


def ours(op: str, options: Options = lambda case: {}) -> Peer:
    """Return gpt_fast's implementation of `op`, as a `Peer` with the name "gpt_fast".

    A `Peer` is an implementation that a benchmark compares with others. `op` is the name of a function in
    `gpt_fast.ops`. A case is one shape, dtype and device to measure. For a case, the peer builds that function with the
    keyword arguments `options(case)`, none by default. If gpt_fast has no kernel of `op` on the case's device, the peer
    counts as missing and gives a reason.
    """

    def missing(case: Case) -> str | None:
        """Return a reason if the outer function's `op` has no kernel on the case's device, else None."""
        return "no kernel here: the reference serves" if ops.serving(op, case.device) == "reference" else None

    return Peer(OURS, lambda case: partial(getattr(ops, op), **options(case)), missing)


def reference(op: str, options: Options = lambda case: {}, memory: Callable[[Case], int] = lambda case: 0) -> Peer:
    """Return the `Peer` "reference": the definition of `op` in plain PyTorch, which does not count as a rival in speed.

    `op` is the name of a function in `gpt_fast.reference`. A case is one shape, dtype and device to measure. For a
    case, the peer builds that function with the keyword arguments `options(case)`, none by default. `memory(case)`
    estimates the bytes that it needs, 0 by default. If they exceed half of the device's free memory, the peer counts as
    missing.
    """
    return Peer(
        "reference", lambda case: partial(getattr(definitions, op), **options(case)), fits(memory), rival=False
    )  # fmt: skip


def compiled(build: Callable[[Case], Function]) -> Peer:
    """Return the `Peer` "torch.compile": the function that `build(case)` returns, compiled for static shapes.

    The peer is marked as one that compiles, so its first call is slow.
    """
    return Peer("torch.compile", lambda case: torch.compile(build(case), dynamic=False), compiles=True)


def dropout(case: Case) -> dict[str, Any]:
    """Return the dropout arguments of gpt_fast's ops: {"dropout_p", "seed", "site"}, or {} if the case has no dropout.

    "dropout_p" is the case's probability. "seed" is a constant int64 tensor with one element, on the case's device.
    "site" is a constant; in a model it is the number that gives each dropout call a mask of its own.
    """
    seed = torch.tensor([1234567], device=case.device)
    return {"dropout_p": case.dropout, "seed": seed, "site": SITE} if case.dropout else {}


# ---- reasons to be missing


def fits(memory: Callable[[Case], int]) -> Missing:
    """Return a check for `Peer.missing`: a function that takes a case and returns a reason as text, or None.

    It returns a reason if `memory(case)` bytes exceed half of the memory that is free at that time on the case's
    device. Otherwise it returns None.
    """

    def missing(case: Case) -> str | None:
        need = memory(case)
        return f"needs about {need / 2**30:.0f} GiB" if need > available_memory(case.device) / 2 else None

    return missing


def cuda_only(package: str | None = None) -> Missing:
    """Return a check for `Peer.missing`: a function that takes a case and returns a reason as text, or None.

    It returns a reason if `package` is given and cannot be found, or else if the case's device is not "cuda". Otherwise
    it returns None. `package` is a module name as in an import, such as "liger_kernel".
    """

    def missing(case: Case) -> str | None:
        if package and importlib.util.find_spec(package) is None:
            return f"{package.replace('_', '-')} is not installed"
        return None if case.device == "cuda" else "runs on GPUs only"

    return missing
