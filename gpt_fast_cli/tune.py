"""The command `gpt-fast tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .terminal import AsJson, Device, print_json, print_table, require_train_extra, resolve_device, say


def tune(
    ops: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OP]...", help="Operations to tune; all that have a table by default."),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure what is fastest on this machine, and keep it for every later program.

    On a GPU the command measures launch configurations of the kernels. An operation takes minutes, because every
    configuration is compiled. On a CPU it measures whether this library or PyTorch is faster at the matrix products of
    [bold]linear[/bold], by dtype and number of rows. Untuned, this library computes them. The results are kept in a
    file in [bold]~/.config/gpt_fast/launch_configs[/bold], or in the folder that the environment variable
    GPT_FAST_LAUNCH_CONFIGS names. Remove the file to undo the tuning. An empty variable means: no file is used.

    [bold]Examples[/bold]

    gpt-fast tune

    gpt-fast tune attention linear_cross_entropy

    gpt-fast tune --device cpu
    """
    require_train_extra()
    if resolve_device(device) == "cpu":
        _tune_cpu(ops or ["linear"], as_json)
    else:
        _tune_gpu(ops, as_json)


def _table(name: str) -> Path:
    """Return the path of the file for tuning results: `name` is "cpu", or a GPU's architecture, such as "sm_90".

    Raise `ValueError` if the environment variable GPT_FAST_LAUNCH_CONFIGS is empty, which means that no results are
    kept.
    """
    from gpt_fast.kernels.user_tables import FOLDER, user_table

    path = user_table(name)
    if path is None:
        raise ValueError(f"tune: {FOLDER} is empty; expected a folder to write to")
    return path


def _refuse_unknown(ops: list[str], known: list[str], device: str) -> None:
    """Raise `ValueError` if `ops` holds a name that is not in `known`, the ops with a table on `device`."""
    unknown = sorted(set(ops) - set(known))
    if unknown:
        raise ValueError(
            f"tune: {', '.join(unknown)} has no table on {device}; expected {'one of ' * (len(known) > 1)}"
            f"{', '.join(known)}"
        )


def _tune_gpu(ops: list[str] | None, as_json: bool) -> None:
    """Find the fastest launch configurations of `ops` on this GPU, and write those that are not shipped to a file.

    `ops` None stands for all ops with launch configurations. `_table` names the file. A configuration serves a class of
    shapes: a kernel, an element size, and head sizes or widths up to a limit. The fastest one of each class is printed
    on stderr as soon as it is found. At the end those that differ from the shipped ones are printed as a table. With
    `as_json` all are printed as JSON instead. Raise `ValueError` if `ops` names an op without launch configurations.
    """
    import torch

    from gpt_fast import tuning
    from gpt_fast.kernels import launch_configs

    names = list(ops or launch_configs.TABLES)
    _refuse_unknown(names, list(launch_configs.TABLES), "cuda")
    architecture = launch_configs.architecture(torch.device("cuda"))
    path = _table(f"sm_{architecture}")
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


def _tune_cpu(ops: list[str], as_json: bool) -> None:
    """Measure whether PyTorch or this library computes `linear` faster on the CPU, by dtype and number of rows.

    The results are written to the file that `_table` names for "cpu", and printed as a table, or as JSON with
    `as_json`. Raise `ValueError` if `ops` names another operation, and `RuntimeError` if this library has no C++ kernel
    for `linear` here.
    """
    from gpt_fast import ops as gpt_fast_ops
    from gpt_fast.ops import _products

    _refuse_unknown(ops, ["linear"], "cpu")
    if gpt_fast_ops.serving("linear", "cpu") != "cpp":
        raise RuntimeError("tune: linear has no C++ kernel here; `gpt-fast doctor` tells why")
    path = _table("cpu")
    rules = list(_products.tune(path))
    if as_json:
        entries = [{**rule._asdict(), "faster": "torch" if rule.by_torch else "gpt_fast"} for rule in rules]
        print_json({"file": str(path), "rules": entries})
        return
    print_table(f"written to {path}", [(_described(rule), _compared(rule)) for rule in rules])


def _described(rule) -> str:
    """Return the dtype and number of rows of a `Rule` of the products as text."""
    return f"{rule.dtype}{' by autocast' if rule.is_autocast else ''}, {rule.rows:,} rows"


def _compared(rule) -> str:
    """Return whose products were faster in a `Rule`, and both times in milliseconds, as text."""
    faster = "PyTorch" if rule.by_torch else "gpt_fast"
    return f"{faster} (gpt_fast {1e3 * rule.gpt_fast:.2f} ms, PyTorch {1e3 * rule.torch:.2f} ms)"
