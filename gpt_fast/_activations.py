"""The activations of an MLP: one table, from which every other part of the Python code takes what it needs.

To add one, add its row here, its formula to csrc/cpu/core/activations.h and to `_activate` in kernels/mlp.py.
`tests/ops/test_activations.py` then asks every part for it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """One activation: its definition, PyTorch's module for it, and its names in transformers.

    `function` is the definition; `aliases` are other functions of PyTorch that compute the same. The module is
    `module(**options)`. Of `gpt2` and `gpt1`, the names in the configurations of transformers, the first is the one
    that `to_hf` writes. `cublaslt` is True if cuBLASLt has an epilogue for it.
    """

    function: Callable[[Tensor], Tensor]
    module: type[nn.Module]
    options: dict[str, Any]
    aliases: tuple[Callable[..., Any], ...] = ()
    gpt2: tuple[str, ...] = ()
    gpt1: tuple[str, ...] = ()
    cublaslt: bool = False

    def make_module(self) -> nn.Module:
        """Return a new PyTorch module that computes this activation, such as `nn.ReLU()`: `module(**options)`."""
        return self.module(**self.options)

    def is_computed_by(self, function: Any) -> bool:
        """Return True if `function`, a callable or an `nn.Module`, is known to compute this activation.

        A module has to be an instance of this activation's module class whose attributes have the values in `options`.
        Any other callable has to be the very object in the field `function`, or one of `aliases`.
        """
        if isinstance(function, nn.Module):
            if not isinstance(function, self.module):
                return False
            return all(getattr(function, name) == value for name, value in self.options.items())
        return function is self.function or function in self.aliases


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, nn.ReLU, {}, aliases=(torch.relu,), gpt2=("relu",), gpt1=("relu",), cublaslt=True),
    "gelu": Activation(F.gelu, nn.GELU, {"approximate": "none"}, gpt2=("gelu",)),
    "gelu_tanh": Activation(
        functools.partial(F.gelu, approximate="tanh"),
        nn.GELU,
        {"approximate": "tanh"},
        gpt2=("gelu_new", "gelu_pytorch_tanh"),
        gpt1=("gelu",),  # the tanh form, although transformers calls it gelu
        cublaslt=True,
    ),
}


def find(user: str, name: str) -> Activation:
    """Return the `Activation` with the name "relu", "gelu" or "gelu_tanh".

    Raise `ValueError` for any other `name`. The message begins with `user`, the name of the caller, and lists the valid
    names.
    """
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{user}: activation is {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
