"""Benchmark of a training step of GPT-2s that people write themselves, before and after `gpt_fast.accelerate`."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.models.counts import training
from benchmarks.models.handwritten import MODELS, Sizes, loss_of
from benchmarks.models.training import Loss, pair_bytes, written_peers
from benchmarks.topic import BF16, F32, Case, Target, Topic, Work, every, ids

JOB = "handwritten_step"


def inputs(case: Case) -> tuple:
    """Return a tuple of one tensor: random int64 tokens [B, T + 1]. The first T are read, the last T are the labels."""
    return (ids(case, case.config.num_tokens, case.size["B"], case.size["T"] + 1),)


def tokens(case: Case) -> int:
    """Return how many tokens one training step reads: B × T, the case's sizes."""
    return case.size["B"] * case.size["T"]


def work(case: Case, passes: str) -> Work:
    """Return the least bytes and FLOPs of one training step, as a `Work`; `passes` is always "step" and is not used.

    All hand-written models count as GPT-2 does: the bytes of AdamW's weights, gradients and moments, and the FLOPs of
    three forward passes.
    """
    return training(case.config, case.size["B"], case.size["T"], output_rows=tokens(case))


def cases(device: str) -> Iterator[Case]:
    """Yield two cases for each hand-written model in MODELS, with and without dropout, on "cpu" or "cuda".

    The case's size "code" is the model's key in MODELS. The models have GPT-2 124M's vocabulary, width and heads: on a
    GPU in bfloat16 with all layers, on a CPU in float32 with 2 layers. The cases of "packed" and "separate" are also in
    a quick run.
    """
    for code in MODELS:
        if device == "cuda":
            size = {"model": "gpt2", "code": code, "B": 8, "T": 1023}
            yield from every(JOB, device, [size], (BF16,), (0.1, 0.0), quick=code in ("packed", "separate"))
        else:
            size = {"model": "gpt2", "layers": 2, "code": code, "B": 4, "T": 255}
            yield from every(JOB, device, [size], (F32,), (0.1, 0.0), quick=code in ("packed", "separate"))


def targets(case: Case) -> Iterator[Target]:
    """Yield the one speed target of every case: the model after `gpt_fast.accelerate` is at least as fast as before."""
    yield Target("as written", 1.0)


def as_written(case: Case) -> tuple[nn.Module, Loss]:
    """Return (the hand-written model of a case, a function from tokens [B, T + 1] to its loss).

    The case's size "code" is the model's key in MODELS, by default "packed". The model is on the case's device, and its
    float32 weights are drawn with seed 0.
    """
    config = case.config
    sizes = Sizes(config.num_tokens, config.seq_len, config.hidden_dim, config.num_heads, config.num_layers)
    torch.manual_seed(0)
    model = MODELS[case.size.get("code", "packed")](sizes, case.dropout).to(case.device)
    return model, partial(_loss, model)


def _loss(model: nn.Module, row: Tensor) -> Tensor:
    """Return the model's mean loss on tokens `row` [B, T + 1]: the first T are read, the last T are the labels."""
    return loss_of(model, row[:, :-1], row[:, 1:].contiguous())


TOPIC = Topic(
    JOB, "train", inputs, work, cases,
    peers=written_peers(as_written),
    title="training step of a model written by hand",
    passes=("step",),
    targets=targets,
    tests=("integrations/test_handwritten.py", "model/test_devices.py"),
    tokens=tokens,
    pair_bytes=pair_bytes,
)  # fmt: skip
