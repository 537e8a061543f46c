"""Inference engines as peers of generation and prompts: OpenVINO, CTranslate2 and ONNX Runtime, where installed."""

import dataclasses
import importlib.util
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.engines import ctranslate2, onnxruntime, openvino
from benchmarks.engines.check import check
from benchmarks.models.generating import work_with
from benchmarks.models.job import Job
from benchmarks.topic import LEFT, OURS, Case, Function, Peer, Target
from gpt_fast import GPTConfig, GPTForCausalLM

ENGINES: dict[str, ModuleType] = {"OpenVINO": openvino, "CTranslate2": ctranslate2, "ONNX Runtime": onnxruntime}
PRECISIONS = ("float32", "bfloat16", "int8", "int4")  # from the highest
PRODUCTS = {"bfloat16": "bf16_products", "int8": "int8_products"}  # what a device must have for a target


def missing(case: Case, engine: str, precision: str) -> str | None:
    """Return the reason why an inference engine cannot run the case in this precision, or None if it can.

    A `Case` is a job at fixed sizes, dtype and device. `engine` is a key of ENGINES, such as "OpenVINO". `precision` is
    "float32", "bfloat16", "int8" or "int4". Engines run on CPUs only, on cases in float32 only, and only if their
    packages are installed. Then the engine's own module decides, by what the CPU can compute.
    """
    if case.device != "cpu":
        return "measured on CPUs only"
    if case.dtype != torch.float32:
        return "converted from float32 models: each of its precisions is beside the float32 case"
    absent = [name for name in ENGINES[engine].PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed"
    return ENGINES[engine].missing(precision)


def build(case: Case, engine: str, precision: str) -> Function:
    """Return a job that runs the case on an engine, with a model of random weights converted to this precision.

    `engine` is a key of ENGINES, such as "OpenVINO". `precision` is one of PRECISIONS, such as "int8". The `Job` is
    called with the prompt [B, T] and returns it with more tokens: as many as the case's size "new", or one if the case
    has none. First the engine must generate the right tokens with a small model. Raise `ValueError` if it does not, so
    that the engine is reported and not timed.
    """
    checked(engine, precision)
    facts = tuple((field.name, getattr(case.config, field.name)) for field in dataclasses.fields(case.config))
    generate = ENGINES[engine].Generator(Path(converted(engine, precision, facts).name), precision)
    new = case.size.get("new", 1)
    return Job(None, lambda tokens: generate(tokens, new), work=work_with(case, precision))


@cache
def checked(engine: str, precision: str) -> None:
    """Raise `ValueError` if an engine generates wrong tokens with a small model in this precision.

    `engine` is a key of ENGINES, such as "OpenVINO". `precision` is one of PRECISIONS, such as "int8". A check that
    passes is not repeated; one that fails is.
    """
    check(ENGINES[engine], precision)


@cache
def converted(engine: str, precision: str, facts: tuple[tuple[str, Any], ...]) -> tempfile.TemporaryDirectory:
    """Return a temporary folder that holds a model with random weights, converted for an engine in this precision.

    `engine` is a key of ENGINES, such as "OpenVINO". `precision` is one of PRECISIONS, such as "int8". `facts` are the
    fields of the model's `GPTConfig`, as (name, value). The weights are drawn with seed 0. Calls with equal arguments
    share the folder, which lasts as long as the program.
    """
    torch.manual_seed(0)
    folder = tempfile.TemporaryDirectory(prefix="gpt_fast_benchmarks_")
    ENGINES[engine].convert(GPTForCausalLM(GPTConfig(**dict(facts))).eval(), precision, Path(folder.name))
    return folder


def no_llama(case: Case) -> str:
    """Return the reason why llama.cpp is not measured: its package is missing or, if not, the suite cannot feed it.

    There always is a reason, because the suite writes no GGUF file, which llama.cpp reads. The case does not matter.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed"
    return "the suite writes no GGUF file, which llama.cpp reads"


def name(engine: str, precision: str) -> str:
    """Return the name of the implementation that runs an engine in a precision, such as "OpenVINO int8"."""
    return f"{engine} {precision}"


def rivals(times: dict[str, float]) -> Iterator[Target]:
    """Yield the speed targets of gpt_fast against inference engines, three for each precision of gpt_fast's weights.

    The keys of `times` are these precisions, such as "int8", and the values are factors. In the first target, gpt_fast
    must be this factor times as fast as its rival: the fastest engine of the same or a higher precision.

    The other two targets are for runs beside a busy process. In the second, gpt_fast must be at least as fast as the
    rival. In the third, gpt_fast must reach 80 % of the speed that it has without the busy process and with one thread
    less.

    The targets of "bfloat16" and "int8" count only on CPUs with instructions for matrix products in this precision.
    """
    for precision, least in times.items():
        who = OURS if precision == "float32" else f"{OURS} {precision} weights"
        others = tuple(name(engine, kind) for engine, kind in _KINDS if _rank(kind) <= _rank(precision))
        products = PRODUCTS.get(precision, "")
        yield Target(others, least, who=who, products=products)
        yield Target(others, 1.0, who=who, products=products, busy=True)
        yield Target(f"{who}, {LEFT}", 0.8, who=who, products=products, busy=True)


_rank = PRECISIONS.index
_KINDS = [(engine, precision) for engine, module in ENGINES.items() for precision in module.PRECISIONS]
# The fastest other of a float32 case is one that computes in float32.
ENGINE_PEERS = (
    *(
        Peer(
            name(engine, precision), partial(build, engine=engine, precision=precision),
            partial(missing, engine=engine, precision=precision), rival=precision == "float32",
        )
        for engine, precision in _KINDS
    ),
    Peer("llama.cpp", partial(build, engine="llama.cpp", precision="float32"), no_llama),
)  # fmt: skip
