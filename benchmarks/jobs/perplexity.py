"""Study of what the precision of the weights costs: perplexity of held-out text, each token predicted by a decode step.

The model is trained first, on the demo's text: the source of Python's standard library.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.measure.perplexity import perplexities
from benchmarks.report.markdown import table
from benchmarks.topic import Study
from gpt_fast import GPTConfig, GPTForCausalLM
from gpt_fast.data.batches import lm_windows
from gpt_fast.data.tokenizer import special_ids, vocabulary_size
from gpt_fast.training.engine.distributed import World
from gpt_fast.training.engine.optimizer import schedule
from gpt_fast.training.engine.update import Engine, EngineSettings
from gpt_fast.training.lm_data import LMData, WindowSource, read_lm_data
from gpt_fast.training.runs.recipes import SMALL

SIZES = {"num_layers": 4, "num_heads": 4, "hidden_dim": 256, "seq_len": 128}
BATCH, WINDOWS = 16, 64  # windows of an update, and held-out ones
WORDS = 4096  # of the vocabulary


def measure(device: str, quick: bool, cpu_time: bool) -> dict[str, Any]:
    """Train a small GPT-2 and measure its perplexity. Return {"parameters", "updates", "tokens", "perplexity"}.

    "parameters", "updates" and "tokens" are the numbers of the model's parameters, of its training updates and of
    held-out tokens. "perplexity" maps each precision of the weights, such as "int8", to the perplexity of these tokens.
    The text is the source of Python's standard library. With `quick` there are fewer updates. `device` and `cpu_time`
    change nothing: the model runs on the CPU.
    """
    updates = 20 if quick else 400
    data = read_lm_data((), None, WORDS, World())
    model = train(data, updates)
    tokens = lm_windows(data.valid, SIZES["seq_len"], WINDOWS)
    return {
        "parameters": model.num_parameters(), "updates": updates, "tokens": tokens.numel(),
        "perplexity": perplexities(model, tokens),
    }  # fmt: skip


def train(data: LMData, updates: int) -> GPTForCausalLM:
    """Train a GPT-2 of the size SIZES with `updates` updates of BATCH windows of `data`. Return it in eval mode.

    The weights are drawn with seed 0. There is no dropout, and the learning rate has a warm-up and a cosine.
    """
    torch.manual_seed(0)
    config = GPTConfig.preset(
        "gpt2", dropout=0.0, num_tokens=vocabulary_size(data.tokenizer), **SIZES, **special_ids(data.tokenizer)
    )
    settings = EngineSettings(weight_decay=SMALL.weight_decay, beta1=SMALL.beta1, beta2=SMALL.beta2)
    model = GPTForCausalLM(config)
    engine = Engine(model, SMALL.lr, settings)
    rate = schedule("cosine", total=updates, warmup=updates // 10)
    source = WindowSource(data.train, SIZES["seq_len"], BATCH, 0)
    for update in range(updates):
        engine.update(source(update), SMALL.lr * rate(update))
    return model.eval()


# ---- how it is shown


def lines(record: dict[str, Any]) -> list[str]:
    """Return a section of Markdown as lines: a heading, a paragraph on what was measured, and a table.

    The table has a row for each precision of the weights: the perplexity, and its change against float32. `record` is
    the content of the study's results file.
    """
    found = record["perplexity"]
    rows = [[weights, f"{value:.4f}", f"{value / found['float32'] - 1:+.3%}"] for weights, value in found.items()]
    return [
        "## perplexity by the weights' precision",
        "",
        f"A model of {record['parameters']:,} parameters after {record['updates']} updates on the source of Python's",
        f"standard library, {record['tokens']:,} held-out tokens, each predicted by a decode step; {record['date']}",
        f"UTC, commit {str(record['commit']['id'])[:12]}.",
        "",
        *table(["weights", "perplexity", "against float32"], rows),
    ]


STUDY = Study(
    "perplexity", "decode", measure, lines,
    fields=("parameters", "updates", "tokens", "perplexity"),
    devices=("cpu",),
    tests=("generation/test_decode_session.py",),
    timed=False,
)  # fmt: skip
