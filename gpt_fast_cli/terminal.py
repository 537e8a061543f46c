"""Common parts of the commands: devices, progress bars, results and errors on the terminal."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Progress

    from gpt_fast.training import loop

Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to run; auto takes a GPU if there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout, for programs.")]

Raw = Annotated[bool, typer.Option("--raw", help="Print control characters as they are, on a terminal too.")]

# C0 but for tabs and line ends, DEL, C1, and the characters that reorder text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SURROGATE = re.compile("[\ud800-\udfff]")

err = Console(stderr=True, highlight=False)
_PIPED = 1 << 24  # bytes of a prompt at standard input
_WIDE = 80  # columns that a bar needs beside its figures; count and time left fit into 40


def require_train_extra() -> None:
    """Raise `ValueError`, which names them, if packages that the extra `train` installs are missing.

    They are tokenizers, safetensors, torchmetrics, matplotlib and yaml.
    """
    missing = [
        name for name in ("tokenizers", "safetensors", "torchmetrics", "matplotlib", "yaml") if find_spec(name) is None
    ]
    if missing:
        raise ValueError(f"this command needs {', '.join(missing)}; pip install gpt-fast[train]")


def resolve_device(name: str) -> str:
    """Return the device to run on, "cpu" or "cuda", for the value `name` of --device: "auto", "cpu" or "cuda".

    "auto" becomes "cuda" if there is a GPU. Raise `ValueError` for another name, and for "cuda" if there is no GPU.
    """
    from gpt_fast.training.engine.distributed import resolve_device as resolve

    return resolve(name)


def escaped(text: str) -> str:
    r"""Return `text` with control characters spelled out as \x1b, for example. Line feeds and tabs are kept.

    Control characters could move the cursor, colour or retitle a terminal, or reverse the order of the characters.
    """
    return _CONTROL.sub(lambda found: _code(found[0]), text)


def printable(text: str, raw: bool = False) -> str:
    """Return `text` in the form in which it is printed on stdout.

    Control characters are spelled out if stdout is a terminal, unless `raw` is True. For a file or a pipe `text` is
    unchanged.
    """
    return text if raw or not sys.stdout.isatty() else escaped(text)


def write_text(text: str, raw: bool, nl: bool = True) -> None:
    """Print a model's text on stdout, with a line end behind it if `nl`.

    On a terminal control characters are escaped, unless `raw`. A file or pipe gets the text unchanged; `typer.echo`
    alone would drop escape sequences of colours there. Raise `OSError` if stdout cannot be written.
    """
    with _standard_output():
        typer.echo(printable(text, raw), nl=nl, color=True)


@contextmanager
def _standard_output() -> Iterator[None]:
    """Raise a clear `OSError` for an error that writing to stdout raises inside the block, such as a full disk.

    Standard output is then replaced by /dev/null, so that Python raises no second error when it flushes at exit. The
    error of a closed pipe (EPIPE) is raised unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:  # a reader that has seen enough, as in `gpt-fast … | head -1`
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(
            error.errno, f"standard output: not written whole ({error.strerror}); files that were named are written"
        ) from None


def _code(character: str) -> str:
    r"""Return the escape sequence of a character: \x1b, or \u202e from 256 on."""
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"


def check_decoded(option: str, text: str | None) -> None:
    """Raise `ValueError` if `text`, the value of the option named `option`, held bytes that are not UTF-8.

    Python decodes such bytes to lone surrogates, by which they are recognised. None passes.
    """
    found = None if text is None else _SURROGATE.search(text)
    if found is not None:
        raise ValueError(f"{option}: not UTF-8 from character {found.start() + 1} on; expected text")


def piped_text() -> str:
    """Return the text of a pipe or file at standard input, without its last line end and byte order mark, else "".

    A pipe is read to its end. Terminals, sockets and /dev/null are not read, because a program may have left them
    there. Raise `ValueError` if the text is longer than 16 MiB or not UTF-8.
    """
    try:
        mode = os.fstat(0).st_mode
    except OSError:  # closed
        return ""
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode)):
        return ""
    content = sys.stdin.buffer.read(_PIPED + 1)
    if len(content) > _PIPED:
        raise ValueError(f"standard input: has more than {_PIPED:,} bytes; expected a prompt")
    try:
        return content.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: not UTF-8 from byte {error.start} on; expected text") from None


def say(message: str) -> None:
    """Print a message on stderr without wrapping it. Control characters are escaped, except line feeds and tabs."""
    err.print(Text(escaped(message)), soft_wrap=True)


def print_error(message: str) -> None:
    """Print "gpt-fast: " and an error's message as one red line on stderr, however long it is.

    Each run of white space becomes one space, and control characters are escaped.
    """
    err.print(Text(f"gpt-fast: {escaped(' '.join(message.split()))}", style="red"), soft_wrap=True)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print "gpt-fast: " and a warning in yellow on stderr, without the source line that Python's `warnings` adds.

    This replaces `warnings.showwarning`, whose parameters it has. Only `message` is used.
    """
    err.print(Text(f"gpt-fast: {escaped(str(message))}", style="yellow"), soft_wrap=True)


def print_json(result: dict[str, Any]) -> None:
    """Print a result on stdout as one line of JSON. NaN and infinity become null.

    Text is not escaped to ASCII, but on a terminal control characters are. Raise `OSError` if stdout cannot be written.
    """
    from gpt_fast._files import finite

    text = json.dumps(finite(result), ensure_ascii=False)
    if sys.stdout.isatty():
        text = _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    with _standard_output():
        typer.echo(text)


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Print a title and below it `rows` of (name, value) on stdout, in two columns.

    A terminal folds long values inside their column, and control characters are escaped there. A file or pipe gets each
    row on one line, without colours and trailing spaces. Raise `OSError` if stdout cannot be written.
    """
    from rich.measure import Measurement
    from rich.table import Column, Table

    table = Table.grid(Column(no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(f"  {printable(name)}"), Text(printable(value)))
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = 2 + Measurement.get(out, out.options.update_width(sys.maxsize), table).maximum
    with _standard_output():
        with out.capture() as printed:
            out.print(Text(printable(title), style="bold"), soft_wrap=True)
            out.print(table)
        print("\n".join(line.rstrip() for line in printed.get().splitlines()), flush=True)


def metric_rows(measured: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (name, text) for each known metric in `measured`, as rows for `print_table`, in a fixed order.

    `measured` maps metrics such as "accuracy" or "loss" to numbers. The text is the formatted number. For "accuracy",
    "macro_f1", "mse" and "choice_accuracy" the text goes on with the score of a constant or random answer, which is
    another entry of `measured`: "majority_accuracy", "majority_macro_f1", "mean_mse" or "chance". If it is missing
    there, `KeyError` is raised. Metrics that this function does not know are left out.
    """
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
        ("bits per word", "bits_per_word", "{bits_per_word:.3f}"),
        ("last word", "last_word_accuracy", "{last_word_accuracy:.1%} written by greedy decoding"),
        ("its perplexity", "last_word_perplexity", "{last_word_perplexity:,.1f}"),
        ("accuracy", "choice_accuracy", "{choice_accuracy:.1%} by log-likelihood, by chance: {chance:.1%}"),
        ("normalised", "choice_accuracy_norm", "{choice_accuracy_norm:.1%} by log-likelihood per character"),
        ("per token", "choice_accuracy_per_token", "{choice_accuracy_per_token:.1%} by log-likelihood per token"),
        ("entity F1", "entity_f1", "{entity_f1:.3f}"),
        ("exact match", "exact_match", "{exact_match:.1%}"),
        ("word F1", "word_f1", "{word_f1:.3f}"),
        ("tokens", "tokens", "{tokens:,}"),
        ("rows", "examples", "{examples:,.0f}"),
    )
    return [(name, line.format(**measured)) for name, field, line in lines if field in measured]


def _per(measured: dict[str, Any]) -> str:
    """Return " per token", which follows the loss of a language model, if `measured` has a "perplexity", else ""."""
    return " per token" if "perplexity" in measured else ""


def has_bars() -> bool:
    """Return True if stderr is a terminal that can redraw a line, as progress bars need."""
    return err.is_terminal and not err.is_dumb_terminal


@contextmanager
def training_bar(label: str) -> Iterator[Callable[[loop.Progress], None]]:
    """Yield a function that updates a progress bar on stderr from a `loop.Progress`, the state of a training.

    The bar has `label`, the updates done, the loss, tokens per second and the time left; on a narrow terminal not the
    loss and the speed. It appears with the first call. If stderr is no terminal, there is no bar. The results of a
    validation are printed as a line on stderr either way, above the bar.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    count, left = MofNCompleteColumn(), TimeRemainingColumn(compact=True)
    columns: tuple[ProgressColumn, ...] = (TextColumn(label), count, left, TextColumn("left"))
    if err.width >= _WIDE:
        loss = TextColumn("loss {task.fields[loss]:.3f} · {task.fields[rate]:,.0f} tokens/s{task.fields[mfu]} ·")
        columns = (TextColumn(label), BarColumn(), count, loss, left, TextColumn("left"))
    with _from_first_call(Progress(*columns, console=err, disable=not has_bars())) as progress:
        task = progress.add_task(label, total=None, visible=False, loss=float("nan"), rate=0.0, mfu="")

        def show(now: loop.Progress) -> None:
            """Update the bar from the training's state, and print the results of a validation if `now` has any."""
            progress.start()
            mfu = f" · MFU {now.mfu:.0%}" if now.mfu else ""
            rate = now.tokens_per_second
            progress.update(task, completed=now.step, total=now.steps, loss=now.loss, rate=rate, mfu=mfu, visible=True)
            if now.logged and any(name.startswith("valid_") for name in now.logged):
                figures = [f"{name.replace('_', ' ')} {now.logged[name]:.3f}" for name in now.logged if _shown(name)]
                progress.console.print(f"  update {now.step:>5}: {', '.join(figures)}", soft_wrap=True)

        yield show


@contextmanager
def counting_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function show(done, total) that updates a progress bar on stderr with `label` and these two counts.

    The bar appears with the first call and is removed at the end of the block. If stderr is no terminal, there is no
    bar.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count, left = MofNCompleteColumn(), TimeRemainingColumn(compact=True)
    columns = (TextColumn(label), *([BarColumn()] if err.width >= _WIDE else []), count, left)
    bar = Progress(*columns, console=err, transient=True, disable=not has_bars())
    with _from_first_call(bar) as progress:
        task = progress.add_task(label, total=None)

        def show(done: int, total: int) -> None:
            """Update the bar: `done` of `total` units of work are finished."""
            progress.start()
            progress.update(task, completed=done, total=total)

        yield show


@contextmanager
def _from_first_call(progress: Progress) -> Iterator[Progress]:
    """Yield `progress`, a bar that is not started yet. Stop it when the block ends or raises, if it was started.

    The block starts the bar when there is progress to show. So a command that fails before prints its error alone.
    """
    try:
        yield progress
    finally:
        if progress.live.is_started:
            progress.stop()


def _shown(name: str) -> bool:
    """Return True if the metric `name` is printed with a validation.

    Printed are "train_loss" and all metrics whose names begin with "valid_", except "valid_examples".
    """
    return name == "train_loss" or (name.startswith("valid_") and name != "valid_examples")
