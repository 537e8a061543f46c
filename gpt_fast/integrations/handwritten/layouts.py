"""Roles of a hand-written block's attributes: a table of known layouts, and inference for other names."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .snapshot import Snapshot


@dataclass(frozen=True)
class Layout:
    """Attribute paths of a block's parts, relative to the block.

    `qkv` is one packed projection, or three separate ones in the order q, k, v, or those of single heads: all queries,
    then all keys, then all values. `activation` is "" where the forward calls a function. `attention` and `mlp` are
    the modules around the parts, "" where the block holds them itself. A module that is attention alone has no `fc`,
    one that is an MLP alone no `qkv`; neither has norms.
    """

    name: str
    norm1: str = ""
    attention: str = ""
    qkv: tuple[str, ...] = ()
    out: str = ""
    norm2: str = ""
    mlp: str = ""
    fc: str = ""
    activation: str = ""
    proj: str = ""


# A code base whose blocks have other names is a row here, or needs none if inference finds its parts.
LAYOUTS = (
    Layout(
        "nanoGPT, build-nanogpt", norm1="ln_1", attention="attn", qkv=("attn.c_attn",), out="attn.c_proj", norm2="ln_2",
        mlp="mlp", fc="mlp.c_fc", activation="mlp.gelu", proj="mlp.c_proj",
    ),
    Layout(
        "minGPT", norm1="ln_1", attention="attn", qkv=("attn.c_attn",), out="attn.c_proj", norm2="ln_2",
        mlp="mlp", fc="mlp.c_fc", activation="mlp.act", proj="mlp.c_proj",
    ),
    Layout(
        "LLMs-from-scratch", norm1="norm1", attention="att", qkv=("att.W_query", "att.W_key", "att.W_value"),
        out="att.out_proj", norm2="norm2", mlp="ff", fc="ff.layers.0", activation="ff.layers.1", proj="ff.layers.2",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Norm:
    """A LayerNorm: path of its module, names of its gain and bias ("" for none) within the module, and its eps."""

    path: str
    weight: str
    bias: str
    eps: float
    state: Snapshot | None = None  # of a norm outside of blocks


def part(block: Any, path: str) -> Any:
    """Return the attribute of `block` at a dotted path such as "attn.c_proj". The path "" stands for `block` itself.

    Raise `AttributeError` if a name on the path is missing.
    """
    for name in path.split(".") if path else ():
        block = getattr(block, name)
    return block


def layouts(block: nn.Module) -> Iterator[Layout]:
    """Yield each `Layout` (the paths of norms, attention and MLP) that fits the modules of `block`.

    They are the rows of the table `LAYOUTS` whose paths lead to modules of the right kinds. If there is none, it is the
    one layout that the structure of `block` suggests, or nothing.
    """
    known = [layout for layout in LAYOUTS if _is_there(block, layout)]
    yield from known
    inferred = None if known else _inferred(block)
    if inferred is not None:
        yield inferred


def _is_there(block: nn.Module, layout: Layout) -> bool:
    """Return True if `block` has a module at each path of `layout`, an `nn.Linear` for each linear layer.

    Paths that are "" are skipped.
    """
    modules = dict(block.named_modules())
    paths = [getattr(layout, field.name) for field in fields(layout) if field.name != "name"]
    flat = [path for value in paths for path in ([value] if isinstance(value, str) else value)]
    linears = (*layout.qkv, layout.out, layout.fc, layout.proj)
    return all(path == "" or path in modules for path in flat) and all(
        isinstance(modules[path], nn.Linear) for path in linears
    )


def _inferred(block: nn.Module) -> Layout | None:
    """Return the layout that the structure of `block` suggests, or None if it is not that of a GPT block.

    A block has two norms of width C and these linear layers. Queries, keys and values come from one layer C → 3C, three
    layers C → C, or three layers C → D for each head. The output is another C → C. The MLP is C → F and F → C, in the
    order of registration.
    """
    modules = dict(block.named_modules())
    norms = [path for path, module in modules.items() if norm_width(module) is not None]
    linears = [path for path, module in modules.items() if isinstance(module, nn.Linear)]
    if len(norms) != 2 or len(linears) < 4:
        return None
    C = norm_width(modules[norms[0]]) or 0
    sizes = {path: (modules[path].in_features, modules[path].out_features) for path in linears}
    found = _projections(C, sizes, len(linears) - 2)
    if found is None:
        return None
    qkv, out = found
    rest = [path for path in linears if path not in (*qkv, out)]
    if len(rest) != 2 or sizes[rest[0]][0] != C or sizes[rest[1]] != (sizes[rest[0]][1], C):
        return None
    fc, proj = rest
    mlp = _common(fc, proj)
    activation = _activation_within(modules, mlp)
    return Layout("inferred", norms[0], _common(*qkv, out), qkv, out, norms[1], mlp, fc, activation, proj)


def _projections(C: int, sizes: dict[str, tuple[int, int]], count: int) -> tuple[tuple[str, ...], str] | None:
    """Return (qkv, out), the paths of attention's input projections and of its output projection, or None.

    `sizes` maps the path of each linear layer, the MLP's included, to its (in_features, out_features). Attention's
    layers are chosen among them by size and name. `count` is the number of attention's layers: 2 if one layer computes
    queries, keys and values, 4 if each has a layer, 3 H + 1 if each of H heads has three. `qkv` lists the layers of
    queries, then keys, then values. `C` is the model's width. The result is None if the layers do not fit.
    """
    square = [path for path, size in sizes.items() if size == (C, C)]
    if count == 2:
        packed = [path for path, size in sizes.items() if size == (C, 3 * C)]
        # A second one is an MLP of width 3C, registered behind attention.
        return ((packed[0],), square[0]) if len(packed) in (1, 2) and len(square) == 1 else None
    H = (count - 1) // 3
    named = {
        role: [path for path, size in sizes.items() if size == (C, C // H) and _role(path) == role]
        for role in ("q", "k", "v")
    } if H > 0 and count == 3 * H + 1 and C % H == 0 else {}  # fmt: skip
    qkv = tuple(path for paths in named.values() for path in paths)
    rest = [path for path in square if path not in qkv]
    is_whole = named and len(rest) == 1 and all(len(paths) == H for paths in named.values())
    return (qkv, rest[0]) if is_whole else None


def _activation_within(modules: dict[str, nn.Module], mlp: str) -> str:
    """Return the path of the first activation module inside the module at the path `mlp`, or "" if it has none.

    `modules` maps paths, relative to the block, to the modules of a block, in the order of `named_modules`. The result
    is one of its keys. With `mlp` "" all modules are searched. Any module without parameters and children counts as an
    activation, except dropout and identity.
    """
    inside = (path for path in modules if path.startswith(f"{mlp}." if mlp else "") and _is_activation(modules[path]))
    return next(inside, "")


def alone(module: nn.Module) -> Layout | None:
    """Return the layout of a module that may be attention alone or an MLP alone, or None if it can be neither.

    The layout of attention has the fields `qkv` and `out`, and that of an MLP has `fc`, `activation` and `proj`. They
    are found by the sizes and names of the linear layers. The result is None for an `nn.Linear` and for a module with a
    LayerNorm inside.
    """
    modules = dict(module.named_modules())
    sizes = {path: (one.in_features, one.out_features) for path, one in modules.items() if isinstance(one, nn.Linear)}
    if "" in sizes or len(sizes) < 2 or any(norm_width(one) is not None for one in modules.values()):
        return None
    first = next(iter(sizes.values()))
    found = _projections(first[0], sizes, len(sizes))
    if found is not None:
        return Layout("attention", qkv=found[0], out=found[1])
    if len(sizes) == 2 and list(sizes.values())[1] == first[::-1]:
        fc, proj = sizes
        return Layout("mlp", fc=fc, activation=_activation_within(modules, ""), proj=proj)
    return None


def _role(path: str) -> str | None:
    """Return "q", "k" or "v" for the path of a projection such as "att.W_query" or "to_v", or None for other names."""
    name = path.rpartition(".")[2].lower()
    for word in ("weight", "proj", "linear", "attn", "lin", "_", "to", "w", "fc"):
        name = name.replace(word, "")
    names = ("q", "k", "v", "query", "key", "value", "queries", "keys", "values", "qs", "ks", "vs")
    return name[0] if name in names else None


def _common(*paths: str) -> str:
    """Return the path of the innermost module that contains the modules at all `paths`, "" for the outermost one."""
    prefixes = [path.split(".")[:-1] for path in paths]
    shared = []
    for names in zip(*prefixes, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def _is_activation(module: nn.Module) -> bool:
    """Return True if `module` may be an activation: no children, no parameters, and neither dropout nor identity."""
    empty = not list(module.children()) and not list(module.parameters())
    return empty and not isinstance(module, nn.Dropout | nn.Identity)


def norm_width(module: nn.Module) -> int | None:
    """Return the width C of a module that may be a LayerNorm, or None if it cannot be one.

    Such a module has no children, and one or two parameters of shape [C]. It is neither `nn.Embedding` nor `nn.Linear`.
    """
    if list(module.children()) or isinstance(module, nn.Embedding | nn.Linear):
        return None
    parameters = list(module.parameters(recurse=False))
    if len(parameters) not in (1, 2) or any(parameter.dim() != 1 for parameter in parameters):
        return None
    widths = {parameter.numel() for parameter in parameters}
    return widths.pop() if len(widths) == 1 else None


_GAINS, _SHIFTS = ("weight", "scale", "gamma", "gain", "g", "a_2"), ("bias", "shift", "beta", "b", "b_2")
_EPS_NAMES = ("eps", "epsilon", "variance_epsilon")
_EPS = (1e-5, 1e-6, 1e-8, 1e-12)


def find_norm(path: str, module: Any) -> Norm | None:
    """Return the `Norm` (path, parameter names, eps) of a module that computes LayerNorm, else None.

    The module runs on random float64 inputs, in evaluation and in training mode, and gets its train flag back. It
    computes LayerNorm if `F.layer_norm`, with its own eps or one of 1e-5, 1e-6, 1e-8 and 1e-12, has equal outputs and
    gradients. The result is None, too, if the module raises, draws random numbers, has buffers or has no
    parameters. Parameters have to be named as a gain or a bias. `path` is the path in the result.
    """
    names = dict(module.named_parameters(recurse=False))
    gain = next((name for name in _GAINS if name in names), "")
    shift = next((name for name in _SHIFTS if name in names), "")
    if not names or {gain, shift} - {""} != set(names) or list(module.buffers()):
        return None
    first = next(iter(names.values()))
    C = first.numel()
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    with torch.inference_mode(False):
        x = drawn(3, 4, C) * torch.tensor([1.0, 1e-2, 5.0], dtype=torch.float64, device="cpu")[:, None, None]
        x = (x + drawn(3, 4, 1)).to(first.device).requires_grad_()
    weights = {name: drawn(C).to(first.device).requires_grad_() for name in names}
    upstream = drawn(3, 4, C).to(first.device)
    leaves = [x, *weights.values()]
    results = []
    flag, state = module.training, torch.get_rng_state()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for training in (False, True):
                module.train(training)
                y = torch.func.functional_call(module, weights, (x.clone(),))
                results.append((y, *torch.autograd.grad(y, leaves, upstream)))
    except Exception:  # noqa: BLE001  whatever foreign code raises: it is no LayerNorm
        return None
    finally:
        module.train(flag)
    if not torch.equal(torch.get_rng_state(), state):
        torch.set_rng_state(state)
        return None
    own = [getattr(module, name) for name in _EPS_NAMES if isinstance(getattr(module, name, None), float)]
    for eps in dict.fromkeys([*own, *_EPS]):
        with torch.inference_mode(False), torch.enable_grad():
            y = F.layer_norm(x, (C,), weights.get(gain), weights.get(shift), eps)
            expected = (y, *torch.autograd.grad(y, leaves, upstream))
        if all(_same(got, wanted) for result in results for got, wanted in zip(result, expected, strict=True)):
            return Norm(path, gain, shift, eps)
    return None


def _same(got: Tensor, expected: Tensor) -> bool:
    """Return True if `got` equals `expected` in shape, dtype and, to 1e-6 of the largest expected value, in values."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    return torch.allclose(got, expected, rtol=1e-6, atol=1e-6 * float(expected.detach().abs().max()))
