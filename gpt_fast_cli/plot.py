"""The command `gpt-fast plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .terminal import require_train_extra, write_text


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders, finished or not.")],
    out: Annotated[Path, typer.Option(metavar="PNG", help="Picture to write.")] = Path("curves.png"),
    metric: Annotated[
        str, typer.Option(help="A field of metrics.jsonl, such as train_loss, valid_loss, valid_accuracy or lr.")
    ] = "valid_loss",
) -> None:
    """Draw one curve of each run into one picture.

    The curves show [bold]--metric[/bold] over the updates. The picture's path is printed, and a file of that name is
    replaced. A run whose metrics lack that field is an error.

    [bold]Example[/bold]

    gpt-fast plot runs/a runs/b --metric train_loss --out losses.png
    """
    require_train_extra()
    from gpt_fast.training.plots import plot_runs
    from gpt_fast.training.runs.folder import read_curve

    curves = [(str(run), read_curve(run, metric)) for run in runs]
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: expected a name that ends in .png")
    plot_runs(curves, metric, out)
    write_text(str(out), raw=False)
