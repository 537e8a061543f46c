"""The command of the suite, in a checkout: `python -m benchmarks`."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from benchmarks.console import out_console, print_table, resolve_device

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
err_console = Console(stderr=True, highlight=False)


@app.command()
def bench(
    suite: Annotated[
        str, typer.Option(metavar="ops|train|decode|all", help="What to measure; also the name of one op or job.")
    ] = "all",
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="Where to run; auto takes a GPU if there is one.")
    ] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Few cases and rounds: a few minutes.")] = False,
    out: Annotated[Path, typer.Option(help="Where the results go, in a folder for the device.")] = Path("runs/bench"),
    resume: Annotated[bool, typer.Option("--resume", help="Resume the partial results in --out.")] = False,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="CPU seconds of one thread, for a machine that others keep busy.")
    ] = False,
    untested: Annotated[
        bool, typer.Option("--untested", help="Time at once, without the tests; the results say so.")
    ] = False,
    busy: Annotated[
        bool, typer.Option("--busy", help="A process that computes in an endless loop runs beside, on purpose.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="OLD NEW", help="Measure nothing: show what changed beyond the noise."),
    ] = None,
) -> None:
    """Time operations, training steps and generation against the machine's measured limits and other implementations.

    --suite chooses what is timed. The tests of each op or job run first, unless --untested. If they fail, no time of it
    is reported, and the exit code is 1 at the end. The limits, called floors (copy and read bandwidth, rate of matrix
    products), are measured in the same run.

    Writes one JSON file for each op, job or study, a page with tables, and plots. Ctrl-C keeps what was measured,
    marked partial, and ends with exit code 130; --resume continues. --busy measures while another process keeps a core
    busy, to show how much that slows each implementation. Its results go into separate files, and the page compares
    them with the results without --busy. --cpu-time sets PyTorch to one thread. --busy and --cpu-time need a CPU and
    exclude each other. --compare only prints the times that changed between two results.

    [bold]Example[/bold]

    python -m benchmarks --suite ops --quick
    """
    if compare is not None:
        _compare(*compare)
        return
    from benchmarks.catalogue import select

    topics, device = select(suite), resolve_device(device)
    if cpu_time:
        if device != "cpu":
            raise ValueError(f"--cpu-time with --device {device}; expected --device cpu: a GPU's times are its own")
        import torch

        torch.set_num_threads(1)
    if busy and (device != "cpu" or cpu_time):
        raise ValueError(
            f"--busy with {'--cpu-time' if cpu_time else '--device ' + device}; expected a CPU's wall time"
        )
    _run(topics, device, quick, out, resume, cpu_time, untested, busy)


def _say(message: str) -> None:
    """Print `message` on stderr, as plain text that is not wrapped."""
    err_console.print(Text(message), soft_wrap=True)


def _compare(old: Path, new: Path) -> None:
    """Print a table of the times that changed beyond the noise between two results, then a line with counts, on stdout.

    `old` and `new` are paths. Each is a results file of an op or job, the folder with one device's results files, or a
    folder of such device folders. A median has changed beyond the noise if two conditions hold: it differs by more than
    3 %, and by more than the sum of the two interquartile ranges. The table begins with the largest speed-up, and is
    left out if no time changed. Raise `ValueError` if the two have no time in common.
    """
    from benchmarks.report import markdown, results

    changes = results.compare(results.read_any(old), results.read_any(new))
    if not changes:
        raise ValueError(f"{old} and {new} have no figure in common")
    moved = sorted((change for change in changes if change["beyond"]), key=lambda change: change["ratio"])
    rows = [
        [
            f"{change['topic']} {change['case']}",
            markdown.PASS_NAMES.get(change["pass"], change["pass"]),
            change["peer"],
            markdown.seconds(change["old"]),
            markdown.seconds(change["new"]),
            f"{change['ratio']:.2f}",
        ]
        for change in moved
    ]
    if rows:
        header = ["case", "pass", "implementation", "old", "new", "new / old"]
        print_table(header, rows, ["green" if change["ratio"] < 1 else "red" for change in moved])
    faster = sum(change["ratio"] < 1 for change in moved)
    typer.echo(
        f"{len(changes)} figures in both: {faster} faster, {len(moved) - faster} slower, "
        f"{len(changes) - len(moved)} within the noise"
    )


def _run(
    topics: list[Any], device: str, quick: bool, out: Path, resume: bool, cpu_time: bool, untested: bool, busy: bool
) -> None:  # fmt: skip
    """Measure topics and studies. Show the progress on stderr, and write the results and their pages under `out`.

    `topics` are ops and whole-model jobs (`Topic`) and measurements with a table of their own (`Study`). Those with
    nothing to measure on `device`, "cpu" or "cuda", are skipped. `quick` measures fewer cases and rounds. `resume`
    keeps the results that are already in `out`. `cpu_time` measures CPU seconds, `untested` skips the tests, and `busy`
    runs a busy process beside.

    The results of each case and study are also printed on stdout as they come. At the end stderr gets the paths of the
    pages and the output of failed tests. Raise `typer.Exit` with code 130 after SIGINT or SIGTERM, else with code 1 if
    the tests of a topic failed.
    """
    from benchmarks.measure.runner import Settings, count, here, run
    from benchmarks.report import pages
    from gpt_fast.interrupts import caught

    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("left"),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    with Progress(*columns, console=err_console, expand=True) as progress:
        task = progress.add_task("", total=None)

        def advance(done: int, label: str) -> None:
            progress.update(task, advance=done, description=label)

        topics = here(topics, device, busy)
        settings = Settings(device, quick, resume, cpu_time, untested, busy, out, advance, _show_case, _show_study)
        progress.update(task, total=count(topics, settings))
        with caught():
            outcome = run(topics, settings)
    if outcome.files:
        _say(f"results: {', '.join(str(page) for page in pages.write_pages(out))}")
    for topic, output in outcome.refused.items():
        _say(output)
        _say(f"benchmarks: the tests of {topic} fail, so none of its times is reported")
    if outcome.interrupted:
        _say("benchmarks: interrupted; the results so far are kept and marked partial, --resume continues them")
        raise typer.Exit(130)
    if outcome.refused:
        raise typer.Exit(1)


def _show_case(run: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Print a table of one case on stdout, with a row for each implementation; print nothing if `records` is empty.

    A case is an op or job at fixed sizes and dtype. `run` is the content of the op's or job's results file. `records`
    are the file's entries for this case, each with the times of one implementation.
    """
    from benchmarks.report import results, tables

    if records:
        rows = tables.rows(run, {record["peer"]: record for record in records})
        print_table(tables.columns(run, records), rows, title=f"{results.label(run)} {records[0]['case']}")


def _show_study(study: Any, record: dict[str, Any]) -> None:
    """Print the results of a `Study` on stdout: `study.lines(record)` are lines of Markdown, which are rendered.

    `record` is the content of the study's results file.
    """
    out_console.print(Markdown("\n".join(study.lines(record))))


def main() -> None:
    """Run the command `python -m benchmarks`. A `ValueError` or `OSError` becomes a line on stderr and exit code 2.

    If pytest or matplotlib is not installed, no command runs: a line on stderr says so, and the exit code is 2.
    """
    missing = [name for name in ("pytest", "matplotlib") if find_spec(name) is None]
    try:
        if missing:
            raise ValueError(f"{', '.join(missing)} missing; pip install gpt-fast[train,bench]")
        app(prog_name="python -m benchmarks")
    except (ValueError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        err_console.print(Text(f"benchmarks: {' '.join(message.split())}", style="red"), soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
