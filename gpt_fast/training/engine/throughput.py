"""Share of a device that a training run uses: model FLOPs per token, and the rate to which they are compared."""

from __future__ import annotations

import time

import torch

from ...config import GPTConfig

# Dense matrix products in bfloat16 and float16, as the makers' data sheets give them.
PUBLISHED = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
SIDES, REPEATS = (256, 512, 1024), 5
LONGEST = 0.5  # seconds of one product


def flops_per_token(config: GPTConfig, parameters: int, causal: bool) -> float:
    """Return the FLOPs per token of forward and backward, `6 N + 12 L C T`; attention's term is halved if `causal`.

    The model has L layers, C hidden dimensions and T positions. N is `parameters`, the number of its parameters,
    without the position embedding, and without the token embedding unless it is the output layer too (`config.tied`).
    Recomputed activations do not count, so activation checkpointing lowers the MFU. Source: Kaplan et al. (2020),
    arXiv:2001.08361; Chowdhery et al. (2022), arXiv:2204.02311, appendix B.
    """
    N = parameters - config.seq_len * config.hidden_dim - (0 if config.tied else config.num_tokens * config.hidden_dim)
    attention = 12 * config.num_layers * config.hidden_dim * config.seq_len
    return 6 * N + (attention / 2 if causal else attention)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the peak rate of one device for matrix products in `dtype`, in FLOP/s.

    For 16 bits on an A100, H100 or H200 it is the published rate, else a measured one. The measured rate is the best of
    products of square matrices with 256, 512 and 1024 rows in `dtype`, each size five times. Measuring ends before a
    size whose product, at the best rate so far, would take longer than half a second. This happens in 16 bits on a CPU
    without instructions for them. Measuring draws random numbers from torch's generator of the device.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for known, rate in PUBLISHED.items():
            if known in name:
                return rate
    best = 0.0
    for side in SIDES:
        a = torch.randn(side, side, device=device, dtype=dtype)
        for _ in range(REPEATS):
            began = time.perf_counter()
            a @ a
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, 2 * side**3 / (time.perf_counter() - began))
        if 2 * (2 * side) ** 3 / best > LONGEST:
            break
    return best
