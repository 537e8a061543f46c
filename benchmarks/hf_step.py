"""A training step of transformers' GPT-2 as it is and accelerated: python -m benchmarks.hf_step

One model, accelerated and restored in turn, so that both see the same weights and the same optimiser; a step is
forward, backward and `AdamW(fused=True)`, with the model's default dropout. Times are medians of interleaved
repetitions, with the quartiles of the pairs' ratios. Peak memory is that of a process of its own for each.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext

import torch
from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel
from transformers.utils import logging

import gpt_fast
from benchmarks.environment import device_name

WAYS = ("original", "accelerated")
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}  # the second by autocast


class Step:
    """One training step after another on random tokens [B, T]."""

    def __init__(self, kind: str, batch: int, length: int, dtype: str, layers: int | None):
        torch.manual_seed(0)
        sizes = {} if layers is None else {"n_layer": layers}
        model = (
            GPT2LMHeadModel(GPT2Config(**sizes)) if kind == "gpt2" else OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes))
        )
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.tokens = torch.randint(self.model.config.vocab_size, (batch, length))
        self.dtype = DTYPES[dtype]

    def seconds(self, way: str) -> float:
        if way == "accelerated":
            gpt_fast.accelerate(self.model, strict=True)
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with nullcontext() if self.dtype is None else torch.autocast("cpu", self.dtype):
            loss = self.model(self.tokens, labels=self.tokens).loss
        loss.backward()
        self.optimizer.step()
        seconds = time.perf_counter() - began
        gpt_fast.restore(self.model)
        return seconds


def measure_time(kind: str, batch: int, length: int, dtype: str, repeats: int, layers: int | None = None) -> dict:
    """Median seconds of both, and the ratio original / accelerated with its quartiles."""
    step = Step(kind, batch, length, dtype, layers)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(repeats + 1):
        for way in WAYS if repeat % 2 else reversed(WAYS):
            seconds = step.seconds(way)
            if repeat:  # the first of each allocates
                times[way].append(seconds)
    ratios = [a / b for a, b in zip(times["original"], times["accelerated"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "model": kind, "batch": batch, "length": length, "dtype": dtype,
        **{way: statistics.median(times[way]) for way in WAYS},
        "ratio": statistics.median(times["original"]) / statistics.median(times["accelerated"]),
        "quartiles": [quartiles[0], quartiles[2]],
    }  # fmt: skip


def measure_memory(kind: str, batch: int, length: int, dtype: str, layers: int | None = None) -> dict:
    """Peak resident MiB of a process that makes two steps, for each way."""
    peaks = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.hf_step", "--model", kind, "--batch", str(batch), "--length"]
        command += [
            str(length),
            "--dtype",
            dtype,
            "--peak",
            way,
            *([] if layers is None else ["--layers", str(layers)]),
        ]
        peaks[way] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {"model": kind, "batch": batch, "length": length, "dtype": dtype, "peak_mib": peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=("gpt2", "openai-gpt"), default="gpt2")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", choices=(*DTYPES, "all"), default="all")
    parser.add_argument("--figures", choices=("time", "memory", "both"), default="both")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, help="fewer than the model has, for a quick look")
    parser.add_argument("--peak", choices=WAYS, help="run two steps this way and print the process's peak in MiB")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    logging.set_verbosity_error()
    if options.peak:
        step = Step(options.model, options.batch, options.length, options.dtype, options.layers)
        for _ in range(2):
            step.seconds(options.peak)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    sizes = options.model, options.batch, options.length
    if not options.json:
        print(f"{device_name('cpu')}; {options.model}, B = {options.batch}, T = {options.length}", flush=True)
    results = []
    for dtype in DTYPES if options.dtype == "all" else [options.dtype]:
        if options.figures != "memory":
            results.append(measure_time(*sizes, dtype, options.repeats, options.layers))
            if not options.json:
                print(in_words(results[-1]), flush=True)
        if options.figures != "time":
            results.append(measure_memory(*sizes, dtype, options.layers))
            if not options.json:
                print(in_words(results[-1]), flush=True)
    if options.json:
        print(json.dumps({"device": device_name("cpu"), "results": results}, indent=1))


def in_words(result: dict) -> str:
    if "peak_mib" in result:
        peaks = result["peak_mib"]
        return f"{result['dtype']}: peak {peaks['original']:,.0f} MiB, accelerated {peaks['accelerated']:,.0f} MiB"
    low, high = result["quartiles"]
    return (
        f"{result['dtype']}: {result['original']:.2f} s, accelerated {result['accelerated']:.2f} s, "
        f"ratio {result['ratio']:.2f} ({low:.2f} to {high:.2f})"
    )


if __name__ == "__main__":
    main()
