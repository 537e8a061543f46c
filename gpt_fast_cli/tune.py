"""The command `gpt-fast tune`."""

from __future__ import annotations

from typing import Annotated

import typer

from .terminal import AsJson, print_json, print_table, require_train_extra, say


def tune(
    ops: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OP]...", help="Operations to tune; all that have a table by default."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the launch configurations of this GPU's kernels, and keep those that are faster than the shipped ones.

    Every later program on this GPU uses the result: the file is in [bold]~/.config/gpt_fast/launch_configs[/bold], or
    in the folder that the environment variable GPT_FAST_LAUNCH_CONFIGS names. Removing it undoes the tuning; an empty
    variable ignores it. An operation takes minutes, because every configuration is compiled. It needs a CUDA device.

    [bold]Examples[/bold]

    gpt-fast tune

    gpt-fast tune attention linear_cross_entropy
    """
    require_train_extra()
    import torch

    if not torch.cuda.is_available():
        raise ValueError("tune: no CUDA device; expected a GPU to measure on")
    from gpt_fast import tuning
    from gpt_fast.kernels import launch_configs

    names = list(ops or launch_configs.TABLES)
    unknown = sorted(set(names) - set(launch_configs.TABLES))
    if unknown:
        raise ValueError(f"tune: {', '.join(unknown)} has no table; expected one of {', '.join(launch_configs.TABLES)}")
    architecture = launch_configs.architecture(torch.device("cuda"))
    path = launch_configs.user_table(architecture)
    if path is None:
        raise ValueError(f"tune: {launch_configs.FOLDER} is empty; expected a folder to write to")
    measured = []
    for op, row, is_new in tuning.tune(names, path, architecture, torch.cuda.get_device_name(), tuning.median):
        say(f"{op} {row.kernel}, {row.element} bytes, up to {row.size}: {list(row.config)}{' (new)' if is_new else ''}")
        measured.append({"op": op, **row._asdict(), "new": is_new})
    new = [row for row in measured if row["new"]]
    if as_json:
        print_json({"file": str(path), "rows": measured})
        return
    shown = [(f"{row['op']} {row['kernel']}", str(list(row["config"]))) for row in new]
    print_table(f"written to {path}", shown or [("-", "nothing is faster than what is shipped")])
