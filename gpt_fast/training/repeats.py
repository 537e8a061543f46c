"""Several runs of one fine-tuning, over seeds or folds of the table, with the mean and the spread of their metrics."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from typing import Any

from gpt_fast_settings.finetune import FinetuneSettings

from .._files import finite, write_json
from ..interrupts import Interrupted, Stop
from .finetune import finetune
from .program import Record, Say, Show

SUMMARY = "repeats.json"


def is_repeated(settings: FinetuneSettings) -> bool:
    """Return True if the settings ask for runs in folders of their own: by --seeds, or by --folds without --fold."""
    return settings.seeds is not None or (settings.folds is not None and settings.fold is None)


def repeat(settings: FinetuneSettings, show: Show, say: Say, stop: Stop | None = None) -> Record:
    """Train several runs, each into a folder of its own inside `settings.out`, and write repeats.json there.

    There is a run for each pair of a seed and a fold. Return the content of repeats.json: "runs", the folders, and
    "metrics", {metric: {"mean", "sd", "min", "max", "values"}} over the runs. `show(progress)` is called after each
    update, and `say(line)` with lines for the user. `stop` tells whether a signal has asked the training to end. After
    a signal, `Interrupted` is raised, and no repeats.json is written. With --resume, finished runs stay as they are,
    and all others are trained or resumed. Raise `FileExistsError` if `settings.out` is itself a run.
    """
    if (settings.out / "config.json").exists():
        raise FileExistsError(f"--out {settings.out}: is a run; expected a folder to hold several")
    runs = variants(settings)
    records = []
    for number, (name, changes) in enumerate(runs, start=1):
        say(f"{settings.out / name}: run {number} of {len(runs)}")
        # A copy keeps which settings the user gave, which a resumed run asks.
        one = settings.model_copy(update=changes | {"out": settings.out / name})
        try:
            records.append(finetune(one, show, say, stop))
        except Interrupted as stopped:
            others = "; the whole command with --resume trains the others, too" if len(runs) > 1 else ""
            stopped.saved = f"{stopped.saved or f'stopped by {stopped}'}{others}"
            raise
    summary = {"runs": [str(settings.out / name) for name, _ in runs], "metrics": spread(records)}
    if os.environ.get("RANK", "0") == "0":
        write_json(settings.out / SUMMARY, finite(summary))
    return summary


def variants(settings: FinetuneSettings) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, changes) for each of several runs: the name of its folder, and how it differs from `settings`.

    There is a run for each pair of a seed and a fold. Seeds count up from `settings.seed`; folds are all from 1 to
    `settings.folds`, or `settings.fold` alone if it is given. `changes` are new values of three settings: "seed",
    "fold" (the fold's number, or None without folds) and "seeds", which becomes None. A name is "seed-0", "fold-1" or
    "seed-0-fold-1", for example: it has the seed with --seeds, and the fold if there are several.
    """
    seeds = range(settings.seed, settings.seed + (settings.seeds or 1))
    folds = [settings.fold] if settings.folds is None or settings.fold else list(range(1, settings.folds + 1))
    made = []
    for seed in seeds:
        for fold in folds:
            names = [f"seed-{seed}"] * (settings.seeds is not None) + [f"fold-{fold}"] * (len(folds) > 1)
            made.append(("-".join(names), {"seed": seed, "fold": fold, "seeds": None}))
    return made


def spread(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Return how each validation metric varies over `records`, the contents of run.json of one or more finished runs.

    The value for a metric, which is named without "valid_", is {"mean", "sd", "min", "max", "values"}. "values" has one
    number for each run, and "sd" is the standard deviation of a sample, 0 for one run. Metrics that not all runs have
    measured are left out.
    """
    names = [name for name in records[0] if name.startswith("valid_") and name != "valid_rows"]
    found = {}
    for name in names:
        values = [record.get(name) for record in records]
        if not all(isinstance(value, int | float) for value in values):
            continue
        numbers = [float(value) for value in values if value is not None]
        found[name.removeprefix("valid_")] = {
            "mean": statistics.fmean(numbers),
            "sd": statistics.stdev(numbers) if len(numbers) > 1 else 0.0,
            "min": min(numbers),
            "max": max(numbers),
            "values": numbers,
        }
    return found
