"""Times training and fine-tuning steps under pytest-benchmark: pytest benchmarks/bench_train.py --benchmark-only"""

SUITE = "train"


def test_train(timed, case, peer, passes) -> None:
    timed(case, peer, passes)
