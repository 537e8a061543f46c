"""Writes what a benchmark run measured as Markdown: python -m benchmarks.report RUN.json [--out results]

Under OUT/<device>/: ops.md to read, and ops.json, the run's own figures without every single round.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

OURS = "gpt_fast"
Run = dict[str, Any]


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def seconds(value: float) -> str:
    """Three significant digits in the unit that suits them."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1 or unit == "µs":
            return f"{value * factor:.3g} {unit}" if value * factor < 1000 else f"{value * factor:.0f} {unit}"
    raise AssertionError


def timing(benchmark: Run) -> str:
    stats = benchmark["stats"]
    return f"{seconds(stats['median'])} ± {stats['iqr'] / stats['median'] / 2:.0%}"


def rates(run: Run) -> dict[str, float]:
    """Measured bytes or FLOPs in a second, by floor."""
    found = {}
    for benchmark in run["benchmarks"]:
        info = benchmark["extra_info"]
        if "floor" in info:
            found[info["floor"]] = max(info["bytes"], info["flops"]) / benchmark["stats"]["median"]
    return found


def floor(info: Run, rate: dict[str, float]) -> float:
    """No version runs much faster: the bytes at copy bandwidth, or the FLOPs at the matrix rate."""
    arithmetic = info["flops"] / rate[f"matmul {info['dtype']}"] if info["flops"] else 0.0
    return max(info["bytes"] / rate["copy"], arithmetic)


def op_table(op: str, benchmarks: list[Run], rate: dict[str, float]) -> list[str]:
    groups: dict[str, dict[str, Run]] = defaultdict(dict)
    for benchmark in benchmarks:
        groups[benchmark["group"]][benchmark["extra_info"]["peer"]] = benchmark
    peers = list(dict.fromkeys(benchmark["extra_info"]["peer"] for benchmark in benchmarks))
    others = [peer for peer in peers if peer != OURS]
    lines = [f"| case | floor | {OURS} | of the floor's speed | {' | '.join(others)} |"]
    lines.append("| --- | ---: | ---: | ---: |" + " ---: |" * len(others))
    for group, by_peer in groups.items():
        limit = floor(next(iter(by_peer.values()))["extra_info"], rate)
        ours = by_peer.get(OURS)
        cells = [group.removeprefix(f"{op} "), seconds(limit)]
        cells += [timing(ours), f"{limit / ours['stats']['median']:.0%}"] if ours else ["not measured", ""]
        for peer in others:
            measured = by_peer.get(peer)
            ratio = f" ({measured['stats']['median'] / ours['stats']['median']:.2f} x)" if measured and ours else ""
            cells.append(timing(measured) + ratio if measured else "not measured")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def markdown(run: Run) -> str:
    machine, commit = run["machine_info"], run.get("commit_info") or {}
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    identity = f"{str(commit.get('id', 'unknown'))[:12]}{' with changes' if commit.get('dirty') else ''}"
    rate = rates(run)
    lines = [
        f"# Ops on {machine['device']}",
        "",
        f"{run['datetime'][:10]}, commit {identity}; {versions}.",
        "Medians ± half the interquartile range; in brackets, the time as a multiple of ours. The floor is the bytes",
        "an op must move at the copy bandwidth, or its FLOPs at the matrix rate, both measured in this run. What fits",
        "in a cache may beat it.",
        "",
        "",
        *(f"- {name}: {value / 1e9:.4g} {'GFLOP/s' if 'matmul' in name else 'GB/s'}" for name, value in rate.items()),
    ]
    by_op: dict[str, list[Run]] = defaultdict(list)
    for benchmark in run["benchmarks"]:
        if "op" in benchmark["extra_info"]:
            by_op[benchmark["extra_info"]["op"]].append(benchmark)
    for op, benchmarks in by_op.items():
        lines += ["", f"## {op}", "", *op_table(op, benchmarks, rate)]
    if run["missing"]:
        named = (f"{absent['peer']} for {absent['op']} ({absent['reason']})" for absent in run["missing"])
        lines += ["", f"Not measured: {'; '.join(named)}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    run = json.loads(arguments.run.read_text("utf-8"))
    for benchmark in run["benchmarks"]:
        benchmark["stats"].pop("data", None)
    folder = arguments.out / slug(run["machine_info"]["device"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ops.md").write_text(markdown(run), encoding="utf-8")
    (folder / "ops.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    print(f"{folder / 'ops.md'}")


if __name__ == "__main__":
    main()
