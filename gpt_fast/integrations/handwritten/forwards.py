"""The forwards that `gpt_fast.accelerate` puts on the recognised modules of a hand-written GPT.

A block draws a dropout seed for each call; its sites are 0 (attention), 1 and 3 (branches) and 2 (hidden activation).
Norms, linear layers, activations and branch dropouts that have hooks are called. A block that is not what it was when
it was recognised runs the forward of its class.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ... import _plain, ops
from .deferred import logits, value
from .layouts import Layout, Norm, part
from .snapshot import Snapshot

PARTS = "_gpt_fast_parts"  # the attribute that holds what a module was recognised as


@dataclass(frozen=True)
class Block:
    """A recognised block, attention or MLP: paths and classes of its modules, its norms and its dropouts."""

    layout: Layout
    norm1: Norm | None
    norm2: Norm | None
    heads: int
    activation: str  # this library's name
    pre_norm: bool
    dropouts: tuple[str, str, str, str]  # paths of the rates: attention, its branch, hidden, the MLP's branch; "" none
    kinds: dict[str, type]  # the class of each part, by path
    head_dropouts: tuple[str, ...] = ()  # of heads that are modules of their own: one rate for all
    state: Snapshot | None = None  # what else its function depends on


def block_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a hand-written block that `gpt_fast.accelerate` recognised: x [B, T, C] → [B, T, C], on `gpt_fast.ops`.

    `self` is the block, and x is the first argument. The forward of the block's class runs instead if the block changed
    or got hooks after it was recognised. It also runs if x is no tensor of three dimensions, or if another argument
    differs from its default. If a dropout is active, the call draws a seed.
    """
    parts: Block = vars(self)[PARTS]
    x = args[0] if args and ((len(args) == 1 and not kwargs) or _has_only_defaults(self, args, kwargs)) else None
    if not isinstance(x, Tensor) or x.dim() != 3 or not _can_fuse(self, parts):
        return _plain.original(self, *args, **kwargs)
    seed = ops.new_seed(x.device) if any(_rate(self, path) > 0 for path in parts.dropouts) else None
    norm1, norm2 = parts.norm1, parts.norm2
    assert norm1 is not None and norm2 is not None
    if parts.pre_norm:
        branch, p = _attention(self, parts, _norm(self, parts, norm1, x), seed)
        normed, x = _add_norm(self, parts, norm2, branch, x, p, seed, 1)
        branch, p = _mlp(self, parts, normed, seed)
        return _plain.add(branch, x, p, seed, 3)
    branch, p = _attention(self, parts, x, seed)
    x, _ = _add_norm(self, parts, norm1, branch, x, p, seed, 1)
    branch, p = _mlp(self, parts, x, seed)
    return _add_norm(self, parts, norm2, branch, x, p, seed, 3)[0]


def attention_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an attention module that is accelerated alone, not as part of a block: x [B, T, C] → [B, T, C].

    `self` is the attention module, and x is the first argument. The output projection and the dropout after it are
    included. The forward of the module's class runs instead if the module changed or got hooks after it was recognised.
    It also runs if x is no tensor of three dimensions, or if another argument differs from its default.
    """
    return _run_alone(self, _attention, args, kwargs)


def mlp_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an MLP that is accelerated alone, not as part of a block: x [B, T, C] → [B, T, C].

    `self` is the MLP, and x is the first argument. The dropout of the output is included. The forward of the MLP's
    class runs instead if the MLP changed or got hooks after it was recognised. It also runs if x is no tensor of three
    dimensions, or if another argument differs from its default.
    """
    return _run_alone(self, _mlp, args, kwargs)


def _run_alone(root: Any, branch_of: Any, args: tuple, kwargs: dict) -> Any:
    """Run attention or an MLP that is accelerated alone, not as part of a block: x [B, T, C] → [B, T, C].

    `root` is the attention module or the MLP, and `branch_of` is the function that computes it, `_attention` or `_mlp`.
    `args` and `kwargs` are the arguments of the call, and x is the first of them. The forward of the module's class
    runs instead if the module changed or got hooks after it was recognised. It also runs if x is no tensor of three
    dimensions, or if another argument differs from its default.
    """
    parts: Block = vars(root)[PARTS]
    x = args[0] if args and ((len(args) == 1 and not kwargs) or _has_only_defaults(root, args, kwargs)) else None
    if not isinstance(x, Tensor) or x.dim() != 3 or not _can_fuse(root, parts):
        return _plain.original(root, *args, **kwargs)
    seed = ops.new_seed(x.device) if any(_rate(root, path) > 0 for path in parts.dropouts) else None
    branch, p = branch_of(root, parts, x, seed)
    return nn.functional.dropout(branch, p) if p > 0 else branch


def _has_only_defaults(root: Any, args: tuple, kwargs: dict) -> bool:
    """Return True if each argument of a call but the first is the default in the forward of the module's class.

    `root` is the module, and `args` and `kwargs` are the arguments of its call. The result is False if an argument has
    no default or an unknown name, or if there are too many. Bools are compared by value, other arguments by identity.
    """
    kind: Any = type(root)
    names, defaults = _signature(kind)
    given = dict(zip(names[1:], args[1:], strict=False)) | kwargs
    return len(args) <= len(names) and all(
        name in defaults and (value is defaults[name] or (isinstance(value, bool) and value == defaults[name]))
        for name, value in given.items()
    )


@functools.cache
def _signature(kind: type[nn.Module]) -> tuple[list[str], dict[str, Any]]:
    """Return (names, defaults) of the parameters after `self` of the forward of class `kind`.

    `defaults` maps each parameter that has a default to this default. The result is cached.
    """
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
    return [one.name for one in parameters], defaults


def _can_fuse(root: Any, parts: Block) -> bool:
    """Return True if `gpt_fast.ops` may compute `root`: it is as it was recognised, and no hook would be skipped.

    `root` is the recognised block, or attention or an MLP alone, and `parts` is its record. `_is_unchanged` must return
    True, except in a compiled graph, where it is not called. `root` and the attention and MLP modules in it must have
    no hooks. No forward may be set on these instances, except by `gpt_fast.accelerate`. The dropouts of attention
    probabilities and of the hidden activation must be numbers or `nn.Dropout` modules without hooks. If each head has a
    dropout, all must have the same rate.
    """
    layout = parts.layout
    called = {*layout.qkv, layout.out, layout.fc, layout.proj, layout.activation, layout.norm1, layout.norm2}
    called |= {parts.dropouts[1], parts.dropouts[3]}
    return (
        (torch.compiler.is_compiling() or _is_unchanged(root, parts, called))
        and all(
            _plain.why_not_plain(part(root, path), parts.kinds[path]) is None
            for path in dict.fromkeys(("", layout.attention, layout.mlp))
        )
        and all(_has_plain_rate(root, path) for path in (parts.dropouts[0], parts.dropouts[2], *parts.head_dropouts))
        and len({_rate(root, path) for path in parts.head_dropouts}) <= 1
    )


def _is_unchanged(root: Any, parts: Block, called: set[str]) -> bool:
    """Return True if `root` did not change after it was recognised, and the fused forward would skip no hook.

    `root` is the recognised block, or attention or an MLP alone, and `parts` is its record. Its buffers, its simple
    attributes (such as numbers and strings) and the classes of its submodules must equal the recorded ones. `called`
    holds paths of submodules that the fused forward can call. All other submodules must be without hooks and without a
    forward set on the instance.
    """
    if parts.state is None or not parts.state.holds(root):
        return False
    return all(
        path in called or not (_plain.is_hooked_itself(module) or "forward" in vars(module))
        for path, module in root.named_modules()
        if path
    )


def _has_plain_rate(root: Any, path: str) -> bool:
    """Return True if the dropout at `path` in the module `root` can run inside an op, which takes only its rate.

    The result is True if `path` is "" (no dropout) or leads to a number, the rate. It is also True if `path` leads to
    an `nn.Dropout` without hooks and with p < 1.
    """
    source: Any = part(root, path) if path else None
    if not isinstance(source, nn.Module):
        return True
    return isinstance(source, nn.Dropout) and _plain.is_plain(source, nn.Dropout) and source.p < 1


def _rate(root: Any, path: str) -> float:
    """Return the dropout probability at `path` in the module `root`: 0.0 outside of training mode, or if `path` is "".

    The path leads to an `nn.Dropout`, or to an attribute that is a number. Such a number counts as 0.0 unless the
    module with that attribute is in training mode.
    """
    if not path:
        return 0.0
    source = part(root, path)
    if isinstance(source, nn.Module):
        return getattr(source, "p", 0.0) if source.training else 0.0
    return source if part(root, path.rpartition(".")[0]).training else 0.0


def _branch(root: Any, path: str, branch: Tensor) -> tuple[Tensor, float]:
    """Return (branch, p): the output of attention or the MLP, and the dropout probability that the caller has to apply.

    `root` is the recognised block, or attention or an MLP alone. `path` leads from `root` to the dropout of the output,
    "" if there is none. If a number or an `nn.Dropout` without hooks is there, `branch` stays and p is the probability,
    0 outside of training mode. Any other dropout module is called on `branch` here, and p is 0.
    """
    source = part(root, path) if path else None
    if isinstance(source, nn.Module):
        return _plain.dropout(source, branch)
    return branch, _rate(root, path)


def _attention(root: Any, parts: Block, x: Tensor, seed: Tensor | None) -> tuple[Tensor, float]:
    """Return (branch, p) for x [B, T, C]: attention's output [B, T, C] after its output projection, and a dropout rate.

    `root` is the recognised block, or attention alone. `parts` is its record, with paths that start at `root`. The
    caller has to apply dropout with probability p to `branch`. p is 0 if the dropout module had to be called here, for
    example because it has hooks. `seed` is the dropout seed of this call, or None if no dropout is active.
    """
    layout = parts.layout
    projected = _projected(root, layout.qkv, x)
    options: dict[str, Any] = {"dropout_p": _rate(root, parts.dropouts[0]), "seed": seed, "site": 0}
    if len(projected) == 1:
        out = ops.attention_qkv(projected[0], parts.heads, **options)
    else:
        q, k, v = (one.unflatten(2, (parts.heads, -1)).transpose(1, 2) for one in projected)  # [B, H, T, D]
        out = ops.attention(q, k, v, **options).transpose(1, 2).flatten(2)
    return _branch(root, parts.dropouts[1], _plain.linear(part(root, layout.out), out))


def _projected(root: Any, paths: tuple[str, ...], x: Tensor) -> list[Tensor]:
    """Return attention's input projections of x [B, T, C]: [qkv [B, T, 3C]], or [q, k, v], each [B, T, C].

    `paths` lead from `root`, the recognised block or attention alone, to the linear layers: one packed layer, or three
    in the order q, k, v. More than three paths lead to the projections of single heads: all queries, then all keys,
    then all values. Their weights [D, C] are joined, and the result is [qkv].
    """
    layers = [part(root, path) for path in paths]
    if len(layers) <= 3:
        return [_plain.linear(layer, x) for layer in layers]
    if not all(_plain.is_plain(layer, nn.Linear) for layer in layers):
        return [torch.cat([layer(x) for layer in layers], dim=-1)]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return [ops.linear(x, torch.cat([layer.weight for layer in layers]), torch.cat(biases) if biases else None)]


def _mlp(root: Any, parts: Block, x: Tensor, seed: Tensor | None) -> tuple[Tensor, float]:
    """Return (branch, p): the MLP's output for x, both [B, T, C], and a dropout rate.

    `root` is the recognised block, or an MLP alone. `parts` is its record, with paths that start at `root`. The caller
    has to apply dropout with probability p to `branch`. p is 0 if the dropout module had to be called here, for example
    because it has hooks. `seed` is the dropout seed of this call, or None if no dropout is active.
    """
    layout = parts.layout
    fc, proj = part(root, layout.fc), part(root, layout.proj)
    is_plain = _plain.is_plain(fc, nn.Linear) and _plain.is_plain(proj, nn.Linear)
    p = _rate(root, parts.dropouts[2])
    if is_plain and _is_as_it_was(root, parts, layout.activation):
        branch = ops.mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, parts.activation, p, seed, site=2)
    else:
        hidden = _activate(root, parts, fc(x))
        branch = proj(hidden if not parts.dropouts[2] else nn.functional.dropout(hidden, p, p > 0))
    return _branch(root, parts.dropouts[3], branch)


def _activate(root: Any, parts: Block, x: Tensor) -> Tensor:
    """Return act(x) for x [B, T, F], where act is the MLP's activation function.

    `root` is the recognised block, or an MLP alone, and `parts` is its record. The activation module in `root` is
    called. If `root` has none, the activation with the name `parts.activation` runs, such as "gelu".
    """
    from ..._activations import ACTIVATIONS

    path = parts.layout.activation
    return part(root, path)(x) if path else ACTIVATIONS[parts.activation].make_module()(x)


def _is_as_it_was(root: Any, parts: Block, path: str) -> bool:
    """Return True if the module at `path` in `root` still has the recorded class and no hooks, or if `path` is "".

    `root` is the recognised block, or attention or an MLP alone. `parts` is its record, in which `kinds` maps each path
    to a class. The path "" stands for no module.
    """
    return not path or _plain.why_not_plain(part(root, path), parts.kinds[path]) is None


def _norm(root: Any, parts: Block, norm: Norm, x: Tensor) -> Tensor:
    """Return LayerNorm of x [B, T, C], by `ops.layer_norm`, with the parameters of the module at `norm.path` in `root`.

    `root` is the recognised block and `parts` is its record. The norm module is called instead if it has hooks or
    another class than the recorded one.
    """
    module = part(root, norm.path)
    if _plain.why_not_plain(module, parts.kinds[norm.path]) is not None:
        return module(x)
    return ops.layer_norm(x, _named(module, norm.weight), _named(module, norm.bias), norm.eps)


def _add_norm(
    root: Any, parts: Block, norm: Norm, branch: Tensor, x: Tensor, p: float, seed: Tensor | None, site: int
) -> tuple[Tensor, Tensor]:
    """Return (norm(x + dropout(branch)), x + dropout(branch)), both [B, T, C], with dropout probability `p`.

    `root` is the recognised block and `parts` is its record. One op computes both results with the parameters of the
    norm module at `norm.path` in `root`. The norm module is called instead if it has hooks or another class than the
    recorded one. `seed` and `site`, the number of this dropout within the call, choose the dropout mask.
    """
    module = part(root, norm.path)
    if _plain.why_not_plain(module, parts.kinds[norm.path]) is not None:
        summed = _plain.add(branch, x, p, seed, site)
        return module(summed), summed
    weight, bias = _named(module, norm.weight), _named(module, norm.bias)
    return ops.add_layer_norm(branch, x, weight, bias, norm.eps, p, seed, site)


def _named(module: Any, name: str) -> Tensor | None:
    """Return the parameter `name` of `module`, or None if the name is ""."""
    return getattr(module, name) if name else None


# ---- around the blocks -----------------------------------------------------------------------------------------------


def norm_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a LayerNorm that `gpt_fast.accelerate` replaced outside of blocks: x [..., C] → [..., C].

    `self` is the norm module, and x is the only argument. The forward of the module's class runs instead if the call
    has other arguments, or if the module changed after it was recognised.
    """
    norm: Norm = vars(self)[PARTS]
    x = args[0] if len(args) == 1 and not kwargs else None
    is_as_it_was = torch.compiler.is_compiling() or (norm.state is not None and norm.state.holds(self))
    if not isinstance(x, Tensor) or not is_as_it_was:
        return _plain.original(self, *args, **kwargs)
    return ops.layer_norm(x, _named(self, norm.weight), _named(self, norm.bias), norm.eps)


def output_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the logits [..., V] of the output layer `self` for hidden states [..., C], the only argument.

    The logits are computed when code reads them. Without gradients or in a graph they are computed at once (see
    `logits`). A call with other arguments runs the forward of the module's class.
    """
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        return _plain.original(self, *args, **kwargs)
    return logits(value(args[0]), self.weight, self.bias)
