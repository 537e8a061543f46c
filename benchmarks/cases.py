"""What is measured: one entry in TOPICS for each op and each whole-model job.

A topic is an op or a job, a case one shape of it. Inputs come from `benchmarks.inputs`, counts from
`benchmarks.counts`, the implementations that run a case from `benchmarks.peers` and `benchmarks.models`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import counts, inputs
from benchmarks.counts import Work
from benchmarks.timing import bf16_products
from gpt_fast import GPTConfig

Sizes = dict[str, Any]
SUITES = ("ops", "train", "decode")
# What is timed of a function: its forward pass recording for backward, its backward pass, both, its forward pass
# without autograd, or, of a job, all that one call does.
PASSES = ("forward", "backward", "training", "inference", "step")


@dataclass(frozen=True)
class Case:
    """One topic at one shape, in one dtype, on one device."""

    topic: str
    device: str
    sizes: tuple[tuple[str, Any], ...]
    dtype: torch.dtype
    dropout: float = 0.0
    series: str = ""  # the size that grows from case to case, where a plot shows how cost grows with it
    quick: bool = False  # part of a quick run
    peers: tuple[str, ...] = ()  # the only ones to measure; all where empty

    @property
    def name(self) -> str:
        sizes = " ".join(f"{size}={value}" for size, value in self.sizes)
        dropout = f" dropout={self.dropout:g}" if self.dropout else ""
        return f"{sizes} {self.dtype_name}{dropout}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def size(self) -> Sizes:
        return dict(self.sizes)

    @property
    def config(self) -> GPTConfig:
        """Of a whole-model job: the preset named in its sizes, with `layers` of them if given."""
        layers = {"num_layers": self.size["layers"]} if "layers" in self.size else {}
        return GPTConfig.preset(self.size["model"], dropout=self.dropout, **layers)


@dataclass(frozen=True)
class Topic:
    """How to feed an op or a job, what work it cannot avoid, and which cases of it are measured."""

    name: str
    suite: str
    inputs: Callable[[Case], tuple]  # positional arguments; those to differentiate require grad
    work: Callable[[Case, str], Work]  # by pass
    cases: Callable[[str], Iterator[Case]]  # by device type
    passes: tuple[str, ...] = ("forward", "backward")
    small: tuple[Sizes, ...] = ()  # for sanitizers and tests: a tail in every dimension
    tests: tuple[str, ...] = ()  # files in tests/ that must pass before a time is reported
    tokens: Callable[[Case], int] | None = None  # of a job: how many one call works through
    together: bool = True  # peers take turns; False where they do not fit into memory at once
    dropouts: tuple[float, ...] = field(default=(0.0,))  # of the small cases

    def small_cases(self, device: str, dtype: torch.dtype = torch.float32) -> Iterator[Case]:
        for sizes in self.small:
            for dropout in self.dropouts:
                yield Case(self.name, device, tuple(sizes.items()), dtype, dropout)


F32, BF16 = torch.float32, torch.bfloat16


def _dtypes(device: str) -> tuple[torch.dtype, ...]:
    """Of cases that consist of matrix products: bfloat16 where the device multiplies it, float32 on every CPU."""
    return (BF16,) if device == "cuda" else (F32, BF16)[: 1 + bf16_products(device)]


def _main(device: str) -> tuple[torch.dtype, ...]:
    """The dtype in which models are trained there."""
    return _dtypes(device)[:1]


def _cases(topic: str) -> Callable[..., Iterator[Case]]:
    """Makes every combination of sizes, dtypes and dropouts."""

    def make(
        device: str,
        sizes: list[Sizes],
        dtypes: tuple[torch.dtype, ...] | None = None,
        dropouts: tuple[float, ...] = (0.0,),
        **options: Any,
    ) -> Iterator[Case]:
        for size in sizes:
            for dtype in _dtypes(device) if dtypes is None else dtypes:
                for dropout in dropouts:
                    yield Case(topic, device, tuple(size.items()), dtype, dropout, **options)

    return make


def _attention(device: str) -> Iterator[Case]:
    make = _cases("attention")
    grows = ("gpt_fast", "sdpa math", "sdpa flash", "sdpa cudnn", "FlexAttention", "reference")
    lengths = (1024, 2048, 4096, 8192, 16384)
    if device == "cuda":  # 16k tokens in each: GPT-1's and GPT-2's head size, then 128
        for T in lengths:
            sizes = [{"B": 16384 // T, "H": 12, "T": T, "D": 64}]
            yield from make(device, sizes, dropouts=(0.0, 0.1), series="T", quick=T in (1024, 4096))
        for T in (1024, 4096):
            yield from make(device, [{"B": 16384 // T, "H": 6, "T": T, "D": 128}], dropouts=(0.0, 0.1))
        return
    for T in (256, 1024):
        yield from make(device, [{"B": 4, "H": 12, "T": T, "D": 64}], dropouts=(0.0, 0.1), quick=T == 256)
    yield from make(device, [{"B": 1, "H": 2, "T": T, "D": 64} for T in lengths], (F32,), series="T", peers=grows)


def _layer_norm(device: str) -> Iterator[Case]:
    make = _cases("layer_norm")
    if device == "cuda":  # GPT-2's four widths
        for N in (768, 1024, 1280, 1600):
            yield from make(device, [{"M": 32768, "N": N}], series="N", quick=N == 768)
        return
    yield from make(device, [{"M": 1024, "N": 768}], (F32, BF16), quick=True)  # stays in the cache
    yield from make(device, [{"M": 32768, "N": 768}], (F32, BF16))


def _add_layer_norm(device: str) -> Iterator[Case]:
    make = _cases("add_layer_norm")
    if device == "cuda":
        for N in (768, 1024, 1280, 1600):
            yield from make(device, [{"M": 32768, "N": N}], dropouts=(0.0, 0.1), series="N", quick=N == 768)
        return
    yield from make(device, [{"M": 1024, "N": 768}], (F32,), (0.0, 0.1), quick=True)
    yield from make(device, [{"M": 1024, "N": 768}], (BF16,), (0.1,))
    yield from make(device, [{"M": 32768, "N": 768}], (F32,), (0.1,))


def _mlp(device: str) -> Iterator[Case]:
    make = _cases("mlp")
    M = 16384 if device == "cuda" else 512
    for C in (768, 1024, 1280, 1600):
        yield from make(device, [{"M": M, "C": C}], _main(device), series="C", quick=C == 768)
    yield from make(device, [{"M": M, "C": 768}], dropouts=(0.1,))


def _linear_cross_entropy(device: str) -> Iterator[Case]:
    make = _cases("linear_cross_entropy")
    if device == "cuda":
        yield from make(device, [{"N": 16384, "C": 768, "V": 50257}], quick=True)
        yield from make(device, [{"N": 16384, "C": C, "V": 50257} for C in (1024, 1280, 1600)])
        sizes = [{"N": 8192, "C": 768, "V": V} for V in (8192, 16384, 32768, 65536, 131072)]
        yield from make(device, sizes, series="V")
        return
    yield from make(device, [{"N": 256, "C": 768, "V": 50257}], (F32,), quick=True)
    yield from make(device, [{"N": 1024, "C": 768, "V": 50257}])
    sizes = [{"N": 512, "C": 768, "V": V} for V in (8192, 16384, 32768, 65536, 131072)]
    yield from make(device, sizes, (F32,), series="V", peers=("gpt_fast", "torch", "reference"))


def _embedding(device: str) -> Iterator[Case]:
    make = _cases("embedding")
    size = {"B": 16 if device == "cuda" else 4, "T": 1024 if device == "cuda" else 256, "V": 50257, "C": 768}
    yield from make(device, [size], _main(device), (0.0, 0.1), quick=True)


def _decode_attention(device: str) -> Iterator[Case]:
    make = _cases("decode_attention")
    for B in (1, 8):
        for S in (256, 1024):
            yield from make(device, [{"B": B, "H": 12, "S": S, "D": 64}], _main(device), quick=S == 1024)


GROWTH = ("gpt_fast", "plain", "Hugging Face sdpa")


def _training_step(device: str) -> Iterator[Case]:
    make = _cases("training_step")
    if device == "cuda":
        yield from make(device, [{"model": "gpt2", "B": 8, "T": 1024}], dropouts=(0.1, 0.0), quick=True)
        yield from make(device, [{"model": "gpt2", "B": 32, "T": 1024}], dropouts=(0.1, 0.0))
        for model, B in (("gpt2-medium", 16), ("gpt2-large", 8), ("gpt2-xl", 4)):
            yield from make(device, [{"model": model, "B": B, "T": 1024}], dropouts=(0.1, 0.0))
        batches, layers, T = [1, 2, 4, 8, 16, 32], [2, 4, 8, 12, 24], 1024
    else:
        yield from make(device, [{"model": "gpt2", "B": 1, "T": 128}], (F32,), (0.1, 0.0), quick=True)
        yield from make(device, [{"model": "gpt2", "B": 4, "T": 256}], dropouts=(0.1, 0.0))
        batches, layers, T = [1, 2, 4, 8], [1, 2, 4, 8], 128
        larger = [{"model": model, "B": 1, "T": 128} for model in ("gpt2-medium", "gpt2-large", "gpt2-xl")]
        yield from make(device, larger, (F32,), (0.1,), peers=GROWTH)
    by_batch = [{"model": "gpt2", "layers": 2, "B": B, "T": T} for B in batches]
    yield from make(device, by_batch, _main(device), (0.1,), series="B", peers=GROWTH)
    by_depth = [{"model": "gpt2", "layers": L, "B": 2, "T": T // 2} for L in layers]
    yield from make(device, by_depth, _main(device), (0.1,), series="layers", peers=GROWTH)


def _finetuning_step(device: str) -> Iterator[Case]:
    make = _cases("finetuning_step")
    sizes = {"model": "gpt2", "B": 32, "T": 256} if device == "cuda" else {"model": "gpt2", "B": 4, "T": 64}
    yield from make(device, [sizes], _main(device), (0.1,), quick=True)


def _prefill(device: str) -> Iterator[Case]:
    make = _cases("prefill")
    yield from make(device, [{"model": "gpt2", "B": 1, "T": 128}], _main(device), quick=True)
    yield from make(device, [{"model": "gpt2", "B": 1, "T": 512}, {"model": "gpt2", "B": 8, "T": 128}])


def _generation(device: str) -> Iterator[Case]:
    make = _cases("generation")
    yield from make(device, [{"model": "gpt2", "B": 1, "prompt": 16, "new": 32}], _main(device), quick=True)
    sizes = [{"model": "gpt2", "B": B, "prompt": 16, "new": 128} for B in (1, 8)]
    yield from make(device, sizes, _main(device))
    if device == "cuda":
        yield from make(device, [{"model": "gpt2-xl", "B": 1, "prompt": 16, "new": 128}])


def _rows(case: Case) -> int:
    return case.size["B"] * case.size["T"]


TOPICS: dict[str, Topic] = {
    topic.name: topic
    for topic in (
        Topic(
            "attention",
            "ops",
            inputs.attention,
            lambda case, direction: counts.attention(**case.size, element=case.dtype.itemsize, direction=direction),
            _attention,
            small=({"B": 1, "H": 2, "T": 67, "D": 64}, {"B": 2, "H": 1, "T": 17, "D": 40}),
            dropouts=(0.0, 0.1),
        ),
        Topic(
            "layer_norm",
            "ops",
            inputs.layer_norm,
            lambda case, direction: counts.layer_norm(**case.size, element=case.dtype.itemsize, direction=direction),
            _layer_norm,
            small=({"M": 5, "N": 100}, {"M": 67, "N": 768}, {"M": 3, "N": 2050}),
        ),
        Topic(
            "add_layer_norm",
            "ops",
            inputs.add_layer_norm,
            lambda case, direction: counts.add_layer_norm(
                **case.size, element=case.dtype.itemsize, direction=direction, dropout=case.dropout
            ),
            _add_layer_norm,
            small=({"M": 5, "N": 100}, {"M": 67, "N": 768}),
            dropouts=(0.0, 0.1),
        ),
        Topic(
            "mlp",
            "ops",
            inputs.mlp,
            lambda case, direction: counts.mlp(
                **case.size, F=4 * case.size["C"], element=case.dtype.itemsize, direction=direction
            ),
            _mlp,
            small=({"M": 37, "C": 72}, {"M": 130, "C": 64}),
            dropouts=(0.0, 0.1),
        ),
        Topic(
            "linear_cross_entropy",
            "ops",
            inputs.linear_cross_entropy,
            lambda case, direction: counts.linear_cross_entropy(**case.size, element=case.dtype.itemsize),
            _linear_cross_entropy,
            passes=("training",),
            small=({"N": 33, "C": 72, "V": 301},),
        ),
        Topic(
            "embedding",
            "ops",
            inputs.embedding,
            lambda case, direction: counts.embedding(**case.size, element=case.dtype.itemsize, direction=direction),
            _embedding,
            small=({"B": 2, "T": 19, "V": 53, "C": 72},),
            dropouts=(0.0, 0.1),
        ),
        Topic(
            "decode_attention",
            "ops",
            inputs.decode_attention,
            lambda case, direction: counts.decode_attention(**case.size, element=case.dtype.itemsize),
            _decode_attention,
            passes=("inference",),
            small=({"B": 3, "H": 2, "S": 77, "D": 64},),
        ),
        Topic(
            "training_step",
            "train",
            inputs.training_step,
            lambda case, direction: counts.training_step(case.config, case.size["B"], case.size["T"]),
            _training_step,
            passes=("step",),
            tests=("model/test_model.py", "model/test_heads.py"),
            tokens=_rows,
            together=False,
        ),
        Topic(
            "finetuning_step",
            "train",
            inputs.finetuning_step,
            lambda case, direction: counts.finetuning_step(case.config, case.size["B"], case.size["T"]),
            _finetuning_step,
            passes=("step",),
            tests=("model/test_model.py", "model/test_heads.py"),
            tokens=_rows,
            together=False,
        ),
        Topic(
            "prefill",
            "decode",
            inputs.prefill,
            lambda case, direction: counts.prefill(case.config, case.size["B"], case.size["T"], case.dtype.itemsize),
            _prefill,
            passes=("step",),
            tests=("model/test_model.py", "generation/test_generation.py"),
            tokens=_rows,
        ),
        Topic(
            "generation",
            "decode",
            inputs.generation,
            lambda case, direction: counts.decode(
                case.config, case.size["B"], case.size["prompt"], case.size["new"], case.dtype.itemsize,
                case.dtype.itemsize,
            ),
            _generation,
            passes=("step",),
            tests=("model/test_model.py", "generation/test_generation.py"),
            tokens=lambda case: case.size["B"] * case.size["new"],
        ),
    )
}  # fmt: skip


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def select(suite: str) -> list[Topic]:
    """The topics of a suite, of all, or the one topic of that name. Raises `ValueError` for another name."""
    found = [topic for topic in TOPICS.values() if suite in ("all", topic.suite, topic.name)]
    if not found:
        raise ValueError(
            f"--suite {suite}: wanted {', '.join(SUITES)} or all, or one of {', '.join(TOPICS)}"
        )  # fmt: skip
    return found


def cases(topic: Topic, device: str, quick: bool = False) -> list[Case]:
    """A topic's cases. A quick run takes those marked for it."""
    return [case for case in topic.cases(device) if case.quick or not quick]
