"""pytest-benchmark on the suite's cases: what each file of benchmarks/bench_*.py shares.

`pytest benchmarks --benchmark-only` times one group a case and one benchmark an implementation, with pytest-benchmark's
statistics, options and JSON. `gpt-fast bench` measures the same calls with implementations taking turns.
"""

import itertools
from typing import Any

import pytest

from benchmarks import environment, runner
from benchmarks.cases import TOPICS, Case, cases, device_type
from benchmarks.peers import Peer
from benchmarks.timing import FULL, Stamp, Stopwatch, flush

DEVICE = device_type()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case, pass and implementation of the module's SUITE."""
    if "peer" not in metafunc.fixturenames:
        return
    parameters = [
        pytest.param(case, peer, passes, id=f"{topic.name} {case.name} {passes} {peer.name}")
        for topic in TOPICS.values()
        if topic.suite == metafunc.module.SUITE
        for case in cases(topic, DEVICE)
        for passes in topic.passes
        for peer in runner.peers_of(topic)
        if not case.peers or peer.name in case.peers
    ]
    metafunc.parametrize(("case", "peer", "passes"), parameters)


@pytest.fixture(scope="session")
def facts() -> dict[str, Any]:
    return environment.describe(DEVICE)


@pytest.fixture(scope="session")
def red() -> dict[str, str]:
    """By topic, what its tests said."""
    return {}


@pytest.fixture
def timed(benchmark, facts: dict[str, Any], red: dict[str, str]):
    """Times one implementation's pass of a case; skips it with the reason where it is missing."""

    def run(case: Case, peer: Peer, passes: str) -> None:
        topic = TOPICS[case.topic]
        reason = peer.missing(case)
        if reason:
            pytest.skip(f"{peer.name}: {reason}")
        if topic.name not in red:
            red[topic.name] = runner.run_tests(topic, DEVICE)
        if red[topic.name]:
            pytest.fail(f"the tests of {topic.name} are red: not timed\n{red[topic.name]}", pytrace=False)
        benchmark.group = f"{topic.name} {case.name} {passes}"
        benchmark.extra_info.update(
            topic=topic.name, case=case.name, peer=peer.name, sizes=case.size, dtype=case.dtype_name,
            dropout=case.dropout, **vars(topic.work(case, passes)), **facts,
        )  # fmt: skip
        before = flush(DEVICE) if topic.suite == "ops" else None
        calls = runner.prepare(peer.build(case), runner.make_inputs(topic, case), passes)
        watch = Stopwatch(DEVICE, calls, before)
        rounds = FULL.rounds(watch.warm_up())
        if DEVICE == "cuda":
            benchmark._timer = Stamp
        turns = itertools.cycle(calls)

        def run_next() -> object:
            return next(turns)()

        benchmark.pedantic(run_next, setup=before, rounds=rounds)

    return run
