"""The speeds that cases must reach, beside what a run reached."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks import catalogue
from benchmarks.report import results
from benchmarks.report.markdown import PASS_NAMES
from benchmarks.report.results import Record, Run
from benchmarks.topic import FLOOR, OURS, TOKENS, Case, Target


@dataclass(frozen=True)
class Verdict:
    """A target of a case, and the figure that the run has for it."""

    case: str
    against: str
    required: float
    reached: float

    @property
    def met(self) -> bool:
        """Return True if the required figure was reached."""
        return self.reached >= self.required


HEADER = ["case", "against", "must reach", "reached", "met"]


def rows(runs: list[Run]) -> list[list[str]]:
    """Return a row of cells under HEADER for each target whose implementations ran.

    The cells are the case, what it is compared with, the figure to reach, the figure reached, and whether it was met.
    """
    return [
        [
            verdict.case, verdict.against, _figure(verdict.against, verdict.required),
            _figure(verdict.against, verdict.reached), "yes" if verdict.met else "**no**",
        ]
        for verdict in verdicts(runs)
    ]  # fmt: skip


def verdicts(runs: list[Run]) -> Iterator[Verdict]:
    """Yield the verdict on each target of each case that the runs can judge.

    Left out are targets of the other kind of run (quiet or beside a busy process), targets for instructions that the
    device lacks, and those whose implementations did not run.
    """
    for run in runs:
        topic = catalogue.topics().get(run["topic"])
        for records in results.by_case(run).values() if topic else ():
            for target in topic.targets(case_of(run, next(iter(records.values())))):  # type: ignore[union-attr]
                if target.busy != bool(run.get("busy")) or (target.products and not _has(run, target.products)):
                    continue
                verdict = judge(run, records, target)
                if verdict:
                    yield verdict


def unjudged(runs: list[Run]) -> list[str]:
    """Return a line for each implementation whose targets do not count, because the device lacks instructions for it.

    `runs` are the contents of results files.
    """
    found = {}
    for run in runs:
        topic = catalogue.topics().get(run["topic"])
        for records in results.by_case(run).values() if topic else ():
            for target in topic.targets(case_of(run, next(iter(records.values())))):  # type: ignore[union-attr]
                if run["device"].get(target.products) is False and judge(run, records, target):
                    found[target.who] = f"{target.who}: this CPU has no {target.products.replace('_', ' ')}"
    return list(found.values())


def _has(run: Run, products: str) -> bool:
    """Return True if the run's device has these instructions, such as "bf16_products"."""
    return bool(run["device"].get(products))


def case_of(run: Run, record: Record) -> Case:
    """Return the case that a record was measured on."""
    dtype = getattr(torch, record["dtype"])
    return Case(run["topic"], run["device"]["type"], tuple(record["sizes"].items()), dtype, record["dropout"])


def judge(run: Run, records: dict[str, Record], target: Target) -> Verdict | None:
    """Return the verdict on a target for a case: what is required, and what was reached.

    `records` are those of the case by implementation. The result is None if an implementation or a pass that the target
    names was not measured. If the target names several implementations, the fastest measured one counts.
    """
    who = records.get(target.who)
    if who is None:
        return None
    passes = target.passes or tuple(who["times"])
    if not set(passes) <= set(who["times"]):
        return None
    names = [PASS_NAMES.get(name, name) for name in passes]
    case = f"{results.label(run)} {who['case']}" + ("" if names == ["time"] else f", {' + '.join(names)}")
    case = case if target.who == OURS else f"{case}: {target.who}"
    if target.peer == FLOOR:
        return Verdict(case, FLOOR, target.times, results.share_of_floor(run, who, *passes))
    if target.peer == TOKENS:
        return Verdict(case, TOKENS, target.times, who["tokens"] / _total(who, passes))
    peers = (target.peer,) if isinstance(target.peer, str) else target.peer
    there = [peer for peer in peers if peer in records and set(passes) <= set(records[peer]["times"])]
    if not there:
        return None
    best = min(there, key=lambda peer: _ratio(records[peer], who, passes))
    return Verdict(case, best, target.times, _ratio(records[best], who, passes))


def _ratio(peer: Record, who: Record, passes: tuple[str, ...]) -> float:
    """Return the time of the record `peer` divided by that of the record `who`, added up over the passes.

    For one pass against gpt_fast it is the median over pairs of rounds, if the run has it, else the ratio of the
    medians.
    """
    if len(passes) == 1 and who["peer"] == OURS and "to_ours" in peer["times"][passes[0]]:
        return peer["times"][passes[0]]["to_ours"]["median"]
    return _total(peer, passes) / _total(who, passes)


def _total(record: Record, passes: tuple[str, ...]) -> float:
    """Return the sum of the median seconds of the passes."""
    return sum(record["times"][name]["median"] for name in passes)


def _figure(against: str, value: float) -> str:
    """Return a target's figure as text: a percentage for the measured speed limit, tokens a second, or a multiple.

    `against` is FLOOR for the limit, TOKENS, or the name of the implementation that is compared with.
    """
    return f"{value:.0%}" if against == FLOOR else f"{value:,.0f}" if against == TOKENS else f"{value:.2f} ×"
