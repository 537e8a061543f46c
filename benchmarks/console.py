"""Console, table and choice of a device for the commands of the suite."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

out_console = Console(highlight=False)


def print_table(
    header: list[str], rows: list[list[str]], colors: list[str | None] | None = None, title: str | None = None
) -> None:  # fmt: skip
    """Print a table on stdout. The first column is aligned left, all others right.

    `header` has the columns' names, and `rows` the cells as text. `colors` has a colour for each row, such as "red", or
    None for a row without one. `title` stands above the table. On a terminal, long cells are wrapped to fit its width.
    Otherwise a row stays on one line of at most 1,000 characters.
    """
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left", overflow="fold")
    for place, row in enumerate(rows):
        table.add_row(*map(Text, row), style=colors[place] if colors else None)
    if out_console.is_terminal:
        out_console.print(table)
    else:
        wide = Console(highlight=False, width=1000)
        wide.print(table, crop=False)


def resolve_device(name: str) -> str:
    """Return "cpu" or "cuda" for the option --device, whose value is `name`: "auto", "cpu" or "cuda".

    "auto" is "cuda" if PyTorch sees a GPU. Raise `ValueError` for any other name, and for "cuda" without a GPU.
    """
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device is {name}; expected auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA device; gpt-fast doctor tells more")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
