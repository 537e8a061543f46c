"""Ask a module what it computes: on drawn inputs, against the formula that its parts suggest.

A probe leaves no trace: parameters are swapped for float64 ones and back, and buffers, train flags, dropout rates and
random generators are as before. Whatever foreign code raises means that the module is not what its parts suggest.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..._activations import ACTIVATIONS
from .forwards import Block
from .layouts import Layout, Norm, part

# Rows, positions and scale of the drawn inputs. The small scale shows eps, the large one the softmax's scale.
_SHAPES = ((2, 5, 1.0), (1, 9, 0.05), (3, 1, 2.0))
_TOLERANCE = 1e-6  # relative, in float64: constants such as sqrt(2 / pi) are often written in float32
_FIRST_RATE = 0.11


class Refused(Exception):
    """A module computes something else than its parts suggest; the message says what."""


@contextlib.contextmanager
def without_trace(module: nn.Module) -> Iterator[None]:
    """Restore flags, buffers and random generators after the block."""
    flags = [(child, child.training) for child in module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    attributes = [(child, dict(vars(child))) for child in module.modules()]
    tables = [(child, dict(child._buffers)) for child in module.modules()]
    with torch.random.fork_rng(devices=_cuda_devices(module)):
        try:
            yield
        finally:
            for child, training in flags:
                child.training = training
            for child, before in tables:
                child._buffers.clear()
                child._buffers.update(before)
            with torch.no_grad():
                for buffer, before_value in buffers:
                    if not torch.equal(buffer.nan_to_num(), before_value.nan_to_num()):
                        buffer.copy_(before_value)
            for child, before_attributes in attributes:
                if vars(child).keys() != before_attributes.keys():
                    for name in vars(child).keys() - before_attributes.keys():
                        del vars(child)[name]


def _cuda_devices(module: nn.Module) -> list[int]:
    return sorted({p.get_device() for p in module.parameters() if p.is_cuda})


def block_of(block: nn.Module, layout: Layout, norms: tuple[Norm, Norm], longest: int | None) -> Block:
    """Return what the block is, after comparing outputs, gradients, dropout and masks; raise `Refused`."""
    reason = ""
    for heads in _heads(block, layout):
        for pre_norm in (True, False):
            for activation in _activations_of(block, layout):
                kinds = {path: type(part(block, path)) for path in _paths(layout, norms)}
                found = Block(layout, *norms, heads, activation, pre_norm, ("", "", "", ""), kinds)
                with without_trace(block):
                    wrong = _why_not(block, found)
                    if wrong:
                        reason = reason or wrong  # of the likeliest parts, which come first
                        continue
                    found = _with_dropouts(block, found)
                    if longest is not None:
                        _compare_long(block, found, longest)
                return found
    raise Refused(reason or "has parts of a block, but no number of heads was found")


def _paths(layout: Layout, norms: tuple[Norm, Norm]) -> set[str]:
    named = {"", layout.attention, layout.mlp, layout.activation, *(norm.path for norm in norms)}
    return named | {*layout.qkv, layout.out, layout.fc, layout.proj}


_HEAD_NAMES = ("n_head", "num_heads", "n_heads", "heads", "nhead", "num_attention_heads", "h")


def _heads(block: Any, layout: Layout) -> Iterator[int]:
    """Yield numbers of heads that the block may have: what it calls so, then other integers that divide its width."""
    C = part(block, layout.out).in_features
    owners = [part(block, layout.attention), block]
    named = [getattr(owner, name, None) for owner in owners for name in _HEAD_NAMES]
    others = [value for owner in owners for value in vars(owner).values()]
    seen = {value: None for value in (*named, *others) if type(value) is int and 0 < value <= C and C % value == 0}
    yield from (value for value in seen if C // value <= 256)


def _activations_of(block: Any, layout: Layout) -> list[str]:
    """Return the names of the activations that the block may have: the one that its module computes, or all."""
    if not layout.activation:
        return list(ACTIVATIONS)
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    try:
        with torch.no_grad():
            got = part(block, layout.activation)(x)
    except Exception:  # noqa: BLE001  whatever foreign code raises
        return []
    names = [name for name, row in ACTIVATIONS.items() if _close(got, row.make_module()(x))]
    if not names:
        raise Refused(f"{layout.activation} is no activation of this library's")
    return names


# ---- the formula -----------------------------------------------------------------------------------------------------


def formula(block: Any, parts: Block, x: Tensor, factors: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Return what a block of these parts computes, in plain PyTorch; each dropout multiplies by its factor instead."""
    layout = parts.layout

    def normed(norm: Norm, y: Tensor) -> Tensor:
        module = part(block, norm.path)
        weight = getattr(module, norm.weight) if norm.weight else None
        bias = getattr(module, norm.bias) if norm.bias else None
        return F.layer_norm(y, y.shape[-1:], weight, bias, norm.eps)

    def linear(path: str, y: Tensor) -> Tensor:
        return F.linear(y, part(block, path).weight, part(block, path).bias)

    def attend(y: Tensor) -> Tensor:
        T = y.shape[1]
        qkv = torch.cat([linear(path, y) for path in layout.qkv], dim=-1)
        q, k, v = (one.unflatten(2, (parts.heads, -1)).transpose(1, 2) for one in qkv.chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        later = torch.ones(T, T, dtype=torch.bool, device=y.device).triu(1)
        out = scores.masked_fill(later, -torch.inf).softmax(-1) @ v * factors[0]
        return linear(layout.out, out.transpose(1, 2).flatten(2)) * factors[1]

    def feed(y: Tensor) -> Tensor:
        hidden = ACTIVATIONS[parts.activation].make_module()(linear(layout.fc, y)) * factors[2]
        return linear(layout.proj, hidden) * factors[3]

    if parts.pre_norm:
        x = x + attend(normed(parts.norm1, x))
        return x + feed(normed(parts.norm2, x))
    x = normed(parts.norm1, x + attend(x))
    return normed(parts.norm2, x + feed(x))


def _why_not(block: nn.Module, parts: Block) -> str:
    """Return how the block differs from the formula in evaluation mode, "" where outputs and gradients agree."""
    block.eval()
    wide = {name: value.detach().double().requires_grad_() for name, value in block.named_parameters()}
    first = next(iter(wide.values()))
    C = part(block, parts.layout.out).in_features
    generator = torch.Generator().manual_seed(1)
    for B, T, scale in _SHAPES:
        drawn = torch.randn(B, T, C, generator=generator, dtype=torch.float64) * scale
        x = drawn.to(first.device).requires_grad_()
        try:
            got = _called(block, wide, x)
        except Exception as error:  # noqa: BLE001  whatever foreign code raises
            return f"cannot be called with hidden states alone ({type(error).__name__}: {str(error).splitlines()[0]})"
        if not isinstance(got, Tensor) or got.shape != x.shape:
            return "returns something else than hidden states"
        expected = _swapped(block, wide, parts, x)
        if not _close(got, expected):
            return f"computes something else than its parts suggest, at batch {B} and length {T}"
        upstream = torch.randn(got.shape, generator=generator, dtype=torch.float64).to(first.device)
        leaves = [x, *wide.values()]
        ours = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)
        theirs = torch.autograd.grad(got, leaves, upstream, allow_unused=True)
        largest = max(float(b.abs().max()) for b in ours if b is not None)  # the gradient of a key's bias is 0
        for a, b in zip(theirs, ours, strict=True):
            if (a is None) != (b is None) or (a is not None and b is not None and not _close(a, b, largest)):
                return f"has other gradients than its parts suggest, at batch {B} and length {T}"
    return ""


def _called(block: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Any:
    return torch.func.functional_call(block, parameters, (x,), tie_weights=False)


def _swapped(block: nn.Module, parameters: dict[str, Tensor], parts: Block, x: Tensor, *factors: Any) -> Tensor:
    """Return the formula on other parameters."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return formula(self.block, parts, x, *factors)

    named = {f"block.{name}": value for name, value in parameters.items()}
    return torch.func.functional_call(Holder(), named, (x,), tie_weights=False)


def _close(got: Any, expected: Tensor, largest: float | None = None) -> bool:
    """Return True if `got` is `expected` within the tolerance, relative to the `largest` value."""
    if not isinstance(got, Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    got, expected = got.detach(), expected.detach()
    if largest is None:
        largest = float(expected.abs().max()) if expected.numel() else 0.0
    return bool(torch.isfinite(got).all()) and torch.allclose(got, expected, rtol=_TOLERANCE, atol=_TOLERANCE * largest)


def _compare_long(block: nn.Module, parts: Block, length: int) -> None:
    """Compare at the longest sequence, in the block's own dtype, because a local window does not show in short ones."""
    block.eval()
    first = next(block.parameters())
    C = part(block, parts.layout.out).in_features
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, length, C, generator=generator).to(first.device, first.dtype)
    with torch.no_grad():
        got, expected = block(x), formula(block, parts, x)
    rounding = 64 * torch.finfo(first.dtype).eps * float(expected.abs().max())
    if float((got - expected).abs().max()) > rounding:
        raise Refused(f"computes something else than its parts suggest, at length {length}")


# ---- dropout ---------------------------------------------------------------------------------------------------------


class _Dropouts(TorchFunctionMode):
    """Record every dropout, and multiply by a factor of its own in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[float, tuple[int, ...]]] = []  # rate and shape; () for attention's fused dropout
        self.others: list[str] = []

    def factor(self, rate: float, shape: tuple[int, ...]) -> float:
        self.calls.append((rate, shape))
        return 1.0 + 0.25 * len(self.calls)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            call = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
            x, p = call["input"], call.get("p", 0.5)
            if not call.get("training", True) or p == 0:
                return x
            return x * self.factor(p, tuple(x.shape))
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            call = dict(zip(names, args, strict=False)) | kwargs
            p = call.pop("dropout_p", 0.0)
            out = func(**call)
            return out * self.factor(p, ()) if p > 0 else out
        if getattr(func, "__name__", "") in _RANDOM:
            self.others.append(func.__name__)
        return func(*args, **kwargs)


_RANDOM = {
    "bernoulli", "bernoulli_", "rand", "rand_like", "randn", "randn_like", "dropout", "dropout_", "native_dropout",
    "alpha_dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d", "exponential_", "normal_", "uniform_",
}  # fmt: skip


def _with_dropouts(block: nn.Module, parts: Block) -> Block:
    """Return the block with the places of its dropouts, as training mode shows them; raise `Refused`."""
    rates = _rates(block)
    before = {path: _get_rate(block, path) for path in rates}
    try:
        for index, path in enumerate(rates):  # each rate is another one, so that a call tells whose it is
            _set_rate(block, path, _FIRST_RATE + 0.01 * index)
        return _placed(block, parts, {round(_FIRST_RATE + 0.01 * i, 2): path for i, path in enumerate(rates)})
    finally:
        for path, rate in before.items():
            _set_rate(block, path, rate)


def _placed(block: nn.Module, parts: Block, sources: dict[float, str]) -> Block:
    block.train()
    wide = {name: value.detach().double() for name, value in block.named_parameters()}
    first = next(iter(wide.values()))
    layout = parts.layout
    C, hidden = part(block, layout.out).in_features, part(block, layout.fc).out_features
    B, T = 2, 5
    x = torch.randn(B, T, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(first.device)
    with _Dropouts() as seen, torch.no_grad():
        got = _called(block, wide, x)
    if seen.others:
        raise Refused(f"draws random numbers by {seen.others[0]}, which is no dropout that can be fused")
    places: dict[int, str] = {}
    factors = [1.0, 1.0, 1.0, 1.0]
    for index, (rate, shape) in enumerate(seen.calls):
        if round(rate, 2) not in sources:
            raise Refused(f"drops with a rate of {rate} that belongs to no nn.Dropout and no attribute")
        if shape in ((), (B, parts.heads, T, T), (B * parts.heads, T, T)):
            site = 0
        elif shape[-1] == hidden and hidden != C:
            site = 2
        elif shape == (B, T, C):
            site = 1 if 1 not in places else 3
        else:
            raise Refused(f"drops at a place of shape {list(shape)}, which no op fuses")
        if site in places:
            raise Refused("drops twice at one place")
        places[site] = sources[round(rate, 2)]
        factors[site] = 1.0 + 0.25 * (index + 1)
    candidates = [(places, tuple(factors))]
    if 1 in places and 3 not in places:  # one dropout on a branch: attention's or the MLP's
        moved = {3 if site == 1 else site: path for site, path in places.items()}
        candidates.append((moved, (factors[0], 1.0, factors[2], factors[1])))
    for found, chosen in candidates:
        if _close(got, _swapped(block, wide, parts, x, chosen).detach()):
            places_found = (found.get(0, ""), found.get(1, ""), found.get(2, ""), found.get(3, ""))
            return dataclasses.replace(parts, dropouts=places_found)
    raise Refused("drops at other places than a block of its parts")


def _rates(block: nn.Module) -> list[str]:
    """Return the paths of all dropout rates: modules, and numbers whose name holds "drop"."""
    found = []
    for path, module in block.named_modules():
        if isinstance(module, nn.Dropout):
            found.append(path)
            continue
        for name, value in vars(module).items():
            if isinstance(value, float) and 0 <= value < 1 and "drop" in name:
                found.append(f"{path}.{name}" if path else name)
    return found


def _get_rate(block: Any, path: str) -> float:
    source = part(block, path)
    return source.p if isinstance(source, nn.Dropout) else source


def _set_rate(block: Any, path: str, rate: float) -> None:
    source = part(block, path)
    if isinstance(source, nn.Dropout):
        source.p = rate
    else:
        owner, _, name = path.rpartition(".")
        setattr(part(block, owner), name, rate)
