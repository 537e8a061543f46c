"""Run every op once against its definition, first of all on a new device: `python -m benchmarks.first_look`.

Each call runs forward and backward on random values. The truth is the definition in float64 on the CPU. A figure is the
largest error as a share of the bound that the fuzz has for it: every rounding that the contract names, carried to the
result. Above 1 it fails. Lines are printed as they come, and a kernel that raises is a failure like any other. `--part
2/8` takes every eighth call from the second on: compiling a kernel takes a second of one core, so several processes
share the work.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.console import resolve_device
from gpt_fast import ops
from tests import numerics
from tests.fuzz.ops import OPS, as_tuple, definition, detached, results, without

BF16, F32 = torch.bfloat16, torch.float32
B, H, T, D, C = 2, 3, 200, 64, 768
Arguments = dict[str, Any]
SEED: Arguments = {"dropout_p": 0.1, "seed": torch.tensor([5])}


class Look(NamedTuple):
    """One call: `draw()` returns its arguments on the CPU in float32, `dtype` is what floating ones become."""

    op: str
    name: str
    dtype: torch.dtype
    draw: Callable[[], Arguments]


def normal(*shape: int) -> Tensor:
    """Return standard normal random values of `shape`, float32 on the CPU, from PyTorch's global generator."""
    return torch.randn(shape)


def attention(D: int = D, **options: Any) -> Arguments:
    """Return arguments of `ops.attention` by name: random "q", "k" and "v" [B, H, T, D], and `options` as they are.

    B, H and T are constants of this file. The tensors are float32 on the CPU. `options` are other arguments of the op,
    such as `window`.
    """
    return {name: normal(B, H, T, D) for name in "qkv"} | options


def packed_attention(D: int = D) -> Arguments:
    """Return arguments of `ops.attention` by name, for two packed sequences of 50 and T - 50 tokens, with dropout.

    "q", "k" and "v" are random, [1, H, T, D], float32 on the CPU. "cu_seqlens" is [0, 50, T] in int32. "dropout_p" is
    0.1, and "seed" is a tensor. H and T are constants of this file.
    """
    starts = torch.tensor([0, 50, T], dtype=torch.int32)
    return {name: normal(1, H, T, D) for name in "qkv"} | {"cu_seqlens": starts} | SEED


def norm(width: int) -> Arguments:
    """Return random arguments of `ops.layer_norm` by name: "x" [67, width], "weight" and "bias" [width]."""
    return {"x": normal(67, width), "weight": normal(width), "bias": normal(width)}


def add_norm(width: int) -> Arguments:
    """Return arguments of `ops.add_layer_norm` by name, random and with dropout.

    They are "x" and "residual" [67, width], "weight" and "bias" [width]. "dropout_p" is 0.1, and "seed" is a tensor.
    """
    return norm(width) | {"residual": normal(67, width)} | SEED


def mlp(activation: str, **options: Any) -> Arguments:
    """Return arguments of `ops.mlp` by name: random tensors, the activation, and `options` as they are.

    The tensors are "x" [130, 72], "fc_weight" [288, 72], "fc_bias", "proj_weight" [72, 288] and "proj_bias".
    `activation` is "relu", "gelu" or "gelu_tanh". `options` are other arguments of the op, such as `dropout_p` and
    `seed`.
    """
    tensors = {
        "x": normal(130, 72), "fc_weight": normal(288, 72) / 72**0.5, "fc_bias": normal(288),
        "proj_weight": normal(72, 288) / 288**0.5, "proj_bias": normal(72),
    }  # fmt: skip
    return tensors | {"activation": activation} | options


def loss(V: int, **options: Any) -> Arguments:
    """Return arguments of `ops.linear_cross_entropy` by name: random tensors for V classes, and `options` as they are.

    The tensors are "x" [150, 72], "weight" [V, 72], "bias" [V] and the classes "target" [150]. Every seventh target is
    -100, which the op ignores. `options` are other arguments of the op, such as `label_smoothing`.
    """
    target = torch.randint(0, V, (150,))
    target[::7] = -100
    return {"x": normal(150, 72), "weight": normal(V, 72) / 8, "bias": normal(V), "target": target} | options


def embedding() -> Arguments:
    """Return arguments of `ops.embedding` by name: "tokens" [B, 19], "token_weight" [53, C], "position_weight" [19, C].

    All are random; the tokens are ids below 53. B and C are constants of this file. There is dropout too: "dropout_p"
    is 0.1, and "seed" is a tensor.
    """
    return {
        "tokens": torch.randint(0, 53, (B, 19)),
        "token_weight": normal(53, C),
        "position_weight": normal(19, C),
    } | SEED


def decode(D: int) -> Arguments:
    """Return arguments of `ops.decode_attention` by name, for two rows, whose caches hold 300 and 7 tokens.

    "q" is [2, H, D], "k_cache" and "v_cache" are [2, H, 300, D], all random, and "lengths" is [300, 7]. H is a constant
    of this file, and D the size of a head.
    """
    cache = {name: normal(B, H, 300, D) for name in ("k_cache", "v_cache")}
    return {"q": normal(B, H, D), "lengths": torch.tensor([300, 7])} | cache


def looks() -> Iterator[Look]:
    """Yield the calls to check, as `Look`: every op of `ops.NAMES` with its main options.

    A `Look` has the op's name, a name for its options, a dtype, and a function that draws the arguments. All options
    are in bfloat16 and most also in float32.
    """
    masks: dict[str, Arguments] = {
        "causal": {}, "bidirectional": {"causal": False}, "lengths": {"lengths": torch.tensor([T // 2, 7])},
        "key_mask": {"key_mask": torch.arange(T) % 5 > 0}, "window": {"window": 17},
        "mask": {"causal": False, "mask": torch.rand(T, T) < 0.7},
    }  # fmt: skip
    masks["key_mask"]["key_mask"] = masks["key_mask"]["key_mask"].expand(B, T)
    dropouts: tuple[Arguments, ...] = ({}, SEED)
    for dtype, (name, options), dropout in product((BF16, F32), masks.items(), dropouts):
        yield Look(
            "attention", f"{name}{' dropout' if dropout else ''}", dtype, partial(attention, **options, **dropout)
        )
    for size in (20, 128, 256):
        yield Look("attention", f"D={size} dropout", BF16, partial(attention, size, **SEED))
    yield Look("attention", "packed dropout", BF16, packed_attention)
    for dtype, width in product((BF16, F32), (768, 1600)):
        yield Look("layer_norm", f"C={width}", dtype, partial(norm, width))
        yield Look("add_layer_norm", f"C={width} dropout", dtype, partial(add_norm, width))
    for dtype, activation in product((BF16, F32), ("relu", "gelu", "gelu_tanh")):
        yield Look("mlp", f"{activation} dropout", dtype, partial(mlp, activation, **SEED))
        yield Look("mlp", activation, dtype, partial(mlp, activation))
    for dtype in (BF16, F32):
        yield Look("linear_cross_entropy", "V=301", dtype, partial(loss, 301, label_smoothing=0.1))
        yield Look("linear_cross_entropy", "V=50257", dtype, partial(loss, 50257))
        yield Look("embedding", "dropout", dtype, embedding)
        yield Look("decode_attention", "D=64", dtype, partial(decode, 64))
    yield Look("decode_attention", "D=256", BF16, partial(decode, 256))


# One call's fault of any kind must not end the look at the others.
FAULTS = (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)


def share(look: Look, device: str) -> tuple[float, str]:
    """Run one call of an op, forward and backward. Return (largest share, name of the result that has it).

    A result is an output, named "out", "out1", ..., or the gradient of an argument, named "gradient of <argument>". Its
    share is its largest error divided by the error that its bound allows, so above 1 is a failure. The error is
    measured against the op's definition in float64 on the CPU. NaN counts as the largest share, and is returned as NaN.

    `look` names the op, draws the arguments and sets the dtype. The call runs on `device`, "cpu" or "cuda". PyTorch's
    seed is set to 0 first. An op without a backward pass is only run forward.

    The other results of `add_layer_norm` are computed from its second output, the sum. If this sum is wrong, they
    cannot be judged, and `AssertionError` is raised. Errors of the call itself are raised too.
    """
    torch.manual_seed(0)
    spec, function = OPS[look.op], getattr(ops, look.op)
    parameters = inspect.signature(function).parameters.values()
    public = (p for p in parameters if not p.name.startswith("_"))
    arguments = {p.name: p.default for p in public if p.default is not p.empty} | look.draw()
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            arguments[name] = value.to(look.dtype)
    exact = {name: numerics.exact(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    moved: Arguments = {}
    for name, value in arguments.items():
        grows = isinstance(value, Tensor) and value.is_floating_point() and spec.differentiable
        moved[name] = value.to(device).requires_grad_(grows) if isinstance(value, Tensor) else value
    outputs = as_tuple(function(**moved))
    upstream = [torch.randn(output.shape).to(output.dtype) for output in outputs]
    on_device = [value.to(device) for value in upstream]
    got = {label: value.cpu() for label, value in results(outputs, moved, on_device, spec.differentiable).items()}
    if spec.stored is not None:
        exact = spec.stored(exact, tuple(output.detach().cpu() for output in outputs))
    for value in exact.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_(spec.differentiable)
    wide = [value.double() for value in upstream]
    truth = results(as_tuple(definition(look.op)(**without(exact))), exact, wide, spec.differentiable)
    bounds = spec.bound({name: detached(value) for name, value in exact.items()}, wide, look.dtype)
    shares = {}
    for label, value in got.items():
        allowed = bounds[label] + numerics.rounding(truth[label].detach(), value.dtype)
        shares[label] = ((value.double() - truth[label].detach()).abs() / allowed).max().item()
    worst = max(shares, key=lambda label: _rank(shares[label]))
    return shares[worst], worst if worst.startswith("out") else f"gradient of {worst}"


def _rank(share: float) -> float:
    """Return `share` as a key for `max`: infinity for NaN, so that no number is above NaN, else `share` itself."""
    return share if share == share else float("inf")


def look_at(look: Look, device: str) -> dict[str, Any]:
    """Run one call and return its record: "op", "case", "dtype", "outcome", "seconds", and the reason for the outcome.

    `look` is the call. It runs on `device`, "cpu" or "cuda". "case" is the name of the call's options. "outcome" is
    "pass" or "fail", and "seconds" is the time of the whole check. The reason is one of three:

    - If the results were compared, "share" is the largest error relative to its bound, and "of" is the name of the
      result with this error. The call passes if the share is at most 1; NaN fails.
    - If an assertion failed, there is no "share", and "of" is the assertion's message.
    - If the call raised another error of FAULTS, "error" is its type and the first line of its message.
      Errors that are not in FAULTS are raised.
    """
    began = time.perf_counter()
    record: dict[str, Any] = {"op": look.op, "case": look.name, "dtype": str(look.dtype).removeprefix("torch.")}
    try:
        value, worst = share(look, device)
        record |= {"outcome": "pass" if value <= 1 else "fail", "share": value, "of": worst}
    except AssertionError as error:  # of a result that the others start from
        record |= {"outcome": "fail", "of": _first_line(error)}
    except FAULTS as error:
        record |= {"outcome": "fail", "error": f"{type(error).__name__}: {_first_line(error)}"}
    return record | {"seconds": round(time.perf_counter() - began, 2)}


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, cut to 300 characters, or its type's name for a blank message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def main() -> None:
    """Run the calls that the command line chooses, print a line for each and a count, and exit: code 1 if one fails.

    Otherwise the exit code is 0. --device is "auto", "cpu" or "cuda", --only an op's name, and --part "2/8" takes every
    eighth call from the second on. With --out, the record of each call is also appended to that file as a line of JSON.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_look", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--part", default="1/1", help="2/8: every eighth call, from the second on")
    parser.add_argument("--only", default="", help="an op's name")
    parser.add_argument("--out", type=Path, help="file that gets one line of JSON a call")
    options = parser.parse_args()
    device = resolve_device(options.device)
    part, parts = (int(number) for number in options.part.split("/"))
    chosen = [look for look in list(looks())[part - 1 :: parts] if options.only in ("", look.op)]
    failed = 0
    for look in chosen:
        record = look_at(look, device)
        failed += record["outcome"] == "fail"
        detail = f"{record['share']:.2f} {record['of']}" if "share" in record else record.get("error") or record["of"]
        print(f"{record['outcome']}  {look.op} {look.name} {record['dtype']}: {detail}", flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    print(f"first_look: {len(chosen) - failed} of {len(chosen)} calls within what is allowed")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
