"""Records what the launchers launch, for every shipped configuration: python -m benchmarks.codegen_record OUT

The launchers run on meta tensors with Triton's launch replaced by a recorder, so that the gate compiles what a GPU
would be given: same constants, same specialisation of integers, same number of warps. benchmarks.codegen compiles the
record, under the Triton of the gate and without PyTorch.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
Launches = Iterator[tuple[str, Callable[[], object]]]  # a label and what launches under it


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layer_norm(kernels: Any) -> Launches:
    """The widest row of every configuration, in the dtype of training, and GPT-2's width in all of them."""
    shapes = [(config.width, torch.bfloat16) for config in kernels.CONFIGS]
    shapes += [(768, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    for N, dtype in shapes:
        x, weight, bias = meta(4096, N, dtype=dtype), meta(N, dtype=dtype), meta(N, dtype=dtype)
        rows = meta(4096, dtype=torch.float32)
        label = f"N={N} {str(dtype).removeprefix('torch.')}"
        yield label, partial(kernels.forward, x, weight, bias, 1e-5)
        yield label, partial(kernels.backward, x, x, weight, rows, rows, True, True)


def add_layer_norm(kernels: Any) -> Launches:
    """As in training: with dropout, and with the gradient that the residual stream carries."""
    for config in importlib.import_module("kernels.layer_norm").CONFIGS:
        N = config.width
        x, weight, bias = (meta(*shape, dtype=torch.bfloat16) for shape in ((4096, N), (N,), (N,)))
        rows, seed = meta(4096, dtype=torch.float32), meta(1, dtype=torch.int64)
        dropout = (6554, 65536 / (65536 - 6554), seed, 3)
        label = f"N={N} bfloat16 dropout"
        yield label, partial(kernels.forward, x, x, weight, bias, 1e-5, *dropout)
        dtypes = (torch.bfloat16, torch.bfloat16)
        yield label, partial(kernels.backward, x, x, x, weight, rows, rows, *dtypes, *dropout, True, True)


def attention(kernels: Any) -> Launches:
    """Causal, from a packed projection, in the dtype of training with and without dropout; and the other dtypes."""
    cases = [(D, torch.bfloat16, p) for D in (64, 128) for p in (0.0, 0.1)]
    cases += [(256, torch.bfloat16, 0.1), (64, torch.float16, 0.1)]
    cases += [(D, torch.float32, 0.0) for D in (64, 128, 256)]
    for D, dtype, p in cases:
        B, T, H = 2, 4096, 4
        qkv, out = meta(B, T, 3 * H * D, dtype=dtype), meta(B, T, H, D, dtype=dtype).transpose(1, 2)
        q, k, v = qkv.unflatten(2, (3, H, D)).permute(2, 0, 3, 1, 4)
        lse, seed = meta(B, H, T, dtype=torch.float32), meta(1, dtype=torch.int64) if p else None
        options = kernels.Options(None, None, None, None, True, None, p, seed, 3, D**-0.5)
        rule = (6554, 65536 / (65536 - 6554)) if p else (0, 1.0)
        label = f"D={D} {str(dtype).removeprefix('torch.')}{' dropout' if p else ''}"
        yield label, partial(kernels.forward, q, k, v, options, *rule)
        yield label, partial(kernels.backward_qkv, out, qkv, H, out, lse, options, *rule)


def embedding(kernels: Any) -> Launches:
    """GPT-2's tables, with dropout."""
    for dtype in (torch.bfloat16, torch.float32):
        V, P, C, T = 50257, 1024, 768, 1024
        tokens, positions = meta(8, T, dtype=torch.int64), meta(T, dtype=torch.int64)
        tables, seed = (meta(V, C, dtype=dtype), meta(P, C, dtype=dtype)), meta(1, dtype=torch.int64)
        dropout = (6554, 65536 / (65536 - 6554), seed, 0)
        label = f"C={C} {str(dtype).removeprefix('torch.')} dropout"
        yield label, partial(kernels.forward, tokens, *tables, positions, *dropout)
        dout = meta(8, T, C, dtype=dtype)
        yield label, partial(kernels.backward, dout, tokens, *tables, positions, *dropout, True, True)


def decode_attention(kernels: Any) -> Launches:
    """One query of each sequence against caches as `generate` keeps them: every configuration, and the other dtypes."""
    cases = [(config.width, torch.bfloat16) for config in kernels.CONFIGS]
    for D, dtype in [*cases, (64, torch.float16), (64, torch.float32), (256, torch.float32)]:
        B, H, S = 2, 12, 1024
        q, cache = meta(B, 1, 3, H, D, dtype=dtype)[:, 0, 0], meta(B, H, S, D, dtype=dtype)
        label = f"D={D} {str(dtype).removeprefix('torch.')}"
        yield label, partial(kernels.forward, q, cache, cache, meta(B, dtype=torch.int64))


OPS: dict[str, Callable[[Any], Launches]] = {
    "attention": attention,
    "layer_norm": layer_norm,
    "add_layer_norm": add_layer_norm,
    "embedding": embedding,
    "decode_attention": decode_attention,
}


def describe(kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The signature, constants and alignments that Triton would derive from this call."""
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: list[str] = []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible.append(name)  # allocations are aligned
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                divisible.append(name)
        else:
            signature[name] = "fp32"
    options = {name: value for name, value in kwargs.items() if name in ("num_warps", "num_stages", "maxnreg")}
    return {"signature": signature, "constants": constants, "divisible": divisible, "options": options}


def record(op: str, found: dict[str, dict[str, Any]]) -> None:
    """Adds the op's launches to `found`, by what is compiled: a kernel may serve several shapes, and several ops."""
    kernels = importlib.import_module(f"kernels.{op}")
    for label, launch in OPS[op](kernels):

        def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, label: str = label, **kwargs: Any) -> None:
            launch = {"module": kernel.fn.__module__, "kernel": kernel.__name__, **describe(kernel, args, kwargs)}
            name = kernel.__name__.strip("_").removesuffix("_kernel")
            found.setdefault(json.dumps(launch), {"key": f"{op} {name} {label}", **launch})

        with mock.patch.object(JITFunction, "run", run):
            launch()


def main() -> None:
    present = {path.stem for path in Path("kernels").glob("*.py") if "\ndef forward(" in path.read_text("utf-8")}
    if present != set(OPS):
        sys.exit(f"benchmarks/codegen_record.py: no entry for {present - set(OPS)}, no kernel for {set(OPS) - present}")
    found: dict[str, dict[str, Any]] = {}
    for op in OPS:
        record(op, found)
    Path(sys.argv[1]).write_text(json.dumps(list(found.values()), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
