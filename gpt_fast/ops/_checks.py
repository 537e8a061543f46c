"""Checks that public functions share. Each raises `ValueError` with the op, the value and the expected one."""

import numbers
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT_DTYPES = (torch.int64, torch.int32)


def short(dtype: torch.dtype) -> str:
    """Return the name of a dtype without "torch.", such as "float32"."""
    return str(dtype).removeprefix("torch.")


def described(value: object) -> str:
    """Return text for a message: "float32 [2, 3]" for a tensor, "None" for None, else "of type " and the class."""
    if isinstance(value, Tensor):
        return f"{short(value.dtype)} {list(value.shape)}"
    return "None" if value is None else f"of type {type(value).__name__}"


def tensors(op: str, **arguments: Any) -> None:
    """Raise `ValueError`, which names `op` and the argument, unless each of `arguments` is a tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"gpt_fast.{op}: {name} is {described(value)}; expected a tensor")


def optional_tensors(op: str, **arguments: Any) -> None:
    """Raise `ValueError`, which names `op` and the argument, unless each of `arguments` is a tensor or None."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"gpt_fast.{op}: {name} is {described(value)}; expected a tensor or None")


def is_number(value: Any) -> bool:
    """Return True for a real number: Python's, NumPy's, or a symbolic one in a graph. Return False for a bool.

    A tensor counts only if it has no dimension and `torch.jit.trace` is recording, where computed sizes are tensors.
    """
    if isinstance(value, Tensor):
        return torch.jit.is_tracing() and value.dim() == 0  # what follows from a shape is a tensor in a trace
    return isinstance(value, float | int | numbers.Real | torch.SymFloat | torch.SymInt) and not isinstance(value, bool)


def integer(op: str, **arguments: Any) -> None:
    """Validate that each of `arguments`, by name, is an integer and no bool.

    Python's, NumPy's and symbolic integers count. While `torch.jit.trace` records, every tensor passes.

    Raises:
        ValueError: An argument is something else. The message names `op` and the argument.
    """
    for name, value in arguments.items():
        if isinstance(value, Tensor) and torch.jit.is_tracing():
            continue  # what follows from a shape
        if not isinstance(value, int | numbers.Integral | torch.SymInt) or isinstance(value, bool):
            raise ValueError(f"gpt_fast.{op}: {name} is {value!r}; expected an integer")


def boolean_option(op: str, **arguments: Any) -> None:
    """Raise `ValueError`, which names `op` and the argument, unless each of `arguments` is Python's True or False."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise ValueError(f"gpt_fast.{op}: {name} is {value!r}; expected True or False")


def alike(first: Tensor, *others: Tensor | None) -> bool:
    """Return True if `first` is floating and all of `others` that are not None have its dtype and device.

    Floating means float32, bfloat16, float16 or float64. The check takes 1 µs.
    """
    dtype, device = first.dtype, first.device
    if dtype not in FLOAT_DTYPES:
        return False
    for tensor in others:  # noqa: SIM110  a generator would take twice as long
        if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
            return False
    return True


def floating_alike(op: str, **tensors: Tensor | None) -> None:
    """Raise `ValueError` unless all tensors that are not None are floating, of one dtype and on one device.

    Floating means float32, bfloat16, float16 or float64. The first tensor may not be None. `op` is the op's name, for
    the message.
    """
    if not alike(*tensors.values()):  # type: ignore[arg-type]
        floating(op, **tensors)
        same_dtype(op, **tensors)
        same_device(op, **tensors)


def floating(op: str, **tensors: Tensor | None) -> None:
    """Validate that each tensor is None or has dtype float32, bfloat16, float16 or float64.

    Raises:
        ValueError: A tensor has another dtype. The message names `op` and the tensor by its keyword.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            expected = ", ".join(short(dtype) for dtype in FLOAT_DTYPES)
            raise ValueError(f"gpt_fast.{op}: {name} has dtype {short(tensor.dtype)}; expected one of {expected}")


def integral(op: str, **tensors: Tensor | None) -> None:
    """Raise `ValueError`, which names `op` and the tensor, unless each tensor is None or has dtype int64 or int32."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in INT_DTYPES:
            raise ValueError(f"gpt_fast.{op}: {name} has dtype {short(tensor.dtype)}; expected int64 or int32")


def boolean(op: str, **tensors: Tensor | None) -> None:
    """Raise `ValueError`, which names `op` and the tensor, unless each tensor is None or has dtype bool."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.bool:
            raise ValueError(f"gpt_fast.{op}: {name} has dtype {short(tensor.dtype)}; expected bool")


def same_dtype(op: str, **tensors: Tensor | None) -> None:
    """Validate that all tensors that are not None have one dtype.

    Raises:
        ValueError: A tensor has another dtype than the first one that is not None. The message names `op` and both.
    """
    given = [(name, tensor.dtype) for name, tensor in tensors.items() if tensor is not None]
    for name, dtype in given[1:]:
        first, expected = given[0]
        if dtype != expected:
            raise ValueError(
                f"gpt_fast.{op}: {name} has dtype {short(dtype)}; expected {short(expected)}, the dtype of {first}"
            )


def same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise `ValueError`, which names `op` and the devices, unless all tensors that are not None are on one device."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    # On one device as a rule, and then a comparison of flags tells: devices themselves are slow to make and to hash.
    if all(tensor.is_cpu for tensor in given.values()):
        return
    if len({tensor.device for tensor in given.values()}) > 1:
        got = ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        raise ValueError(f"gpt_fast.{op}: got {got}; expected one device for all of them")


def shape(op: str, name: str, tensor: Tensor | None, wanted: tuple, why: str) -> None:
    """Validate that `tensor` is None or has the shape `wanted`. `why` says where these sizes come from.

    Raises:
        ValueError: The shape differs. The message has `op`, the argument's `name`, both shapes and `why`.
    """
    if tensor is not None and tuple(tensor.shape) != tuple(wanted):
        raise ValueError(f"gpt_fast.{op}: {name} has shape {list(tensor.shape)}; expected {list(wanted)}: {why}")


def dimensions(op: str, name: str, tensor: Tensor, wanted: str) -> None:
    """Validate that `tensor` has as many dimensions as `wanted`, names of sizes like "[B, H, T, D]".

    The sizes themselves are not checked.

    Raises:
        ValueError: The number differs. The message has `op`, the argument's `name`, its shape and `wanted`.
    """
    if tensor.dim() != wanted.count(",") + 1:
        raise ValueError(f"gpt_fast.{op}: {name} has shape {list(tensor.shape)}; expected {wanted}")


def probability(op: str, name: str, p: float) -> None:
    """Raise `ValueError` unless `p`, the argument called `name` of `op`, is a real number in [0, 1)."""
    if not is_number(p) or not 0.0 <= p < 1.0:
        raise ValueError(f"gpt_fast.{op}: {name} is {p!r}; expected a probability in [0, 1)")


def seed(op: str, seed: Tensor | None, device: torch.device) -> None:
    """Raise `ValueError`, which names `op`, unless `seed` is None or an int64 tensor of one element on `device`."""
    if seed is None:
        return
    if not isinstance(seed, Tensor):
        raise ValueError(
            f"gpt_fast.{op}: seed is {described(seed)}; expected an int64 tensor of one element on {device}"
        )
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(
            f"gpt_fast.{op}: seed has dtype {short(seed.dtype)} and shape {list(seed.shape)} on {seed.device}; "
            f"expected an int64 tensor of one element on {device}"
        )


def values_below(op: str, name: str, tensor: Tensor, upper: int, *, lower: int = 0, besides: int | None = None) -> None:
    """Validate that each value of `tensor` is in [lower, upper) or equals `besides`. An empty tensor passes.

    Reading the values of a GPU's tensor waits for the device.

    Raises:
        ValueError: A value lies outside. The message has `op`, the argument's `name` and the first wrong value.
    """
    wrong = (tensor < lower) | (tensor >= upper)
    if besides is not None:
        wrong = wrong & (tensor != besides)
    if bool(wrong.any()):
        value = int(tensor[wrong][0])
        extra = f" or {besides}" if besides is not None else ""
        raise ValueError(f"gpt_fast.{op}: {name} holds {value}; expected values in [{lower}, {upper}){extra}")
