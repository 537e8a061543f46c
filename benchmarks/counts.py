"""The work that the mathematics of an op or a job cannot avoid, counted from its shape.

Bytes: each tensor that goes in or comes out once, no intermediate. FLOPs: those of matrix products, two for a
multiply-add, and of attention only the pairs that the causal mask leaves. `element` is the size of a number in bytes.
"""

from dataclasses import dataclass

from gpt_fast import GPTConfig

MFU_FORMULA = "MFU = tokens/s × (6 N + 6 L C (T + 1)) / measured matrix rate"
MFU_WHERE = (
    "N: parameters in matrix products, 12 L C² + V C; 6 L C (T + 1): causal attention; "
    "a training step counts three forward passes, recomputation counts nothing"
)


@dataclass(frozen=True)
class Work:
    bytes: int
    flops: int = 0
    bound: str = "copy"  # the bandwidth that bytes are held against: "copy", or "read" where nearly all is read


def layer_norm(M: int, N: int, element: int, direction: str) -> Work:
    statistics = 2 * 4 * M
    if direction == "forward":  # reads x, weight, bias; writes y, mean, rstd
        return Work(element * (2 * M * N + 2 * N) + statistics)
    return Work(element * (3 * M * N + 3 * N) + statistics)  # reads dy, x, weight; writes dx, dweight, dbias


def add_layer_norm(M: int, N: int, element: int, direction: str, dropout: float) -> Work:
    statistics = 2 * 4 * M
    if direction == "forward":  # reads x, residual, weight, bias; writes normed, summed, mean, rstd
        return Work(element * (4 * M * N + 2 * N) + statistics)
    # Reads dnormed, dsummed, summed, weight; writes dresidual, dweight, dbias, and dx where dropout makes it differ.
    matrices = 5 if dropout else 4
    return Work(element * (matrices * M * N + 3 * N) + statistics)


def attention(B: int, H: int, T: int, D: int, element: int, direction: str) -> Work:
    """Two products forward, five backward (the scores again, dV, dP, dQ, dK)."""
    pairs = B * H * T * (T + 1) // 2
    values, lse = B * H * T * D, 4 * B * H * T
    if direction == "forward":  # reads q, k, v; writes out and lse
        return Work(element * 4 * values + lse, 2 * 2 * pairs * D)
    return Work(element * 8 * values + lse, 5 * 2 * pairs * D)  # reads q, k, v, out, dout, lse; writes dq, dk, dv


def mlp(M: int, C: int, F: int, element: int, direction: str) -> Work:
    weights = 2 * C * F + F + C
    if direction == "forward":  # reads x and the weights; writes y
        return Work(element * (2 * M * C + weights), 2 * 2 * M * C * F)
    return Work(element * (3 * M * C + 2 * weights - C), 4 * 2 * M * C * F)  # reads x, dy, weights; writes gradients


def linear_cross_entropy(N: int, C: int, V: int, element: int) -> Work:
    """Forward and backward together: logits, dx, dweight. Reads x, weight, target; writes dx and dweight."""
    return Work(element * 2 * (N * C + V * C) + 8 * N, 3 * 2 * N * C * V)


def embedding(B: int, T: int, V: int, C: int, element: int, direction: str) -> Work:
    rows, ids = B * T * C, 8 * B * T
    if direction == "forward":  # reads a row of the table for each token, the positions once; writes the sums
        return Work(element * (2 * rows + T * C) + ids)
    return Work(element * (rows + V * C + T * C) + ids)  # reads dout; writes both tables' gradients


def decode_attention(B: int, H: int, S: int, D: int, element: int) -> Work:
    """Reads both caches and q, writes out."""
    return Work(element * (2 * B * H * S * D + 2 * B * H * D), 2 * 2 * B * H * S * D, "read")


def matrix_parameters(config: GPTConfig) -> int:
    """The parameters that multiply each token: four C² and two C F a layer, and the output layer."""
    C, F = config.hidden_dim, config.ff_dim
    return config.num_layers * (4 * C * C + 2 * C * F) + config.num_tokens * C


def parameters(config: GPTConfig) -> int:
    """All parameters of a GPT-2 (pre-norm, tied, biases): 124,439,808 for the smallest."""
    C, F, L = config.hidden_dim, config.ff_dim, config.num_layers
    layer = 4 * C * C + 4 * C + 2 * C * F + F + C + 4 * C
    return config.num_tokens * C + config.seq_len * C + L * layer + 2 * C


def forward_flops(config: GPTConfig, B: int, T: int, output_rows: int) -> int:
    """Of B × T tokens through the layers, and of `output_rows` positions through the output layer."""
    C, V, L = config.hidden_dim, config.num_tokens, config.num_layers
    layers = matrix_parameters(config) - V * C
    return 2 * B * T * layers + 2 * output_rows * V * C + L * 4 * C * B * T * (T + 1) // 2


def training_step(config: GPTConfig, B: int, T: int) -> Work:
    """Three forward passes' FLOPs; AdamW reads parameter, gradient and two moments and writes all but the gradient."""
    return Work(7 * 4 * parameters(config), 3 * forward_flops(config, B, T, B * T))


def finetuning_step(config: GPTConfig, B: int, T: int) -> Work:
    """As a training step, but that only a few labels are scored instead of the vocabulary."""
    return Work(7 * 4 * parameters(config), 3 * forward_flops(config, B, T, 0))


def prefill(config: GPTConfig, B: int, T: int, element: int) -> Work:
    """The layers on B × T tokens, the output layer on the last of each row; reads every weight once."""
    return Work(element * matrix_parameters(config), forward_flops(config, B, T, B), "read")


def decode(config: GPTConfig, B: int, prompt: int, new: int, element: int, cache_element: int) -> Work:
    """`new` tokens a row, one at a time: the weights once for each, and the keys and values of what came before."""
    C, L = config.hidden_dim, config.num_layers
    weights = element * matrix_parameters(config)
    seen = sum(prompt + i for i in range(new))  # tokens in the cache, added up over the steps
    cache = cache_element * 2 * L * C * B * seen
    flops = 2 * B * new * matrix_parameters(config) + 4 * L * C * B * seen
    return Work(new * weights + cache, flops, "read")
