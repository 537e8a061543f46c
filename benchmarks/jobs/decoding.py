"""Study of decoding on the CPU: GPT-2 at batch 1 against the memory's read bandwidth and transformers' generate.

Every figure is a median over interleaved repetitions in one process. `of_bound` is the share of the time that reading
the step's weights and cache takes, at the read bandwidth measured between the repetitions. Weights are random: speed
does not depend on them. transformers generates greedily with its own cache; the prompt's time is subtracted.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.measure.floors import reader
from benchmarks.report.markdown import table
from benchmarks.topic import Study
from gpt_fast import DecodeSession, GPTConfig, GPTForCausalLM
from gpt_fast.generation.session import GREEDY
from gpt_fast.generation.steps import WEIGHTS

MODEL = "gpt2"
PEERS = {"float32": "hf float32", "bfloat16": "hf bfloat16"}  # by the weights they are compared with
PROMPT = 16  # tokens before the first that is timed
COLORS = ("#c1440e", "#1f5a94", "#3c8d5a", "#8a63a8", "#b38b00")  # by weights, in their order
READ = 512 << 20  # bytes of the buffer whose reading is timed


def measure(device: str, quick: bool, cpu_time: bool) -> dict[str, Any]:
    """Measure decoding with GPT-2 at batch 1 on the CPU. Return a dict, the study's record.

    "model" is the preset's name. "read_bandwidth" is the median of the memory's read bandwidth in bytes a second, and
    "read_bandwidth_range" is [least, most]. Each precision of the weights in WEIGHTS, and transformers as "hf float32"
    and "hf bfloat16", has {"seconds": median time of a token, "range": [least, most]}. The entry of a precision also
    has "bytes" and "bytes_per_cached_token", which a step reads, and "of_bound", the share of the measured bandwidth
    that is reached. "curves" has for each precision a list of (tokens in the cache, seconds of a step, read bandwidth).

    `device` is ignored. `quick` times fewer tokens and repetitions, but does not shorten the curves. With `cpu_time`
    the times are CPU seconds of the process. The entries of transformers are missing if it is not installed.
    """
    now = time.process_time if cpu_time else time.perf_counter
    tokens, repeats = (8, 1) if quick else (32, 3)
    figures = token_seconds(MODEL, tokens, repeats, now)
    return figures | {"curves": {weights: curve(MODEL, weights, now) for weights in WEIGHTS}}


def read_bandwidth(buffer: torch.Tensor, now: Callable[[], float]) -> float:
    """Read `buffer` three times with PyTorch's number of threads. Return the highest rate, in bytes a second.

    `buffer` is a contiguous float32 tensor. `now` returns the reading of a clock in seconds.
    """
    read, seconds = reader(buffer), []
    for _ in range(3):
        start = now()
        read()
        seconds.append(now() - start)
    return buffer.nbytes / min(seconds)


def our_seconds(session: DecodeSession, tokens: int, now: Callable[[], float]) -> float:
    """Return the median seconds of a greedy decode step of `session`, over `tokens` steps at batch 1.

    Before the steps the session is reset and reads a prompt of PROMPT tokens, which is not timed. `now` returns the
    reading of a clock in seconds.
    """
    session.reset()
    session.prefill(torch.arange(PROMPT)[None])
    new, seconds = torch.tensor([7]), []
    for _ in range(tokens):
        start = now()
        new = session.advance(new, GREEDY)
        seconds.append(now() - start)
    return statistics.median(seconds)


def hf_seconds(model: Any, tokens: int, now: Callable[[], float]) -> float:
    """Return the seconds for each new token that the greedy `generate` of a transformers model takes, at batch 1.

    Two calls are timed: one adds a quarter of `tokens` (at least 1) to a prompt of PROMPT tokens, the other adds
    `tokens` more than that. The difference of their times is divided by `tokens`, so the prompt and the set-up do not
    count. `now` returns the reading of a clock in seconds.
    """

    def run(new: int) -> float:
        """Return the seconds in which `generate` adds `new` tokens to a prompt of PROMPT tokens.

        `model` and the clock `now` come from the enclosing function.
        """
        start = now()
        ids = torch.arange(PROMPT)[None]
        model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        return now() - start

    few = max(1, tokens // 4)
    return (run(few + tokens) - run(few)) / tokens


def bytes_read(session: DecodeSession) -> dict[str, int]:
    """Return {"bytes", "bytes_per_cached_token"}: the bytes that one decode step of `session` reads at batch 1.

    "bytes" counts the packed weights of all matrices. "bytes_per_cached_token" counts the keys and values of one token
    in the cache, over all layers. `session` must be a CPU session that was made with `weights`.
    """
    config = session.config
    cache = 2 * config.num_layers * config.hidden_dim * session.cache.keys.element_size()
    return {"bytes": session._step.weights.bytes, "bytes_per_cached_token": cache}  # type: ignore[union-attr]


def bound(figure: dict[str, Any], cached: float, bandwidth: float) -> float:
    """Return the least seconds of a decode step: the time of reading its weights and its cache from memory.

    `figure` maps "bytes" to the size of the weights, and "bytes_per_cached_token" to the size of one token's keys and
    values. `cached` is the number of tokens in the cache, which may be a mean over steps. `bandwidth` is in bytes a
    second.
    """
    return (figure["bytes"] + figure["bytes_per_cached_token"] * cached) / bandwidth


def token_seconds(
    name: str, tokens: int, repeats: int, now: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:  # fmt: skip
    """Measure greedy decoding with the preset `name` at batch 1, by precision and with transformers. Return a dict.

    "model" is `name`. "read_bandwidth" is the median in bytes a second, and "read_bandwidth_range" is [least, most].
    Each precision in WEIGHTS, such as "int8", has {"seconds": median time of a token, "range": [least, most]} for
    gpt_fast. "hf float32" and "hf bfloat16" have the same for transformers, and are missing if it is not installed.

    The entry of a precision also maps "bytes" to the size of the weights, "bytes_per_cached_token" to the size of one
    token's keys and values, and "of_bound" to a share: the least time in which a step can read its weights and cache,
    divided by the measured time.

    Each of `repeats` repetitions times `tokens` steps by the clock `now`, in seconds, and a quarter as many (at least
    4) with transformers. One more repetition warms up before. PyTorch's seed is set to 0.
    """
    torch.manual_seed(0)
    model = GPTForCausalLM(GPTConfig.preset(name)).eval()
    runs: dict[str, Callable[[], float]] = {}
    sessions = {weights: DecodeSession(model, weights=weights) for weights in WEIGHTS}
    for weights, session in sessions.items():
        runs[weights] = lambda session=session: our_seconds(session, tokens, now)  # type: ignore[misc]
    for peer in PEERS.values() if importlib.util.find_spec("transformers") else ():
        theirs = model.to_hf().eval().to(getattr(torch, peer.removeprefix("hf ")))
        runs[peer] = lambda theirs=theirs: hf_seconds(theirs, max(4, tokens // 4), now)  # type: ignore[misc]
    buffer = torch.ones(READ // 4)
    seconds: dict[str, list[float]] = {run: [] for run in runs}
    bandwidths: list[float] = []
    for repeat in range(repeats + 1):  # the first warms up
        for run, call in runs.items():
            bandwidth, taken = read_bandwidth(buffer, now), call()
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


def curve(
    name: str, weights: str, now: Callable[[], float] = time.perf_counter
) -> list[tuple[int, float, float]]:  # fmt: skip
    """Return [(position, seconds of a step, read bandwidth)] for 16 positions across the whole cache, at batch 1.

    A position is a number of tokens in the cache, from 0. Each time is the median of 16 steps from there on. The
    bandwidth, in bytes a second, is measured just before them. `name` is the model's preset, `weights` the precision of
    its weights, such as "int8", and `now` the clock to read, in seconds.
    """
    model = GPTForCausalLM(GPTConfig.preset(name)).eval()
    session = DecodeSession(model, weights=weights)
    places = session.cache.length // 16
    buffer, points = torch.ones(READ // 4), []
    for first in range(0, session.cache.length, places):
        session.cache.lengths.fill_(first)
        bandwidth, taken = read_bandwidth(buffer, now), []
        for _ in range(16):
            start = now()
            session.advance(torch.tensor([7]), GREEDY)
            taken.append(now() - start)
        points.append((first, statistics.median(taken), bandwidth))
    return points


# ---- how it is shown


def shown(record: dict[str, Any]) -> list[str]:
    """Return the precisions of weights in WEIGHTS, in its order, that are keys of `record`, the study's results file.

    A file that was written before a precision was added lacks it.
    """
    return [weights for weights in WEIGHTS if weights in record]


def lines(record: dict[str, Any]) -> list[str]:
    """Return a section of Markdown as lines: a heading, a paragraph on what was measured, and a table.

    The table has a row for each precision of the weights: milliseconds a token, tokens a second, and the share of the
    memory's read bandwidth. Two more cells have the time of transformers in the same precision, and that time divided
    by gpt_fast's. They are "" if not measured. `record` is the content of the study's results file.
    """
    low, high = (f"{bandwidth / 1e9:.1f}" for bandwidth in record["read_bandwidth_range"])
    rows = []
    for weights in shown(record):
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
        f"{str(record['commit']['id'])[:12]}. *Of the bound*: the time of reading weights and cache, over ours,",
        f"at {record['read_bandwidth'] / 1e9:.1f} GB/s ({low} to {high}), measured between the steps.{absent}",
        "",
        *table(["weights", "ms a token", "tokens/s", "of the bound", "Hugging Face, ms", "× Hugging Face"], rows),
    ]


def picture(record: dict[str, Any]) -> Figure:
    """Return a plot of the milliseconds of a decode step over the number of tokens in the cache, by precision.

    A dashed line of the same colour is the time that reading the cache and the weights takes at least. `record` is the
    content of the study's results file, of which "model", "curves" and the entries of the precisions are used.
    """
    figure = Figure(figsize=(6.3, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    config = GPTConfig.preset(record["model"])
    for weights, color in zip(shown(record), COLORS, strict=False):
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


STUDY = Study(
    "decoding", "decode", measure, lines,
    fields=("model", "read_bandwidth", "read_bandwidth_range", WEIGHTS[0], "curves"),
    picture=picture,
    caption="milliseconds a token, by the tokens before it",
    devices=("cpu",),
    tests=("generation/test_decode_session.py", "model/test_devices.py"),
)  # fmt: skip
