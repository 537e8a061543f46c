"""Where cuBLASLt serves, which csrc/cuda calls: on widths of 16-bit tensors for which it was measured to be faster."""

import torch
from torch import Tensor

from .. import _transforms
from . import _library

ALIGNMENT = 8  # each size of each matrix is a multiple of it


def serves(op: str, kernel: str, operator: str, x: Tensor, sizes: tuple[int, ...]) -> bool:
    """Return True if cuBLASLt can compute the call and, by measurements, is faster at this width than other kernels.

    It can if the operator `gpt_fast::<operator>` was built for CUDA, x is bfloat16 or float16 and has elements, and
    each of `sizes` is a positive multiple of 8. `sizes` holds the sizes of the matrices; `sizes[0]` is the width of x.
    The rows of kernels/launch_configs.py for the kernel `kernel` of `op` hold the measurements. The row with the
    smallest limit of at least `sizes[0]` decides.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        return False
    widths = classes(op, kernel, operator, x.get_device())
    if not any(faster for _, faster in widths):
        return False
    if x.numel() == 0 or any(size == 0 or size % ALIGNMENT for size in sizes):
        return False
    return next(faster for width, faster in widths if width >= sizes[0])


@_transforms.constant_in_graphs
def classes(op: str, kernel: str, operator: str, device_index: int) -> tuple[tuple[int, bool], ...]:
    """Return (largest width of x, True if cuBLASLt is faster there) for each range of widths, ascending by width.

    The rows of kernels/launch_configs.py for the kernel `kernel` of `op`, two-byte elements and the architecture of
    CUDA device `device_index` decide. The result is empty if `operator`, an operator's name without "gpt_fast::", was
    not built.
    """
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"gpt_fast::{operator}", "CUDA"):
        return ()
    launch_configs = _library.triton_kernel("launch_configs")
    architecture = launch_configs.architecture(torch.device("cuda", device_index))
    rows = launch_configs.serving(op, kernel, architecture, 2)
    return tuple((row.size, row.config == (1,)) for row in rows)
