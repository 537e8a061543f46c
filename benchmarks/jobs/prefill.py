"""Benchmark of prefill: the first token after a prompt, against a plain model and transformers."""

from collections.abc import Iterator

from benchmarks.models.counts import forward_flops, matrix_parameters
from benchmarks.models.generating import PEERS
from benchmarks.topic import Case, Topic, Work, every, ids, main_dtype

JOB = "prefill"


def inputs(case: Case) -> tuple:
    return (ids(case, case.config.num_tokens, case.size["B"], case.size["T"]),)


def work(case: Case, passes: str) -> Work:
    """Count the layers on B × T tokens, and the output layer on the last of each row. Reads every weight once."""
    config, B, T = case.config, case.size["B"], case.size["T"]
    return Work(case.dtype.itemsize * matrix_parameters(config), forward_flops(config, B, T, B), "read")


def cases(device: str) -> Iterator[Case]:
    yield from every(JOB, device, [{"model": "gpt2", "B": 1, "T": 128}], main_dtype(device), quick=True)
    yield from every(JOB, device, [{"model": "gpt2", "B": 1, "T": 512}, {"model": "gpt2", "B": 8, "T": 128}])


TOPIC = Topic(
    JOB, "decode", inputs, work, cases, PEERS,
    title="prefill: the first token after a prompt",
    passes=("step",),
    tests=("model/test_model.py", "generation/test_generation.py", "model/test_devices.py"),
    tokens=lambda case: case.size["B"] * case.size["T"],
)  # fmt: skip
