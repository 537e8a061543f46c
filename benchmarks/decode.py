"""Decoding on the CPU: GPT-2 at batch 1 against the memory's read bandwidth and Hugging Face's generate.

    python -m benchmarks.decode [--model gpt2] [--tokens 32] [--repeats 3] [--peers] [--curve] [--json FILE]
    python -m benchmarks.decode --perplexity RUN    # of a run's held-out text, by the precision of the weights

Every figure is a median over interleaved repetitions in one process; `bound` is the time that reading the step's
weights and cache would take at the read bandwidth measured between the repetitions. Weights are random: speed does
not depend on them. Hugging Face generates greedily with its own cache; the prompt's time is subtracted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gpt_fast import DecodeSession, GPTConfig, GPTForCausalLM
from gpt_fast.decode_steps import WEIGHTS
from gpt_fast.decoding import GREEDY

PROMPT = 16  # tokens before the first that is timed
READ = 512 << 20  # bytes of the buffer that the read kernel goes through


def read_bandwidth(buffer: torch.Tensor) -> float:
    """Bytes per second of one pass over the buffer by all threads."""
    from gpt_fast import _C  # type: ignore[attr-defined]

    start = time.perf_counter()
    _C.read_all(buffer)
    return buffer.nbytes / (time.perf_counter() - start)


def our_seconds(session: DecodeSession, tokens: int) -> list[float]:
    """Of each of `tokens` steps after a prompt."""
    session.reset()
    session.prefill(torch.arange(PROMPT)[None])
    new, seconds = torch.tensor([7]), []
    for _ in range(tokens):
        start = time.perf_counter()
        new = session.advance(new, GREEDY)
        seconds.append(time.perf_counter() - start)
    return seconds


def hf_seconds(model: Any, tokens: int) -> float:
    """A token of transformers' generate: the difference of two runs, so that neither prompt nor set-up counts."""

    def run(new: int) -> float:
        start = time.perf_counter()
        ids = torch.arange(PROMPT)[None]
        model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        return time.perf_counter() - start

    few = max(1, tokens // 4)
    return (run(few + tokens) - run(few)) / tokens


def bytes_read(session: DecodeSession, tokens: int) -> float:
    """By an average step of `our_seconds`: all matrices, and the keys and values up to each position."""
    config = session.config
    cache = 2 * config.num_layers * config.hidden_dim * session.cache.keys.element_size()
    return session._step.weights.bytes + cache * (PROMPT + (tokens + 1) / 2)  # type: ignore[union-attr]


def measure(name: str, tokens: int, repeats: int, peers: bool) -> dict[str, Any]:
    """Figures by weights: seconds a token, share of the bound, ratio to Hugging Face."""
    torch.manual_seed(0)
    model = GPTForCausalLM(GPTConfig.preset(name)).eval()
    runs: dict[str, Callable[[], float]] = {}
    sessions = {weights: DecodeSession(model, weights=weights) for weights in WEIGHTS}
    for weights, session in sessions.items():
        runs[weights] = lambda session=session: statistics.median(our_seconds(session, tokens))  # type: ignore[misc]
    if peers:
        theirs = model.to_hf().eval()
        runs["hf float32"] = lambda: hf_seconds(theirs, max(4, tokens // 4))
        rounded = model.to_hf().eval().to(torch.bfloat16)
        runs["hf bfloat16"] = lambda: hf_seconds(rounded, max(4, tokens // 4))
    buffer = torch.ones(READ // 4)
    seconds: dict[str, list[float]] = {run: [] for run in runs}
    bandwidths: list[float] = []
    for repeat in range(repeats + 1):  # the first warms up
        for run, call in runs.items():
            bandwidth, taken = max(read_bandwidth(buffer) for _ in range(3)), call()
            if repeat:
                bandwidths.append(bandwidth)
                seconds[run].append(taken)
    bandwidth = statistics.median(bandwidths)
    figures: dict[str, Any] = {
        "model": name,
        "threads": torch.get_num_threads(),
        "read_bandwidth": bandwidth,
        "read_bandwidth_range": [min(bandwidths), max(bandwidths)],
    }
    for run, times in seconds.items():
        figures[run] = {"seconds": statistics.median(times), "range": [min(times), max(times)]}
    for weights, session in sessions.items():
        bound = bytes_read(session, tokens) / bandwidth
        figures[weights] |= {"bytes": bytes_read(session, tokens), "of_bound": bound / figures[weights]["seconds"]}
    return figures


def curve(name: str, weights: str) -> list[tuple[int, float]]:
    """(position, seconds a token) over the whole cache: the median of 16 neighbouring steps at each of 16 places."""
    model = GPTForCausalLM(GPTConfig.preset(name)).eval()
    session = DecodeSession(model, weights=weights)
    places = session.cache.length // 16
    points = []
    for first in range(0, session.cache.length, places):
        session.cache.lengths.fill_(first)
        taken = []
        for _ in range(16):
            start = time.perf_counter()
            session.advance(torch.tensor([7]), GREEDY)
            taken.append(time.perf_counter() - start)
        points.append((first, statistics.median(taken)))
    return points


def perplexities(folder: Path, windows: int = 64) -> dict[str, float]:
    """Of held-out text of the standard library, each token predicted by a decode step with these weights."""
    from gpt_fast.data.batches import lm_windows, token_stream
    from gpt_fast.data.corpus import read_corpus
    from gpt_fast.data.tokenizer import encode_documents
    from gpt_fast.training.evaluate import load_generator, run_tokenizer
    from gpt_fast.training.runs import special_token

    model = load_generator(folder, "cpu").eval()
    texts = [document.text for document in read_corpus(None).valid]
    ids = encode_documents(run_tokenizer(folder, model), texts)
    stream = token_stream(ids, special_token(model.config, "start_token"))
    tokens = lm_windows(stream, model.config.seq_len)
    tokens = tokens[:: max(1, len(tokens) // windows)][:windows]  # [B, T]
    found = {}
    for weights in WEIGHTS:
        session = DecodeSession(model, batch=len(tokens), weights=weights)
        losses = []
        for t in range(tokens.shape[1] - 1):
            logits = session.step(tokens[:, t].contiguous())
            losses.append(torch.nn.functional.cross_entropy(logits.double(), tokens[:, t + 1], reduction="none"))
        found[weights] = torch.cat(losses).mean().exp().item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="measure Hugging Face's generate too")
    parser.add_argument("--curve", action="store_true", help="seconds a token over the length of the cache")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--perplexity", type=Path, metavar="RUN", help="measure this instead, of a trained run")
    arguments = parser.parse_args()
    if arguments.perplexity:
        found = perplexities(arguments.perplexity)
        for name, value in found.items():
            print(f"  {name:12} perplexity {value:.4f} ({value / found['float32'] - 1:+.3%})")
        return
    figures = measure(arguments.model, arguments.tokens, arguments.repeats, arguments.peers)
    low, high = figures["read_bandwidth_range"]
    print(f"{arguments.model}, {figures['threads']} threads, read bandwidth {figures['read_bandwidth'] / 1e9:.1f} GB/s "
          f"({low / 1e9:.1f} to {high / 1e9:.1f})")  # fmt: skip
    for name, figure in figures.items():
        if isinstance(figure, dict):
            low, high = figure["range"]
            share = f", {figure['of_bound']:.1%} of the bound" if "of_bound" in figure else ""
            print(f"  {name:12} {figure['seconds'] * 1e3:7.2f} ms a token ({low * 1e3:.2f} to {high * 1e3:.2f}){share}")
    if arguments.curve:
        for weights in WEIGHTS:
            points = curve(arguments.model, weights)
            figures[f"curve {weights}"] = points
            print(f"  {weights}: " + ", ".join(f"{at}: {taken * 1e3:.2f}" for at, taken in points) + " ms")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
