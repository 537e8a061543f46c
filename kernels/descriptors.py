"""Tensor descriptors: which tensors the kernels read by one, and how it is made.

A descriptor lets the tensor memory accelerator load a tile, which saves address arithmetic and registers. It is made on
the host: made on the device it would cost instructions in every program.
"""

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import architectures

ALIGNMENT = 16  # bytes, of a descriptor's base and of every stride but the last


def describable(x: torch.Tensor, architecture: int) -> bool:
    """Return True if kernels read `x` by a descriptor. 32-bit tensors are read by pointers, for lack of a gain."""
    *strides, last = _strides(x)
    return (
        architectures.has_descriptors(architecture)
        and x.element_size() == 2
        and x.numel() > 0
        and x.data_ptr() % ALIGNMENT == 0
        and last == 1
        and all(stride >= x.shape[-1] and stride * x.element_size() % ALIGNMENT == 0 for stride in strides)
    )


def descriptor(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """Return the descriptor of `x` for tiles of shape `block`."""
    return TensorDescriptor(x, list(x.shape), _strides(x), block)


def _strides(x: torch.Tensor) -> list[int]:
    """Return the strides of `x`. The stride of an axis of size 1 has no meaning, so it becomes one that is valid."""
    valid = triton.cdiv(x.shape[-1], ALIGNMENT) * ALIGNMENT  # elements of any size then fill whole units of 16 bytes
    leading = [valid if size == 1 else stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return [*leading, x.stride(-1)]
