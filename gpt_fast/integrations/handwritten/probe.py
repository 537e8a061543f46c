"""Ask a module what it computes: on drawn inputs, against the formula that its parts suggest.

A probe leaves no trace: parameters are swapped for float64 ones and back, and buffers, train flags, dropout rates and
random generators are as before. Whatever foreign code raises means that the module is not what its parts suggest.
"""

import contextlib
import dataclasses
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ... import _plain
from ..._activations import ACTIVATIONS
from .forwards import Block
from .layouts import Layout, Norm, part
from .snapshot import Snapshot

# Rows, positions, scale of the drawn inputs and factor on the weights. A small scale shows eps, a large one clamps of
# the residual stream, large weights clamps of the scores.
_SHAPES = ((2, 5, 1.0, 1.0), (1, 9, 0.05, 1.0), (9, 3, 2.0, 1.0), (2, 6, 60.0, 1.0), (2, 7, 1.0, 4.0), (1, 1, 1.0, 1.0))
_TOLERANCE = 1e-6  # relative, in float64: constants such as sqrt(2 / pi) are often written in float32
_FIRST_RATE, _RATE_STEP = 0.1234567, 0.0076543  # rates that nobody writes


class Refused(Exception):
    """The module cannot be replaced; the message says how it differs from a GPT block with the same submodules."""


@contextlib.contextmanager
def without_trace(module: nn.Module) -> Iterator[None]:
    """Restore `module` and the random generators after the `with` block; raise `Refused` if it wrote or drew.

    Flags, attributes and buffers of `module` and its submodules are restored, also if an exception is raised.
    `Refused` is raised if a forward wrote an attribute or a buffer, or drew random numbers other than dropout's. Fused
    ops would not do what such a forward does.
    """
    modules = list(module.modules())
    attributes = [dict(vars(child)) for child in modules]
    tables = [dict(child._buffers) for child in modules]
    boxes = [(box, list(box)) for before in attributes for key, box in before.items()
             if isinstance(box, list | dict | set) and not key.startswith("_")]  # fmt: skip
    values = [(buffer, buffer._version, buffer.clone()) for buffer in module.buffers() if not buffer.is_inference()]
    python, state = random.getstate(), torch.get_rng_state()
    numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None
    wrote = ""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=_cuda_devices(module)):
            yield
            if random.getstate() != python or not torch.equal(torch.get_rng_state(), state):
                wrote = "draws random numbers that are no dropout"
    finally:
        for child, before, table in zip(modules, attributes, tables, strict=True):
            own = vars(child)
            if own.keys() - {"training"} != before.keys() - {"training"} or any(
                own[name] is not before[name] for name in before if name not in ("training", "p", "_buffers")
                and name in own and not isinstance(before[name], float)
            ):  # fmt: skip
                wrote = "keeps values of a pass in its attributes"
            if any(child._buffers.get(name) is not buffer for name, buffer in table.items()):
                wrote = "keeps values of a pass in its buffers"
            child._buffers.clear()
            child._buffers.update(table)
            own.clear()
            own.update(before)
        for box, before_items in boxes:
            if len(box) != len(before_items):
                wrote = "keeps values of a pass in its attributes"
                if isinstance(box, list):
                    box[:] = before_items
                else:
                    for item in set(box) - set(before_items):
                        box.pop(item) if isinstance(box, dict) else box.discard(item)
        with torch.no_grad():
            for buffer, version, before_value in values:
                if buffer._version != version:
                    wrote = "writes into its buffers"
                    buffer.copy_(before_value)
        random.setstate(python)
        if numpy is not None:
            if not _same_state(sys.modules["numpy"].random.get_state(), numpy):
                wrote = "draws random numbers that are no dropout"
            sys.modules["numpy"].random.set_state(numpy)
    if wrote:
        raise Refused(wrote)


def _same_state(a: Any, b: Any) -> bool:
    """Return True if two states of NumPy's random generator are equal.

    A state is a tuple of arrays and plain values.
    """
    return all(bool((x == y).all()) if hasattr(x, "all") else x == y for x, y in zip(a, b, strict=True))


def _cuda_devices(module: nn.Module) -> list[int]:
    """Return the indices of the CUDA devices on which `module` has parameters."""
    return sorted({p.get_device() for p in module.parameters() if p.is_cuda})


def block_of(block: nn.Module, layout: Layout, norms: tuple[Norm | None, Norm | None], longest: int) -> Block:
    """Return the `Block` that tells how `block` computes; raise `Refused` if it does not compute a GPT block.

    `layout` gives the paths of its linear layers, and `norms` describes the norms at `layout.norm1` and `layout.norm2`.
    Both are None for attention or an MLP alone. Numbers of heads, pre-norm and post-norm, and activations are tried in
    turn. `block` and `formula` have to agree in outputs and gradients on random inputs, in training with dropout, and
    in outputs at sequence length `longest`. `Refused` is raised, too, for hooks, the meta device, and a block that
    writes attributes or buffers. Other errors in the block's code reach the caller. The block is left as it was.
    """
    if any(parameter.is_meta for parameter in block.parameters()):
        raise Refused("is on the meta device, where nothing can be compared")
    if any(_plain.is_hooked_itself(module) for module in block.modules()):
        raise Refused("has hooks, which a probe would run: accelerate before they are registered")
    reason = ""
    for heads in _heads(block, layout) if layout.qkv else (1,):
        for pre_norm in (True, False) if layout.norm1 else (True,):
            for activation in _activations_of(block, layout) if layout.fc else ("",):
                kinds = {path: type(part(block, path)) for path in _paths(layout)}
                found = Block(layout, *norms, heads, activation, pre_norm, ("", "", "", ""), kinds)
                with without_trace(block):
                    wrong = _why_not(block, found)
                if wrong:
                    reason = reason or wrong  # of the likeliest parts, which come first
                    continue
                with without_trace(block):
                    found = _with_dropouts(block, found, longest)
                with without_trace(block):
                    _compare_long(block, found, longest)
                rates = frozenset(path for path in (*found.dropouts, *found.head_dropouts) if path)
                return dataclasses.replace(found, state=Snapshot(block, rates))
    raise Refused(reason or "has parts of a block, but no number of heads was found")


def _paths(layout: Layout) -> set[str]:
    """Return the paths of all modules in `layout`, and "" for the block itself."""
    named = {"", layout.attention, layout.mlp, layout.activation, layout.norm1, layout.norm2}
    return named | {*layout.qkv, layout.out, layout.fc, layout.proj}


def _width(block: nn.Module, layout: Layout) -> int:
    """Return the width C of the hidden states that `block` takes, from the linear layers of `layout`."""
    return part(block, layout.out if layout.qkv else layout.fc).in_features


_HEAD_NAMES = ("n_head", "num_heads", "n_heads", "heads", "nhead", "num_attention_heads", "h")


def _heads(block: Any, layout: Layout) -> Iterator[int]:
    """Yield the numbers of heads that the block may have, likeliest first.

    Integers in attributes with a name such as "n_head" come first. Other integer attributes that divide the width
    follow, then the quotients of the width by all of these, because a number may be the width of a head. Numbers that
    make heads wider than 256 are left out. Projections of single heads, more than three in `layout.qkv`, allow one
    number alone.
    """
    C = part(block, layout.out).in_features
    if len(layout.qkv) > 3:
        yield len(layout.qkv) // 3
        return
    owners = [part(block, layout.attention), block]
    named = [getattr(owner, name, None) for owner in owners for name in _HEAD_NAMES]
    options = [value for owner in owners for key, value in vars(owner).items() if not key.startswith("_")]
    inner = [one for value in options for one in _inside(value)]
    numbers = [
        value for value in (*named, *options, *inner) if type(value) is int and 0 < value <= C and C % value == 0
    ]
    seen = dict.fromkeys([*numbers, *(C // value for value in numbers)])  # a number may be the width of a head
    yield from (value for value in seen if C // value <= 256)


def _inside(value: Any) -> list[Any]:
    """Return the values of `value` if it is a dictionary, or of its attributes if it has a `__dict__`, else [].

    `value` is an attribute of a block, for example a configuration object that holds the number of heads. The result
    for a module, a tensor or a class is [].
    """
    if isinstance(value, dict):
        return list(value.values())
    has_options = hasattr(value, "__dict__") and not isinstance(value, type | nn.Module | Tensor)
    return list(vars(value).values()) if has_options else []


def _activations_of(block: Any, layout: Layout) -> list[str]:
    """Return the names in `ACTIVATIONS` that the block's activation may have.

    The result names the activation that the module at `layout.activation` computes. If that path is "", there is no
    module, and the result has all names. It is empty if the module raises on a float64 vector. Raises `Refused` if the
    module computes no activation of this library.
    """
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


Factors = tuple[float | Tensor, float | Tensor, float | Tensor, float | Tensor]


def formula(block: Any, parts: Block, x: Tensor, factors: Factors = (1.0, 1.0, 1.0, 1.0), fused: float = 1.0) -> Tensor:
    """Return the output [B, T, C] of a GPT block for x [B, T, C], in plain PyTorch, or of attention or an MLP alone.

    `parts` tells where `block` keeps its weights and how it computes; without norms it is attention or an MLP alone.
    Attention is causal. Each of the four `factors`, a number or a mask, multiplies in the place of a dropout: attention
    probabilities, attention's output, hidden activation, the MLP's output. The number `fused` multiplies the product of
    probabilities and values. It stands for a dropout inside `F.scaled_dot_product_attention`.
    """
    layout = parts.layout

    def normed(norm: Norm, y: Tensor) -> Tensor:
        module = part(block, norm.path)
        weight = getattr(module, norm.weight) if norm.weight else None
        bias = getattr(module, norm.bias) if norm.bias else None
        return F.layer_norm(y, y.shape[-1:], weight, bias, norm.eps)

    def linear(path: str, y: Tensor) -> Tensor:
        return F.linear(y, part(block, path).weight, part(block, path).bias)

    def attend(y: Tensor) -> Tensor:
        """Return causal attention of y [B, T, C] with its output projection, its dropouts replaced by factors.

        Layers, number of heads, `factors` and `fused` are those of the enclosing call of `formula`.
        """
        T = y.shape[1]
        qkv = torch.cat([linear(path, y) for path in layout.qkv], dim=-1)
        q, k, v = (one.unflatten(2, (parts.heads, -1)).transpose(1, 2) for one in qkv.chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        later = torch.ones(T, T, dtype=torch.bool, device=y.device).triu(1)
        out = (scores.masked_fill(later, -torch.inf).softmax(-1) * factors[0]) @ v * fused
        return linear(layout.out, out.transpose(1, 2).flatten(2)) * factors[1]

    def feed(y: Tensor) -> Tensor:
        hidden = ACTIVATIONS[parts.activation].make_module()(linear(layout.fc, y)) * factors[2]
        return linear(layout.proj, hidden) * factors[3]

    if parts.norm1 is None or parts.norm2 is None:
        return attend(x) if layout.qkv else feed(x)
    if parts.pre_norm:
        x = x + attend(normed(parts.norm1, x))
        return x + feed(normed(parts.norm2, x))
    x = normed(parts.norm1, x + attend(x))
    return normed(parts.norm2, x + feed(x))


def _why_not(block: nn.Module, parts: Block) -> str:
    """Return how `block` differs from `formula` in evaluation mode, or "" if outputs and gradients agree.

    Both run on random inputs of several shapes and scales. `parts` tells how the block is supposed to compute. The
    block is put into evaluation mode and stays in it.
    """
    block.eval()
    C = _width(block, parts.layout)
    generator = torch.Generator().manual_seed(1)
    for B, T, scale, factor in _SHAPES:
        wide = _widened(block, factor)
        place = next(iter(wide.values())).device
        x = (_drawn(generator, B, T, C) * scale).to(place).requires_grad_()
        try:
            got = _called(block, wide, x)
        except Exception as error:  # noqa: BLE001  whatever foreign code raises
            return f"cannot be called with hidden states alone ({type(error).__name__}: {str(error).splitlines()[0]})"
        if not isinstance(got, Tensor) or got.shape != x.shape:
            return "returns something else than hidden states"
        where = f"at batch {B} and length {T}"
        reason = _why_other(got, _swapped(block, wide, parts, x), [x, *wide.values()], generator, where)
        if reason:
            return reason
    return ""


def _why_other(got: Tensor, expected: Tensor, leaves: list[Tensor], generator: torch.Generator, where: str) -> str:
    """Return how outputs or gradients differ by more than 1e-6, relative to the largest value, or "" if they agree.

    `got` and `expected` are the outputs of the block and of `formula`. The gradients are those of `leaves` for a random
    upstream gradient, drawn from `generator`. A gradient that only one side has is a difference. `where` ends the
    message, such as "at batch 2 and length 5".
    """
    if not _close(got, expected):
        return f"computes something else than its parts suggest, {where}"
    upstream = _drawn(generator, *got.shape).to(got.device)
    ours = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)
    theirs = torch.autograd.grad(got, leaves, upstream, allow_unused=True)
    largest = max(float(b.abs().max()) for b in ours if b is not None)  # the gradient of a key's bias is 0
    for a, b in zip(theirs, ours, strict=True):
        if (a is None) != (b is None) or (a is not None and b is not None and not _close(a, b, largest)):
            return f"has other gradients than its parts suggest, {where}"
    return ""


def _drawn(generator: torch.Generator, *shape: int) -> Tensor:
    """Return float64 numbers of this shape on the CPU, drawn from N(0, 1)."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _widened(block: nn.Module, factor: float = 1.0) -> dict[str, Tensor]:
    """Return the parameters of `block` by name as float64 copies that require gradients, multiplied by `factor`."""
    return {name: (value.detach().double() * factor).requires_grad_() for name, value in block.named_parameters()}


def _called(block: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Any:
    """Return block(x) with `parameters`, which maps names to tensors, in place of the block's parameters.

    The call gets a copy of x, because the block may write into its input.
    """
    return torch.func.functional_call(block, parameters, (x.clone(),), tie_weights=False)  # which may write into it


def _swapped(block: nn.Module, parameters: dict[str, Tensor], parts: Block, x: Tensor, *factors: Any) -> Tensor:
    """Return formula(block, parts, x, *factors) with `parameters` (name → tensor) in place of the block's parameters.

    `parts` tells how the block computes. `factors` is empty or holds the last two arguments of `formula`: a tuple of
    multipliers, one in place of each of four dropouts, and the multiplier `fused` of attention's result.
    """

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return formula(self.block, parts, x, *factors)

    named = {f"block.{name}": value for name, value in parameters.items()}
    return torch.func.functional_call(Holder(), named, (x,), tie_weights=False)


def _close(got: Any, expected: Tensor, largest: float | None = None) -> bool:
    """Return True if `got` is a finite tensor with the shape, dtype and, within a tolerance, values of `expected`.

    A value may differ by 1e-6 times the sum of |expected value| and `largest`. `largest` is by default the largest
    absolute value in `expected`.
    """
    if not isinstance(got, Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    got, expected = got.detach(), expected.detach()
    if largest is None:
        largest = float(expected.abs().max()) if expected.numel() else 0.0
    return bool(torch.isfinite(got).all()) and torch.allclose(got, expected, rtol=_TOLERANCE, atol=_TOLERANCE * largest)


def _compare_long(block: nn.Module, parts: Block, length: int) -> None:
    """Raise `Refused` if `block` and `formula` differ on one random sequence of `length` tokens.

    The dtype is that of the block. The block is put into evaluation mode and stays in it. Outputs may differ by 64
    times the dtype's eps times the largest expected value. `parts` tells how the block computes. Attention to a local
    window, for example, differs in long sequences only.
    """
    block.eval()
    first = next(block.parameters())
    C = _width(block, parts.layout)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, length, C, generator=generator, device="cpu").to(first.device, first.dtype)
    with torch.no_grad():
        got, expected = block(x.clone()), formula(block, parts, x)
    rounding = 64 * torch.finfo(first.dtype).eps * float(expected.abs().max())
    if float((got - expected).abs().max()) > rounding:
        raise Refused(f"computes something else than its parts suggest, at length {length}")


# ---- dropout ---------------------------------------------------------------------------------------------------------


class _Dropouts(TorchFunctionMode):
    """Mode that records each dropout, and multiplies by recorded factors instead of dropping."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[float, Any]] = []  # rate and factor: a number for attention's fused dropout, else a mask

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return func(*args, **kwargs), but let a dropout with p > 0 multiply by a factor, and record (p, factor).

        The factor of `F.dropout` and `torch.dropout` is a random tensor in the shape of the input, and outside of
        training they change nothing. The factor of `F.scaled_dot_product_attention` is a number for its result. `calls`
        holds the records.
        """
        kwargs = kwargs or {}
        if func in (F.dropout, torch.dropout):
            names = ("input", "p", "training", "inplace") if func is F.dropout else ("input", "p", "train")
            call = dict(zip(names, args, strict=False)) | kwargs
            x, p = call["input"], call.get("p", 0.5)
            if not call.get("training", call.get("train", True)) or p == 0:
                return x
            mask = _drawn(torch.Generator().manual_seed(100 + len(self.calls)), *x.shape).to(x.device) + 2.0
            self.calls.append((p, mask))
            return x * mask
        if func is F.scaled_dot_product_attention:
            inputs = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            call = dict(zip(inputs, args, strict=False)) | kwargs
            p = call.pop("dropout_p", 0.0)
            if p > 0:
                factor = 1.5 + 0.25 * len(self.calls)
                self.calls.append((p, factor))
                return func(**call) * factor
            return func(**call)
        return func(*args, **kwargs)


def _with_dropouts(block: nn.Module, parts: Block, longest: int) -> Block:
    """Return `parts` with the paths of the block's dropouts, found by runs in training mode.

    The sequences have lengths of 5 and 33, or `longest` if that is less. Raises `Refused` if the block drops at places
    where a GPT block has no dropout. `longest` is the longest sequence that the model takes. The dropout rates are
    changed for the runs and restored. The block is put into training mode and stays in it.
    """
    rates = _rates(block)
    before = {path: _get_rate(block, path) for path in rates}
    try:
        for index, path in enumerate(rates):  # each rate is another one, so that a call tells whose it is
            _set_rate(block, path, _FIRST_RATE + _RATE_STEP * index)
        sources = {_FIRST_RATE + _RATE_STEP * index: path for index, path in enumerate(rates)}
        found = [_placed(block, parts, sources, T) for T in (min(5, longest), min(33, longest))]
    finally:
        for path, rate in before.items():
            _set_rate(block, path, rate)
    if found[0] != found[1]:
        raise Refused("drops at other places in longer sequences")
    dropouts, heads = found[0]
    return dataclasses.replace(parts, dropouts=dropouts, head_dropouts=heads)


Places = tuple[tuple[str, str, str, str], tuple[str, ...]]


def _placed(block: nn.Module, parts: Block, sources: dict[float, str], T: int) -> Places:
    """Return (paths, heads): the paths of the dropouts that act in the block when it runs in training mode.

    The four `paths` lead to the dropouts of attention's probabilities, attention's output, the hidden activation and
    the MLP's output, "" where nothing is dropped. If each head is a module with its own dropout, `heads` holds the
    paths of the dropouts of all heads, and the first one is also `paths[0]`. Otherwise `heads` is empty.

    `parts` tells where the block keeps its weights and how it computes; its dropouts are not read. `sources` maps each
    dropout probability, which no two dropouts share, to the dropout's path. The block runs on random hidden states of
    length T in training mode, and stays in that mode. Raises `Refused` if the block drops at other places, or if its
    outputs or gradients differ from the ones of `formula`.
    """
    block.train()
    wide = _widened(block)
    place = next(iter(wide.values())).device
    layout = parts.layout
    C, F_ = _width(block, layout), part(block, layout.fc).out_features if layout.fc else 0
    B = 2
    generator = torch.Generator().manual_seed(3)
    x = _drawn(generator, B, T, C).to(place).requires_grad_()
    with _Dropouts() as seen:
        got = _called(block, wide, x)
    factors: dict[int, Any] = {}
    places = {0: "", 1: "", 2: "", 3: ""}
    fused = 1.0
    branches = []
    heads: dict[str, Tensor] = {}
    for rate, factor in seen.calls:
        source = next((path for one, path in sources.items() if abs(one - rate) < 1e-9), None)
        if source is None:
            raise Refused(f"drops with a rate of {rate} that belongs to no nn.Dropout and no attribute")
        shape = tuple(factor.shape) if isinstance(factor, Tensor) else ()
        if shape == (B, T, C):
            branches.append((source, factor))
            continue
        if shape == (B, T, T) and len(layout.qkv) > 3 and source not in heads:
            heads[source] = factor
            continue
        site = 0 if shape in ((), (B, parts.heads, T, T)) else 2 if shape == (B, T, F_) else None
        if site is None or places[site]:
            raise Refused(f"drops at a place of shape {list(shape)}, which no op fuses")
        places[site] = source
        if shape:
            factors[site] = factor
        else:
            fused = factor
    if heads:
        if len(heads) != parts.heads or places[0]:
            raise Refused("drops out in some of its heads")
        places[0], factors[0] = next(iter(heads)), torch.stack(list(heads.values()), dim=1)
    choices: dict[int, list[tuple[int, ...]]] = {0: [()], 1: [(1,), (3,)], 2: [(1, 3)]}
    orders = choices.get(len(branches))
    if orders is None:
        raise Refused("drops more than once on a branch")
    for order in orders:
        chosen = factors | {site: factor for site, (_, factor) in zip(order, branches, strict=True)}
        given = tuple(chosen.get(site, 1.0) for site in range(4))
        expected = _swapped(block, wide, parts, x, given, fused)
        if not _why_other(got, expected, [x, *wide.values()], generator, ""):
            named = places | {site: source for site, (source, _) in zip(order, branches, strict=True)}
            return (named[0], named[1], named[2], named[3]), tuple(heads)
    raise Refused("computes something else in training mode, or drops at other places than a block of its parts")


def _rates(block: nn.Module) -> list[str]:
    """Return the paths of all dropouts in `block`: `nn.Dropout` modules, and floats in [0, 1) with "drop" in the name.

    The floats are attributes of modules. The path of a float ends in the attribute's name.
    """
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
    """Return the probability of the dropout at `path` in `block`, an `nn.Dropout` or a float attribute."""
    source = part(block, path)
    return source.p if isinstance(source, nn.Dropout) else source


def _set_rate(block: Any, path: str, rate: float) -> None:
    """Set the probability of the dropout at `path` in `block`, an `nn.Dropout` or a float attribute, to `rate`."""
    source = part(block, path)
    if isinstance(source, nn.Dropout):
        source.p = rate
    else:
        owner, _, name = path.rpartition(".")
        setattr(part(block, owner), name, rate)
