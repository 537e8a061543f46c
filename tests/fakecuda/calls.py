"""Calls of every op for the tests on the stand-in for CUDA: tables of name → function.

Each function makes the inputs on a device and returns a call. The call runs the op's forward, and its backward if it
has one. Making the inputs may copy to the device and wait for it. The call may not.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

from gpt_fast import ops

Call = Callable[[], object]
Make = Callable[[torch.device], Call]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bfloat16": BF16, "float16": F16, "float32": F32}
B, H, T = 2, 3, 200


def values(device: torch.device, *shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device, requires_grad=grad)


def seed(device: torch.device) -> Tensor:
    return torch.ones(1, dtype=torch.int64, device=device)


def both_ways(function: Callable[[], Tensor | tuple[Tensor, ...]]) -> Call:
    """Return a call of `function` and of the backward pass of everything that it returns."""

    def call() -> None:
        results = function()
        results = results if isinstance(results, tuple) else (results,)
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])

    return call


# --- attention

MASKS: dict[str, Callable[[torch.device, int, int], dict]] = {
    "causal": lambda device, T, S: {},
    "bidirectional": lambda device, T, S: {"causal": False},
    "lengths": lambda device, T, S: {"causal": False, "lengths": torch.tensor([S // 2, 7], device=device)},
    "key_mask": lambda device, T, S: {"key_mask": torch.ones(B, S, dtype=torch.bool, device=device)},
    "mask": lambda device, T, S: {"causal": False, "mask": torch.ones(T, S, dtype=torch.bool, device=device)},
    "window": lambda device, T, S: {"window": 17},
    "all masks": lambda device, T, S: {
        "lengths": torch.tensor([S // 2, 7], device=device),
        "key_mask": torch.ones(B, S, dtype=torch.bool, device=device),
        "mask": torch.ones(B, 1, T, S, dtype=torch.bool, device=device),
        "window": 17,
    },
}


def attention(
    device: torch.device, dtype: torch.dtype, D: int, masks: str = "causal", p: float = 0.0, T: int = T, S: int = T
) -> Call:
    q = values(device, B, H, T, D, dtype=dtype)
    k, v = (values(device, B, H, S, D, dtype=dtype) for _ in range(2))
    options = MASKS[masks](device, T, S)
    if p:
        options |= {"dropout_p": p, "seed": seed(device)}
    return both_ways(partial(ops.attention, q, k, v, **options))


def attention_qkv(device: torch.device, dtype: torch.dtype, B: int, T: int, H: int, D: int, packed: bool) -> Call:
    qkv = values(device, B, T, 3 * H * D, dtype=dtype)
    options = {"dropout_p": 0.1, "seed": seed(device)}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, T // 4, T], dtype=torch.int32, device=device)
    return both_ways(partial(ops.attention_qkv, qkv, H, **options))


def long_attention(device: torch.device) -> Call:
    """Return a call of attention with B H over 65,535, CUDA's limit for the second and third dimension of a grid."""
    q = values(device, 4096, 17, 16, 16, dtype=BF16)
    return both_ways(partial(ops.attention, q, q, q, dropout_p=0.1, seed=seed(device)))


# --- norms, mlp, embedding, loss, decoding


def layer_norm(device: torch.device, dtype: torch.dtype, rows: int, C: int, affine: bool = True) -> Call:
    x = values(device, rows, C, dtype=dtype)
    weights = [values(device, C, dtype=dtype) for _ in range(2)] if affine else []
    return both_ways(partial(ops.layer_norm, x, *weights))


def add_layer_norm(device: torch.device, dtype: torch.dtype, rows: int, C: int, p: float) -> Call:
    x, residual = (values(device, rows, C, dtype=dtype) for _ in range(2))
    weight, bias = (values(device, C, dtype=dtype) for _ in range(2))
    return both_ways(partial(ops.add_layer_norm, x, residual, weight, bias, 1e-5, p, seed(device) if p else None, 3))


def mlp(
    device: torch.device, dtype: torch.dtype, activation: str, p: float, sizes: tuple[int, ...] = (130, 72, 288, 72),
    bias: bool = True, recompute: bool = False,
) -> Call:  # fmt: skip
    N, C, F, Cout = sizes
    x, fc, proj = (values(device, *shape, dtype=dtype) for shape in ((N, C), (F, C), (Cout, F)))
    biases = [values(device, size, dtype=dtype) if bias else None for size in (F, Cout)]
    return both_ways(
        partial(
            ops.mlp, x, fc, biases[0], proj, biases[1], activation, p, seed(device) if p else None, recompute=recompute
        )
    )


def linear_cross_entropy(
    device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int], bias: bool, reduction: str, smoothing: float
) -> Call:
    N, C, V = sizes
    x, weight = values(device, N, C, dtype=dtype), values(device, V, C, dtype=dtype)
    target = torch.zeros(N, dtype=torch.int64, device=device)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    b = values(device, V, dtype=dtype) if bias else None
    return both_ways(partial(ops.linear_cross_entropy, x, weight, target, b, **options))


def embedding(device: torch.device, dtype: torch.dtype, C: int, p: float, positions: bool = False) -> Call:
    tokens = torch.zeros(B, 19, dtype=torch.int64, device=device)
    token_weight, position_weight = values(device, 53, C, dtype=dtype), values(device, 19, C, dtype=dtype)
    places = torch.zeros(B, 19, dtype=torch.int64, device=device) if positions else None
    return both_ways(
        partial(ops.embedding, tokens, token_weight, position_weight, places, p, seed(device) if p else None)
    )


def decode_attention(device: torch.device, dtype: torch.dtype, D: int, S: int) -> Call:
    q = values(device, B, H, D, dtype=dtype, grad=False)
    cache = values(device, B, H, S, D, dtype=dtype, grad=False)
    lengths = torch.ones(B, dtype=torch.int64, device=device)
    return partial(ops.decode_attention, q, cache, cache, lengths)


def decode_attention_append(device: torch.device, dtype: torch.dtype, D: int, S: int) -> Call:
    q, k, v = (values(device, B, H, D, dtype=dtype, grad=False) for _ in range(3))
    caches = (values(device, B, H, S, D, dtype=dtype, grad=False) for _ in range(2))
    lengths = torch.ones(B, dtype=torch.int64, device=device)
    return partial(ops.decode_attention_append, q, k, v, *caches, lengths)


def few_rows(device: torch.device, dtype: torch.dtype, C: int) -> Call:
    x = values(device, 1, C, dtype=dtype, grad=False)
    weights = values(device, 4 * C, C, dtype=dtype), None, values(device, C, 4 * C, dtype=dtype), None
    return partial(ops.mlp, x, *(weight if weight is None else weight.detach() for weight in weights))


def _training() -> dict[str, Make]:
    """Return training calls of each op in bfloat16, with dropout if the op has it, and a few in float32."""
    made: dict[str, Make] = {
        f"attention D={D} {name}": partial(attention, dtype=dtype, D=D, p=0.1)
        for D, (name, dtype) in product((64, 128, 256), DTYPES.items())
        if name != "float16"
    }
    return made | {
        "layer_norm": partial(layer_norm, dtype=BF16, rows=67, C=768),
        "add_layer_norm": partial(add_layer_norm, dtype=BF16, rows=67, C=768, p=0.1),
        "mlp": partial(mlp, dtype=BF16, activation="gelu_tanh", p=0.1),
        "mlp float32": partial(mlp, dtype=F32, activation="gelu_tanh", p=0.1),
        "linear_cross_entropy": partial(
            linear_cross_entropy, dtype=BF16, sizes=(40, 768, 50257), bias=False, reduction="mean", smoothing=0.0
        ),
        "linear_cross_entropy float32": partial(
            linear_cross_entropy, dtype=F32, sizes=(40, 768, 1000), bias=False, reduction="mean", smoothing=0.0
        ),
        "embedding": partial(embedding, dtype=BF16, C=768, p=0.1),
    }


TRAINING = _training()
DECODING: dict[str, Make] = {
    f"decode_attention D={D} {name}": partial(decode_attention, dtype=dtype, D=D, S=77)
    for D, (name, dtype) in product((64, 256), DTYPES.items())
}
DECODING |= {
    f"decode_attention_append D={D} {name}": partial(decode_attention_append, dtype=dtype, D=D, S=77)
    for D, (name, dtype) in product((64, 256), DTYPES.items())
}
DECODING |= {
    f"mlp one row C={C} {name}": partial(few_rows, dtype=dtype, C=C)
    for C, (name, dtype) in product((256, 768), DTYPES.items())
}


def _others() -> dict[str, Make]:
    """Return calls for the dtypes, masks and edge cases of every op that TRAINING and DECODING lack."""
    made: dict[str, Make] = {}
    for (name, dtype), masks, p in product(DTYPES.items(), MASKS, (0.0, 0.1)):
        made[f"attention {masks} {name} dropout={p}"] = partial(attention, dtype=dtype, D=64, masks=masks, p=p)
    for D in (1, 20, 80, 192):
        made[f"attention D={D}"] = partial(attention, dtype=BF16, D=D)
    for T, S in ((5, 77), (1, 77), (1, 1)):
        made[f"attention T={T} S={S}"] = partial(attention, dtype=BF16, D=64, T=T, S=S)
    for sizes in ((2, 130, 3, 64), (2, 130, 1, 64), (1, 1, 1, 64)):
        made[f"attention_qkv B, T, H, D = {sizes}"] = partial(
            attention_qkv, dtype=BF16, packed=False, **dict(zip("BTHD", sizes, strict=True))
        )
    made["attention_qkv packed"] = partial(attention_qkv, dtype=BF16, B=1, T=200, H=3, D=64, packed=True)
    made["attention B·H=69632"] = long_attention
    for (name, dtype), C in product(DTYPES.items(), (1, 100, 768, 1600, 5000, 16384, 40000)):
        made[f"layer_norm C={C} {name}"] = partial(layer_norm, dtype=dtype, rows=67, C=C)
        made[f"add_layer_norm C={C} {name}"] = partial(add_layer_norm, dtype=dtype, rows=67, C=C, p=0.0)
    made["layer_norm of one row"] = partial(layer_norm, dtype=BF16, rows=1, C=768)
    made["layer_norm without weight"] = partial(layer_norm, dtype=BF16, rows=67, C=768, affine=False)
    for (name, dtype), activation, p in product(DTYPES.items(), ("relu", "gelu", "gelu_tanh"), (0.0, 0.1)):
        made[f"mlp {activation} {name} dropout={p}"] = partial(mlp, dtype=dtype, activation=activation, p=p)
    made["mlp recompute"] = partial(mlp, dtype=BF16, activation="gelu", p=0.1, bias=False, recompute=True)
    made["mlp of size 1"] = partial(mlp, dtype=BF16, activation="gelu", p=0.0, sizes=(1, 1, 1, 1))
    made["mlp of GPT-2"] = partial(mlp, dtype=BF16, activation="gelu_tanh", p=0.0, sizes=(2048, 768, 3072, 768))
    for (name, dtype), reduction in product(DTYPES.items(), ("mean", "sum", "none")):
        made[f"linear_cross_entropy {reduction} {name}"] = partial(
            linear_cross_entropy, dtype=dtype, sizes=(300, 72, 301), bias=True, reduction=reduction, smoothing=0.1
        )
    made["linear_cross_entropy of size 1"] = partial(
        linear_cross_entropy, dtype=BF16, sizes=(1, 1, 1), bias=False, reduction="mean", smoothing=0.0
    )
    for (name, dtype), C in product(DTYPES.items(), (1, 72, 768)):
        made[f"embedding C={C} {name}"] = partial(embedding, dtype=dtype, C=C, p=0.0)
    made["embedding positions"] = partial(embedding, dtype=BF16, C=72, p=0.1, positions=True)
    for D, S in ((1, 77), (20, 1000), (128, 77)):
        made[f"decode_attention D={D} S={S}"] = partial(decode_attention, dtype=BF16, D=D, S=S)
    return made


OTHERS = _others()
EVERY = TRAINING | DECODING | OTHERS
