"""The developer's side of `gpt-fast tune`: compare configurations, or ship a table that a GPU has measured.

    python -m tools.tune --compare FILE [OP ...] [--part 2/8]
    python -m tools.tune --ship TABLE

`--compare` changes no table: it measures the configuration that serves, the candidates and the neighbours, and appends
one line of JSON for each to FILE. `--part 2/8` takes every eighth class of shapes from the second on, so that processes
share the work. `--ship` writes the rows of a user's table into kernels/launch_configs.py. Run the tests and
`make codegen` after it, because tiles order sums.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

from gpt_fast import tuning
from gpt_fast.kernels import launch_configs
from gpt_fast.kernels.launch_configs import ANY, Row

PATH = Path(launch_configs.__file__)


def rewritten(text: str, op: str, rows: list[Row]) -> str:
    """Return `text`, the source of kernels/launch_configs.py, with the rows of `op` in TABLES replaced by `rows`.

    A `Row` is a launch configuration for a kernel and an architecture, up to an element size in bytes and up to a head
    size (attention) or width. Raise `ValueError` unless TABLES has exactly one table of the op. No file is written.
    """
    lines = []
    for row in rows:
        size = "ANY" if row.size == ANY else str(row.size)
        config = f"({', '.join(map(str, row.config))}{',' if len(row.config) == 1 else ''})"
        lines.append(
            f'        Row("{row.kernel}", {row.architecture}, {row.element}, {size}, {config}, "{row.source}"),\n'
        )
    pattern = re.compile(rf'(    "{op}": \[\n).*?(    \],\n)', re.DOTALL)
    tables, candidates, rest = text.partition("\nCANDIDATES: ")
    new, count = pattern.subn(lambda match: match[1] + "".join(lines) + match[2], tables)
    if count != 1:
        raise ValueError(f"{PATH}: found {count} tables of {op}; expected 1")
    return new + candidates + rest


def ship(table: Path) -> None:
    """Write the launch configurations of a user's table into TABLES of kernels/launch_configs.py.

    `table` is a file that `gpt-fast tune` wrote. A row of the file replaces the shipped row for the same kernel,
    architecture, element size and largest size of a shape, or is inserted if there is none. An architecture without
    rows for a kernel uses the rows of another architecture. When it gets the first row, those rows are copied for it,
    because the new row covers only some of the sizes.
    """
    _, found = launch_configs.read_table(table)
    text = PATH.read_text("utf-8")
    for op, rows in found.items():
        merged = launch_configs.TABLES[op]
        for row in rows:
            merged = launch_configs.with_row(merged, row)
        text = rewritten(text, op, merged)
    PATH.write_text(text, encoding="utf-8")


def main() -> None:
    """Measure launch configurations on the GPU (--compare FILE), or ship a table of them (--ship TABLE).

    With --compare, the time of each configuration is appended to FILE as a line of JSON, for the ops that the command
    line names, by default all. --part 2/8 does the second of eight parts of this work, so that eight processes can
    share it. With --ship, the rows of TABLE are written into kernels/launch_configs.py. Exit with a message for an
    unknown op, and with --compare if there is no GPU.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(launch_configs.TABLES)}; all by default")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--compare", type=Path, metavar="FILE", help="append the times of candidates and neighbours")
    action.add_argument("--ship", type=Path, metavar="TABLE", help="write its rows into kernels/launch_configs.py")
    parser.add_argument("--part", default="1/1", help="with --compare: 2/8 is every eighth class from the second on")
    arguments = parser.parse_args()
    unknown = set(arguments.ops) - set(launch_configs.TABLES)
    if unknown:
        parser.error(f"no table of {', '.join(sorted(unknown))}; there are {', '.join(launch_configs.TABLES)}")
    if arguments.ship:
        ship(arguments.ship)
        return
    if not torch.cuda.is_available():
        sys.exit("tools.tune: no CUDA device")
    architecture = launch_configs.architecture(torch.device("cuda"))
    tuning.compare(arguments.ops or list(launch_configs.TABLES), arguments.part, arguments.compare, architecture)


if __name__ == "__main__":
    main()
