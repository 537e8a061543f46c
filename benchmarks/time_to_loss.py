"""Measure how soon AdamW and Muon reach a loss, in a checkout: `python -m benchmarks.time_to_loss`.

Pre-train the same small model on the source of Python's standard library, as bytes, with either optimizer. A sweep on
the first seed finds each one's peak learning rate. Muon's is that of its matrices. The weights of AdamW beside it keep
the rate that is best for AdamW alone. Then every seed trains with the best. Stopped, the same command resumes.

The loss to reach is the highest final one of AdamW's seeds, so that all of its runs reach it. The command reports a
rate at the edge of its sweep, because the best one may lie outside.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gpt_fast.data.corpus import read_stdlib
from gpt_fast.training.compare import first_at
from gpt_fast.training.runs.folder import read_curve

RATES = {"adamw": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), "muon": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)}
MODEL = ("--layers", 4, "--heads", 4, "--dim", 128, "--seq-len", 128)


def run(*arguments: object) -> None:
    """Print the command `gpt-fast` with these arguments and run it. Its standard output is dropped.

    Raise `SystemExit` with its exit code if the command fails.
    """
    command = [sys.executable, "-m", "gpt_fast", *map(str, arguments)]
    print("gpt-fast", *command[3:], flush=True)
    code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
    if code:
        raise SystemExit(code)


def tokens(out: Path) -> Path:
    """Return the folder of token files, `out`/tokens. If it is missing, make it first by `gpt-fast prepare`.

    The text is the source of Python's standard library. It is written to `out`/text, and its bytes are the tokens.
    """
    if not (out / "tokens").is_dir():
        for document in read_stdlib():
            path = out / "text" / document.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(document.text, encoding="utf-8")
        run("prepare", "--data", out / "text", "--tokenizer", "byte", "--out", out / "tokens", "--processes", 1)
    return out / "tokens"


def train(out: Path, optimizer: str, rates: Sequence[float], seed: int, steps: int, batch_size: int) -> Path:
    """Train a model with `gpt-fast pretrain`, or resume it if its run folder is already there. Return the run folder.

    The folder is in `out` and named after the other arguments. The tokens to train on are in `out`/tokens, made first
    if missing. `optimizer` is "adamw" or "muon". `rates` holds AdamW's learning rate and, for Muon, then the learning
    rate of the matrices. `seed` sets the weights and the order of the data. `steps` is the number of updates, and
    `batch_size` the number of windows in an update. Raise `SystemExit` if the command fails.
    """
    name = "-".join([optimizer, *(f"{rate:g}" for rate in rates), f"seed-{seed}"])
    folder = out / f"{steps}-updates-of-{batch_size}" / name
    options = ["--optimizer", optimizer, "--lr", rates[0]]
    if optimizer == "muon":
        options += ["--muon-lr", rates[1]]
    run(
        "pretrain", "--data", tokens(out), *MODEL, "--steps", steps, "--batch-size", batch_size, "--seed", seed,
        *options, "--out", folder, "--resume",
    )  # fmt: skip
    return folder


def final_loss(folder: Path) -> float:
    """Return the last held-out loss ("valid_loss") in the metrics of the run in `folder`.

    Raise `FileNotFoundError` without a metrics file, and `ValueError` if it has no held-out loss.
    """
    return read_curve(folder, "valid_loss")[-1]["valid_loss"]


def sweep(out: Path, optimizer: str, given: Sequence[float], options: dict[str, int]) -> dict[float, float]:
    """Train once with each learning rate in RATES[optimizer]. Return {learning rate: final held-out loss}.

    `optimizer` is "adamw" or "muon", and the run folders are in `out`. `given` are the learning rates before the one
    that varies: [] for "adamw", and [AdamW's best learning rate] for "muon", whose sweep is over the rate of the
    matrices. `options` has "seed", "steps" (updates) and "batch_size" (windows in an update).
    """
    return {rate: final_loss(train(out, optimizer, [*given, rate], **options)) for rate in RATES[optimizer]}


def figures(runs: dict[str, list[Path]]) -> dict[str, Any]:
    """Return a dict that compares the runs of both optimizers. `runs` maps optimizer → run folders, one for each seed.

    The keys of `runs` are "adamw" and "muon". In the result, "loss" is the loss to reach: the highest final held-out
    loss of AdamW's seeds. "adamw" and "muon" have dicts of lists with one entry a seed. "final" has the final losses.
    "step" and "seconds" are the point at which the held-out loss first fell to the loss to reach, or None if it never
    did. "seconds_per_step" is the mean over the whole run.
    """
    losses = {name: [final_loss(folder) for folder in folders] for name, folders in runs.items()}
    target = max(losses["adamw"])
    found: dict[str, Any] = {"loss": target}
    for name, folders in runs.items():
        curves = [read_curve(folder, "valid_loss") for folder in folders]
        found[name] = {"final": losses[name]} | {
            field: [first_at(curve, "valid_loss", target, field) for curve in curves] for field in ("step", "seconds")
        }
        found[name]["seconds_per_step"] = [curve[-1]["seconds"] / curve[-1]["step"] for curve in curves]
    return found


def table(found: dict[str, Any]) -> str:
    """Return a Markdown table with a line for each optimizer: final loss, steps and seconds to the loss, ms a step.

    `found` has "loss", the loss to reach, and for each optimizer the lists "final", "step", "seconds" and
    "seconds_per_step" with one entry a seed. A cell has the mean and the range over the seeds, or says how many seeds
    did not reach the loss.
    """
    lines = [
        f"| optimizer | final loss | steps to {found['loss']:.3f} | seconds to it | ms a step |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in RATES:
        own = found[name]
        cells = [spread(own["final"], ".3f"), spread(own["step"], ".0f"), spread(own["seconds"], ".0f")]
        cells.append(spread([1000 * seconds for seconds in own["seconds_per_step"]], ".0f"))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float | None], form: str) -> str:
    """Return "mean (smallest to largest)" of the values, each formatted by `form`, such as ".3f".

    A value of None stands for a run that never reached the loss. If there is one, the text is instead "not reached by 1
    of 3", with the number of such runs.
    """
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return f"not reached by {len(values) - len(there)} of {len(values)}"
    return f"{statistics.mean(there):{form}} ({min(there):{form}} to {max(there):{form}})"


def best(name: str, losses: dict[float, float]) -> float:
    """Print the losses of a sweep by learning rate, and return the learning rate with the lowest loss.

    `losses` maps learning rate → loss. `name` is the optimizer's name, which is printed. Losses that are not finite are
    not chosen. If the best rate is the smallest or the largest of all, a second line warns of that, because a better
    one may lie outside. Raise `ValueError` if no loss is finite.
    """
    finite = [rate for rate, loss in losses.items() if math.isfinite(loss)]
    if not finite:
        raise ValueError(f"{name}: every rate of the sweep diverged: {', '.join(map(str, losses))}")
    rate = min(finite, key=lambda each: losses[each])
    print(f"{name}: " + ", ".join(f"{each:g} → {loss:.3f}" for each, loss in losses.items()) + f"; best {rate:g}")
    if rate in (min(losses), max(losses)):
        print(f"{name}: the best rate is at the edge of the sweep")
    return rate


def main(
    out: Annotated[Path, typer.Option(help="Folder for the text and the runs.")] = Path("runs/time-to-loss"),
    steps: Annotated[int, typer.Option(help="Updates of each run.")] = 400,
    batch_size: Annotated[int, typer.Option(help="Windows in an update.")] = 8,
    seeds: Annotated[str, typer.Option(help="Of weights and order; the sweep has the first.")] = "0,1,2",
) -> None:
    numbers = [int(seed) for seed in seeds.split(",")]
    options = {"seed": numbers[0], "steps": steps, "batch_size": batch_size}
    swept = {"adamw": sweep(out, "adamw", [], options)}
    rates = [best("adamw", swept["adamw"])]
    swept["muon"] = sweep(out, "muon", rates, options)
    rates.append(best("muon", swept["muon"]))
    runs = {
        name: [train(out, name, rates[: 1 + (name == "muon")], seed, steps, batch_size) for seed in numbers]
        for name in RATES
    }
    found = figures(runs) | {"sweep": swept, "rates": rates, "steps": steps, "batch_size": batch_size}
    (out / "time_to_loss.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    typer.run(main)
