"""Benchmark of `generate`: a prompt and new tokens, greedily, against a plain model, transformers and engines."""

from collections.abc import Iterator

from benchmarks.engines.peers import ENGINE_PEERS, rivals
from benchmarks.models.counts import decoding
from benchmarks.models.generating import PACKED_PEERS, PEERS
from benchmarks.topic import F32, FLOOR, Case, Target, Topic, Work, every, ids, main_dtype

JOB = "generation"


def inputs(case: Case) -> tuple:
    """Return a tuple of one tensor: the prompt, random int64 tokens [B, T], where T is the case's size "prompt"."""
    return (ids(case, case.config.num_tokens, case.size["B"], case.size["prompt"]),)


def work(case: Case, passes: str) -> Work:
    """Return the least bytes and FLOPs of generating the case's new tokens, as a `Work`, without reading its prompt.

    Each step reads all weights and all cached keys and values, which are in the case's dtype. `passes` is always "step"
    and is not used.
    """
    size, element = case.size, case.dtype.itemsize
    return decoding(case.config, size["B"], size["prompt"], size["new"], element, element)


def cases(device: str) -> Iterator[Case]:
    """Yield the cases to benchmark on a device, "cpu" or "cuda": a prompt of 16 tokens, then 32 to 128 new tokens.

    They are GPT-2 124M in the dtype of training on the device. The batch size is 1 or 8, or also 32 on a CPU. On a GPU
    there is also GPT-2 XL at batch 1. Batch 1 with 32 new tokens is the case of a quick run.
    """
    yield from every(JOB, device, [{"model": "gpt2", "B": 1, "prompt": 16, "new": 32}], main_dtype(device), quick=True)
    batches, new = ((1, 8), 128) if device == "cuda" else ((1, 8, 32), 64)
    sizes = [{"model": "gpt2", "B": B, "prompt": 16, "new": new} for B in batches]
    yield from every(JOB, device, sizes, main_dtype(device))
    if device == "cuda":
        yield from every(JOB, device, [{"model": "gpt2-xl", "B": 1, "prompt": 16, "new": 128}])


def targets(case: Case) -> Iterator[Target]:
    """Yield the speed targets of a case.

    On a GPU at batch 1, gpt_fast must reach a share of the measured speed limit. On a CPU in float32 there are targets
    for gpt_fast with weights in float32, bfloat16 and int8. Each must be 1.0 to 1.3 times as fast as the fastest
    inference engine of the same or a higher precision. Further targets of the CPU cases are for runs beside a busy
    process. Other cases have no target.
    """
    if case.device == "cuda" and case.size["B"] == 1:
        yield Target(FLOOR, 0.8 if case.size["model"] == "gpt2-xl" else 0.5)
    if case.device == "cpu" and case.dtype == F32:
        one = case.size["B"] == 1
        low = 1.3 if one else 1.1
        yield from rivals({"float32": 1.0 if one else 1.1, "bfloat16": low, "int8": low})


TOPIC = Topic(
    JOB, "decode", inputs, work, cases, (PEERS[0], *PACKED_PEERS, *PEERS[1:], *ENGINE_PEERS),
    title="decoding, greedily, prompt included",
    passes=("step",),
    targets=targets,
    tests=("model/test_model.py", "generation/test_generation.py", "model/test_devices.py"),
    tokens=lambda case: case.size["B"] * case.size["new"],
)  # fmt: skip
