"""The commands of `gpt-fast`. What is slow to import, torch before all, is imported when a command runs."""

from __future__ import annotations

import sys
import warnings
from io import TextIOWrapper
from typing import Annotated

import typer

from ..interrupts import Interrupted
from . import bench, compare, convert, doctor, evaluate, finetune, generate, plot, predict, prepare, pretrain
from .common import print_error, say, show_warning

app = typer.Typer(
    name="gpt-fast",
    help="Pre-train, fine-tune, evaluate and run GPT-1 and GPT-2 class models, on a GPU or a CPU.",
    epilog="A first round: gpt-fast pretrain --out runs/lm, then gpt-fast finetune --from runs/lm --out runs/task, "
    "then gpt-fast generate --from runs/lm --prompt 'def '. Neither needs data of yours.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("doctor")(doctor.doctor)
app.command("prepare")(prepare.prepare)
app.command("pretrain")(pretrain.pretrain)
app.command("finetune")(finetune.finetune)
app.command("evaluate")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("plot")(plot.plot)
app.command("generate")(generate.generate)
app.command("compare")(compare.compare)
app.command("bench")(bench.bench)
app.command("convert")(convert.convert)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"gpt-fast {version('gpt-fast')}")
        raise typer.Exit


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Runs before any command; `run` looks for --traceback itself."""


def run() -> None:
    """Runs the command line. What a user can cause, a ValueError or OSError, becomes one line and exit code 2; a
    signal that stopped a training the code that shells give it (130 for Ctrl-C, 143 for SIGTERM); anything else is a
    fault of ours and keeps its traceback."""
    warnings.showwarning = show_warning
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: no label is an error because it is printed
    try:
        app()
    except Interrupted as stopped:
        say(f"gpt-fast: {stopped.saved or f'stopped by {stopped}, nothing is left of it'}")
        sys.exit(128 + stopped.signum)
    except (ValueError, OSError) as error:
        if "--traceback" in sys.argv:
            raise
        print_error(error)
        sys.exit(2)
