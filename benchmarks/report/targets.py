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
        """Return True if the figure that a run reached is at least the required one."""
        return self.reached >= self.required


HEADER = ["case", "against", "must reach", "reached", "met"]


def rows(runs: list[Run]) -> list[list[str]]:
    """Return a row of cells for each speed target that the runs can judge.

    The cells are the case, what it is compared with, the figure to reach, the figure reached, and "yes" or "**no**".
    `runs` are the contents of topics' results files. A target is left out if what it compares was not measured, or if
    it is for another kind of run or device.
    """
    return [
        [
            verdict.case, verdict.against, _figure(verdict.against, verdict.required),
            _figure(verdict.against, verdict.reached), "yes" if verdict.met else "**no**",
        ]
        for verdict in verdicts(runs)
    ]  # fmt: skip


def verdicts(runs: list[Run]) -> Iterator[Verdict]:
    """Yield a `Verdict` on each target that can be judged: case, what it is compared with, required and reached figure.

    `runs` are the contents of topics' results files. A target is a speed that a case must reach. A target is left out
    if it is for the other kind of run (quiet or beside a busy process), or for instructions that the device lacks. It
    is also left out if an implementation or a pass of it was not measured. Topics that the suite has dropped have no
    targets.
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
    """Return a line for each implementation that has a target for instructions which the run's device lacks.

    A line is such as "<implementation>: this CPU has no bf16 products". An implementation has only one line, however
    many of its targets need missing instructions. A target gives no line if what it compares was not measured. `runs`
    are the contents of topics' results files.
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
    """Return True if the run's file says that its device has the instructions `products`, such as "bf16_products".

    `run` is the content of a topic's results file.
    """
    return bool(run["device"].get(products))


def case_of(run: Run, record: Record) -> Case:
    """Return the `Case` that `record` was measured on: topic, device type, sizes, dtype and dropout.

    `run` is the content of the results file that has the record. The case's fields `series`, `quick` and `peers` keep
    their defaults.
    """
    dtype = getattr(torch, record["dtype"])
    return Case(run["topic"], run["device"]["type"], tuple(record["sizes"].items()), dtype, record["dropout"])


def judge(run: Run, records: dict[str, Record], target: Target) -> Verdict | None:
    """Return the `Verdict` on a target for one case, with the figure to reach and the figure reached, or None.

    A target compares the implementation `target.who` with the measured speed limit, with a number of tokens a second,
    or with other implementations. Of several others, the fastest measured one counts. A target without passes means all
    passes that `target.who` was measured in. The result is None if `target.who`, one of the passes, or all of the
    others were not measured.

    The verdict's `case` is text: topic, case, passes, and `target.who` unless it is gpt_fast. `against` names what
    `target.who` is compared with. `required` and `reached` are the figures. `run` is the content of a topic's results
    file. `records` maps implementation → record of the case.
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
    """Return how many times as long the implementation of the record `peer` took as that of the record `who`.

    `passes` are names of passes that both records have. The median times are added up over the passes and divided. If
    there is one pass and `who` is gpt_fast's record, the median in "to_ours" of the pass is returned instead, if it is
    there. "to_ours" was measured as the ratio of calls that ran shortly after each other.
    """
    if len(passes) == 1 and who["peer"] == OURS and "to_ours" in peer["times"][passes[0]]:
        return peer["times"][passes[0]]["to_ours"]["median"]
    return _total(peer, passes) / _total(who, passes)


def _total(record: Record, passes: tuple[str, ...]) -> float:
    """Return the sum of the record's median seconds over the passes named in `passes`."""
    return sum(record["times"][name]["median"] for name in passes)


def _figure(against: str, value: float) -> str:
    """Return a target's figure `value` as text. `against` names what the target is compared with.

    - FLOOR ("the floor"): `value` is a share of the measured speed limit, and 0.85 gives "85%".
    - TOKENS ("tokens/s"): `value` is tokens a second, and 550000 gives "550,000".
    - an implementation's name: `value` is a multiple of that implementation's speed, and 1.25 gives "1.25 ×".
    """
    return f"{value:.0%}" if against == FLOOR else f"{value:,.0f}" if against == TOKENS else f"{value:.2f} ×"
