"""Measure whether batches that grow during a run pay, in a checkout: `python -m benchmarks.growing_batches`.

Pre-train the demo's model on the demo's text, the source of Python's standard library. Every variant sees as many
tokens, under a learning rate that follows their share. Batches that grow are a quarter of the full one in the first
quarter of the tokens, and half of it in the second. A smaller batch is more updates.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import torch
import typer

from gpt_fast import GPTConfig, GPTForCausalLM
from gpt_fast.data.batches import lm_windows
from gpt_fast.data.tokenizer import special_ids, vocabulary_size
from gpt_fast.training.engine.distributed import World
from gpt_fast.training.engine.optimizer import schedule
from gpt_fast.training.engine.update import Engine, EngineSettings
from gpt_fast.training.lm_data import LMData, WindowSource, lm_batch, read_lm_data
from gpt_fast.training.metrics import lm_loss
from gpt_fast.training.runs.recipes import SMALL

SEQ_LEN, BATCH = 128, 16
# Phases of a run: the share of all tokens at which the phase ends, and the windows in an update.
VARIANTS = {
    "as it is": [(1.0, BATCH)],
    "growing": [(0.25, BATCH // 4), (0.5, BATCH // 2), (1.0, BATCH)],
    "half": [(1.0, BATCH // 2)],
}


def train(data: LMData, phases: list[tuple[float, int]], seed: int, tokens: int) -> tuple[float, float, int]:
    """Train one model. Return (held-out loss, seconds spent in updates, number of updates).

    `data` has the tokens to train on and held-out ones. `tokens` is the number of tokens to train on in all phases
    together. Each of `phases` is (share of `tokens` at which the phase ends, number of windows in each of its updates).
    A window has SEQ_LEN tokens. The last update of a phase is a full one, even if it passes the end of the phase.
    `seed` sets the weights and the order of the windows. The model is a GPT-2 of 4 layers without dropout. The loss is
    the mean over at most 512 windows.
    """
    torch.manual_seed(seed)
    config = GPTConfig.preset(
        "gpt2", dropout=0.0, num_tokens=vocabulary_size(data.tokenizer), num_layers=4, num_heads=4, hidden_dim=128,
        seq_len=SEQ_LEN, **special_ids(data.tokenizer),
    )  # fmt: skip
    settings = EngineSettings(weight_decay=SMALL.weight_decay, beta1=SMALL.beta1, beta2=SMALL.beta2)
    engine = Engine(GPTForCausalLM(config), SMALL.lr, settings)
    rate = schedule("cosine", total=tokens, warmup=tokens // 10)
    windows, updates, seconds = 0, 0, 0.0
    for end, batch_size in phases:
        source = WindowSource(data.train, SEQ_LEN, batch_size, seed)
        while windows * SEQ_LEN < round(end * tokens):
            batches = source(windows // batch_size)
            began = time.perf_counter()
            engine.update(batches, SMALL.lr * rate(windows * SEQ_LEN)).loss.item()
            seconds += time.perf_counter() - began
            windows, updates = windows + batch_size, updates + 1
    held_out = lm_windows(data.valid, SEQ_LEN, 512)
    batches = [lm_batch(part, None, torch.Generator(), None) for part in held_out.split(BATCH)]
    return lm_loss(engine.model, batches), seconds, updates


def main(
    steps: Annotated[int, typer.Option(help="Full updates whose tokens every variant sees.")] = 400,
    seeds: Annotated[str, typer.Option(help="Of weights and order.")] = "0,1",
) -> None:
    torch.set_num_threads(1)
    data = read_lm_data((), None, 4096, World())
    for name, phases in VARIANTS.items():
        runs = [train(data, phases, int(seed), steps * BATCH * SEQ_LEN) for seed in seeds.split(",")]
        losses = ", ".join(f"{loss:.3f}" for loss, _, _ in runs)
        mean = statistics.mean(loss for loss, _, _ in runs)
        times = ", ".join(f"{seconds:.0f}" for _, seconds, _ in runs)
        print(f"{name}: {runs[0][2]} updates, loss {mean:.3f} ({losses}), {times} s", flush=True)


if __name__ == "__main__":
    typer.run(main)
