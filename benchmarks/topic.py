"""The suite's vocabulary: topics, cases, implementations, the work of a case, and its targets.

A topic is an op or a whole-model job. An implementation runs a case. A case has work that no implementation can avoid,
and a speed to reach. `benchmarks/ops/<op>.py` and `benchmarks/jobs/<job>.py` each define one `TOPIC` (or one `STUDY`)
in these words.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from benchmarks.measure.floors import bf16_products
from gpt_fast import GPTConfig

OURS = "gpt_fast"
FLOOR, TOKENS = "the floor", "tokens/s"  # what a target can name in place of an implementation
LEFT = "quiet, with one thread less"  # after ours in a busy run: measured without the busy process, on the cores left
SUITES = ("ops", "train", "decode")
# forward: records for backward. training: forward and backward. inference: forward without autograd. step: one call of
# a job.
PASSES = ("forward", "backward", "training", "inference", "step")
F32, BF16 = torch.float32, torch.bfloat16

Sizes = dict[str, Any]
Function = Callable[..., Any]
Launches = Iterator[tuple[str, Callable[[], object]]]  # a label, and a call that launches kernels


@dataclass(frozen=True)
class Work:
    """Bytes and FLOPs of one call that no implementation can avoid.

    Bytes: each input is read once, each output written once, intermediates not at all. FLOPs: those of matrix
    products, two for each multiply-add; of attention only the pairs that the causal mask leaves.
    """

    bytes: int
    flops: int = 0
    bound: str = "copy"  # the bandwidth for the bytes: "copy", or "read" if nearly all of them are read
    product: str = ""  # a further dtype whose matrix rate may bound the case


@dataclass(frozen=True)
class Case:
    """One topic at one shape, in one dtype, on one device."""

    topic: str
    device: str
    sizes: tuple[tuple[str, Any], ...]
    dtype: torch.dtype
    dropout: float = 0.0
    series: str = ""  # the size that grows from case to case; a plot shows the cost over it
    quick: bool = False  # part of a quick run
    peers: tuple[str, ...] = ()  # the only implementations to measure; all if empty

    @property
    def name(self) -> str:
        """Return the case as text: sizes, dtype and any dropout, such as "M=1024 N=768 float32 dropout=0.1"."""
        sizes = " ".join(f"{size}={value}" for size, value in self.sizes)
        dropout = f" dropout={self.dropout:g}" if self.dropout else ""
        return f"{sizes} {self.dtype_name}{dropout}"

    @property
    def dtype_name(self) -> str:
        """Return the dtype as text, such as "float32"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def size(self) -> Sizes:
        """Return the sizes by name, such as {"M": 1024, "N": 768}."""
        return dict(self.sizes)

    @property
    def config(self) -> GPTConfig:
        """Return the model's configuration; only the cases of whole-model jobs have one.

        It is the preset that the size "model" names, with the case's dropout. The size "layers", if the case has it,
        replaces the preset's number of layers. Raise `KeyError` if the case has no size "model".
        """
        layers = {"num_layers": self.size["layers"]} if "layers" in self.size else {}
        return GPTConfig.preset(self.size["model"], dropout=self.dropout, **layers)


@dataclass(frozen=True)
class Peer:
    """An implementation of a topic: ours, the reference, or another library's."""

    name: str
    build: Callable[[Case], Function]  # returns the function, which takes the case's inputs
    missing: Callable[[Case], str | None] = lambda case: None  # the reason why it cannot run a case here
    compiles: bool = False  # by torch.compile, which takes too long for whole models in a quick run
    same: bool = True  # it computes the whole op
    rival: bool = True  # it counts in "speed against the fastest other"


@dataclass(frozen=True)
class Target:
    """A speed to reach: `peer` takes at least `times` as long as `who`.

    With several peers the fastest that ran counts. FLOOR as peer: `who` reaches the share `times` of the floor. TOKENS:
    `who` reaches `times` tokens a second.
    """

    peer: str | tuple[str, ...]
    times: float
    passes: tuple[str, ...] = ()  # all passes together if empty
    who: str = OURS
    busy: bool = False  # of a run beside a busy process; else of a quiet one
    products: str = ""  # the instructions that the device must have, as its facts name them


@dataclass(frozen=True)
class Topic:
    """An op or a job: its inputs, its unavoidable work, its implementations and its cases."""

    name: str
    suite: str
    inputs: Callable[[Case], tuple]  # positional arguments; those to differentiate require grad
    work: Callable[[Case, str], Work]  # by pass
    cases: Callable[[str], Iterator[Case]]  # by device type
    peers: tuple[Peer, ...]  # ours first
    title: str = ""
    passes: tuple[str, ...] = ("forward", "backward")
    targets: Callable[[Case], Iterable[Target]] = lambda case: ()
    small: tuple[Sizes, ...] = ()  # for sanitizers and tests: a tail in every dimension
    tiny: Sizes | None = None  # a few elements, to measure what a call costs before any work
    dropouts: tuple[float, ...] = (0.0,)  # of the small cases
    tests: tuple[str, ...] = ()  # files in tests/ that must pass first; tests/ops/test_<name>.py if empty
    launches: Callable[[ModuleType], Launches] | None = None  # what the codegen gate compiles, given kernels/<op>.py
    tokens: Callable[[Case], int] | None = None  # how many tokens one call of a job works through
    pair_bytes: Callable[[Case], int] | None = None  # memory of two implementations, if all do not fit at once

    def small_cases(self, device: str, dtype: torch.dtype = F32) -> Iterator[Case]:
        """Yield a `Case` for each of the topic's `small` shapes with each of its `dropouts`, for tests and sanitizers.

        `device` is "cpu" or "cuda". All cases have the dtype `dtype`.
        """
        for sizes in self.small:
            for dropout in self.dropouts:
                yield Case(self.name, device, tuple(sizes.items()), dtype, dropout)


@dataclass(frozen=True)
class Study:
    """A measurement with a record and a table of its own, for what is not a comparison case by case."""

    name: str
    suite: str
    measure: Callable[[str, bool, bool], dict[str, Any]]  # (device, quick, cpu_time) → what the record adds
    lines: Callable[[dict[str, Any]], list[str]]  # the record as Markdown, under a heading of level 2
    fields: tuple[str, ...]  # names that every record has
    picture: Callable[[dict[str, Any]], Any] | None = None  # the record as a matplotlib figure
    caption: str = ""  # of the picture
    devices: tuple[str, ...] = ("cpu", "cuda")
    tests: tuple[str, ...] = ()
    timed: bool = True  # its figures are times, so that a busy process beside it would change them


def product_dtypes(device: str) -> tuple[torch.dtype, ...]:
    """Return the dtypes in which matrix products are benchmarked on a device, "cpu" or "cuda".

    On a GPU that is bfloat16. On a CPU it is float32, followed by bfloat16 if the CPU has instructions for it.
    """
    return (BF16,) if device == "cuda" else (F32, BF16)[: 1 + bf16_products(device)]


def main_dtype(device: str) -> tuple[torch.dtype, ...]:
    """Return a tuple of one dtype, that of training on the device: bfloat16 on "cuda", float32 on "cpu"."""
    return product_dtypes(device)[:1]


def is_slow(device: str, dtype: torch.dtype) -> bool:
    """Return True if `dtype` is bfloat16 and `device` is a CPU without instructions for bfloat16 products.

    PyTorch's products of whole models take minutes there.
    """
    return dtype == BF16 and not bf16_products(device)


def every(
    topic: str,
    device: str,
    sizes: list[Sizes],
    dtypes: tuple[torch.dtype, ...] | None = None,
    dropouts: tuple[float, ...] = (0.0,),
    **options: Any,
) -> Iterator[Case]:
    """Yield a case of `topic` for every combination of sizes, dtypes and dropout probabilities, in this nesting order.

    `topic` is the topic's name, and `device` is "cpu" or "cuda". An entry of `sizes` maps names to values, such as
    {"M": 1024, "N": 768}. `dtypes` is by default bfloat16 on a GPU, and on a CPU float32, plus bfloat16 if the CPU has
    instructions for it. `options` are other fields of `Case`, such as `quick` and `peers`.
    """
    for size in sizes:
        for dtype in product_dtypes(device) if dtypes is None else dtypes:
            for dropout in dropouts:
                yield Case(topic, device, tuple(size.items()), dtype, dropout, **options)


def ids(case: Case, bound: int, *shape: int) -> torch.Tensor:
    """Return random int64 integers from 0 to `bound` - 1, of `shape`, on the case's device.

    They serve as token ids, labels or targets. PyTorch's global generator draws them.
    """
    return torch.randint(bound, shape, device=case.device)
