"""Results as text: the cells that terminal and Markdown share, and the Markdown of one device."""

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks import results
from benchmarks.counts import MFU_FORMULA, MFU_WHERE
from benchmarks.environment import data_sheet
from benchmarks.results import OURS, Record, Run

TITLES = {
    "training_step": "training step (forward, backward, AdamW)",
    "finetuning_step": "fine-tuning step of a classifier",
    "prefill": "prefill: the first token after a prompt",
    "generation": "decoding, greedily, prompt included",
}
PASS_NAMES = {"training": "forward + backward", "inference": "forward", "step": "time"}


def seconds(value: float) -> str:
    """Three significant digits in the unit that suits them."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1 or unit == "µs":
            return f"{value * factor:.3g} {unit}" if value * factor < 1000 else f"{value * factor:.0f} {unit}"
    raise AssertionError


def memory(value: int | None) -> str:
    if value is None:
        return ""
    mib = value / 2**20
    return f"{mib / 1024:.2f} GiB" if mib >= 1000 else f"{mib:.3g} MiB" if mib < 100 else f"{mib:.0f} MiB"


def rate(name: str, value: float) -> str:
    unit, scale = ("FLOP/s", value) if name.startswith("matmul") else ("B/s", value)
    return f"{scale / 1e12:.3g} T{unit}" if scale >= 1e12 else f"{scale / 1e9:.3g} G{unit}"


def columns(run: Run, records: Iterable[Record]) -> list[str]:
    """The header of one case's table."""
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
    """One row for each implementation of a case, ours first."""
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
            against = ours and ours["times"].get(name)
            cells += [
                f"{seconds(time['median'])} ± {spread:.0%}",
                f"{time['median'] / against['median']:.2f}" if against else "",
                f"{results.share_of_floor(run, record, name):.0%}",
            ]
        if record["tokens"]:
            cells.append(f"{record['tokens'] / record['times'][passes[0]]['median']:,.0f}")
        if run["suite"] == "train":
            cells.append(f"{mfu(run, record):.0%}")
        lines.append([*cells, memory(record["peak_memory"])])
    return lines


def mfu(run: Run, record: Record) -> float:
    """FLOPs that the mathematics needs in a second, over the matrix rate measured in the same session."""
    floors = results.session(run, record)["floors"]
    rates = [floors[name]["rate"] for name in (f"matmul {record['dtype']}", "matmul float32") if name in floors]
    return record["work"]["step"]["flops"] / record["times"]["step"]["median"] / max(rates)


def missing(run: Run) -> list[str]:
    """Each implementation that was not measured, with the reason and, unless it is all of them, the cases."""
    every = {record["case"] for record in run["records"]} | {entry["case"] for entry in run["missing"]}
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in run["missing"]:
        reasons.setdefault((entry["peer"], entry["reason"]), []).append(entry["case"])
    return [
        f"{peer}: {reason}" + ("" if len(where) == len(every) else f" ({'; '.join(where)})")
        for (peer, reason), where in reasons.items()
    ]


def floors_line(run: Run, index: int) -> str:
    session = run["sessions"][index]
    stated = data_sheet(run["device"]["name"])

    def figure(name: str, measured: float) -> str:
        beside = f" (data sheet {rate(name, stated[name])})" if name in stated else ""
        return f"{name} {rate(name, measured)}{beside}"

    shown = (figure(name, floor["rate"]) for name, floor in session["floors"].items())
    return f"{session['date']} UTC, load {session['load']}: {', '.join(shown)}"


def table(header: list[str], lines: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"| --- |{' ---: |' * (len(header) - 1)}",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]


# ---- the page of one device


SUMMARY_HEADER = ["case", OURS, "of the floor", "speed against the fastest other"]
NOT_THE_SAME = ("products alone",)  # what computes less than the op
NOT_OTHERS = ("reference", "Hugging Face accelerated", *NOT_THE_SAME)  # this library in another place, and those


def summary(runs: list[Run]) -> list[list[str]]:
    """One row for each case that everybody ran, and pass: ours, its share of the floor, and the fastest other."""
    lines = []
    for run, case, records in _complete(runs):
        for passes in records[OURS]["times"]:
            name = PASS_NAMES.get(passes, passes)
            lines.append(_summed(run, records, f"{case}" + ("" if name == "time" else f", {name}"), (passes,)))
    return lines


def highlights(runs: list[Run]) -> list[list[str]]:
    """The same with all passes of a case together, and of each topic's dtypes and dropouts the largest case only."""
    largest: dict[tuple[Any, ...], list[str]] = {}
    for run, case, records in _complete(runs):
        ours = records[OURS]
        passes = tuple(ours["times"])
        name = "" if passes == ("step",) else f", {' + '.join(PASS_NAMES.get(name, name) for name in passes)}"
        largest[run["topic"], ours["dtype"], ours["dropout"]] = _summed(run, records, case + name, passes)
    return list(largest.values())


def _complete(runs: list[Run]) -> Iterator[tuple[Run, str, dict[str, Record]]]:
    for run in runs:
        for case, records in results.by_case(run).items():
            if OURS in records and records[OURS]["complete"]:
                yield run, f"{run['topic']} {case}", records


def _summed(run: Run, records: dict[str, Record], case: str, passes: tuple[str, ...]) -> list[str]:
    def time(record: Record) -> float:
        return sum(record["times"][name]["median"] for name in passes)

    ours = records[OURS]
    floors = results.session(run, ours)["floors"]
    floor = sum(results.floor_seconds(ours, name, floors) for name in passes)
    others = {
        peer: time(record)
        for peer, record in records.items()
        if set(passes) <= set(record["times"]) and not peer.startswith(OURS) and peer not in NOT_OTHERS
    }
    best = min(others, key=lambda peer: others[peer]) if others else ""
    against = f"{others[best] / time(ours):.2f} × {best}" if best else ""
    return [case, seconds(time(ours)), f"{floor / time(ours):.0%}", against]


FLOOR = """\
*Of the floor*: how much of the speed limit is reached, which is the bytes that must move at the bandwidth measured in
the same session, or the FLOPs at the rate of a matrix product, whichever takes longer. What fits in a cache can beat
the bandwidth, and so does the embedding's gradient on a CPU, whose unused rows are never written."""
EXPLANATION = f"""\
Times are medians ± half the interquartile range; implementations take turns, but in training, where they do not fit
into memory together. *× ours*: the time as a multiple of {OURS}'s. {FLOOR} *Peak memory*: what a call adds to its
inputs, forward and backward together; of a job, with weights and the optimiser's state.

{MFU_FORMULA}. {MFU_WHERE}."""


def page(runs: list[Run], plots: dict[str, str], last: Iterable[str] = ()) -> str:
    """Everything measured on one device, as Markdown. `plots`: file name → what it shows; `last`: lines at the end."""
    device = runs[0]["device"]
    lines = [
        f"# {device['name']}",
        "",
        "Made by `make report` from the JSON files beside this page; measured by `gpt-fast bench`.",
        "",
        *versions(runs),
        "",
        EXPLANATION,
        "",
        "## Summary",
        "",
        *table(SUMMARY_HEADER, summary(runs)),
    ]
    for name, caption in plots.items():
        lines += ["", f"![{caption}]({name})"]
    for run in runs:
        lines += ["", f"## {TITLES.get(run['topic'], run['topic'])}", "", *notes(run), *case_tables(run)]
        absent = missing(run)
        if absent:
            lines += ["", "Not measured:", "", *(f"- {line}" for line in absent)]
    return "\n".join([*lines, *last]) + "\n"


def case_tables(run: Run, complete: bool = False) -> list[str]:
    """A table of every implementation for each case, or for those alone that everybody ran."""
    lines = []
    for case, records in results.by_case(run).items():
        if not complete or (OURS in records and records[OURS]["complete"]):
            lines += ["", f"**{case}**", "", *table(columns(run, records.values()), rows(run, records))]
    return lines


def versions(runs: list[Run]) -> list[str]:
    """Device, versions and commits; one line where all runs agree."""
    shown = {_versions(run): [] for run in runs}  # type: dict[str, list[str]]
    for run in runs:
        shown[_versions(run)].append(run["topic"])
    if len(shown) == 1:
        return [next(iter(shown))]
    return [f"- {', '.join(topics)}: {line}" for line, topics in shown.items()]


def _versions(run: Run) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    commit: dict[str, Any] = run["commit"]
    return f"Commit {str(commit['id'])[:12]}{' with changes' if commit['dirty'] else ''}; {packages}."


def notes(run: Run) -> list[str]:
    lines = [f"{floors_line(run, index)}." for index in range(len(run["sessions"]))]
    if run["device"]["name"].endswith("CPU time"):
        lines.append("CPU seconds of one thread, measured while other programs kept the machine busy.")
    if not run["device"]["bf16_products"]:
        lines.append("No bfloat16 for what consists of matrix products: this CPU has no instructions for them.")
    if run["quick"]:
        lines.append("A quick run: fewer cases and rounds.")
    if run["partial"]:
        lines.append("**Partial**: the run was cut off; what is missing was not measured.")
    return ["  \n".join(lines)]
