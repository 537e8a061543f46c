"""Compilation of a model's kernels before they are needed: Triton keeps compiled kernels in its cache on the disk."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..config import PRESETS, GPTConfig
from ..data.batches import causal_batch
from ..generation import generate
from ..heads import GPTForCausalLM
from ..model_folder import read_config
from .engine.update import Engine, EngineSettings

LAYERS = 2  # the first block and the others call different kernels
PROMPTS = (1, 17, 32)  # tokens: one alone, a length that no tile divides, one that tiles divide
NEW_TOKENS = 2


@dataclasses.dataclass
class Compiled:
    """Kernels that Triton compiled, and those that it found in its cache."""

    compiled: int = 0
    found: int = 0

    def __call__(self, *, cache_hit: bool, **_: Any) -> None:
        """Count one kernel: in `found` if Triton took it from its cache (`cache_hit`), else in `compiled`.

        A compilation listener of Triton calls this for each kernel, with Triton's arguments. All but `cache_hit` are
        ignored.
        """
        self.found += cache_hit
        self.compiled += not cache_hit


def choose(source: Path | None, preset: str | None) -> GPTConfig:
    """Return the model configuration of the run folder `source`, or else of the preset called `preset`.

    Raise `ValueError` unless exactly one of the two is not None, for an unknown preset, and for a run whose head is not
    `GPTForCausalLM`. No weights are read.
    """
    if (source is None) == (preset is None):
        raise ValueError("expected --from RUN or --preset NAME, one of them")
    if source is None:
        if preset not in PRESETS:
            raise ValueError(f"--preset {preset!r}: expected one of {', '.join(PRESETS)}")
        return GPTConfig.preset(str(preset))
    head, config = read_config(source)
    if head != GPTForCausalLM.__name__:
        raise ValueError(f"--from {source}: its head is {head}; expected {GPTForCausalLM.__name__}")
    return config


def warm(config: GPTConfig, batch_size: int = 16, precision: str = "float32") -> dict[str, Any]:
    """Compile the kernels that training and generation launch for a model of this configuration.

    One update and a few generated tokens run on the current CUDA device, by a model of at most two layers: the other
    layers launch the same kernels. Sizes decide what is compiled, so the batch is as large as in the training to come.

    Args:
        config: Configuration of the model, with the vocabulary size that training will use.
        batch_size: Sequences of `config.seq_len` tokens in one micro-batch: `--batch-size` over `--accumulate`.
        precision: "float32", "bfloat16" or "float16", as `gpt-fast pretrain --precision`.

    Returns:
        "training" and "generation", each a dict of its "seconds" and of the numbers of kernels that were "compiled" and
        that were "found" in Triton's cache; and "cache", the folder of that cache.

    Raises:
        ValueError: `batch_size` is below 1, PyTorch sees no CUDA device, or Triton is not installed.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: expected 1 or more")
    if not torch.cuda.is_available():
        raise ValueError("gpt-fast warmup: this PyTorch sees no CUDA device; expected one, as only it runs Triton")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("gpt-fast warmup: Triton is not installed; expected it for CUDA kernels: pip install triton")
    from triton import knobs

    config = dataclasses.replace(config, num_layers=min(LAYERS, config.num_layers))
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.device(device):
        model = GPTForCausalLM(config)
    result: dict[str, Any] = {}
    with _counted(knobs, result, "training"):
        batch = causal_batch(torch.zeros(batch_size, config.seq_len, dtype=torch.int64))
        Engine(model, 1e-4, EngineSettings(precision=precision)).update([batch], 1e-4)
    model.eval()
    with _counted(knobs, result, "generation"):
        for length in PROMPTS:
            length = min(length, config.seq_len - NEW_TOKENS)
            generate(model, torch.zeros(1, length, dtype=torch.int64, device=device), max_new_tokens=NEW_TOKENS)
    return result | {"cache": str(knobs.cache.dir)}


@contextmanager
def _counted(knobs: Any, result: dict[str, Any], name: str) -> Iterator[None]:
    """Time the block and count its kernels: `result[name]` gets a dict with "seconds", "compiled" and "found".

    "compiled" is the number of kernels that Triton compiled, and "found" of those that it took from its cache. The
    seconds include the wait for the CUDA device. If the block raises, `result` is unchanged. `knobs` is `triton.knobs`.
    A compilation listener that is installed there already is called too, and is put back afterwards.
    """
    counter, before, began = Compiled(), knobs.compilation.listener, time.perf_counter()

    def listen(**event: Any) -> None:
        """Count one kernel in the counter of the enclosing function, and call the listener installed before, if any.

        `event` are the keyword arguments with which Triton calls a compilation listener.
        """
        counter(**event)
        if before is not None:
            before(**event)

    knobs.compilation.listener = listen
    try:
        yield
        torch.cuda.synchronize()
    finally:
        knobs.compilation.listener = before
    seconds = round(time.perf_counter() - began, 1)
    result[name] = {"seconds": seconds, **dataclasses.asdict(counter)}
