"""The suite's cases under pytest-benchmark: `pytest benchmarks --benchmark-only -k "ops and embedding"`.

Each case is a group, and each implementation a benchmark, with pytest-benchmark's statistics, options and JSON. `python
-m benchmarks` measures the same calls with the implementations taking turns.
"""

import itertools
from typing import Any

import pytest
import torch

from benchmarks import catalogue
from benchmarks.measure import environment
from benchmarks.measure.calls import make_inputs, prepare
from benchmarks.measure.gate import run_tests
from benchmarks.measure.timing import FULL, Stamp, Stopwatch, flush
from benchmarks.topic import Case, Peer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parameters() -> list:
    """Return pytest's parameter sets (case, implementation, pass), one for each combination to time on DEVICE."""
    return [
        pytest.param(case, peer, passes, id=f"{topic.suite} {topic.name} {case.name} {passes} {peer.name}")
        for topic in catalogue.topics().values()
        for case in catalogue.cases(topic, DEVICE)
        for passes in topic.passes
        for peer in topic.peers
        if not case.peers or peer.name in case.peers
    ]


@pytest.fixture(scope="session")
def facts() -> dict[str, Any]:
    """Return {"device", "versions", "commit"}, see `environment.describe`, which is stored beside all times."""
    return environment.describe(DEVICE)


@pytest.fixture(scope="session")
def red() -> dict[str, str]:
    """Return an empty dict that lasts for the whole session of pytest.

    `test_time` fills it: topic's name → output of its failed tests, "" if they passed.
    """
    return {}


@pytest.mark.parametrize(("case", "peer", "passes"), parameters())
def test_time(case: Case, peer: Peer, passes: str, benchmark, facts: dict[str, Any], red: dict[str, str]) -> None:
    """Time one pass of the implementation `peer` on a case by pytest-benchmark.

    Skip it if the implementation cannot run the case here, and fail if the tests of the topic fail. They run once,
    before the topic's first timing. `passes` names the pass. `benchmark` is pytest-benchmark's fixture; `facts` and
    `red` are the fixtures of this file.
    """
    topic = catalogue.topics()[case.topic]
    reason = peer.missing(case)
    if reason:
        pytest.skip(f"{peer.name}: {reason}")
    if topic.name not in red:
        red[topic.name] = run_tests(topic, DEVICE)
    if red[topic.name]:
        pytest.fail(f"the tests of {topic.name} fail: not timed\n{red[topic.name]}", pytrace=False)
    benchmark.group = f"{topic.name} {case.name} {passes}"
    benchmark.extra_info.update(
        topic=topic.name, case=case.name, peer=peer.name, sizes=case.size, dtype=case.dtype_name,
        dropout=case.dropout, **vars(topic.work(case, passes)), **facts,
    )  # fmt: skip
    before = flush(DEVICE) if topic.suite == "ops" else None
    calls = prepare(peer.build(case), make_inputs(topic, case), passes)
    watch = Stopwatch(DEVICE, calls, before)
    rounds = FULL.rounds(watch.warm_up())
    if DEVICE == "cuda":
        benchmark._timer = Stamp
    turns = itertools.cycle(calls)

    def run_next() -> object:
        return next(turns)()

    benchmark.pedantic(run_next, setup=before, rounds=rounds)
