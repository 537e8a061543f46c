"""The command `gpt-fast compare`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from .terminal import AsJson, Device, counting_bar, print_json, print_table, require_train_extra, resolve_device


def compare(
    source: Annotated[Path | None, typer.Option("--from", help="Run folder of any model.")] = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN…", help="Run folders, to show how soon each reaches a loss, instead of --from."),
    ] = None,
    more_runs: Annotated[list[Path] | None, typer.Argument(hidden=True)] = None,
    loss: Annotated[
        float | None, typer.Option(help="Loss to reach, in nats; by default the lowest that all --runs reach.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Field of metrics.jsonl that falls in training; by default valid_loss.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in the batch, by default 8.")] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Timed training steps of each model, by default 9; the median is shown.")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare a model on its fused kernels with the same model on the pure-PyTorch reference, or runs with each other.

    With [bold]--from[/bold], both models get one random batch, the same weights and the same dropout masks. The result
    is the largest differences of logits and gradients, and the speed of training steps, which are timed in turn.
    [bold]gpt-fast doctor[/bold] shows which operations have a kernel here; an operation that the reference serves does
    not differ from it.

    With [bold]--runs[/bold], the result is after how many updates, and seconds spent in them, each run's held-out loss
    (or [bold]--metric[/bold]) first fell to a value: [bold]--loss[/bold], or the lowest that all runs reach.

    [bold]Examples[/bold]

    gpt-fast compare --from runs/lm

    gpt-fast compare --runs runs/adamw runs/muon --loss 3.5
    """
    require_train_extra()
    folders = [*(runs or ()), *(more_runs or ())]
    if (source is None) == (not folders) or (more_runs and not runs):
        raise ValueError("compare: expected --from with one run folder, or --runs with several")
    if loss is not None and not math.isfinite(loss):
        raise ValueError(f"--loss {loss}: expected a finite number")
    timing = {"--batch-size": batch_size, "--repeats": repeats}
    if folders:
        for option in (name for name, value in timing.items() if value is not None):
            raise ValueError(f"{option} {timing[option]}: of timing one model; expected --from without --runs")
        _compare_runs(folders, loss, metric or "valid_loss", as_json)
        return
    for option in ([] if loss is None else [f"--loss {loss:g}"]) + ([] if metric is None else [f"--metric {metric}"]):
        raise ValueError(f"{option}: of one run; expected --runs beside it")
    assert source is not None
    for option, value in timing.items():
        if value is not None and not 1 <= value <= 1_000_000:
            raise ValueError(f"{option} {value}: expected 1 to 1,000,000")
    device = resolve_device(device)
    from gpt_fast.training.compare import compare as measure

    with counting_bar("timing") as show:
        result = measure(source, device, batch_size or 8, repeats or 9, show)
    if as_json:
        print_json(result)
        return
    by_kernel: dict[str, list[str]] = {}
    for op, kernel in result["kernels"].items():
        by_kernel.setdefault(kernel, []).append(op)
    rows = [(f"run by {kernel}", ", ".join(names)) for kernel, names in sorted(by_kernel.items())]
    for name in ("logits", "gradients"):
        apart = result[name]
        rows.append((name, f"differ by at most {apart['largest']:.1e}, {apart['relative']:.1e} of their scale"))
    for name, label in (("fused", "with kernels"), ("reference", "reference")):
        low, high = result[f"{name}_spread"]
        rows.append((label, f"{result[f'{name}_tokens_per_second']:,.0f} tokens/s ({low:,.0f} to {high:,.0f})"))
    rows.append(("speed-up", f"{result['speedup']:.2f} ×"))
    B, T = result["batch"]
    print_table(f"{source} on {result['device']}, training steps of {B} × {T} tokens", rows)


def _compare_runs(folders: list[Path], loss: float | None, metric: str, as_json: bool) -> None:
    """Print after how many updates and seconds each run in `folders` first reached a loss, or that it did not.

    `loss` is the value of the metric to reach, or None for the lowest that all runs reach. `metric` is a field of
    metrics.jsonl. If `as_json`, the dict that `compare_runs` returns is printed as JSON instead of a table.
    """
    from gpt_fast.training.compare import compare_runs

    result = compare_runs(folders, loss, metric)
    if as_json:
        print_json(result)
        return
    rows = []
    for run in result["runs"]:
        step, seconds = run["step"], run["seconds"]
        when = f"not reached; its best is {run['best']:.3f}" if step is None else f"{step:,.1f} updates"
        rows.append((run["run"], when if seconds is None else f"{when}, {seconds:,.0f} s"))
    print_table(f"{metric} {result['loss']:.3f}", rows)
