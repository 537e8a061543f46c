"""`gpt-fast bench`"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from .terminal import Device, err, resolve_device, say

ROOT = Path(__file__).resolve().parents[1]


def bench(
    suite: Annotated[
        str, typer.Option(metavar="ops|train|decode|all", help="What to measure; also the name of one op or job.")
    ] = "all",
    device: Device = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Few cases and rounds: a few minutes.")] = False,
    out: Annotated[Path, typer.Option(help="Where the results go, in a folder for the device.")] = Path("runs/bench"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the partial results in --out.")] = False,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="CPU seconds of one thread, for a machine that others keep busy.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="OLD NEW", help="Measure nothing: show what changed beyond the noise."),
    ] = None,
) -> None:
    """Times every operation, training steps and generation against their floors and against other implementations.

    Runs the tests of what it measures first and reports no time where they fail. The floors (copy and read bandwidth,
    rate of matrix products) are measured in the same run. Writes one JSON file a topic, a page with tables, and plots.
    Ctrl-C keeps what there is, marked partial; --resume goes on. Needs a checkout of the repository, which has the
    tests and the peers.

    [bold]Example[/bold]

    gpt-fast bench --suite ops --quick
    """
    _require_checkout()
    if compare is not None:
        _compare(*compare)
        return
    from benchmarks.cases import select

    topics, device = select(suite), resolve_device(device)
    if cpu_time:
        if device != "cpu":
            raise ValueError(f"--cpu-time on {device}: wanted --device cpu; a GPU's times are its own already")
        import torch

        torch.set_num_threads(1)
    _run(topics, device, quick, out, resume, cpu_time)


def _require_checkout() -> None:
    if not (ROOT / "benchmarks" / "runner.py").exists():
        raise ValueError(
            f"bench needs a checkout of the repository, with the tests that it runs first; this gpt_fast is installed "
            f"in {ROOT}. Clone it, and there: make install, make bench"
        )
    missing = [name for name in ("pytest", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ValueError(f"bench needs {', '.join(missing)}; pip install gpt-fast[train,bench]")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))


def _compare(old: Path, new: Path) -> None:
    from benchmarks import results, tables

    changes = results.compare(results.read_any(old), results.read_any(new))
    if not changes:
        raise ValueError(f"{old} and {new} have no figure in common")
    moved = sorted((change for change in changes if change["beyond"]), key=lambda change: change["ratio"])
    header = ["case", "pass", "implementation", "old", "new", "new / old"]
    rows = [
        [
            f"{change['topic']} {change['case']}",
            tables.PASS_NAMES.get(change["pass"], change["pass"]),
            change["peer"],
            tables.seconds(change["old"]),
            tables.seconds(change["new"]),
            f"{change['ratio']:.2f}",
        ]
        for change in moved
    ]
    if rows:
        _print(header, rows, ["green" if change["ratio"] < 1 else "red" for change in moved])
    faster = sum(change["ratio"] < 1 for change in moved)
    typer.echo(
        f"{len(changes)} figures in both: {faster} faster, {len(moved) - faster} slower, "
        f"{len(changes) - len(moved)} within the noise"
    )


def _run(topics: list[Any], device: str, quick: bool, out: Path, resume: bool, cpu_time: bool) -> None:
    from benchmarks import report
    from benchmarks.runner import Settings, count, run
    from gpt_fast.interrupts import caught

    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("left"),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    with Progress(*columns, console=err, expand=True) as progress:
        task = progress.add_task("", total=None)

        def advance(done: int, label: str) -> None:
            progress.update(task, advance=done, description=label)

        settings = Settings(device, quick, resume, cpu_time, out, advance, say, _show)
        progress.update(task, total=count(topics, settings))
        with caught():
            outcome = run(topics, settings)
    if outcome.files:
        pages = report.write_pages(out)
        say(f"results: {', '.join(str(page) for page in pages)}")
    for topic, output in outcome.refused.items():
        say(output)
        say(f"gpt-fast: {topic}: its tests fail, so no time of it is reported")
    if outcome.interrupted:
        say("gpt-fast: interrupted; the results so far are kept and marked partial, --resume goes on with them")
        raise typer.Exit(130)
    if outcome.refused:
        raise typer.Exit(1)


def _show(run: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """The table of one case, on stdout."""
    from benchmarks import tables

    if records:
        typer.secho(f"\n{run['topic']} {records[0]['case']}", bold=True)
        _print(tables.columns(run, records), tables.rows(run, {record["peer"]: record for record in records}))


def _print(header: list[str], rows: list[list[str]], colors: list[str] | None = None) -> None:
    """Columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for i, row in enumerate([header, *rows]):
        cells = [f"{cell:{'>' if j else '<'}{widths[j]}}" for j, cell in enumerate(row)]
        typer.secho("  ".join(cells), fg=colors[i - 1] if colors and i else None, bold=i == 0)
