"""Shared parts of the ops: registration, the choice of the implementation, seeds, and the two switches.

PyTorch's dispatcher chooses the kernel by device. There is no registry beside it. Schemas are defined here in Python.
The C++ extension and Triton only implement them.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from .. import _transforms, reference

apply = _transforms.apply  # of an op's autograd function

LIBRARY = torch.library.Library("gpt_fast", "DEF")

# Under the interpreter Triton kernels run on CPU tensors and take the place of the C++ kernels.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_KEYS = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_DECOMPOSITIONS: dict[torch._ops.OperatorBase, Callable] = {}  # filled by the ops' modules when they are imported

# Module globals and no ContextVar, which Dynamo cannot trace.
_reference_forced = False
_values_checked = False


@contextlib.contextmanager
def use_reference() -> Iterator[None]:
    """Run every op inside the block by its pure-PyTorch definition in `gpt_fast.reference`.

    The block computes without any kernel of this library, on every device, with the same parameters and dropout masks.
    The end of the block, by an exception too, restores the setting from before it.

    Yields:
        None.

    Example:
        ```python
        import torch
        import gpt_fast

        x, weight = torch.randn(8, 64), torch.ones(64)
        with gpt_fast.use_reference():
            expected = gpt_fast.ops.layer_norm(x, weight)
        print(torch.allclose(gpt_fast.ops.layer_norm(x, weight), expected, atol=1e-5))  # True
        ```

    Note:
        The switch is one for the process, not one for each thread. Backward belongs inside the block only if the
        forward pass was inside it.

        Source: `gpt_fast/reference.py`.
    """
    global _reference_forced
    before, _reference_forced = _reference_forced, True
    try:
        yield
    finally:
        _reference_forced = before


def check_values(enabled: bool = True) -> None:
    """Set whether ops check values inside tensors on every device, or on the CPU alone. The setting is the process's.

    The values are token ids, targets, lengths and `cu_seqlens`. A value out of range raises `ValueError`, which names
    the op and the value.

    Args:
        enabled: True checks on every device. False checks on the CPU alone, which is the setting at import.

    Example:
        ```python
        import gpt_fast

        gpt_fast.check_values()
        gpt_fast.check_values(False)
        ```

    Note:
        On CUDA the check waits for the device, so it is off by default and kernels clamp instead. Nothing is checked
        while PyTorch records a graph (`torch.compile`, `torch.export`, `torch.jit.trace`), nor inside a `vmap`.
    """
    global _values_checked
    _values_checked = enabled


def values_checked(tensor: Tensor) -> bool:
    """Return True if an op now checks the values inside this tensor: see `check_values`.

    Args:
        tensor: Tensor of any shape and dtype. Its values are not read.

    Returns:
        False while PyTorch records a graph and inside a `vmap`. Else True on the CPU, and True on any device while
        `check_values` is enabled.

    Example:
        ```python
        import torch
        from gpt_fast import ops

        print(ops.values_checked(torch.tensor([3])))  # True
        ```
    """
    if _transforms.is_recording() or _transforms.is_batched(tensor):
        return False
    return _values_checked or tensor.device.type == "cpu"


def define_forward(op: str, signature: str) -> None:
    """Define the operator `gpt_fast::<op>_forward` with the schema `signature`, such as "(Tensor x) -> Tensor y"."""
    LIBRARY.define(f"{op}_forward{signature}")


def define_backward(op: str, signature: str) -> None:
    """Define the operator `gpt_fast::<op>_backward` with the schema `signature`, such as "(Tensor dy) -> Tensor dx".

    Its decomposition raises `NotImplementedError`.
    """
    LIBRARY.define(f"{op}_backward{signature}")
    refuse_decomposition(op, "backward", "a program of a forward pass, or one exported under gpt_fast.use_reference()")


def refuse_decomposition(op: str, direction: str, expected: str) -> None:
    """Register a decomposition of `gpt_fast::<op>_<direction>` that raises `NotImplementedError` when PyTorch calls it.

    `direction` is "forward" or "backward". `expected` ends the message and says what to export instead.
    """

    def refuse(*args):
        """Raise `NotImplementedError` for the operator that the enclosing call names, whatever its arguments are."""
        raise NotImplementedError(
            f"gpt_fast.{op}: the exported program has gpt_fast::{op}_{direction}, which has no decomposition; "
            f"expected {expected}"
        )

    _DECOMPOSITIONS[getattr(torch.ops.gpt_fast, f"{op}_{direction}").default] = refuse


def register_decomposition(op: str, function: Callable) -> None:
    """Make `function`, written in PyTorch's own operators, the decomposition of `gpt_fast::<op>_forward`.

    The table that `decompositions` returns then has it. `function` takes the operator's arguments and returns its
    results. Results that only backward reads may be empty: an exported program of a forward pass has no use for them,
    and operators of backward refuse to be decomposed.
    """
    _DECOMPOSITIONS[getattr(torch.ops.gpt_fast, f"{op}_forward").default] = function


def decompositions() -> dict[torch._ops.OperatorBase, Callable]:
    """Return the table that replaces this library's operators by PyTorch's own in an exported program.

    `program.run_decompositions(gpt_fast.ops.decompositions())` leaves every other operator as it is. The replacements
    are the definitions of `gpt_fast.reference`, so the new program runs where this library is not installed, and
    `torch.onnx.export` takes it.

    Returns:
        New dictionary from operators to the functions that replace them. A function raises `NotImplementedError` if its
        operator is a backward pass or `decode_attention_append`, which writes a cache.

    Example:
        ```python
        import torch
        import gpt_fast

        layer = gpt_fast.layers.LayerNorm(64).eval()
        program = torch.export.export(layer, (torch.randn(8, 64),))
        program = program.run_decompositions(gpt_fast.ops.decompositions())
        print("gpt_fast" in str(program.graph))  # False
        ```
    """
    return dict(_DECOMPOSITIONS)


def backward(op: str, *args):
    """Return the results of `gpt_fast::<op>_backward` on `args`; differentiating them raises `NotImplementedError`.

    This error is arranged only outside of compiled graphs and while autograd records. An autograd kernel of the
    operator would raise it too, but costs 20 µs of Python in every backward pass.

    Raises:
        NotImplementedError: One of `args`, such as the upstream gradient, is a dual tensor of forward mode.
    """
    if _transforms.is_forward_mode() and any(isinstance(arg, Tensor) and _transforms.has_tangent(arg) for arg in args):
        raise NotImplementedError(
            f"gpt_fast.{op}: the upstream gradient is a dual tensor; expected a forward pass inside the dual level, "
            "which the reference then serves"
        )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _DifferentiatedOnce.apply(op, *args)
    return getattr(torch.ops.gpt_fast, f"{op}_backward")(*args)


class _DifferentiatedOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, *args):
        ctx.op = op.removesuffix("_cublaslt")
        return getattr(torch.ops.gpt_fast, f"{op}_backward")(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise _transforms.double_backward(ctx.op)


@functools.cache
def triton_kernel(op: str) -> types.ModuleType:
    """Return the module `gpt_fast.kernels.<op>`, which the first call imports.

    The result is cached, because looking for Triton takes 10 µs. An error is not cached.

    Raises:
        RuntimeError: Triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"gpt_fast.{op}: Triton is not installed; expected it for CUDA tensors: pip install triton")
    return importlib.import_module(f"gpt_fast.kernels.{op}")


def register_triton(name: str, launcher: Callable) -> None:
    """Make `launcher` the implementation of `gpt_fast::<name>` on CUDA, and under TRITON_INTERPRET=1 on the CPU too.

    `launcher` gets the operator's arguments and returns its results. While it runs, the device of the first tensor
    among the arguments is the current CUDA device. If Triton has no C compiler, or cannot compile the C code that it
    starts kernels with, a `RuntimeError` names the op and what is missing. Other errors pass unchanged.
    """

    def on_own_device(*args):
        """Return `launcher(*args)`, with the device of the first tensor in `args` as the current CUDA device."""
        with device_guard(_device_index(args)):
            try:
                return launcher(*args)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                if (reason := _why_not_built(error)) is None:
                    raise
                op = name.removesuffix("_forward").removesuffix("_backward")
                raise RuntimeError(f"gpt_fast.{op}: {reason}") from error

    for key in TRITON_KEYS:
        LIBRARY.impl(name, on_own_device, key)


def _why_not_built(error: Exception) -> str | None:
    """Return why Triton could not compile the C code that it starts kernels with, or None for another error.

    Every `CalledProcessError` is taken for a failed compilation. "Failed to find C compiler" in the message of an error
    means that there is no compiler.
    """
    if isinstance(error, subprocess.CalledProcessError):
        return (
            f"Triton's launcher was not compiled, {error.cmd[0]} ended with {error.returncode}; "
            "expected a C compiler and Python's headers (Debian and Ubuntu: apt install gcc python3-dev)"
        )
    if "Failed to find C compiler" in str(error):
        return (
            "Triton found no C compiler; expected gcc or clang on PATH, or CC set to one "
            "(Debian and Ubuntu: apt install gcc)"
        )
    return None


def device_guard(index: int) -> contextlib.AbstractContextManager:
    """Return a context in which CUDA device `index` is the current device. It does nothing for -1, a CPU's index.

    Triton, streams and CUDA graphs use the current device, whatever device the tensors are on. Entering
    `torch.cuda.device` costs microseconds, so the context does nothing if the device is the current one already.
    """
    if index < 0 or index == torch.cuda.current_device():
        return _NO_CONTEXT
    return torch.cuda.device(index)


_NO_CONTEXT = contextlib.nullcontext()


def _device_index(args: Iterable) -> int:
    """Return the CUDA index of the first tensor among `args`, or -1 if it is on the CPU or if there is no tensor.

    A list or tuple among `args` stands for its first tensor. If that is on the CPU, the list or tuple is skipped.
    """
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.get_device()
        if isinstance(arg, (list, tuple)) and (index := _device_index(arg)) >= 0:
            return index
    return -1


@_transforms.constant_in_graphs
def serving(op: str, device_type: str) -> str:
    """Return which implementation PyTorch's dispatcher has for an op on a device type.

    Args:
        op: Name of an op, such as "mlp".
        device_type: Device type that PyTorch knows, such as "cuda".

    Returns:
        "triton", "cpp" or "reference". A single call may run the reference all the same: for float64, under
        `use_reference` and in forward mode, for example.

    Raises:
        ValueError: This library has no such op, or PyTorch does not know the device type.

    Example:
        ```python
        from gpt_fast import ops

        implementation = ops.serving("mlp", "cpu")  # "cpp" if the extension is built
        ```
    """
    if not isinstance(op, str) or not isinstance(device_type, str):
        raise ValueError(
            f"gpt_fast.serving: op is {op!r} and device_type {device_type!r}; expected two names, as in 'mlp', 'cpu'"
        )
    if (op, device_type) in _WITH_KERNEL:
        return _WITH_KERNEL[op, device_type]
    if not hasattr(torch.ops.gpt_fast, f"{op}_forward"):
        raise ValueError(f"gpt_fast.serving: op is {op!r}; expected the name of an op of this library, such as 'mlp'")
    try:
        key = torch._C._dispatch_key_for_device(device_type)
    except RuntimeError as error:
        raise ValueError(
            f"gpt_fast.serving: device_type is {device_type!r}; expected one that PyTorch knows, such as 'cuda'"
        ) from error
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"gpt_fast::{op}_forward", key):
        return "reference"
    _WITH_KERNEL[op, device_type] = "triton" if key in TRITON_KEYS else "cpp"
    return _WITH_KERNEL[op, device_type]


_WITH_KERNEL: dict[tuple[str, str], str] = {}  # what the dispatcher said: asking it costs more than a small op


def dropout_rule(dropout_p: float) -> tuple[int, float]:
    """Return (threshold, scale), an int and a float, of dropout with the probability `dropout_p`.

    Dropout sets an element to 0 if its 16 random bits are below `threshold`, and multiplies it by `scale` otherwise.
    """
    return reference.dropout_threshold(dropout_p), reference.dropout_scale(dropout_p)


_WARNED: set[tuple[str, str]] = set()


@_transforms.constant_in_graphs
def _warn_once(op: str, where: str, advice: str) -> None:
    """Issue a warning that no kernel serves `op` in a case, once in the process for each pair of `op` and `where`.

    `where` describes the case in words, such as "on mps" or "in forward mode", and `advice` ends the message.
    """
    if (op, where) not in _WARNED:
        _WARNED.add((op, where))
        warnings.warn(
            f"gpt_fast.{op}: no fused kernel {where}, the pure-PyTorch reference serves{advice}", stacklevel=4
        )


def has_kernel(op: str, x: Tensor, *others: Tensor | None) -> bool:
    """Return True if a kernel serves a call of `op` on x and `others`, and False if the reference does.

    The reference serves the call on a device without a kernel, for a float64 tensor among x and `others`, and under
    `use_reference`. It also does so in forward mode, during `torch.onnx.export`, and inside transforms of `torch.func`
    that kernels cannot follow. `others` are the floating arguments whose dtype may differ from that of x.
    """
    return allows_kernels(x, *others) and serving(op, x.device.type) != "reference"


def allows_kernels(x: Tensor, *others: Tensor | None) -> bool:
    """Return True unless the reference has to serve a call on x and `others` even on a device with a kernel.

    It has to for a float64 tensor among x and `others`, under `use_reference`, in forward mode, during
    `torch.onnx.export`, and inside transforms of `torch.func` that kernels cannot follow.
    """
    if _reference_forced or _any_float64(x, *others) or not _transforms.is_followed():
        return False
    return not _is_exporting_to_onnx()


def _is_exporting_to_onnx() -> bool:
    """Return True while `torch.onnx.export` records a graph. ONNX knows PyTorch's own operators only."""
    return _transforms.is_recording() and _is_in_onnx_export()


@_transforms.constant_in_graphs
def _is_in_onnx_export() -> bool:
    """Return True inside `torch.onnx.export`, without importing `torch.onnx`, which would take time."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()  # importing it takes time


def _any_float64(*tensors: Tensor | None) -> bool:
    """Return True if one of the tensors that are not None has dtype float64."""
    for tensor in tensors:  # noqa: SIM110  a generator would take twice as long
        if tensor is not None and tensor.dtype == torch.float64:
            return True
    return False


def is_plain_call(op: str, x: Tensor, *others: Tensor | None) -> bool:
    """Return True if a cheap check already shows that a kernel serves the call.

    The call has to be eager, and outside of `use_reference`, forward mode and transforms. x and `others` (or None) have
    to be tensors of one dtype, float32, bfloat16 or float16, and on one device. `serving` must have found a kernel for
    `op` on that device type before. False means only that the full checks (`has_kernel` and the checks of the
    arguments) have to decide. They cost 2 µs more, which shows in a norm of a few rows.
    """
    if _reference_forced or _transforms.is_recording() or _transforms.is_transformed():
        return False
    if _transforms.is_forward_mode() or not isinstance(x, Tensor):
        return False
    dtype, device = x.dtype, x.device
    if dtype not in KERNEL_DTYPES or (op, device.type) not in _WITH_KERNEL:
        return False
    for tensor in others:
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tensor.device != device:
            return False
    return True


def kernel_checks(op: str, x: Tensor) -> bool:
    """Return True if x is on the CPU and a C++ kernel serves `op` for it, which checks the values in its tensors."""
    return x.is_cpu and has_kernel(op, x) and serving(op, "cpu") == "cpp"


def runs_reference(op: str, x: Tensor, *others: Tensor | None) -> bool:
    """Return True if the pure-PyTorch reference serves a call of `op` on x and `others`, and False if a kernel does.

    If the reference does, warn once for each op and reason, unless the reason is `use_reference`, a float64 tensor or
    `torch.onnx.export`. `others` are the floating arguments, or None, whose dtype may differ from that of x.
    """
    if has_kernel(op, x, *others):
        return False
    if _reference_forced or _any_float64(x, *others) or _is_exporting_to_onnx():
        return True
    if _transforms.is_transformed() and not _transforms.is_followed():
        _warn_once(op, "inside torch.func's transforms but one grad or vjp", "")
    elif _transforms.is_forward_mode():
        _warn_once(op, "in forward mode", "")
    else:
        _warn_once(op, f"on {x.device.type}", "; `gpt-fast doctor` tells why")
    return True


def by_reference(function: Callable, device_type: str, *args, **kwargs):
    """Return `function(*args, **kwargs)` for a definition in `gpt_fast.reference`, called with autocast off.

    Autocast is off because the definitions choose their own dtypes. `device_type` is the device type of the inputs.
    PyTorch's profiler shows the call as "gpt_fast::<function> (reference)". For "meta", which PyTorch has no autocast
    for, `function` is simply called, without a profiler entry.
    """
    if device_type == "meta":  # PyTorch has no autocast for it
        return function(*args, **kwargs)
    with torch.autocast(device_type, enabled=False), profiled(f"gpt_fast::{function.__name__} (reference)"):
        return function(*args, **kwargs)


def profiled(name: str) -> contextlib.AbstractContextManager:
    """Return a context that PyTorch's profiler shows as `name`; without a profiler or in a graph it does nothing.

    Operators do not need it: the dispatcher gives the profiler their names.
    """
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return _NO_CONTEXT
    return torch.profiler.record_function(name)


def autocast(x: Tensor, *tensors: Tensor | None) -> tuple:
    """Cast tensors to the autocast dtype if autocast is on for x's device, as `F.linear` does.

    Returns:
        Tuple of x and `tensors`, in this order; None stays None. Without autocast the tensors are returned as they are.
        With autocast, only float32, bfloat16 and float16 tensors are cast. Others, such as float64, stay as they are.
    """
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return x, *tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor.to(dtype) if tensor is not None and tensor.dtype in KERNEL_DTYPES else tensor for tensor in (x, *tensors)
    )


def rounds_weights(op: str, x: Tensor, *weights: Tensor) -> bool:
    """Return True if `op` takes its float32 weights as they are under autocast, and rounds them itself.

    The C++ kernels do so while they pack a weight, which saves a copy of it in the autocast dtype. They return its
    gradient in float32. `x` is the input in the autocast dtype.
    """
    if not x.is_cpu or x.dtype == torch.float32 or not torch.is_autocast_enabled("cpu"):
        return False
    for weight in weights:
        if weight.dtype != torch.float32 or not weight.is_cpu:
            return False
    return has_kernel(op, x) and serving(op, "cpu") == "cpp"


def product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype | None:
    """Return the 16-bit dtype to which a norm may round its result if only a matrix product reads it, or None.

    `dtype` is the dtype that the norm's result has otherwise. Autocast on x's device would cast the result to the
    16-bit dtype for the product anyway, so the bits are the same. This function returns None if `dtype` is not float32,
    if autocast is off, or if autocast casts to neither bfloat16 nor float16.
    """
    device_type = x.device.type
    if dtype != torch.float32 or device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    cast = torch.get_autocast_dtype(device_type)
    return cast if cast != dtype and cast in KERNEL_DTYPES else None


def new_seed(device: torch.device | str) -> Tensor:
    """Draw a dropout seed from torch's generator for a device.

    If `torch.distributed` is initialised, the seed also depends on the rank. So ranks that have all called
    `torch.manual_seed(0)` still get different seeds.

    Args:
        device: Device of the seed, or its name.

    Returns:
        seed [1], int64, on `device`.

    Raises:
        ValueError: `device` is no device and no name of one.

    Example:
        ```python
        import torch
        from gpt_fast import ops

        x, residual, seed = torch.randn(8, 64), torch.randn(8, 64), ops.new_seed("cpu")
        one, other = (ops.add_layer_norm(x, residual, dropout_p=0.1, seed=seed)[0] for _ in range(2))
        print(torch.equal(one, other))  # True
        ```

    Note:
        `torch.manual_seed`, activation checkpointing and CUDA graphs act on the seed as on any number that torch's
        generator draws. Under `torch.compile` torch draws other numbers than in eager mode. A seed that the caller
        passes to an op gives the same mask in both.
    """
    if not isinstance(device, torch.device | str | int) or isinstance(device, bool):
        raise ValueError(f"gpt_fast.new_seed: device is {device!r}; expected a torch.device or its name")
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        seed = seed + _signed(torch.distributed.get_rank() * _RANK_STEP)
    return seed


_RANK_STEP = 0x1E3779B97F4A7C15  # odd, so that multiples of it differ modulo 2^64


def _signed(value: int) -> int:
    """Return the int64 that equals `value` modulo 2^64."""
    return (value + 2**63) % 2**64 - 2**63


def seed_for(dropout_p: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """Return the seed for an op: None if `dropout_p` is 0, else `seed`, or a new one on `device` if `seed` is None."""
    if dropout_p == 0:
        return None
    return new_seed(device) if seed is None else seed
