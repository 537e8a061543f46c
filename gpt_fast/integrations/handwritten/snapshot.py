"""Everything besides parameters on which a module's function depends: options, buffers and the modules inside it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn as nn
from torch import Tensor

_SIMPLE = (bool, int, float, str, bytes, tuple, type(None))
_IGNORED = {"training", "p", "forward"}  # read at each pass, or this library's


class Snapshot:
    """Options, buffers and children of a module and all modules inside it, as they are when it is made.

    Options are attributes with simple values, and such values in dictionaries and objects that attributes hold, as a
    model's configuration. `rates` are attributes that the fused forward reads itself.
    """

    def __init__(self, module: nn.Module, rates: frozenset[str] = frozenset()):
        self._rates = rates
        self._options = _options(module, rates)
        self._kinds = {path: type(child) for path, child in module.named_modules()}
        self._buffers = {name: (_where(buffer), buffer.detach().clone()) for name, buffer in module.named_buffers()}

    def holds(self, module: nn.Module) -> bool:
        """Return True if the module is as it was. A copy of it is."""
        if {path: type(child) for path, child in module.named_modules()} != self._kinds:
            return False
        if _options(module, self._rates) != self._options:
            return False
        buffers = dict(module.named_buffers())
        return buffers.keys() == self._buffers.keys() and all(
            self._has(name, buffer) for name, buffer in buffers.items()
        )

    def _has(self, name: str, buffer: Tensor) -> bool:
        """Compare a buffer by address and version, and by its values where these differ."""
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
    return id(buffer), 0 if buffer.is_inference() else buffer._version


def _options(module: nn.Module, rates: frozenset[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, child in module.named_modules():
        for name, value in vars(child).items():
            key = f"{path}.{name}" if path else name
            if name in _IGNORED or key in rates or name.startswith("_"):
                continue
            found.update(_simple(key, value))
    return found


def _simple(key: str, value: Any) -> dict[str, Any]:
    """Return the simple values of an attribute: itself, or those that a dictionary or an object holds."""
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
