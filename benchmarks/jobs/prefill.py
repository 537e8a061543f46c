"""Benchmark of prefill: the first token after a prompt, against a plain model, transformers and inference engines."""

from collections.abc import Iterator

from benchmarks.engines.peers import ENGINE_PEERS, rivals
from benchmarks.models.counts import prompt
from benchmarks.models.generating import PACKED_PEERS, PEERS
from benchmarks.topic import F32, Case, Target, Topic, Work, every, ids, main_dtype

JOB = "prefill"


def inputs(case: Case) -> tuple:
    """Return a tuple of one tensor: the prompt, random int64 tokens [B, T]; B and T are sizes of the case."""
    return (ids(case, case.config.num_tokens, case.size["B"], case.size["T"]),)


def work(case: Case, passes: str) -> Work:
    """Return the least bytes and FLOPs of reading the prompt, as a `Work`; `passes` is always "step" and is not used.

    Every weight is read once, in the case's dtype. The output layer is applied to the last position of each row only.
    """
    return prompt(case.config, case.size["B"], case.size["T"], case.dtype.itemsize)


def cases(device: str) -> Iterator[Case]:
    """Yield the cases to benchmark on a device, "cpu" or "cuda".

    They are GPT-2 124M with 1 prompt of 128 tokens, 1 of 512, and 8 of 128. All are in bfloat16 on a GPU, and in
    float32 on a CPU. If the CPU has instructions for bfloat16, it also gets the second and third case in bfloat16. The
    first case is the only one of a quick run.
    """
    yield from every(JOB, device, [{"model": "gpt2", "B": 1, "T": 128}], main_dtype(device), quick=True)
    yield from every(JOB, device, [{"model": "gpt2", "B": 1, "T": 512}, {"model": "gpt2", "B": 8, "T": 128}])


def targets(case: Case) -> Iterator[Target]:
    """Yield the speed targets of a case.

    On a CPU in float32, gpt_fast must be 1.05 times as fast as the fastest inference engine of the same or a higher
    precision. There is such a target for gpt_fast's weights in float32, in bfloat16 and in int8. In runs with --busy,
    another process keeps a core busy. gpt_fast must then be at least as fast as the engine. It must also reach 80 % of
    the speed that it has without that process on one thread less. Other cases have no target.
    """
    if case.device == "cpu" and case.dtype == F32:
        yield from rivals({"float32": 1.05, "bfloat16": 1.05, "int8": 1.05})


TOPIC = Topic(
    JOB, "decode", inputs, work, cases, (PEERS[0], *PACKED_PEERS, *PEERS[1:], *ENGINE_PEERS),
    title="prefill: the first token after a prompt",
    passes=("step",),
    targets=targets,
    tests=("model/test_model.py", "generation/test_generation.py", "model/test_devices.py"),
    tokens=lambda case: case.size["B"] * case.size["T"],
)  # fmt: skip
