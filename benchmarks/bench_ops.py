"""Times every op under pytest-benchmark: pytest benchmarks/bench_ops.py --benchmark-only"""

SUITE = "ops"


def test_ops(timed, case, peer, passes) -> None:
    timed(case, peer, passes)
