"""What the commands share: devices, progress bars, results and errors on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from gpt_fast.training import loop

Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to run; auto takes a GPU if there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout, for programs.")]

err = Console(stderr=True, highlight=False)


def require_train_extra() -> None:
    """Raises where the packages of the extra `train` are not installed."""
    missing = [
        name for name in ("tokenizers", "safetensors", "torchmetrics", "matplotlib", "yaml") if find_spec(name) is None
    ]
    if missing:
        raise ValueError(f"this command needs {', '.join(missing)}; pip install gpt-fast[train]")


def resolve_device(name: str) -> str:
    """Return `cpu` or `cuda` for --device."""
    from gpt_fast.training.engine.distributed import resolve_device as resolve

    return resolve(name)


def say(message: str) -> None:
    err.print(Text(message), soft_wrap=True)


def print_error(message: str) -> None:
    """Print one red line on stderr, however long."""
    err.print(Text(f"gpt-fast: {' '.join(message.split())}", style="red"), soft_wrap=True)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line on stderr, without the place in the code that `warnings` adds."""
    err.print(Text(f"gpt-fast: {message}", style="yellow"), soft_wrap=True)


def print_json(result: dict[str, Any]) -> None:
    from gpt_fast._files import finite

    typer.echo(json.dumps(finite(result), ensure_ascii=False))


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Print names and values on stdout. A terminal folds long values inside their column; a file or pipe gets each on
    one line, without colours and without spaces behind it."""
    from rich.measure import Measurement
    from rich.table import Column, Table

    table = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(f"  {name}"), Text(value))
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = 2 + Measurement.get(out, out.options.update_width(sys.maxsize), table).maximum
    with out.capture() as printed:
        out.print(Text(title, style="bold"), soft_wrap=True)
        out.print(table)
    print("\n".join(line.rstrip() for line in printed.get().splitlines()), flush=True)


def metric_rows(measured: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured, for a table: each figure beside what a constant answer reaches."""
    constant = "always the commonest label"
    lines = (
        ("accuracy", "accuracy", "{accuracy:.1%}, " + constant + ": {majority_accuracy:.1%}"),
        ("macro F1", "macro_f1", "{macro_f1:.3f}, " + constant + ": {majority_macro_f1:.3f}"),
        ("micro F1", "micro_f1", "{micro_f1:.3f}"),
        ("Matthews", "matthews", "{matthews:.3f}"),
        ("squared error", "mse", "{mse:.4g}, always the mean: {mean_mse:.4g}"),
        ("Pearson", "pearson", "{pearson:.3f}"),
        ("Spearman", "spearman", "{spearman:.3f}"),
        ("cross-entropy" if "accuracy" in measured else "loss", "loss", "{loss:.3f} nats" + _per(measured)),
        ("unigram entropy", "unigram_entropy", "{unigram_entropy:.3f} nats per token, without any context"),
        ("perplexity", "perplexity", "{perplexity:,.1f}"),
        ("bits per byte", "bits_per_byte", "{bits_per_byte:.3f}"),
        ("exact match", "exact_match", "{exact_match:.1%}"),
        ("word F1", "word_f1", "{word_f1:.3f}"),
        ("tokens", "tokens", "{tokens:,}"),
        ("rows", "examples", "{examples:,.0f}"),
    )
    return [(name, line.format(**measured)) for name, field, line in lines if field in measured]


def _per(measured: dict[str, Any]) -> str:
    return "" if "accuracy" in measured else " per token"


@contextmanager
def training_bar(label: str) -> Iterator[Callable[[loop.Progress], None]]:
    """A progress bar on stderr, with the loss, tokens per second and the time left; validations are lines above it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f} · {task.fields[rate]:,.0f} tokens/s{task.fields[mfu]} ·"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=err) as progress:
        # Seen from the first update on: what fails before it fails without a bar.
        task = progress.add_task(label, total=None, visible=False, loss=float("nan"), rate=0.0, mfu="")

        def show(now: loop.Progress) -> None:
            mfu = f" · MFU {now.mfu:.0%}" if now.mfu else ""
            rate = now.tokens_per_second
            progress.update(task, completed=now.step, total=now.steps, loss=now.loss, rate=rate, mfu=mfu, visible=True)
            if now.logged and any(name.startswith("valid_") for name in now.logged):
                figures = [f"{name.replace('_', ' ')} {now.logged[name]:.3f}" for name in now.logged if _shown(name)]
                progress.console.print(f"  update {now.step:>5}: {', '.join(figures)}", soft_wrap=True)

        yield show


@contextmanager
def counting_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr that counts."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _shown(name: str) -> bool:
    return name == "train_loss" or (name.startswith("valid_") and name != "valid_examples")
