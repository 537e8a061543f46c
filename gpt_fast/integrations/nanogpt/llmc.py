"""llm.c's model files: 256 int32 of header, then every tensor of GPT-2 in a fixed order.

The header holds a magic number, a version (3: float32, 5: bfloat16) and six sizes. Each kind of tensor follows for all
layers together. The vocabulary is padded to `padded_vocab_size` rows, which hold no token.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._llmc import HEADER, MODEL, describe, magic
from ...config import GPTConfig

_VERSIONS: dict[int, tuple[np.dtype[Any], torch.dtype]] = {
    3: (np.dtype("<f4"), torch.float32),
    5: (np.dtype("<i2"), torch.bfloat16),
}
_FIELDS = ("max_seq_len", "vocab_size", "num_layers", "num_heads", "channels", "padded_vocab_size")
_LAYER_TENSORS = (  # nanoGPT's name, shape in units of C
    ("ln_1.weight", (1,)), ("ln_1.bias", (1,)), ("attn.c_attn.weight", (3, 1)), ("attn.c_attn.bias", (3,)),
    ("attn.c_proj.weight", (1, 1)), ("attn.c_proj.bias", (1,)), ("ln_2.weight", (1,)), ("ln_2.bias", (1,)),
    ("mlp.c_fc.weight", (4, 1)), ("mlp.c_fc.bias", (4,)), ("mlp.c_proj.weight", (1, 4)), ("mlp.c_proj.bias", (1,)),
)  # fmt: skip


def read(path: Path) -> tuple[dict[str, Tensor], GPTConfig]:
    """Return (tensors, config) of llm.c's model file: the tensors by nanoGPT's names, and the configuration.

    The tensors are float32 or bfloat16, mapped into memory and not read yet. The rows of the padded vocabulary are left
    out, and "lm_head.weight" is the token embedding. The configuration is GPT-2's with "gelu_tanh" and no dropout.
    Raises `ValueError` for another kind of file, a header with a wrong value, or a file of another size than the header
    asks for.
    """
    with path.open("rb") as file:
        head = file.read(4 * HEADER)
    number = magic(head)
    if number is not None and number != MODEL:
        raise ValueError(f"{path}: {describe(number)}, by llm.c; expected its model file (magic {MODEL})")
    if number is None or len(head) < 4 * HEADER:
        raise ValueError(f"{path}: cut off or no file of llm.c; expected its model file (magic {MODEL})")
    header = [int(value) for value in np.frombuffer(head, "<i4")]
    if header[1] not in _VERSIONS:
        raise ValueError(f"{path}: llm.c's version {header[1]}; expected 3 (float32) or 5 (bfloat16)")
    sizes = dict(zip(_FIELDS, header[2:], strict=False))
    _check_sizes(path, sizes, header[2 + len(_FIELDS) :])
    T, V, L, H, C, Vp = sizes.values()
    stored, dtype = _VERSIONS[header[1]]
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("transformer.wte.weight", (Vp, C)),
        ("transformer.wpe.weight", (T, C)),
    ]
    for name, units in _LAYER_TENSORS:
        shapes += [(f"transformer.h.{{}}.{name}", (L, *(n * C for n in units)))]
    shapes += [("transformer.ln_f.weight", (C,)), ("transformer.ln_f.bias", (C,))]
    counts = [math.prod(shape) for _, shape in shapes]
    expected, found = 4 * HEADER + stored.itemsize * sum(counts), path.stat().st_size
    if found != expected:
        raise ValueError(f"{path}: {found:,} bytes; expected {expected:,} by its header, so it was cut off or added to")
    numbers = torch.from_numpy(np.memmap(path, stored, "c", 4 * HEADER, (sum(counts),))).view(dtype)
    state: dict[str, Tensor] = {}
    for (name, shape), piece in zip(shapes, numbers.split(counts), strict=True):
        tensor = piece.view(shape)
        if "{}" in name:
            state |= {name.format(i): tensor[i] for i in range(L)}
        else:
            state[name] = tensor
    state["transformer.wte.weight"] = state["lm_head.weight"] = state["transformer.wte.weight"][:V]
    config = GPTConfig.preset(
        "gpt2", dropout=0.0, num_tokens=V, hidden_dim=C, num_heads=H, num_layers=L, seq_len=T, activation="gelu_tanh"
    )
    return state, config


def _check_sizes(path: Path, sizes: dict[str, int], rest: list[int]) -> None:
    """Raise `ValueError` if one of the header's `sizes` is wrong, or if the `rest` of the header is not 0.

    `sizes` has max_seq_len, vocab_size, num_layers, num_heads, channels and padded_vocab_size. Each has to be 1 or
    more, the padded vocabulary no smaller than the vocabulary, and "channels" a multiple of "num_heads" with heads of
    at most 256. `path` names the file in messages.
    """
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{path}: its header has {name} {value}; expected 1 or more")
    if sizes["padded_vocab_size"] < sizes["vocab_size"]:
        raise ValueError(
            f"{path}: its header has padded_vocab_size {sizes['padded_vocab_size']}; "
            f"expected vocab_size {sizes['vocab_size']} or more"
        )
    width, heads = sizes["channels"], sizes["num_heads"]
    if width % heads or width // heads > 256:
        raise ValueError(
            f"{path}: its header has num_heads {heads} and channels {width}; expected heads of equal width, at most 256"
        )
    if any(rest):
        raise ValueError(f"{path}: its header has a number behind padded_vocab_size; expected zeros there")
