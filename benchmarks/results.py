"""The files that a run leaves: DIR/<device>/<topic>.json, one for each topic, each complete in itself.

schema, version   "gpt_fast benchmark", 1
topic, suite      what was measured
quick, partial    whether fewer cases were taken; whether the run was cut off before its end
device, versions, commit
sessions          of each start of the program: date, load of the machine, floors (rates with quartiles)
records           of each case and implementation: times by pass (median, quartiles, rounds, first call; seconds),
                  work by pass (bytes, FLOPs, bandwidth they are held against), tokens, peak_memory in bytes,
                      series (the size that grows), complete (not confined to some implementations), session (index)
missing           who was not measured on which case, and why
"""

import json
from pathlib import Path
from typing import Any

from gpt_fast._files import write_json

SCHEMA, VERSION = "gpt_fast benchmark", 1
OURS = "gpt_fast"
Run = dict[str, Any]
Record = dict[str, Any]
_FIELDS = {
    "topic": str, "suite": str, "quick": bool, "partial": bool, "device": dict, "versions": dict, "commit": dict,
    "sessions": list, "records": list, "missing": list,
}  # fmt: skip
_RECORD = {"case", "peer", "sizes", "dtype", "dropout", "series", "complete", "times", "work", "tokens"}


def write(run: Run, path: Path) -> None:
    write_json(path, run)


def read(path: Path) -> Run:
    """A results file. Raises `ValueError` where it is not one of ours or of another version, `OSError` where there is
    none."""
    try:
        run = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); wanted a results file of gpt-fast bench") from error
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not a results file of gpt-fast bench; wanted schema {SCHEMA!r}")
    if run.get("version") != VERSION:
        raise ValueError(f"{path}: a results file of version {run.get('version')!r}; this gpt-fast reads {VERSION}")
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(run.get(name), kind)]
    if any(not record.keys() >= _RECORD for record in run.get("records") or [] if isinstance(record, dict)):
        wrong.append("fields of a record")
    if wrong:
        raise ValueError(f"{path}: a damaged results file: {', '.join(wrong)} missing or of another type")
    return run


def read_folder(folder: Path) -> list[Run]:
    """The results file of every topic in one device's folder, in the order in which topics are listed."""
    from benchmarks.cases import TOPICS

    paths = (folder / f"{name}.json" for name in TOPICS)
    return [read(path) for path in paths if path.exists()]


def read_any(path: Path) -> list[Run]:
    """A results file, or the files of a folder. Raises as `read`, and `ValueError` for a folder without any."""
    if not path.is_dir():
        return [read(path)]
    runs = read_folder(path) or [run for folder in sorted(path.iterdir()) for run in read_folder(folder)]
    if not runs:
        raise ValueError(f"{path}: no results in this folder; wanted the *.json files of gpt-fast bench")
    return runs


def find(run: Run, case: str, peer: str) -> Record | None:
    return next((record for record in run["records"] if (record["case"], record["peer"]) == (case, peer)), None)


def by_case(run: Run) -> dict[str, dict[str, Record]]:
    """case → implementation → record, ours first."""
    groups: dict[str, dict[str, Record]] = {}
    for record in run["records"]:
        groups.setdefault(record["case"], {})[record["peer"]] = record
    return {case: dict(sorted(records.items(), key=lambda item: item[0] != OURS)) for case, records in groups.items()}


def floor_seconds(record: Record, passes: str, floors: dict[str, dict[str, float]]) -> float:
    """No version runs much faster: the bytes at the bandwidth they are held against, or the FLOPs at the matrix rate.

    Where a CPU multiplies a half-precision matrix more slowly than a float32 one, the faster rate counts: operands can
    be widened.
    """
    work = record["work"][passes]
    rates = [floors[f"matmul {dtype}"]["rate"] for dtype in {record["dtype"], "float32"} if f"matmul {dtype}" in floors]
    arithmetic = work["flops"] / max(rates) if work["flops"] and rates else 0.0
    return max(work["bytes"] / floors[work["bound"]]["rate"], arithmetic)


def session(run: Run, record: Record) -> dict[str, Any]:
    return run["sessions"][record["session"]]


def share_of_floor(run: Run, record: Record, passes: str) -> float:
    return floor_seconds(record, passes, session(run, record)["floors"]) / record["times"][passes]["median"]


# ---- comparing two runs

LEAST_CHANGE = 0.03  # what two runs on one quiet machine differ by


def compare(old: list[Run], new: list[Run]) -> list[dict[str, Any]]:
    """Every figure that both have, with the ratio new / old of its medians and whether that is beyond the noise.

    Beyond the noise: the medians differ by more than 3 % and by more than the two interquartile ranges together.
    """
    before = {_key(run, record, passes): time for run in old for record, passes, time in _times(run)}
    changes = []
    for run in new:
        for record, passes, now in _times(run):
            then = before.get(_key(run, record, passes))
            if then is None:
                continue
            apart = abs(now["median"] - then["median"])
            spread = (now["q3"] - now["q1"]) + (then["q3"] - then["q1"])
            ratio = now["median"] / then["median"]
            changes.append(
                {
                    "topic": run["topic"], "case": record["case"], "pass": passes, "peer": record["peer"],
                    "old": then["median"], "new": now["median"], "ratio": ratio,
                    "beyond": apart > spread and abs(ratio - 1) > LEAST_CHANGE,
                }
            )  # fmt: skip
    return changes


def _key(run: Run, record: Record, passes: str) -> tuple[str, ...]:
    return run["topic"], record["case"], record["peer"], passes


def _times(run: Run) -> list[tuple[Record, str, dict[str, float]]]:
    return [(record, passes, time) for record in run["records"] for passes, time in record["times"].items()]
