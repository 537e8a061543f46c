"""Findings of `gpt-fast doctor RUN` in a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...heads import HEADS
from ...model_folder import read_config
from . import checkpoints
from .folder import check_run, check_weights, is_finished, leftovers, read_record
from .load import load_head, run_tokenizer


def examine_run(folder: Path) -> dict[str, Any]:
    """Return what `gpt-fast doctor` reports of a run folder, after reading and checking its files.

    The result is a dict. "folder" is the path as text. "state" is one line: whether the run is finished, after which
    update it stopped, or that no checkpoint or record is there. "checkpoints" maps each checkpoint's name to "whole" or
    "damaged". "leftovers" lists the paths of hidden folders that dead runs left in and beside the folder. "problems" is
    a list with a line for each.

    Checkpoints are compared with their manifests. If the run is finished or has no checkpoint, the model and the
    tokenizer in the folder are loaded too. Before that, the weights are compared with the size and SHA-256 in run.json,
    if they are stated there. A damaged or missing file is a problem, not an error. Raise `FileNotFoundError` if there
    is no such folder.
    """
    problems: list[str] = []
    good, states = [], {}
    for path in checkpoints.newest_first(folder / checkpoints.FOLDER):
        try:
            checkpoints.read(path)
            good.append(checkpoints.step_of(path))
            states[path.name] = "whole"
        except checkpoints.Damaged as error:
            states[path.name] = "damaged"
            problems.append(str(error))
    try:
        check_run(folder)
        name, config = read_config(folder)
        if name not in HEADS:
            raise ValueError(f"{folder / 'config.json'}: head {name}; expected one of {', '.join(HEADS)}")
        if is_finished(folder) or not states:
            check_weights(folder, read_record(folder), whole=True)
            run_tokenizer(folder, load_head(HEADS[name], folder))
    except FileNotFoundError:
        if not folder.is_dir():
            raise
        problems.append(f"{folder}: no run: config.json, tokenizer.json or the weights are missing")
    except (ValueError, OSError) as error:
        problems.append(str(error))
    if is_finished(folder):
        state = "finished"
    elif good:
        state = f"stopped; --resume begins after update {max(good):,}"
    else:
        state = "no checkpoint is whole" if states else "a model without a record of its training"
    return {
        "folder": str(folder),
        "state": state,
        "checkpoints": states,
        "leftovers": [str(path) for path in leftovers(folder)],
        "problems": problems,
    }
