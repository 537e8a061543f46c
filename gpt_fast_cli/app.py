"""The commands of `gpt-fast`. Each imports torch and `gpt_fast` when it runs, so that `--help` answers at once."""

from __future__ import annotations

import sys
import warnings
from io import TextIOWrapper
from typing import Annotated

import typer

from . import bench, compare, convert, doctor, evaluate, finetune, generate, plot, predict, prepare, pretrain
from .terminal import print_error, say, show_warning

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
app.command("bench", **bench.PASSES_ON)(bench.bench)
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
    """Run the command line.

    A `ValueError` or `OSError`, which a user can cause, becomes one line and exit code 2. A signal that stopped a
    training becomes the exit code that shells give it (130 for Ctrl-C, 143 for SIGTERM). Any other exception is a fault
    of this program and keeps its traceback.
    """
    warnings.showwarning = show_warning
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: no label is an error because it is printed
    try:
        app()
    except (ValueError, OSError) as error:
        if "--traceback" in sys.argv:
            raise
        print_error(error)
        sys.exit(2)
    except BaseException as error:
        code = _signal_code(error)
        if code is None:
            raise
        say(f"gpt-fast: {error.saved or f'stopped by {error}, nothing is left of it'}")  # type: ignore[attr-defined]
        sys.exit(code)


def _signal_code(error: BaseException) -> int | None:
    """Return the exit code of an `Interrupted`, or None for another exception. Imports torch only if a command did."""
    interrupts = sys.modules.get("gpt_fast.interrupts")
    return 128 + error.signum if interrupts and isinstance(error, interrupts.Interrupted) else None
