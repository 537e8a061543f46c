"""FLOP formulas of the ops, for PyTorch's counter `torch.utils.flop_counter.FlopCounterMode`.

Each op registers its formulas in its own file. They count what PyTorch counts of the same model in its own functions:
matrix products alone, a multiplication and an addition as two; attention in full whatever its masks hide, and its
scores once more in backward, as in PyTorch's flash attention. Ops without a matrix product have no formula.

A counter copies PyTorch's registry when it is made, so the formulas have to be in the registry before. Importing the
counter imports Triton, which `import gpt_fast` must not. So the formulas wait for the counter's own import.
"""

import importlib.abc
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec

import torch

_COUNTER = "torch.utils.flop_counter"
FORMULAS: dict[str, Callable[..., int]] = {}


def register(name: str, formula: Callable[..., int]) -> None:
    """Store `formula` as the FLOP formula of `gpt_fast::<name>`, for `install` to register with PyTorch's counter.

    `formula` gets the operator's arguments, with shapes in place of tensors, and returns a number of FLOPs.
    """
    FORMULAS[name] = formula


def product(x: Sequence[int], weight: Sequence[int]) -> int:
    """Return 2 M N C, the FLOPs of x weightᵀ, for shapes x [..., C] with M rows and weight [N, C].

    Each of its two gradients costs the same.
    """
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def install() -> None:
    """Register all stored formulas with PyTorch's FLOP counter, at once if `torch.utils.flop_counter` is imported.

    If it is not, put a finder in front of `sys.meta_path`, which registers the formulas when the module is imported.
    """
    if _COUNTER in sys.modules:
        _hand_over(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())


def _hand_over(counter: types.ModuleType) -> None:
    """Register the formula of each operator in `FORMULAS` with `counter`, the module `torch.utils.flop_counter`."""
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.gpt_fast, name))(formula)


class _Finder(importlib.abc.MetaPathFinder):
    """Finder of the counter's module, used once, which hands the formulas over when the module is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return None unless `fullname` is the name of PyTorch's FLOP counter, "torch.utils.flop_counter".

        For the counter, remove this finder from `sys.meta_path` and return the module's usual spec. Its loader is
        wrapped, so that it registers the formulas after the module has run. `path` and `target` are not used.
        """
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Loader of the counter's module, which hands the formulas over after the module's own loader."""

    def __init__(self, own: importlib.abc.Loader):
        self.own = own

    def create_module(self, spec: ModuleSpec) -> types.ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        """Execute the module of the FLOP counter by its own loader, then register the formulas with it.

        The own loader takes this loader's place in `module.__loader__` and in the module's spec.
        """
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self.own  # for `inspect` and whoever else asks
        self.own.exec_module(module)
        _hand_over(module)
