"""Tensor descriptors: which tensors the kernels read by one, and how it is made.

A descriptor lets the tensor memory accelerator load a tile, which saves address arithmetic and registers. It is made on
the host: made on the device it would cost instructions in every program.
"""

import functools

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from . import architectures
from .sizes import cdiv

ALIGNMENT = 16  # bytes; a descriptor's base and every stride but the last are multiples of it


def describable(x: torch.Tensor, architecture: int) -> bool:
    """Return True if kernels can and should read `x` by a tensor descriptor on a GPU of this architecture.

    `architecture` is a compute capability times ten, or INTERPRETER. The architecture has to have descriptors. `x`
    needs 16-bit elements, at least one of them, an address that is a multiple of 16 bytes, and a contiguous last axis.
    Its other strides have to be multiples of 16 bytes, without overlap of rows. 32-bit tensors are read by pointers,
    because descriptors bring them no gain.
    """
    return (
        architectures.has_descriptors(architecture)
        and x.element_size() == 2
        and x.data_ptr() % ALIGNMENT == 0
        and _layout(x.shape, x.stride(), 2)[1]
    )


def descriptor(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """Return the tensor descriptor of `x` for tiles of shape `block`, one size for each axis of `x`.

    The caller makes sure that the address is a multiple of 16 bytes and the strides are valid: the last is 1, others
    are multiples of 16 bytes. Elements may have any size.
    """
    return TensorDescriptor(x, list(x.shape), list(_layout(x.shape, x.stride(), x.element_size())[0]), block)


@functools.lru_cache(maxsize=1024)  # shapes repeat from step to step
def _layout(shape: tuple[int, ...], stride: tuple[int, ...], size: int) -> tuple[tuple[int, ...], bool]:
    """Return (strides for a descriptor, True if they are valid) of a tensor with elements of `size` bytes.

    `shape` and `stride` are the tensor's, in elements. The stride of an axis of size 1 has no meaning, so it is
    replaced by a valid one, except on the last axis. Strides are valid if the last is 1, all others are multiples of 16
    bytes and rows do not overlap. A tensor without elements is not valid.
    """
    *leading, last = stride
    valid = cdiv(shape[-1], ALIGNMENT) * ALIGNMENT  # elements of any size then fill whole units of 16 bytes
    strides = [valid if n == 1 else step for n, step in zip(shape[:-1], leading, strict=True)]
    aligned = all(step >= shape[-1] and step * size % ALIGNMENT == 0 for step in strides)
    return (*strides, last), aligned and last == 1 and 0 not in shape
