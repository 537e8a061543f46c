"""The ops: each checks its arguments, then runs the kernel PyTorch's dispatcher has for the device.

CUDA tensors run Triton, CPU tensors the C++ extension; float64 and everything under `gpt_fast.use_reference()` run the
definitions of `gpt_fast.reference`, and so does a device without a kernel, with one warning. `serving(op, device_type)`
tells which it is.

Dropout is a function of `seed` (int64, one element, on the device), `site` (an int that numbers the dropout within a
pass) and the element's coordinates, the same bit for bit in every implementation, forward, backward and recomputed.
"""

from . import _flops
from ._library import check_values, decompositions, new_seed, serving, use_reference, values_checked
from .add_layer_norm import add_layer_norm
from .attention import attention, attention_qkv
from .decode_attention import decode_attention, decode_attention_append
from .embedding import embedding
from .layer_norm import layer_norm
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .mlp import mlp

# Ops with a kernel for each device. `linear` has one for the CPU; elsewhere PyTorch's own is the kernel.
NAMES = (
    "attention",
    "layer_norm",
    "add_layer_norm",
    "mlp",
    "linear_cross_entropy",
    "embedding",
    "decode_attention",
)

_flops.install()

__all__ = [
    "NAMES",
    "add_layer_norm",
    "attention",
    "attention_qkv",
    "check_values",
    "decode_attention",
    "decode_attention_append",
    "decompositions",
    "embedding",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "new_seed",
    "serving",
    "use_reference",
    "values_checked",
]
