"""Where cuBLASLt serves, which csrc/cuda calls: on widths of 16-bit tensors for which it was measured to be faster."""

import torch
from torch import Tensor

from .. import _transforms
from . import _library

ALIGNMENT = 8  # each size of each matrix is a multiple of it


def serves(op: str, kernel: str, operator: str, x: Tensor, sizes: tuple[int, ...]) -> bool:
    """Return True if cuBLASLt can compute a call of `op`, "linear" or "mlp", and was measured to be faster.

    Without cuBLASLt, PyTorch serves linear and Triton serves mlp. `operator` is the operator that calls cuBLASLt, such
    as "mlp_cublaslt_forward". It has to be built for CUDA, and x has to be bfloat16 or float16 and have elements.
    `sizes` holds the sizes of the matrices, the width of x first. Each has to be a positive multiple of 8.

    The table in kernels/launch_configs.py says where cuBLASLt was faster. `kernel` names the rows of the table:
    "cublaslt" for linear, "cublaslt relu" or "cublaslt gelu_tanh" for mlp. Each row holds for widths up to a limit; the
    row with the smallest limit that is not below `sizes[0]` decides.
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
    """Return (limit, faster) for each class of widths, ascending. A width is the size of the input's last axis.

    A class has the widths above the limit before, up to `limit`. `faster` is True if cuBLASLt was measured to beat
    PyTorch (for the `op` "linear") or Triton (for "mlp"). The classes are the rows named `kernel`, such as "cublaslt
    relu", in kernels/launch_configs.py, for 16-bit inputs on CUDA device `device_index`. The result is empty if
    `operator`, such as "mlp_cublaslt_forward", was not built for CUDA.
    """
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"gpt_fast::{operator}", "CUDA"):
        return ()
    launch_configs = _library.triton_kernel("launch_configs")
    architecture = launch_configs.architecture(torch.device("cuda", device_index))
    rows = launch_configs.serving(op, kernel, architecture, 2)
    return tuple((row.size, row.config == (1,)) for row in rows)
