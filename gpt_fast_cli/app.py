"""The commands of `gpt-fast`.

The file of a command is imported when that command is needed, and imports torch and `gpt_fast` when the command runs:
`gpt-fast --help`, `--version` and completion answer at once.
"""

from __future__ import annotations

import ast
import os
import sys
import time
import warnings
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from . import usage
from .terminal import print_error, say, show_warning, write_text

NAMES = (
    "doctor", "prepare", "pretrain", "finetune", "evaluate", "predict", "plot", "generate", "compare", "bench",
    "tune", "convert", "warmup",
)  # fmt: skip
FIRST_RANK_PRINTS = 30  # seconds at most: torchrun ends the others when the first rank has failed
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


class Commands(TyperGroup):
    """Group that knows its commands by name and docstring, and imports a command when it is needed.

    A command is needed when it runs, shows its help or is completed.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.commands = {name: TyperCommand(name, help=_docstring(name)) for name in NAMES}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return (name, command, remaining arguments) for the command that `args` begin with, and import its file.

        Fail with a usage error, which suggests the nearest command, if there is no such command.
        """
        if args[0] not in self.commands:
            ctx.fail(usage.no_such_command(args[0], NAMES))
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and load_command(str(name)), rest


def load_command(name: str) -> Any:
    """Import the file of the command `name` and return the command, a click command with its options.

    `name` is one of NAMES, such as "pretrain". Raise `ModuleNotFoundError` if there is no such file.
    """
    module = import_module(f".{name}", __package__)
    single = typer.Typer(
        rich_markup_mode="rich", add_completion=False, pretty_exceptions_enable=False, context_settings=HELP_OPTIONS
    )
    single.command(name, cls=usage.Command, **getattr(module, "PASSES_ON", {}))(getattr(module, name))
    return typer.main.get_command(single)


def _docstring(name: str) -> str | None:
    """Return the docstring of the command `name`, read from its file without importing the file; None without one."""
    tree = ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return ast.get_docstring(function)


app = typer.Typer(
    name="gpt-fast",
    cls=Commands,
    help="Pre-train, fine-tune, evaluate and run GPT-1 and GPT-2 class models, on a GPU or a CPU.",
    epilog="A first round: gpt-fast pretrain --out runs/lm, then gpt-fast finetune --from runs/lm --out runs/task, "
    "then gpt-fast generate --from runs/lm --prompt 'def '. Neither needs data of yours.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP_OPTIONS,
)


def _print_version(requested: bool) -> None:
    """Print "gpt-fast VERSION" and raise `typer.Exit` if the user `requested` it by --version. Else do nothing."""
    if requested:
        from importlib.metadata import version

        write_text(f"gpt-fast {version('gpt-fast')}", raw=False)
        raise typer.Exit


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Declare the options that stand before a command. The function itself does nothing.

    The option --version prints the version and exits before. `run` looks for --traceback in the command line.
    """


def run() -> None:
    """Run the command line and exit.

    A wrong command line, and a `ValueError`, `OSError` or `MemoryError`, which a user can cause, become one line on
    stderr and exit code 2. With --traceback these three errors are raised instead. All ranks of a distributed job raise
    a usage error or an `OptionError` alike, so only the first rank of each machine prints it. A signal that stopped a
    training becomes the exit code that shells give it (130 for Ctrl-C, 143 for SIGTERM). Other exceptions are faults of
    this program and keep their traceback. Warnings are printed as one line from now on.
    """
    warnings.showwarning = show_warning
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: no label is an error because it is printed
    try:
        sys.exit(app(standalone_mode=False))  # the code of `typer.Exit`, or None
    except typer.TyperException as error:
        if not _another_rank_prints():
            print_error(usage.message(error))
        sys.exit(error.exit_code)
    except (ValueError, OSError) as error:
        if "--traceback" in sys.argv:
            raise
        settings = sys.modules.get("gpt_fast_settings.declaration")  # which a command imports, and --help need not
        is_alike = settings is not None and isinstance(error, settings.OptionError)
        if not (is_alike and _another_rank_prints()):
            print_error(_message(error))
        sys.exit(2)
    except MemoryError as error:
        if "--traceback" in sys.argv:
            raise
        print_error(
            f"out of memory ({error}); expected a smaller batch, model or file" if str(error) else "out of memory"
        )
        sys.exit(2)
    except BaseException as error:
        code = _signal_code(error)
        if code is None:
            raise
        say(f"gpt-fast: {error.saved or f'stopped by {error}'}")  # type: ignore[attr-defined]
        sys.exit(code)


def _another_rank_prints() -> bool:
    """Return False on the first rank of a machine, True on the others, whose errors are not printed.

    An error that all ranks raise is thereby printed once. The rank is read from the environment variable LOCAL_RANK, 0
    if it is not set. torchrun ends all ranks when one has failed. So under torchrun this function waits
    `FIRST_RANK_PRINTS` (30) seconds before it returns True, for the first rank to print.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(FIRST_RANK_PRINTS)
    return True


def _message(error: ValueError | OSError) -> str:
    """Return an error's text. For an `OSError` of the system this is "FILE: REASON", without `[Errno 2]` and quotes.

    An `OSError` without a file gives "REASON" alone, and one that was made of a text alone gives that text. Of two
    files, as in a rename, the second is named.
    """
    if isinstance(error, OSError) and error.strerror:
        name = error.filename2 or error.filename  # of a rename the name that the file was to have
        return f"{name}: {error.strerror}" if name else error.strerror
    return str(error)


def _signal_code(error: BaseException) -> int | None:
    """Return the exit code for an `Interrupted` of `gpt_fast.interrupts`, 128 + the signal's number.

    Return None for any other error. Importing `gpt_fast` loads torch. So this function does not import it, but looks if
    a command has.
    """
    interrupts = sys.modules.get("gpt_fast.interrupts")
    return 128 + error.signum if interrupts and isinstance(error, interrupts.Interrupted) else None
