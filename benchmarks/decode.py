"""Decoding on the CPU: GPT-2 at batch 1 against the memory's read bandwidth and Hugging Face's generate.

    python -m benchmarks.decode [--model gpt2] [--tokens 32] [--repeats 3] [--out DIR]
    python -m benchmarks.decode --perplexity RUN    # of a run's held-out text, by the precision of the weights

Every figure is a median over interleaved repetitions in one process; `bound` is the time that reading the step's
weights and cache would take at the read bandwidth measured between the repetitions. Weights are random: speed does
not depend on them. Hugging Face generates greedily with its own cache; the prompt's time is subtracted. Writes
DIR/<device>/decoding.json, which `make report` shows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.environment import describe
from benchmarks.tables import table
from gpt_fast import DecodeSession, GPTConfig, GPTForCausalLM
from gpt_fast._files import write_json
from gpt_fast.generation.session import GREEDY
from gpt_fast.generation.steps import WEIGHTS

FILE, PICTURE = "decoding.json", "decoding_tokens.png"
PEERS = {"float32": "hf float32", "bfloat16": "hf bfloat16"}  # by the weights they are compared with
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


def bytes_read(session: DecodeSession) -> dict[str, int]:
    """By one step: all matrices, and the keys and values of each token in the cache."""
    config = session.config
    cache = 2 * config.num_layers * config.hidden_dim * session.cache.keys.element_size()
    return {"bytes": session._step.weights.bytes, "bytes_per_cached_token": cache}  # type: ignore[union-attr]


def bound(figure: dict[str, Any], cached: float, bandwidth: float) -> float:
    """Seconds that a step's reading takes after so many tokens."""
    return (figure["bytes"] + figure["bytes_per_cached_token"] * cached) / bandwidth


def measure(name: str, tokens: int, repeats: int) -> dict[str, Any]:
    """The read bandwidth; seconds a token by precision and of Hugging Face, of ours the share of the bound too."""
    torch.manual_seed(0)
    model = GPTForCausalLM(GPTConfig.preset(name)).eval()
    runs: dict[str, Callable[[], float]] = {}
    sessions = {weights: DecodeSession(model, weights=weights) for weights in WEIGHTS}
    for weights, session in sessions.items():
        runs[weights] = lambda session=session: statistics.median(our_seconds(session, tokens))  # type: ignore[misc]
    for peer in PEERS.values() if importlib.util.find_spec("transformers") else ():
        theirs = model.to_hf().eval().to(getattr(torch, peer.removeprefix("hf ")))
        runs[peer] = lambda theirs=theirs: hf_seconds(theirs, max(4, tokens // 4))  # type: ignore[misc]
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
        "read_bandwidth": bandwidth,
        "read_bandwidth_range": [min(bandwidths), max(bandwidths)],
    }
    for run, times in seconds.items():
        figures[run] = {"seconds": statistics.median(times), "range": [min(times), max(times)]}
    for weights, session in sessions.items():
        figures[weights] |= bytes_read(session)
        least = bound(figures[weights], PROMPT + (tokens + 1) / 2, bandwidth)
        figures[weights]["of_bound"] = least / figures[weights]["seconds"]
    return figures


def curve(name: str, weights: str) -> list[tuple[int, float, float]]:
    """(position, seconds a token, read bandwidth then) over the whole cache: the median of 16 neighbouring steps at
    each of 16 places."""
    model = GPTForCausalLM(GPTConfig.preset(name)).eval()
    session = DecodeSession(model, weights=weights)
    places = session.cache.length // 16
    buffer, points = torch.ones(READ // 4), []
    for first in range(0, session.cache.length, places):
        session.cache.lengths.fill_(first)
        bandwidth, taken = max(read_bandwidth(buffer) for _ in range(3)), []
        for _ in range(16):
            start = time.perf_counter()
            session.advance(torch.tensor([7]), GREEDY)
            taken.append(time.perf_counter() - start)
        points.append((first, statistics.median(taken), bandwidth))
    return points


def perplexities(folder: Path, windows: int = 64) -> dict[str, float]:
    """Of held-out text of the standard library, each token predicted by a decode step with these weights."""
    from gpt_fast.data.batches import lm_windows, token_stream
    from gpt_fast.data.corpus import read_corpus
    from gpt_fast.data.tokenizer import encode_documents
    from gpt_fast.training.runs.folder import special_token
    from gpt_fast.training.runs.load import load_generator, run_tokenizer

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


# ---- how it is shown


def lines(record: dict[str, Any]) -> list[str]:
    """The section of a device's page."""
    low, high = (f"{bandwidth / 1e9:.1f}" for bandwidth in record["read_bandwidth_range"])
    rows = []
    for weights in WEIGHTS:
        ours = record[weights]
        theirs = record.get(PEERS.get(weights, ""), {}).get("seconds")
        rows.append([
            weights, f"{ours['seconds'] * 1e3:.2f}", f"{1 / ours['seconds']:.0f}", f"{ours['of_bound']:.0%}",
            f"{theirs * 1e3:.1f}" if theirs else "", f"{theirs / ours['seconds']:.2f}" if theirs else "",
        ])  # fmt: skip
    absent = "" if record.keys() >= set(PEERS.values()) else " Missing: transformers is not installed."
    return [
        "## what a token costs",
        "",
        f"{record['model']}, batch 1, without the prompt; {record['date']} UTC, load {record['load']}, commit",
        f"{str(record['commit']['id'])[:12]}. *Of the bound*: of what reading weights and cache takes at",
        f"{record['read_bandwidth'] / 1e9:.1f} GB/s ({low} to {high}), measured between the steps.{absent}",
        "",
        *table(["weights", "ms a token", "tokens/s", "of the bound", "Hugging Face, ms", "× Hugging Face"], rows),
    ]


def section(folder: Path) -> list[str]:
    """The same, of a device's folder, with the picture that `draw` makes; empty where it was not measured there."""
    path = folder / FILE
    if not path.exists():
        return []
    record = json.loads(path.read_text("utf-8"))
    return ["", *lines(record), "", f"![milliseconds a token, by the tokens before it]({PICTURE})"]


def draw(folder: Path) -> None:
    """The curve of a device's folder, beside its file; nothing where there is none."""
    path = folder / FILE
    if path.exists():
        FigureCanvasAgg(picture(json.loads(path.read_text("utf-8")))).print_png(folder / PICTURE)


def picture(record: dict[str, Any]) -> Figure:
    """Milliseconds a token over the tokens in the cache, and what reading them and the weights takes."""
    figure = Figure(figsize=(6.3, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    config = GPTConfig.preset(record["model"])
    for weights, color in zip(WEIGHTS, ("#c1440e", "#1f5a94", "#3c8d5a"), strict=True):
        places, seconds, bandwidths = zip(*record["curves"][weights], strict=True)
        axes.plot(places, [1e3 * value for value in seconds], color=color, marker="o", markersize=4, label=weights)
        limit = [1e3 * bound(record[weights], *at) for at in zip(places, bandwidths, strict=True)]
        axes.plot(places, limit, color=color, linewidth=1.2, linestyle=(0, (5, 3)))
        axes.annotate(weights, (places[-1], 1e3 * seconds[-1]), (4, 6), textcoords="offset points", color=color)
    axes.set_xlabel("tokens in the cache (dashed: reading it and the weights)")
    axes.set_ylabel("ms a token")
    axes.set_xlim(0, config.seq_len * 1.12)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    figure.suptitle(f"decoding {record['model']}, batch 1", x=0.01, ha="left", fontsize=11)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--perplexity", type=Path, metavar="RUN", help="measure this instead, of a trained run")
    arguments = parser.parse_args()
    if arguments.perplexity:
        found = perplexities(arguments.perplexity)
        for name, value in found.items():
            print(f"  {name:12} perplexity {value:.4f} ({value / found['float32'] - 1:+.3%})")
        return
    record = {
        **describe("cpu"),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "load": round(os.getloadavg()[0], 2),
        **measure(arguments.model, arguments.tokens, arguments.repeats),
        "curves": {weights: curve(arguments.model, weights) for weights in WEIGHTS},
    }
    print("\n".join(lines(record)))
    if arguments.out:
        folder = arguments.out / record["device"]["slug"]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, record)


if __name__ == "__main__":
    main()
