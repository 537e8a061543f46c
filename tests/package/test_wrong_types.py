"""Test that every public function refuses an argument of a wrong type, naming the argument and what it expects."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import gpt_fast
from gpt_fast import GPT, DecodeSession, GPTConfig, GPTForCausalLM, GPTForSequenceClassification, generate, layers, ops

X, SEED = torch.randn(2, 3, 8), torch.tensor([1])
Q = torch.randn(1, 2, 3, 4)
TOKENS = torch.randint(5, (2, 3))
LENGTHS = torch.tensor([2, 3])
CONFIG = GPTConfig.preset("gpt2", num_tokens=41, hidden_dim=32, num_heads=2, num_layers=1, seq_len=16)
MODEL = GPTForCausalLM(CONFIG).eval()
CLASSIFIER = GPTForSequenceClassification(CONFIG).eval()
DROPOUT: dict[str, Any] = {"dropout_p": 0.1, "seed": SEED, "site": 0}
ATTENTION: dict[str, Any] = {"causal": True, "window": 2, "scale": 0.5, **DROPOUT}
NORM = {"weight": torch.ones(8), "bias": torch.ones(8), "eps": 1e-5}

CALLS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "layer_norm": (ops.layer_norm, {"x": X, **NORM}),
    "add_layer_norm": (ops.add_layer_norm, {"x": X, "residual": X, **NORM, **DROPOUT}),
    "mlp": (
        ops.mlp,
        {"x": X, "fc_weight": torch.randn(16, 8), "fc_bias": torch.randn(16), "proj_weight": torch.randn(8, 16),
         "proj_bias": torch.randn(8), "activation": "gelu", **DROPOUT},
    ),
    "linear": (ops.linear, {"x": X, "weight": torch.randn(4, 8), "bias": torch.randn(4)}),
    "attention": (
        ops.attention, {"q": Q, "k": Q, "v": Q, "mask": torch.ones(3, 3, dtype=torch.bool), **ATTENTION},
    ),
    "attention_qkv": (
        ops.attention_qkv, {"qkv": torch.randn(2, 3, 24), "num_heads": 2, "lengths": LENGTHS, **ATTENTION},
    ),
    "embedding": (
        ops.embedding,
        {"tokens": TOKENS, "token_weight": torch.randn(9, 8), "position_weight": torch.randn(7, 8),
         "positions": torch.tensor([0, 1, 2]), **DROPOUT},
    ),
    "linear_cross_entropy": (
        ops.linear_cross_entropy,
        {"x": X, "weight": torch.randn(9, 8), "target": TOKENS, "bias": torch.randn(9), "ignore_index": -100,
         "label_smoothing": 0.1, "reduction": "mean"},
    ),
    "decode_attention": (
        ops.decode_attention,
        {"q": torch.randn(1, 2, 4), "k_cache": Q, "v_cache": Q, "lengths": torch.tensor([2])},
    ),
    "serving": (ops.serving, {"op": "mlp", "device_type": "cpu"}),
    "generate": (
        generate,
        {"model": MODEL, "tokens": TOKENS, "max_new_tokens": 2, "temperature": 1.0, "top_k": 3, "top_p": 0.9,
         "min_p": 0.1, "repetition_penalty": 1.1, "logits_processors": [], "stop_tokens": [3], "seed": 1,
         "lengths": LENGTHS, "weights": "float32", "sliding": False},
    ),
    "score": (
        gpt_fast.score,
        {"model": MODEL, "inputs": TOKENS, "labels": TOKENS, "lengths": LENGTHS, "stride": 2, "batch_size": 2,
         "greedy": False},
    ),
    "score_mask": (gpt_fast.score, {"model": MODEL, "inputs": TOKENS, "key_mask": TOKENS == TOKENS}),
    "DecodeSession": (DecodeSession, {"model": MODEL, "batch": 1, "length": 8, "weights": "float32"}),
    "prefill": (DecodeSession(MODEL, batch=2).prefill, {"tokens": TOKENS, "lengths": LENGTHS}),
    "step": (DecodeSession(MODEL, batch=2).step, {"tokens": TOKENS[:, 0]}),
    "GPTForCausalLM": (
        MODEL,
        {"tokens": TOKENS, "labels": TOKENS, "lengths": LENGTHS, "logits": True, "loss_weights": torch.ones(1)},
    ),
    "masks": (MODEL, {"tokens": TOKENS, "key_mask": torch.ones(2, 3, dtype=torch.bool)}),
    "attention_mask": (MODEL, {"tokens": TOKENS, "attention_mask": torch.ones(2, 3, dtype=torch.int64)}),
    "GPTForSequenceClassification": (
        CLASSIFIER,
        {"tokens": TOKENS, "labels": torch.tensor([0, 1]), "lengths": LENGTHS, "loss_weights": torch.ones(1)},
    ),
    "loss_counts": (MODEL.loss_counts, {"tokens": TOKENS, "labels": TOKENS, "lengths": LENGTHS}),
    "GPT_loss": (GPT(5, 8, 2, 1, 4, 0.0).loss, {"tokens": TOKENS, "labels": TOKENS, "lengths": LENGTHS}),
    "head_of": (GPTForCausalLM, {"config": CONFIG}),
    "GPTConfig": (GPTConfig, CONFIG.to_dict()),
    "preset": (GPTConfig.preset, {"name": "gpt2", "dropout": 0.1}),
    "GPT": (
        GPT, {"num_tokens": 5, "hidden_dim": 8, "num_heads": 2, "num_layers": 1, "seq_len": 4, "dropout": 0.1},
    ),
    "MLP": (layers.MLP, {"hidden_dim": 8, "ff_dim": 8, "activation": "relu", "dropout": 0.1}),
    "accelerate": (gpt_fast.accelerate, {"model": MODEL}),
    "restore": (gpt_fast.restore, {"model": MODEL}),
    "from_pretrained": (GPTForCausalLM.from_pretrained, {"directory": "nowhere"}),
    "from_nanogpt": (
        GPTForCausalLM.from_nanogpt,
        {"state_dict": {}, "model_args": {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 4, "vocab_size": 5,
                                          "bias": True, "dropout": 0.1}},
    ),
    "save_pretrained": (MODEL.save_pretrained, {"directory": "nowhere"}),
}  # fmt: skip
NOT_NUMBERS = [None, [1, 2], np.ones(2), "x", object(), {"a": 1}, True]
NOT_INTEGERS = [*NOT_NUMBERS, 3.5]
NOT_TENSORS = [*NOT_INTEGERS, -1]
# These arguments may be None: no tensor, no limit, or the default.
OPTIONAL = {
    "weight", "bias", "fc_bias", "proj_bias", "mask", "window", "scale", "positions", "lengths", "seed", "top_k",
    "top_p", "min_p", "stop_tokens", "weights", "length", "labels", "logits", "loss_weights", "key_mask",
    "attention_mask", "stride",
    "pad_token", "mask_token", "start_token", "delimiter_token", "extract_token", "end_token",
}  # fmt: skip


def wrong_values(function: str, name: str, value: Any) -> list[Any]:
    """Return values of wrong types for an argument of which `value` is a valid value."""
    if isinstance(value, bool):
        wrong = [one for one in NOT_TENSORS if one is not True]
    elif isinstance(value, list | tuple):
        wrong = [3.5, "x", object()]
    elif isinstance(value, int) or name.endswith("_token"):
        wrong = NOT_INTEGERS
    elif isinstance(value, float):
        wrong = NOT_NUMBERS
    else:
        wrong = NOT_TENSORS
    if name == "directory":
        wrong = [one for one in wrong if not isinstance(one, str)]
    is_optional = name in OPTIONAL and (function, name) not in REQUIRED
    return [one for one in wrong if not (one is None and is_optional)]


# (function, argument) for which None is not allowed, although other functions allow it for an argument of this name.
REQUIRED = {
    ("loss_counts", "labels"), ("linear", "weight"), ("linear_cross_entropy", "weight"),
    ("decode_attention", "lengths"), ("GPTConfig", "bias"),
}  # fmt: skip


@pytest.mark.parametrize("function", CALLS)
def test_a_wrong_type_is_named(function: str) -> None:
    """The error message is one line that names the argument, the library and what is expected."""
    call, arguments = CALLS[function]
    for name, value in arguments.items():
        if (function, name) == ("preset", "dropout"):
            continue  # for `preset`, None keeps the default
        for wrong in wrong_values(function, name, value):
            with pytest.raises((ValueError, TypeError)) as caught:
                call(**arguments | {name: wrong})
            message = str(caught.value)
            assert name in message and "\n" not in message, f"{name}={wrong!r}: {message}"
            assert "gpt_fast" in message or "GPT" in message, f"{name}={wrong!r}: {message}"
            assert "expected" in message, f"{name}={wrong!r}: {message}"
