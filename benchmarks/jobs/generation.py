"""Benchmark of `generate`: a prompt and new tokens, greedily, against a plain model and transformers."""

from collections.abc import Iterator

from benchmarks.models.counts import decoding
from benchmarks.models.generating import PACKED_PEERS, PEERS
from benchmarks.topic import FLOOR, Case, Target, Topic, Work, every, ids, main_dtype

JOB = "generation"


def inputs(case: Case) -> tuple:
    return (ids(case, case.config.num_tokens, case.size["B"], case.size["prompt"]),)


def work(case: Case, passes: str) -> Work:
    size, element = case.size, case.dtype.itemsize
    return decoding(case.config, size["B"], size["prompt"], size["new"], element, element)


def cases(device: str) -> Iterator[Case]:
    yield from every(JOB, device, [{"model": "gpt2", "B": 1, "prompt": 16, "new": 32}], main_dtype(device), quick=True)
    sizes = [{"model": "gpt2", "B": B, "prompt": 16, "new": 128} for B in (1, 8)]
    yield from every(JOB, device, sizes, main_dtype(device))
    if device == "cuda":
        yield from every(JOB, device, [{"model": "gpt2-xl", "B": 1, "prompt": 16, "new": 128}])


def targets(case: Case) -> Iterator[Target]:
    if case.device == "cuda" and case.size["B"] == 1:
        yield Target(FLOOR, 0.8 if case.size["model"] == "gpt2-xl" else 0.5)


TOPIC = Topic(
    JOB, "decode", inputs, work, cases, (PEERS[0], *PACKED_PEERS, *PEERS[1:]),
    title="decoding, greedily, prompt included",
    passes=("step",),
    targets=targets,
    tests=("model/test_model.py", "generation/test_generation.py", "model/test_devices.py"),
    tokens=lambda case: case.size["B"] * case.size["new"],
)  # fmt: skip
