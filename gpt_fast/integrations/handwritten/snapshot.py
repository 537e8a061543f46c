"""Everything besides parameters on which a module's function depends: options, buffers and the modules inside it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn as nn
from torch import Tensor

_SIMPLE = (bool, int, float, str, bytes, tuple, type(None))
_IGNORED = {"training", "p", "forward"}  # read at each pass, or this library's


class Snapshot:
    """Options, buffers and submodule classes of a module and of all modules inside it, recorded at construction.

    Options are attributes with simple values (numbers, strings, tuples, None), also inside dictionaries and objects
    that attributes hold, such as a model's configuration. `rates` are the paths of dropout attributes, which are not
    recorded.
    """

    def __init__(self, module: nn.Module, rates: frozenset[str] = frozenset()):
        self._rates = rates
        self._options = _options(module, rates)
        self._kinds = {path: type(child) for path, child in module.named_modules()}
        self._buffers = {name: (_where(buffer), buffer.detach().clone()) for name, buffer in module.named_buffers()}

    def holds(self, module: nn.Module) -> bool:
        """Return True if classes, buffers and options of `module` and all modules inside it equal the recorded ones.

        Options are attributes with simple values, such as numbers and strings. `module` may be the recorded module or
        a copy of it.
        """
        if {path: type(child) for path, child in module.named_modules()} != self._kinds:
            return False
        if _options(module, self._rates) != self._options:
            return False
        buffers = dict(module.named_buffers())
        return buffers.keys() == self._buffers.keys() and all(
            self._has(name, buffer) for name, buffer in buffers.items()
        )

    def _has(self, name: str, buffer: Tensor) -> bool:
        """Return True if `buffer` equals the recorded buffer `name`.

        Values are read only if object or write count differ. If the values are equal, the new object and count are
        recorded.
        """
        where, before = self._buffers[name]
        if _where(buffer) == where:
            return True
        if buffer.is_meta or buffer.shape != before.shape:
            return False
        same = bool((buffer.to(before.device, before.dtype) == before).all())
        if same:
            self._buffers[name] = (_where(buffer), before)
        return same


def _where(buffer: Tensor) -> tuple[int, int]:
    """Return (id, version) of a buffer: autograd's version counts in-place writes, and is 0 for inference tensors."""
    return id(buffer), 0 if buffer.is_inference() else buffer._version


def _options(module: nn.Module, rates: frozenset[str]) -> dict[str, Any]:
    """Return the simple attributes of `module` and of all modules inside it, by path, for comparison.

    Simple are numbers, strings, bytes, tuples and None, also one level inside dictionaries and objects. Private
    attributes, train flags and attributes named `p` or `forward` are left out. `rates` holds paths of float attributes
    that are dropout probabilities, such as "attn.dropout". They are left out, because each call reads them anew.
    """
    found: dict[str, Any] = {}
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            key = f"{path}.{name}" if path else name
            if name in _IGNORED or key in rates or name.startswith("_"):
                continue
            found.update(_simple(key, value))
    return found


def _simple(key: str, value: Any) -> dict[str, Any]:
    """Return {key: value} for a simple value, or {key.name: item} for each simple item of a dictionary or an object.

    Simple values are numbers, strings, bytes, tuples and None. For a module, a tensor or a class the result is empty.
    """
    if isinstance(value, _SIMPLE):
        return {key: value}
    if isinstance(value, dict):
        inner = value
    elif dataclasses.is_dataclass(value) or (
        hasattr(value, "__dict__") and not isinstance(value, type | nn.Module | Tensor)
    ):
        inner = vars(value)
    else:
        return {}
    return {f"{key}.{name}": one for name, one in inner.items() if isinstance(one, _SIMPLE)}
