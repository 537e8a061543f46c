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

    The cases are in bfloat16 on a GPU, and in float32 on a CPU. The first case, the only one of a quick run, is GPT-2
    124M at batch 1 with 32 new tokens. On a GPU the others are GPT-2 124M at batch sizes 1 and 8, and GPT-2 XL at batch
    1, all with 128 new tokens. On a CPU they are GPT-2 124M at batch sizes 1, 8 and 32, with 64 new tokens.
    """
    yield from every(JOB, device, [{"model": "gpt2", "B": 1, "prompt": 16, "new": 32}], main_dtype(device), quick=True)
    batches, new = ((1, 8), 128) if device == "cuda" else ((1, 8, 32), 64)
    sizes = [{"model": "gpt2", "B": B, "prompt": 16, "new": new} for B in batches]
    yield from every(JOB, device, sizes, main_dtype(device))
    if device == "cuda":
        yield from every(JOB, device, [{"model": "gpt2-xl", "B": 1, "prompt": 16, "new": 128}])


def targets(case: Case) -> Iterator[Target]:
    """Yield the speed targets of a case.

    On a GPU at batch 1, gpt_fast must reach 50 % of the measured speed limit, and 80 % with GPT-2 XL.

    On a CPU in float32, the targets compare gpt_fast with the fastest inference engine of the same or a higher
    precision. At batch 1 gpt_fast must be 1.3 times as fast with bfloat16 and int8 weights, and at least as fast with
    float32 weights. At larger batches it must be 1.1 times as fast with each of these weights.

    In runs with --busy, another process keeps a core busy. gpt_fast must then be at least as fast as the engine. It
    must also reach 80 % of the speed that it has without that process on one thread less.

    Other cases have no target.
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
