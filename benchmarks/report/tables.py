"""A run as tables: one for each case, a summary of all, the floors, and who is missing."""

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks import catalogue
from benchmarks.measure.environment import data_sheet
from benchmarks.report import results
from benchmarks.report.markdown import PASS_NAMES, memory, rate, seconds, table
from benchmarks.report.results import Record, Run
from benchmarks.topic import LEFT, OURS, Topic


def topic_of(run: Run) -> Topic | None:
    """Return the topic (op or whole-model job) of a run, or None if the suite no longer has it.

    `run` is the content of a topic's results file.
    """
    return catalogue.topics().get(run["topic"])


def title(run: Run) -> str:
    """Return a run's title for headings, which is its topic's title or name.

    `run` is the content of a topic's results file. ", beside a busy process" is added if one ran.
    """
    topic = topic_of(run)
    return (topic.title or topic.name if topic else str(run["topic"])) + (results.BUSY if run.get("busy") else "")


# ---- one case


def columns(run: Run, records: Iterable[Record]) -> list[str]:
    """Return the header of the table of one case: a list of column names.

    First is "implementation". For each pass come its name, "× ours" and "of the floor" (the share of the speed limit).
    For whole-model jobs comes "tokens/s", in the suite "train" also "MFU", and last "peak memory". `run` is the content
    of a topic's results file. `records` are the records of the case in that file, at least one. The first record says
    which passes there are.
    """
    record = next(iter(records))
    header = ["implementation"]
    for passes in record["times"]:
        header += [PASS_NAMES.get(passes, passes), "× ours", "of the floor"]
    if record["tokens"]:
        header += ["tokens/s"]
    if run["suite"] == "train":
        header += ["MFU"]
    return [*header, "peak memory"]


def rows(run: Run, records: dict[str, Record]) -> list[list[str]]:
    """Return a row of cells for each implementation of one case, to stand under the header of `columns`.

    The cells are the implementation's name and, for each pass, three: its time with the spread, the multiple of
    gpt_fast's time, and the share of the speed limit. All three are "" for a pass that it lacks. Jobs also have tokens
    a second, in training the MFU, and each row ends in the peak memory.

    `run` is the content of a topic's results file. `records` maps implementation → its record of the case in that file.
    The first record says which passes there are.
    """
    ours = records.get(OURS)
    passes = list(next(iter(records.values()))["times"])
    lines = []
    for peer, record in records.items():
        cells = [peer]
        for name in passes:
            time = record["times"].get(name)
            if time is None:
                cells += ["", "", ""]
                continue
            spread = (time["q3"] - time["q1"]) / 2 / time["median"]
            cells += [
                f"{seconds(time['median'])} ± {spread:.0%}"
                + (f", host {seconds(time['host'])}" if "host" in time else ""),
                to_ours(time, ours and ours["times"].get(name)),
                f"{results.share_of_floor(run, record, name):.0%}",
            ]
        if record["tokens"]:
            cells.append(f"{record['tokens'] / record['times'][passes[0]]['median']:,.0f}")
        if run["suite"] == "train":
            cells.append(f"{mfu(run, record):.0%}")
        lines.append([*cells, memory(record["peak_memory"])])
    return lines


def to_ours(time: dict[str, Any], ours: dict[str, Any] | None) -> str:
    """Return an implementation's time in one pass as a multiple of gpt_fast's time, as text.

    `time` and `ours` are the two implementations' summaries of times; `ours` is None if gpt_fast was not measured. If
    `time` has "to_ours", the text is its median and quartiles, such as "1.25 (1.20 to 1.31)". "to_ours" was measured as
    the ratio of calls that ran shortly after each other. Otherwise the text is the ratio of the two median times, such
    as "1.25", or "" if `ours` is None.
    """
    if "to_ours" in time:
        pairs = time["to_ours"]
        return f"{pairs['median']:.2f} ({pairs['q1']:.2f} to {pairs['q3']:.2f})"
    return f"{time['median'] / ours['median']:.2f}" if ours else ""


def mfu(run: Run, record: Record) -> float:
    """Return the model FLOPs utilization of a training step, from 0 to about 1.

    It is the FLOPs of a step, divided by the median seconds and by the matrix rate measured in the same session. The
    rate is the greater of those in the record's dtype and in float32. `run` is the content of a topic's results file,
    and `record` one of its records, with times of the pass "step".
    """
    floors = results.session(run, record)["floors"]
    rates = [floors[name]["rate"] for name in (f"matmul {record['dtype']}", "matmul float32") if name in floors]
    return record["work"]["step"]["flops"] / record["times"]["step"]["median"] / max(rates)


def case_tables(run: Run, complete: bool = False) -> list[str]:
    """Return the lines of a Markdown table for each case of a run, each after a line with the case's name in bold.

    `run` is the content of a topic's results file. With `complete`, a case is left out if gpt_fast was not measured, or
    if the suite measures it on chosen implementations only.
    """
    lines = []
    for case, records in results.by_case(run).items():
        if not complete or (OURS in records and records[OURS]["complete"]):
            lines += ["", f"**{case}**", "", *table(columns(run, records.values()), rows(run, records))]
    return lines


# ---- all cases


SUMMARY_HEADER = ["case", OURS, "of the floor", "speed against the fastest other"]


def summary(runs: list[Run]) -> list[list[str]]:
    """Return a row of four cells for each complete case and pass of the quiet runs.

    The cells are the case and pass, gpt_fast's time, the share of the speed limit that it reaches, and a comparison.
    The comparison is gpt_fast's speed as a multiple of the speed of the fastest rival, followed by the rival's name, or
    "" without a rival. `_against` defines rivals. `runs` are the contents of topics' results files. A quiet run has no
    busy process beside it. A case is complete if gpt_fast was measured and the suite does not limit the case to chosen
    implementations.
    """
    lines = []
    for run, case, records in _complete(runs):
        for passes in records[OURS]["times"]:
            name = PASS_NAMES.get(passes, passes)
            lines.append(_summed(run, records, f"{case}" + ("" if name == "time" else f", {name}"), (passes,)))
    return lines


def highlights(runs: list[Run]) -> list[list[str]]:
    """Return a row of four cells for the largest complete case of each topic, dtype and dropout, in quiet runs.

    The cells are the case, gpt_fast's time over all passes, the share of the speed limit that it reaches, and a
    comparison. The comparison is gpt_fast's speed as a multiple of the speed of the fastest rival, followed by the
    rival's name, or "" without a rival. `_against` defines rivals.

    `runs` are the contents of topics' results files. A case is complete if gpt_fast was measured and the suite does not
    limit the case to chosen implementations. The last complete case of a topic, dtype and dropout in its file counts as
    the largest; sizes are not compared.
    """
    return [_summed(run, records, name, passes) for run, name, records, passes in _largest(runs)]


def speedups(runs: list[Run]) -> dict[str, tuple[float, str]]:
    """Return {whole-model case: (gpt_fast's speed as a multiple of the fastest rival's, name of the rival)}.

    Each topic, dtype and dropout has at most one case: the last complete one in its file, which counts as the largest.
    A case is complete if gpt_fast was measured and the suite does not limit the case to chosen implementations. The
    case is left out if no rival was measured. `_against` defines rivals. Runs beside a busy process do not count.
    `runs` are the contents of topics' results files.
    """
    jobs = [run for run in runs if run["suite"] != "ops"]
    found = {name: _against(run, records, passes) for run, name, records, passes in _largest(jobs)}
    return {name: against for name, against in found.items() if against is not None}


def _largest(runs: list[Run]) -> list[tuple[Run, str, dict[str, Record], tuple[str, ...]]]:
    """Return [(run, case's name, records by implementation, passes)], one entry for each topic, dtype and dropout.

    The entry is the last complete case of that topic, dtype and dropout in quiet runs. This case counts as the largest;
    sizes are not compared. A case is complete if gpt_fast was measured and the suite does not limit the case to chosen
    implementations. A quiet run has no busy process beside it.

    The case's name begins with the topic and ends in the passes, except that the pass "step" is not named. `passes` are
    the names of the passes in which gpt_fast was measured. `runs` are the contents of topics' results files.
    """
    largest = {}
    for run, case, records in _complete(runs):
        ours = records[OURS]
        passes = tuple(ours["times"])
        name = "" if passes == ("step",) else f", {' + '.join(PASS_NAMES.get(name, name) for name in passes)}"
        largest[run["topic"], ours["dtype"], ours["dropout"]] = (run, case + name, records, passes)
    return list(largest.values())


def _complete(runs: list[Run]) -> Iterator[tuple[Run, str, dict[str, Record]]]:
    """Yield (run, "<topic> <case>", records by implementation) for each complete case in quiet runs.

    A case is complete if gpt_fast was measured and the suite does not limit the case to chosen implementations. A quiet
    run has no busy process beside it. `runs` are the contents of topics' results files.
    """
    for run in (run for run in runs if not run.get("busy")):
        for case, records in results.by_case(run).items():
            if OURS in records and records[OURS]["complete"]:
                yield run, f"{run['topic']} {case}", records


def _summed(run: Run, records: dict[str, Record], case: str, passes: tuple[str, ...]) -> list[str]:
    """Return a row of four cells for one case, whose passes named `passes` are taken together.

    The cells are `case`, gpt_fast's time, the share of the speed limit, and a comparison. The comparison is gpt_fast's
    speed as a multiple of the speed of the fastest rival, followed by the rival's name, or "" without a rival.
    `_against` defines rivals. `run` is the content of a topic's results file. `records` maps implementation → its
    record in that file. gpt_fast's record must be there and have the passes.
    """
    ours = records[OURS]
    against = _against(run, records, passes)
    speed = f"{against[0]:.2f} × {against[1]}" if against else ""
    return [case, seconds(_time(ours, passes)), f"{results.share_of_floor(run, ours, *passes):.0%}", speed]


def _against(run: Run, records: dict[str, Record], passes: tuple[str, ...]) -> tuple[float, str] | None:
    """Return (gpt_fast's speed as a multiple of the fastest rival's, name of the rival), or None without a rival.

    A rival is an implementation that was measured in all of `passes`, the names of passes. Its name must not begin with
    "gpt_fast", as the names of gpt_fast's variants do. If the suite still has the topic, the topic must list the
    implementation with the flag `Peer.rival`. The slow reference, for example, lacks this flag.

    The median times are added up over the passes and divided. For a single pass, the median in "to_ours" of the rival's
    times is taken instead, if it is there. "to_ours" was measured as the ratio of calls that ran shortly after each
    other. `run` is the content of a topic's results file. `records` maps implementation → its record in that file.
    """
    topic = topic_of(run)
    rivals = {peer.name for peer in topic.peers if peer.rival} if topic else set(records)

    def ratio(record: Record) -> float:
        pairs = record["times"][passes[0]].get("to_ours") if len(passes) == 1 else None
        return pairs["median"] if pairs else _time(record, passes) / _time(records[OURS], passes)

    others = {
        peer: ratio(record)
        for peer, record in records.items()
        if set(passes) <= set(record["times"]) and not peer.startswith(OURS) and peer in rivals
    }
    if not others:
        return None
    best = min(others, key=lambda peer: others[peer])
    return others[best], best


def _time(record: Record, passes: tuple[str, ...]) -> float:
    """Return the sum of the record's median seconds over the passes named in `passes`."""
    return sum(record["times"][name]["median"] for name in passes)


# ---- quiet and busy


BUSY_HEADER = ["case", "quiet", "busy", "busy, of quiet", "busy, of quiet with one thread less"]


def beside(runs: list[Run]) -> list[list[str]]:
    """Return a row of cells for each case, implementation and pass that both a busy and a quiet run of a topic have.

    A busy run was measured while another process computed in an endless loop, a quiet run was not. `runs` are the
    contents of topics' results files. A row has five cells and does not name the pass:

    - the case and the implementation
    - the quiet and the busy figure: tokens a second for jobs, else a time (two cells)
    - the busy speed as a percentage of the quiet speed, below 100 % if the busy run was slower
    - the busy speed as a percentage of the quiet speed with one thread less, "" if that speed was not measured
    """
    quiet = {run["topic"]: run for run in runs if not run.get("busy")}
    lines = []
    for run in (run for run in runs if run.get("busy") and run["topic"] in quiet):
        for record in run["records"]:
            then = results.find(quiet[run["topic"]], record["case"], record["peer"])
            if then is None:
                continue
            left = results.find(run, record["case"], f"{record['peer']}, {LEFT}")
            for name, time in record["times"].items():
                if name in then["times"]:
                    ratios = [then["times"][name], left and left["times"][name]]
                    lines.append([
                        f"{run['topic']} {record['case']}: {record['peer']}",
                        *(_speed(found, found["times"][name]) for found in (then, record)),
                        *(f"{other['median'] / time['median']:.0%}" if other else "" for other in ratios),
                    ])  # fmt: skip
    return lines


def _speed(record: Record, time: dict[str, Any]) -> str:
    """Return a pass's speed as text: "1,234 tokens/s" for a whole-model job, else the median time, such as "1.25 ms".

    `record` has the results of one implementation on one case, and `time` is the summary of one pass in it.
    """
    return f"{record['tokens'] / time['median']:,.0f} tokens/s" if record["tokens"] else seconds(time["median"])


# ---- facts of a run


def missing(run: Run) -> list[str]:
    """Return a line for each pair of unmeasured implementation and reason, such as "Liger: runs on GPUs only".

    `run` is the content of a topic's results file. The names of the cases follow in parentheses, unless the reason
    holds for all cases of the run.
    """
    all_cases = {record["case"] for record in run["records"]} | {entry["case"] for entry in run["missing"]}
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in run["missing"]:
        reasons.setdefault((entry["peer"], entry["reason"]), []).append(entry["case"])
    return [
        f"{peer}: {reason}" + ("" if len(found) == len(all_cases) else f" ({'; '.join(found)})")
        for (peer, reason), found in reasons.items()
    ]


def floors_line(run: Run, index: int) -> str:
    """Return a line with the date, load and measured speed limits of session number `index` of a run, from 0.

    A session is one start of the benchmark program. `run` is the content of a topic's results file. A speed limit is
    the measured rate of a copy, a read or a matrix product. If the vendor's data sheet states a rate for the same work,
    that rate follows in parentheses. If the C library kept freed memory for reuse during the session, the line ends
    by saying so, because this shortens times on a CPU.
    """
    session = run["sessions"][index]
    stated = data_sheet(run["device"]["name"])

    def figure(name: str, measured: float) -> str:
        """Return a speed limit's name and its rate `measured` as text, and the rate that the data sheet states, if any.

        The outer function's `stated` has the rates of the data sheet.
        """
        beside = f" (data sheet {rate(name, stated[name])})" if name in stated else ""
        return f"{name} {rate(name, measured)}{beside}"

    shown = (figure(name, floor["rate"]) for name, floor in session["floors"].items())
    kept = "; the C library keeps freed memory" if session.get("keeps_freed") else ""
    return f"{session['date']} UTC, load {session['load']}: {', '.join(shown)}{kept}"


def versions(runs: list[Run]) -> list[str]:
    """Return lines with the commit and the packages' versions: one if all runs agree, else one for each combination.

    A line for a combination begins with the names of its topics. `runs` are the contents of results files of topics or
    studies.
    """
    shown: dict[str, list[str]] = {}
    for run in runs:
        shown.setdefault(_versions(run), []).append(results.label(run))
    if len(shown) == 1:
        return [next(iter(shown))]
    return [f"- {', '.join(topics)}: {line}" for line, topics in shown.items()]


def _versions(run: Run) -> str:
    """Return a sentence with the commit and the packages' versions of a run.

    The commit has 12 digits, and "with changes" if files differed from it. Packages that were not installed are left
    out. `run` is the content of a results file of a topic or study.
    """
    packages = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    commit: dict[str, Any] = run["commit"]
    return f"Commit {str(commit['id'])[:12]}{' with changes' if commit['dirty'] else ''}; {packages}."


def notes(run: Run) -> list[str]:
    """Return a Markdown paragraph on the speed limits of each session and on anything special in the run.

    The result is a list with one string, the whole paragraph. Markdown's hard line breaks separate the paragraph's
    lines. Special are CPU time instead of wall time, a device without bfloat16 products, a busy process, a quick run,
    tests that were not run, and an interrupted run. `run` is the content of a topic's results file.
    """
    lines = [f"{floors_line(run, index)}." for index in range(len(run["sessions"]))]
    if run["device"]["name"].endswith("CPU time"):
        lines.append("CPU seconds of one thread, measured while other programs kept the machine busy.")
    if not run["device"]["bf16_products"]:
        lines.append("This CPU has no instructions for bfloat16 products, which take PyTorch minutes.")
    if run.get("busy"):
        lines.append(
            "A process that computes in an endless loop ran beside on purpose. The floors were measured without it, "
            f"and so were the implementations named “{LEFT}”."
        )
    if run["quick"]:
        lines.append("A quick run: fewer cases and rounds.")
    if run.get("untested"):
        lines.append("The tests were not run before: these figures may be of wrong results.")
    if run["partial"]:
        lines.append("**Partial**: the run was cut off before its end.")
    return ["  \n".join(lines)]
