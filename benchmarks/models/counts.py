"""Parameters and FLOPs of whole models, from their configuration."""

from benchmarks.topic import Work
from gpt_fast import GPTConfig

MFU_FORMULA = "MFU = tokens/s × (6 N + 6 L C (T + 1)) / measured matrix rate"
MFU_WHERE = (
    "N: parameters in matrix products, 12 L C² + V C; 6 L C (T + 1): causal attention; "
    "a training step counts three forward passes, recomputation counts nothing"
)
STATE_BYTES = 16  # of a parameter in training: float32 weight, gradient and AdamW's two moments


def matrix_parameters(config: GPTConfig) -> int:
    """Return the number of parameters in matrix products: 4 C² + 2 C F in each layer, and V C in the output layer.

    C is the width, F the width of the feed-forward layer, and V the vocabulary size, all of `config`. Biases and
    positions do not count.
    """
    C, F = config.hidden_dim, config.ff_dim
    return config.num_layers * (4 * C * C + 2 * C * F) + config.num_tokens * C


def parameters(config: GPTConfig) -> int:
    """Return the number of all parameters of a GPT-2 with pre-norm blocks, biases and a tied output layer.

    `config` gives the sizes only. The result is 124,439,808 for the smallest of OpenAI's four GPT-2s.
    """
    C, F, L = config.hidden_dim, config.ff_dim, config.num_layers
    layer = 4 * C * C + 4 * C + 2 * C * F + F + C + 4 * C
    return config.num_tokens * C + config.seq_len * C + L * layer + 2 * C


def forward_flops(config: GPTConfig, B: int, T: int, output_rows: int) -> int:
    """Return the FLOPs of one forward pass over B rows of T tokens, in matrix products and causal attention.

    A multiply-add counts as two. Attention counts only the pairs that the causal mask leaves. The output layer is
    applied to `output_rows` of the B × T positions.
    """
    C, V, L = config.hidden_dim, config.num_tokens, config.num_layers
    layers = matrix_parameters(config) - V * C
    return 2 * B * T * layers + 2 * output_rows * V * C + L * 4 * C * B * T * (T + 1) // 2


def training(config: GPTConfig, B: int, T: int, output_rows: int) -> Work:
    """Return the least bytes and FLOPs of a training step on B rows of T tokens, as a `Work`: forward, backward, AdamW.

    A step has the FLOPs of three forward passes. The output layer is applied to `output_rows` of the B × T positions.
    Only AdamW's bytes count, in float32: it reads weight, gradient and two moments of each parameter, and writes all
    but the gradient. The result's `bound` is "copy": the speed limit for the bytes is the bandwidth of a copy.
    """
    return Work(7 * 4 * parameters(config), 3 * forward_flops(config, B, T, output_rows))


def prompt(config: GPTConfig, B: int, T: int, element: float) -> Work:
    """Return the least bytes and FLOPs of reading a prompt of T tokens in each of B rows, as a `Work`.

    Every weight of a matrix product is read once and has `element` bytes, which may be a fraction. No other bytes
    count. The result's `bound` is "read": the speed limit for the bytes is the read bandwidth. The output layer is
    applied to the last position of each row only. Of the other positions the last layer computes nothing but keys and
    values.
    """
    C, F, others = config.hidden_dim, config.ff_dim, B * (T - 1)
    left_out = others * 2 * (2 * C * C + 2 * C * F) + 4 * C * others * T // 2
    return Work(int(element * matrix_parameters(config)), forward_flops(config, B, T, B) - left_out, "read")


def decoding(config: GPTConfig, B: int, prompt: int, new: int, element: float, cache_element: int) -> Work:
    """Return the least bytes and FLOPs of generating `new` tokens, one at a time, for each of B rows, as a `Work`.

    Each step reads every weight of a matrix product, of `element` bytes, and the cached keys and values of all earlier
    tokens, of `cache_element` bytes. The result's `bound` is "read": the speed limit for the bytes is the read
    bandwidth. `prompt` is the number of tokens in each row of the cache at first. Reading the prompt itself is not
    counted.
    """
    C, L = config.hidden_dim, config.num_layers
    weights = int(element * matrix_parameters(config))
    seen = sum(prompt + i for i in range(new))  # tokens in the cache, added up over the steps
    cache = cache_element * 2 * L * C * B * seen
    flops = 2 * B * new * matrix_parameters(config) + 4 * L * C * B * seen
    return Work(new * weights + cache, flops, "read")
