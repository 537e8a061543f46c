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

    It requires grad if `grad`.
    """
    values = torch.randn(shape, device=case.device) * scale
    return values.to(case.dtype).requires_grad_(grad)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor on the device `meta`, which has no memory, for kernel launches that are only recorded."""
    return torch.empty(shape, dtype=dtype, device="meta")


def short(dtype: torch.dtype) -> str:
    """Return the dtype as text, such as "float32"."""
    return str(dtype).removeprefix("torch.")


# ---- implementations


def ours(op: str, options: Options = lambda case: {}) -> Peer:
    """Return gpt_fast's implementation of `op`, the name of a function in `gpt_fast.ops`.

    `options` returns the keyword arguments of the op for a case. On a device without a kernel for the op the
    implementation counts as missing, with a reason.
    """

    def missing(case: Case) -> str | None:
        """Return a reason if the op has no kernel on the case's device, else None."""
        return "no kernel here: the reference serves" if ops.serving(op, case.device) == "reference" else None

    return Peer(OURS, lambda case: partial(getattr(ops, op), **options(case)), missing)


def reference(op: str, options: Options = lambda case: {}, memory: Callable[[Case], int] = lambda case: 0) -> Peer:
    """Return the reference implementation of `op` in plain PyTorch, which does not count as a rival.

    `op` is the name of a function in `gpt_fast.reference`. `options` returns its keyword arguments for a case. `memory`
    returns the bytes that the case needs. The implementation counts as missing if they exceed half of the free memory.
    """
    return Peer(
        "reference", lambda case: partial(getattr(definitions, op), **options(case)), fits(memory), rival=False
    )  # fmt: skip


def compiled(build: Callable[[Case], Function]) -> Peer:
    """Return the implementation "torch.compile": the function that `build(case)` returns, compiled.

    It is compiled for static shapes.
    """
    return Peer("torch.compile", lambda case: torch.compile(build(case), dynamic=False), compiles=True)


def dropout(case: Case) -> dict[str, Any]:
    """Return the dropout arguments of gpt_fast's ops for a case: {"dropout_p", "seed", "site"}, or {} without dropout.

    "seed" is a tensor with one integer. "site" is the number that tells the dropout calls of one model apart, so that
    their masks differ.
    """
    seed = torch.tensor([1234567], device=case.device)
    return {"dropout_p": case.dropout, "seed": seed, "site": SITE} if case.dropout else {}


# ---- reasons to be missing


def fits(memory: Callable[[Case], int]) -> Missing:
    """Return a check for `Peer.missing`, a function from a case to a reason or None.

    It returns a reason if `memory(case)` bytes exceed half of the free memory on the case's device, else None.
    """

    def missing(case: Case) -> str | None:
        need = memory(case)
        return f"needs about {need / 2**30:.0f} GiB" if need > available_memory(case.device) / 2 else None

    return missing


def cuda_only(package: str | None = None) -> Missing:
    """Return a check for `Peer.missing`, a function from a case to a reason or None.

    It returns a reason if `package`, the name of a Python package, is given and not installed, or if the case is on a
    CPU. Otherwise it returns None.
    """

    def missing(case: Case) -> str | None:
        if package and importlib.util.find_spec(package) is None:
            return f"{package.replace('_', '-')} is not installed"
        return None if case.device == "cuda" else "runs on GPUs only"

    return missing
