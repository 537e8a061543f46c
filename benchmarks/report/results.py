"""The files that a run leaves: DIR/<device>/<topic>.json, one for each topic or study, each complete in itself.

schema, version   "gpt_fast benchmark", 1
topic, suite      what was measured
quick             whether fewer cases were taken
untested          true where the tests were not run before; else it is not there
busy              true where a process that computes in an endless loop ran beside, in <topic>_busy.json; else not there
device, versions, commit

A topic's file also has
partial           whether the run was cut off before its end
sessions          of each start of the program: date, load of the machine, floors (rates with quartiles), keeps_freed
                  (whether the C library kept freed memory; not there in older files, where it did not)
records           of each case and implementation: times by pass (median, quartiles, rounds, first call; seconds;
                  to_ours, the ratio to ours over pairs of rounds; host, what a direct call costs the host, where
                  graphs were timed), work by pass (bytes, FLOPs, the bandwidth they are held against), tokens,
                  peak_memory in bytes, series (the size that grows), complete (not confined to some
                  implementations), session (index)
missing           implementations that were not measured on a case, and why

A study's file has date, load, and the study's own fields.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks import catalogue
from benchmarks.topic import OURS, Study
from gpt_fast._files import write_json

BUSY = ", beside a busy process"
SCHEMA, VERSION = "gpt_fast benchmark", 1
Run = dict[str, Any]
Record = dict[str, Any]
_HEAD = {"topic": str, "suite": str, "quick": bool, "device": dict, "versions": dict, "commit": dict}
_RUN = _HEAD | {"partial": bool, "sessions": list, "records": list, "missing": list}
_RECORD = {"case", "peer", "sizes", "dtype", "dropout", "series", "complete", "times", "work", "tokens"}


def write(run: Run, path: Path) -> None:
    """Write `run`, the content of a results file as a dict, to `path` as JSON.

    A file that is there is replaced as a whole, so it is never seen half written.
    """
    write_json(path, run)


def read(path: Path) -> Run:
    """Return the content of the results file of a topic (an op or a whole-model job) as a dict.

    - "schema", "version": format of the file
    - "topic": name of the topic; "suite": "ops", "train" or "decode"
    - "device", "versions", "commit": dicts that `environment.describe` returned
    - "quick": True if fewer cases were measured; "partial": True if the run was cut off
    - "sessions": list with a dict for each start of the program, which `session` describes
    - "records": list with a dict for each measured pair of case and implementation, which `runner.measure` describes;
      the dict also has "session", an index into "sessions"
    - "missing": list with {"case", "peer" (the implementation), "reason"} for each pair that was not measured
    - in some files "untested": True, if the tests were not run before, and "busy": True, if a busy process ran beside

    Raises:
        OSError: if there is no file.
        ValueError: if the file is no results file of these benchmarks or has another version, if a field is missing or
            of another type, or if a record lacks a key.
    """
    run = _load(path)
    wrong = [name for name, kind in _RUN.items() if not isinstance(run.get(name), kind)]
    if any(not record.keys() >= _RECORD for record in run.get("records") or [] if isinstance(record, dict)):
        wrong.append("fields of a record")
    return _unless(wrong, run, path)


def read_study(path: Path, study: Study) -> dict[str, Any]:
    """Return the content of a study's results file as a dict.

    A study is a measurement whose results have a form of their own. The keys are "schema", "version", "topic", "suite",
    "quick", "device", "versions", "commit", "date" and "load", and the names in `study.fields`, which are the results.
    "topic" is the study's name, and "suite" is "ops", "train" or "decode". Further keys are allowed.

    Raises:
        OSError: if there is no file.
        ValueError: if the file is no results file of these benchmarks, or has another version, or lacks a field.
    """
    record = _load(path)
    wrong = [name for name, kind in _HEAD.items() if not isinstance(record.get(name), kind)]
    return _unless(wrong + [name for name in ("date", "load", *study.fields) if name not in record], record, path)


def _load(path: Path) -> dict[str, Any]:
    """Return the JSON object in a results file as a dict. Only its "schema" and "version" are checked.

    Raise `ValueError` if it is not JSON, or of another schema or version, and `OSError` if there is no file.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); expected a results file of benchmarks") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path}: not a results file of benchmarks; expected schema {SCHEMA!r}")
    if found.get("version") != VERSION:
        raise ValueError(f"{path}: a results file of version {found.get('version')!r}; expected version {VERSION}")
    return found


def _unless(wrong: list[str], found: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return `found`, the content of the results file at `path`, if `wrong` is empty.

    `wrong` lists the names of fields that are missing or of another type. Raise `ValueError` with these names if there
    are any.
    """
    if wrong:
        raise ValueError(f"{path}: a damaged results file: {', '.join(wrong)} missing or of another type")
    return found


def file_name(topic: str, busy: bool = False) -> str:
    """Return the name of the results file of a topic or study, such as "mlp.json".

    It is "mlp_busy.json" with `busy`, for a run beside a busy process.
    """
    return f"{topic}{'_busy' if busy else ''}.json"


def label(run: Run) -> str:
    """Return the name of a run's topic (op or job), followed by ", beside a busy process" if one ran during the run.

    `run` is the content of a results file.
    """
    return f"{run['topic']}{BUSY if run.get('busy') else ''}"


def read_folder(folder: Path) -> list[Run]:
    """Return the contents of the topics' results files in one device's folder, in the order of `catalogue.topics`.

    A topic is an op or a whole-model job. Its results beside a busy process follow its quiet ones. Files that are
    missing are skipped, so the list may be empty. Raise `ValueError` if a file is not a sound results file.
    """
    paths = (folder / file_name(name, busy) for name in catalogue.topics() for busy in (False, True))
    return [read(path) for path in paths if path.exists()]


def read_studies(folder: Path) -> list[tuple[Study, dict[str, Any]]]:
    """Return [(study, content of its results file)] of one device's folder, in the order of `catalogue.studies`.

    A study is a measurement with a table of its own. A study that was also measured beside a busy process has a second
    entry behind the first, whose content has "busy": True. Files that are missing are skipped, so the list may be
    empty. Raise `ValueError` if a file is not a sound results file.
    """
    found = (
        (study, folder / file_name(name, busy)) for name, study in catalogue.studies().items() for busy in (False, True)
    )
    return [(study, read_study(path, study)) for study, path in found if path.exists()]


def read_any(path: Path) -> list[Run]:
    """Return the contents of topics' results files at `path`: one file, a device's folder, or a folder of such folders.

    Studies' files in a folder are skipped. Folders in a folder are read in the order of their names.

    Raises:
        OSError: if there is no such file.
        ValueError: if a file is no results file of these benchmarks, or has another version, or is damaged, or if a
            folder has no results files.
    """
    if not path.is_dir():
        return [read(path)]
    runs = read_folder(path) or [run for folder in sorted(path.iterdir()) for run in read_folder(folder)]
    if not runs:
        raise ValueError(f"{path}: no results in this folder; expected the *.json files of benchmarks")
    return runs


def find(run: Run, case: str, peer: str) -> Record | None:
    """Return the record of the implementation named `peer` on the case named `case`, or None if the run has none.

    `run` is the content of a topic's results file.
    """
    return next((record for record in run["records"] if (record["case"], record["peer"]) == (case, peer)), None)


def by_case(run: Run) -> dict[str, dict[str, Record]]:
    """Return {case's name: {implementation: record}} of a run, with gpt_fast's record first in each case.

    The cases, and the other records of a case, are in the file's order. `run` is the content of a topic's results file.
    A record is a dict with the results of one implementation on one case: "times", "work" (least bytes and FLOPs) by
    pass, "peak_memory", and facts of the case, such as "sizes" and "dtype".
    """
    groups: dict[str, dict[str, Record]] = {}
    for record in run["records"]:
        groups.setdefault(record["case"], {})[record["peer"]] = record
    return {case: dict(sorted(records.items(), key=lambda item: item[0] != OURS)) for case, records in groups.items()}


def floor_seconds(record: Record, passes: str, floors: dict[str, dict[str, float]]) -> float:
    """Return the least seconds that one pass of a record can take on the device, by measured rates.

    `record` is a dict with the results of one implementation on one case, and `passes` the name of one pass. `floors`
    maps "copy", "read" and "matmul <dtype>" to dicts with "rate", measured in the record's session.

    The result is the longer of two times. The first is the pass's bytes divided by a bandwidth, "copy" or "read",
    whichever the record's work names in "bound". The second is the pass's FLOPs divided by the matrix rate. The second
    time is 0 if no matrix rate was measured. The matrix rate is the fastest of up to three: for the record's dtype, for
    float32 (operands can be widened) and for a further dtype that the record's work may name in "product".
    """
    work = record["work"][passes]
    rates = [
        floors[f"matmul {dtype}"]["rate"]
        for dtype in {record["dtype"], "float32", work.get("product")}
        if f"matmul {dtype}" in floors
    ]
    arithmetic = work["flops"] / max(rates) if work["flops"] and rates else 0.0
    return max(work["bytes"] / floors[work["bound"]]["rate"], arithmetic)


def session(run: Run, record: Record) -> dict[str, Any]:
    """Return the session in which a record of `run` was measured: {"date", "load", "floors"}.

    A session is one start of the benchmark program. "date" is text, and "load" is the machine's load average or None.
    "floors" maps "copy", "read" and "matmul <dtype>" to {"rate", "q1", "q3"}, measured in bytes or FLOPs a second.
    `run` is the content of the results file that has the record.
    """
    return run["sessions"][record["session"]]


def share_of_floor(run: Run, record: Record, *passes: str) -> float:
    """Return the least time that the record's passes can take, divided by the median time that they took.

    The least time follows from bytes, FLOPs and the rates measured in the record's session. Both times are added up
    over `passes`, names of passes that the record has. A result of 1 means that the measured speed limit is reached.
    `run` is the content of the results file that has the record.
    """
    floors = session(run, record)["floors"]
    floor = sum(floor_seconds(record, name, floors) for name in passes)
    return floor / sum(record["times"][name]["median"] for name in passes)


# ---- comparing two runs

LEAST_CHANGE = 0.03  # two runs on one quiet machine differ by that much


def compare(old: list[Run], new: list[Run]) -> list[dict[str, Any]]:
    """Return a dict for each time that is in both lists of results, in the order of `new`.

    `old` and `new` are contents of topics' results files. The keys are "topic", "case", "pass", "peer" (the
    implementation), "old" and "new" (medians in seconds), "ratio" (new / old) and "beyond". "beyond" is True if the
    change is beyond noise: the medians differ by more than 3 % and by more than the two interquartile ranges together.
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
                    "topic": label(run), "case": record["case"], "pass": passes, "peer": record["peer"],
                    "old": then["median"], "new": now["median"], "ratio": ratio,
                    "beyond": apart > spread and abs(ratio - 1) > LEAST_CHANGE,
                }
            )  # fmt: skip
    return changes


def _key(run: Run, record: Record, passes: str) -> tuple[str, ...]:
    """Return (topic, case, implementation, pass) as text, which identifies a time in two runs.

    The topic's text tells a run beside a busy process from a quiet one. `run` is the content of the results file that
    has the record, and `passes` is the name of the pass.
    """
    return label(run), record["case"], record["peer"], passes


def _times(run: Run) -> list[tuple[Record, str, dict[str, float]]]:
    """Return [(record, pass, summary of times)] for each pass of each record of a results file.

    `run` is the file's content. A record has the results of one implementation on one case. A summary is a dict with
    "median", "q1" and "q3" in seconds, and more.
    """
    return [(record, passes, time) for record in run["records"] for passes, time in record["times"].items()]
