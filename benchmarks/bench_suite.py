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
    """Return pytest's parameter sets (case, implementation, pass), one for each combination to time on DEVICE.

    A `Case` is an op or whole-model job at fixed sizes, dtype and device. A pass is "forward", "backward", "training",
    "inference" or "step". Implementations that a case excludes are left out. Those that cannot run here are kept, and
    skipped later.
    """
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
    """Return the facts {"device", "versions", "commit"} of this machine and checkout, to be stored beside all times.

    Each is a dict. "device" has the type, name and instructions of the CPU or GPU. "versions" maps packages to
    versions. "commit" has the hash, and whether files differ from it.
    """
    return environment.describe(DEVICE)


@pytest.fixture(scope="session")
def red() -> dict[str, str]:
    """Return an empty dict that all tests of the pytest session share.

    `test_time` fills it: name of an op or job → output of its failed tests, or "" if they passed.
    """
    return {}


@pytest.mark.parametrize(("case", "peer", "passes"), parameters())
def test_time(case: Case, peer: Peer, passes: str, benchmark, facts: dict[str, Any], red: dict[str, str]) -> None:
    """Time one pass of the implementation `peer` on a case, an op or job at fixed sizes, by pytest-benchmark.

    Skip it if the implementation cannot run the case here. Fail if the tests of the op or job fail; they run once,
    before its first timing. `passes` names the one pass: "forward", "backward", "training", "inference" or "step".

    `benchmark` is pytest-benchmark's fixture. It gets a group name and, as extra info, the case, its least bytes and
    FLOPs, and `facts`: the device, versions and commit. `red` maps op or job → output of its failed tests ("" if they
    passed), and gets an entry here. On a GPU the seconds are the GPU's, and its cache is emptied before each call of an
    op.
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
