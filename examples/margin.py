"""Measure the gain from pre-training, over seeds: `python examples/margin.py`.

Pre-train a language model on the source of Python's standard library. Then train the same classifier on the same few
labelled snippets from those weights and from new weights, and measure both on snippets of files that neither stage has
seen. Another classifier from scratch trains at four times the learning rate, which this model needs from scratch. If
the command is stopped, the same command resumes it.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

ARMS = {
    "pre-trained": [],
    "from scratch, the same rate": ["--scratch"],
    "from scratch, four times the rate": ["--scratch", "--lr", "2e-3"],
}


def run(*arguments: object) -> None:
    command = [sys.executable, "-m", "gpt_fast", *map(str, arguments)]
    print("gpt-fast", *command[3:], flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)


def measured(out: Path, arm: str, rows: int, seed: int) -> Path:
    return out / f"{arm.replace(',', '').replace(' ', '-')}-{rows}-rows-seed-{seed}"


def table(out: Path, rows: int, seeds: list[int]) -> str:
    """Return a Markdown table of the held-out results: accuracy by seed, its mean and spread, macro F1 and loss."""
    lines = ["| classifier | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | sd | macro F1 | loss |"]
    lines.append("| --- |" + " ---: |" * (len(seeds) + 4))
    for arm in ARMS:
        records = [json.loads((measured(out, arm, rows, seed) / "run.json").read_text()) for seed in seeds]
        scores = [100 * record["valid_accuracy"] for record in records]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        f1, loss = (statistics.mean(record[f"valid_{name}"] for record in records) for name in ("macro_f1", "loss"))
        cells = [*(f"{score:.1f} %" for score in scores), f"**{statistics.mean(scores):.1f} %**", f"{spread:.1f}"]
        lines.append(f"| {arm} | " + " | ".join([*cells, f"{f1:.3f}", f"{loss:.2f}"]) + " |")
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/margin"),
    steps: Annotated[int, typer.Option(help="Updates of pre-training.")] = 3000,
    rows: Annotated[int, typer.Option(help="Labelled rows to train on.")] = 500,
    epochs: Annotated[int, typer.Option(help="Passes over them.")] = 10,
    seeds: Annotated[str, typer.Option(help="Of the rows, the new layer, the order and dropout.")] = "0,1,2",
) -> None:
    numbers = [int(seed) for seed in seeds.split(",")]
    run("pretrain", "--steps", steps, "--checkpoint-every", 100, "--out", out / "pretrained", "--resume")
    for seed in numbers:
        for arm, options in ARMS.items():
            run(
                "finetune", "--from", out / "pretrained", "--rows", rows, "--epochs", epochs, "--seed", seed, *options,
                "--out", measured(out, arm, rows, seed), "--resume",
            )  # fmt: skip
    print(table(out, rows, numbers))


if __name__ == "__main__":
    typer.run(main)
