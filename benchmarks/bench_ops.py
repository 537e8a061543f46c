"""Times every op against its floor and its peers: make bench.

One group per case, one benchmark per peer; floors are measured in the same run. On a GPU, time is the device's own,
between two events, with the L2 flushed before each round. An op whose tests are red is not timed.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.cases import Case, cases, device_type
from benchmarks.peers import PEERS, Peer
from benchmarks.timing import Floor, Stamp, clock, floors, flush

ROOT = Path(__file__).resolve().parent.parent
DEVICE = device_type()
SECONDS = 1.0  # of rounds for one benchmark
PAIRS = [
    pytest.param(case, peer, id=f"{case.name} {peer.name}") for case in cases(DEVICE) for peer in PEERS[case.op.name]
]

if DEVICE == "cuda":
    pytestmark = pytest.mark.benchmark(timer=Stamp)

_tests: dict[str, str] = {}  # by op: what its tests said, empty if they passed


def tests_of(op: str) -> str:
    if op not in _tests:
        selection = ["-m", "cuda and not slow"] if DEVICE == "cuda" else []
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            f"tests/test_{op}.py",
            "-p",
            "no:cacheprovider",
            *selection,
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
        _tests[op] = "" if result.returncode == 0 else result.stdout[-2000:]
    return _tests[op]


def measure(benchmark, function: Callable[[], object]) -> None:
    before, now = flush(DEVICE), clock(DEVICE)
    for _ in range(3):  # compiles, allocates, and finds out how long a round takes
        if before:
            before()
        start = now()
        function()
        duration = now() - start
    rounds = max(20, min(1000, int(SECONDS / duration)))
    benchmark.pedantic(function, setup=before, rounds=rounds, warmup_rounds=5)


@pytest.mark.parametrize("floor", floors(DEVICE), ids=lambda floor: floor.name)
def test_floor(benchmark, floor: Floor) -> None:
    benchmark.group = "floors"
    benchmark.extra_info.update(floor=floor.name, bytes=floor.bytes, flops=floor.flops)
    measure(benchmark, floor.build())


@pytest.mark.parametrize(("case", "peer"), PAIRS)
def test_op(benchmark, case: Case, peer: Peer) -> None:
    reason = peer.missing(case)
    if reason:
        pytest.skip(f"{peer.name}: {reason}")
    red = tests_of(case.op.name)
    if red:
        pytest.fail(f"tests/test_{case.op.name}.py is red: not timed\n{red}", pytrace=False)
    benchmark.group = case.name
    benchmark.extra_info.update(
        op=case.op.name,
        peer=peer.name,
        shape=dict(case.shape),
        dtype=str(case.dtype).removeprefix("torch."),
        direction=case.direction,
        bytes=case.bytes,
        flops=case.flops,
    )
    measure(benchmark, case.prepare(peer.build(case)))
