"""Benchmark of a training step: GPT-2 by size, batch and depth, against a plain model and transformers."""

from collections.abc import Iterator

from torch import nn

import gpt_fast
from benchmarks.models.counts import training
from benchmarks.models.job import hf_model
from benchmarks.models.plain_gpt import PlainGPT
from benchmarks.models.training import Loss, pair_bytes, training_peers
from benchmarks.topic import (
    BF16,
    F32,
    FLOOR,
    OURS,
    TOKENS,
    Case,
    Target,
    Topic,
    Work,
    every,
    ids,
    is_slow,
    main_dtype,
)

JOB = "training_step"
GROWTH = (OURS, "plain", "Hugging Face sdpa")
ACCELERATED = ("Hugging Face sdpa", "Hugging Face accelerated")


def inputs(case: Case) -> tuple:
    """Return a tuple of one tensor: random int64 tokens [B, T], which are also the labels.

    B and T are sizes of the case.
    """
    return (ids(case, case.config.num_tokens, case.size["B"], case.size["T"]),)


def tokens(case: Case) -> int:
    """Return how many tokens one training step reads: B × T, the case's sizes."""
    return case.size["B"] * case.size["T"]


def work(case: Case, passes: str) -> Work:
    """Return the least bytes and FLOPs of one training step, as a `Work`; `passes` is always "step" and is not used.

    AdamW reads and writes weights, gradients and moments: these are the bytes. A step has the FLOPs of three forward
    passes, with the output layer at every position.
    """
    return training(case.config, case.size["B"], case.size["T"], output_rows=tokens(case))


def cases(device: str) -> Iterator[Case]:
    """Yield the cases to benchmark on a device, "cpu" or "cuda".

    They are GPT-2 124M with and without dropout, the larger GPT-2s, a series over the batch size and a series over the
    number of layers. GPT-2 124M at its smallest batch is also in a quick run. A CPU without bfloat16 instructions also
    gets small bfloat16 cases. The cases of the two series, those small bfloat16 cases, and the larger GPT-2s on a CPU
    are measured on a few implementations only.
    """
    if device == "cuda":
        yield from every(JOB, device, [{"model": "gpt2", "B": 8, "T": 1024}], dropouts=(0.1, 0.0), quick=True)
        yield from every(JOB, device, [{"model": "gpt2", "B": 32, "T": 1024}], dropouts=(0.1, 0.0))
        for model, B in (("gpt2-medium", 16), ("gpt2-large", 8), ("gpt2-xl", 4)):
            yield from every(JOB, device, [{"model": model, "B": B, "T": 1024}], dropouts=(0.1, 0.0))
        batches, layers, T = [1, 2, 4, 8, 16, 32], [2, 4, 8, 12, 24], 1024
    else:
        yield from every(JOB, device, [{"model": "gpt2", "B": 1, "T": 128}], (F32,), (0.1, 0.0), quick=True)
        yield from every(JOB, device, [{"model": "gpt2", "B": 4, "T": 256}], dropouts=(0.1, 0.0))
        if is_slow(device, BF16):  # a part of the layers: PyTorch's output layer alone takes minutes
            two = [{"model": "gpt2", "layers": 2, "B": 4, "T": 256}]
            yield from every(JOB, device, two, (BF16,), (0.1, 0.0), peers=(OURS, "Hugging Face sdpa"))
            one = [{"model": "gpt2", "layers": 1, "B": 4, "T": 128}]
            yield from every(JOB, device, one, (BF16,), (0.1,), peers=ACCELERATED)
        batches, layers, T = [1, 2, 4, 8], [1, 2, 4, 8], 128
        larger = [{"model": model, "B": 1, "T": 128} for model in ("gpt2-medium", "gpt2-large", "gpt2-xl")]
        yield from every(JOB, device, larger, (F32,), (0.1,), peers=GROWTH)
    by_batch = [{"model": "gpt2", "layers": 2, "B": B, "T": T} for B in batches]
    yield from every(JOB, device, by_batch, main_dtype(device), (0.1,), series="B", peers=GROWTH)
    by_depth = [{"model": "gpt2", "layers": L, "B": 2, "T": T // 2} for L in layers]
    yield from every(JOB, device, by_depth, main_dtype(device), (0.1,), series="layers", peers=GROWTH)


def targets(case: Case) -> Iterator[Target]:
    """Yield the speed targets of a case.

    On a GPU, GPT-2 124M at T = 1024 has two targets. gpt_fast's model must reach 550,000 tokens a second with dropout,
    and 600,000 without. It must also be 1.25 times as fast as the compiled `PlainGPT`.

    On a CPU, GPT-2 124M at batch 4 has these targets. gpt_fast's model must reach 85 % of the speed limit, which
    follows from the step's FLOPs and bytes and the rates measured in the same run. In float32, gpt_fast's model must
    also be faster than transformers' model by at least these factors:

    - "eager" attention: 1.4 without dropout, 1.75 with dropout.
    - "sdpa" attention: 1.2 without dropout, 2 with dropout.
    - "sdpa" attention, compiled: 1.1 with or without dropout.
    - "sdpa" attention, after `gpt_fast.accelerate`: 1 with or without dropout.

    In float32 with dropout, `gpt_fast.accelerate` must also make transformers' model with "sdpa" 1.8 times as fast.

    On a CPU, the bfloat16 cases with the size "layers" are GPT-2s with fewer layers, and have two other targets.
    gpt_fast's model must be 1.25 times as fast as transformers' model with "sdpa". `gpt_fast.accelerate` must make
    transformers' model with "sdpa" 1.2 times as fast.

    All other cases have no target.
    """
    small = case.size["model"] == "gpt2" and "layers" not in case.size
    if case.device == "cuda":
        if small and case.size["T"] == 1024:
            yield Target(TOKENS, 550_000 if case.dropout else 600_000)
            yield Target("plain compiled", 1.25)
    elif case.dtype == BF16 and "layers" in case.size:
        yield Target("Hugging Face sdpa", 1.25)
        yield Target("Hugging Face sdpa", 1.2, who="Hugging Face accelerated")
    elif small and case.size["B"] == 4:
        yield Target(FLOOR, 0.85)
        if case.dtype == F32:
            yield Target("Hugging Face eager", 1.75 if case.dropout else 1.4)
            yield Target("Hugging Face sdpa", 2.0 if case.dropout else 1.2)
            yield Target("Hugging Face compiled", 1.1)
            yield Target("Hugging Face accelerated", 1.0)
            if case.dropout:
                yield Target("Hugging Face sdpa", 1.8, who="Hugging Face accelerated")


# ---- implementations


def ours(case: Case) -> tuple[nn.Module, Loss]:
    """Return (gpt_fast's language model, a function from tokens [B, T] to its mean loss of the next tokens).

    The model has random float32 weights, and the configuration and device of `case`.
    """
    model = gpt_fast.GPTForCausalLM(case.config).to(case.device)
    return model, lambda tokens: model(tokens, tokens).loss


def plain(case: Case) -> tuple[nn.Module, Loss]:
    """Return (the language model in plain PyTorch, a function from tokens [B, T] to its mean loss of the next tokens).

    The model has random float32 weights, and the configuration and device of `case`.
    """
    model = PlainGPT(case.config).to(case.device)
    return model, model.loss


def hugging_face(attention: str, case: Case) -> tuple[nn.Module, Loss]:
    """Return (transformers' language model, a function from tokens [B, T] to its mean loss of the next tokens).

    The model has random float32 weights, and the configuration and device of `case`. `attention` is transformers'
    attention implementation, "eager" or "sdpa".
    """
    model = hf_model("GPT2LMHeadModel", case, attention).to(case.device)
    return model, lambda tokens: model(tokens, labels=tokens, use_cache=False).loss


TOPIC = Topic(
    JOB, "train", inputs, work, cases,
    peers=training_peers(ours, plain, hugging_face),
    title="training step (forward, backward, AdamW)",
    passes=("step",),
    targets=targets,
    tests=("model/test_model.py", "model/test_heads.py", "model/test_devices.py"),
    tokens=tokens,
    pair_bytes=pair_bytes,
)  # fmt: skip
