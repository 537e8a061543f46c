"""Records what the launchers launch, for every shipped configuration: python -m tools.record_launches OUT

The launchers run on meta tensors with Triton's launch replaced by a recorder, once for each architecture, so that the
gate compiles what a GPU would be given: same configuration, same constants, same specialisation of integers.
tools.codegen compiles the record, under the Triton of the gate and without PyTorch.
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
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import launch_configs
from kernels.architectures import ARCHITECTURES

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
    shapes = [(N, torch.bfloat16) for N in sorted({row.size for row in launch_configs.TABLES["layer_norm"]})]
    shapes += [(768, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    for N, dtype in shapes:
        x, weight, bias = meta(4096, N, dtype=dtype), meta(N, dtype=dtype), meta(N, dtype=dtype)
        rows = meta(4096, dtype=torch.float32)
        label = f"N={N} {str(dtype).removeprefix('torch.')}"
        yield label, partial(kernels.forward, x, weight, bias, 1e-5)
        yield label, partial(kernels.backward, x, x, weight, rows, rows, True, True)


def add_layer_norm(kernels: Any) -> Launches:
    """As in training: with dropout, and with the gradient that the residual stream carries."""
    for N in sorted({row.size for row in launch_configs.TABLES["layer_norm"]}):
        x, weight, bias = (meta(*shape, dtype=torch.bfloat16) for shape in ((4096, N), (N,), (N,)))
        rows, seed = meta(4096, dtype=torch.float32), meta(1, dtype=torch.int64)
        dropout = (6554, 65536 / (65536 - 6554), seed, 3)
        label = f"N={N} bfloat16 dropout"
        yield label, partial(kernels.forward, x, x, weight, bias, 1e-5, *dropout)
        dtypes = (torch.bfloat16, torch.bfloat16)
        yield label, partial(kernels.backward, x, x, x, weight, rows, rows, *dtypes, *dropout, True, True)


def attention(kernels: Any) -> Launches:
    """Causal, from a packed projection. Every case with dropout has one without, for the gate to compare them."""
    cases = [(D, torch.bfloat16, p) for D in (64, 128, 256) for p in (0.0, 0.1)]
    cases += [(64, dtype, p) for dtype in (torch.float16, torch.float32) for p in (0.0, 0.1)]
    cases += [(D, torch.float32, 0.0) for D in (128, 256)]
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


def linear_cross_entropy(kernels: Any) -> Launches:
    """GPT-2's vocabulary in the dtype of training, as its heads call it; with everything optional; a transposed weight;
    the other dtypes; single losses. Two chunks: the second adds to the first."""
    V, C = 50257, 768
    bfloat16 = torch.bfloat16
    cases = [("", bfloat16), ("bias smoothing", bfloat16), ("transposed", bfloat16)]
    cases += [("bias", torch.float16), ("bias", torch.float32)]
    for options, dtype in cases:
        x, target = meta(8192, C, dtype=dtype), meta(8192, dtype=torch.int64)
        weight = meta(C, V, dtype=dtype).t() if options == "transposed" else meta(V, C, dtype=dtype)
        bias = meta(V, dtype=dtype) if "bias" in options else None
        smoothing = 0.1 if "smoothing" in options else 0.0
        label = f"V={V} C={C} {str(dtype).removeprefix('torch.')} {options}".strip()
        arguments = (x, weight, target, bias, -100, smoothing)
        needs = (True, True, bias is not None)
        yield label, partial(kernels.forward, *arguments, "mean", *needs)
        if not options:
            yield f"{label} no_grad", partial(kernels.forward, *arguments, "mean", False, False, False)
            dloss = meta(8192, dtype=torch.float32)
            yield f"{label} single losses", partial(kernels.backward, dloss, *arguments, *needs)


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
    cases = [(row.size, torch.bfloat16) for row in launch_configs.TABLES["decode_attention"]]
    for D, dtype in [*cases, (64, torch.float16), (64, torch.float32), (256, torch.float32)]:
        B, H, S = 2, 12, 1024
        q, cache = meta(B, 1, 3, H, D, dtype=dtype)[:, 0, 0], meta(B, H, S, D, dtype=dtype)
        label = f"D={D} {str(dtype).removeprefix('torch.')}"
        yield label, partial(kernels.forward, q, cache, cache, meta(B, dtype=torch.int64))


def mlp(kernels: Any) -> Launches:
    """GPT-2's sizes in the dtype of training: each activation with and without dropout; a Conv1D's transposed weights;
    sizes that no descriptor can take; the other dtypes."""
    cases = [(activation, p, "", torch.bfloat16) for activation in ("relu", "gelu", "gelu_tanh") for p in (0.0, 0.1)]
    cases += [("gelu_tanh", 0.1, layout, torch.bfloat16) for layout in ("Conv1D", "odd")]
    cases += [("gelu_tanh", 0.1, "", dtype) for dtype in (torch.float16, torch.float32)]
    for activation, p, layout, dtype in cases:
        M, C = 8192, 763 if layout == "odd" else 768
        x, fc_bias, proj_bias = meta(M, C, dtype=dtype), meta(4 * C, dtype=dtype), meta(C, dtype=dtype)
        fc_weight, proj_weight = meta(4 * C, C, dtype=dtype), meta(C, 4 * C, dtype=dtype)
        if layout == "Conv1D":
            fc_weight, proj_weight = meta(C, 4 * C, dtype=dtype).t(), meta(4 * C, C, dtype=dtype).t()
        seed = meta(1, dtype=torch.int64) if p else None
        rule = (activation, *((6554, 65536 / (65536 - 6554)) if p else (0, 1.0)), seed, 3)
        label = " ".join((activation, *layout.split(), str(dtype).removeprefix("torch."), *(["dropout"] if p else [])))
        yield label, partial(kernels.forward, x, fc_weight, fc_bias, proj_weight, proj_bias, *rule, True)
        hidden = meta(M, 4 * C, dtype=dtype)
        yield label, partial(kernels.backward, x, x, fc_weight, fc_bias, proj_weight, hidden, *rule, [True] * 5)


OPS: dict[str, Callable[[Any], Launches]] = {
    "attention": attention,
    "layer_norm": layer_norm,
    "add_layer_norm": add_layer_norm,
    "mlp": mlp,
    "linear_cross_entropy": linear_cross_entropy,
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
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{POINTERS[value.base.dtype].removeprefix('*')}[{block}]>"
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


def record(op: str, target: int, found: dict[str, dict[str, Any]]) -> None:
    """Adds the op's launches to `found`, by what is compiled: a kernel may serve several shapes, and several ops."""
    kernels = importlib.import_module(f"kernels.{op}")
    keys = {launch["key"] for launch in found.values() if launch["target"] == target}
    for label, launch in OPS[op](kernels):

        def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, label: str = label, **kwargs: Any) -> None:
            what = {"module": kernel.fn.__module__, "kernel": kernel.__name__, "target": target}
            what |= describe(kernel, args, kwargs)
            key = name = f"{op} {kernel.__name__.strip('_').removesuffix('_kernel')} {label}"
            number = 2
            while key in keys:  # one kernel, several products
                key, number = f"{name} {number}", number + 1
            if found.setdefault(json.dumps(what), {"key": key, **what})["key"] == key:
                keys.add(key)

        with (
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(launch_configs, "architecture", return_value=target),
            mock.patch.object(launch_configs, "multiprocessors", return_value=132),
        ):
            launch()


def main() -> None:
    present = {path.stem for path in Path("kernels").glob("*.py") if "\ndef forward(" in path.read_text("utf-8")}
    if present != set(OPS):
        sys.exit(f"tools/record_launches.py: no entry for {present - set(OPS)}, no kernel for {set(OPS) - present}")
    found: dict[str, dict[str, Any]] = {}
    for op in OPS:
        for architecture in ARCHITECTURES:
            record(op, architecture.capability, found)
    Path(sys.argv[1]).write_text(json.dumps(list(found.values()), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
