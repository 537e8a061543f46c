"""Times prefill and decoding under pytest-benchmark: pytest benchmarks/bench_decode.py --benchmark-only"""

SUITE = "decode"


def test_decode(timed, case, peer, passes) -> None:
    timed(case, peer, passes)
