"""Make records and runs in the form that the benchmark suite writes, for tests that show or compare them."""

from typing import Any

from benchmarks.report import results
from benchmarks.topic import OURS

FLOORS = {
    "copy": {"rate": 10e9, "q1": 9e9, "q3": 11e9},
    "read": {"rate": 20e9, "q1": 19e9, "q3": 21e9},
    "matmul float32": {"rate": 100e9, "q1": 99e9, "q3": 101e9},
}


def record(
    case: str = "M=4 float32", peer: str = OURS, median: float = 1.0, spread: float = 0.0, **more: Any
) -> dict[str, Any]:  # fmt: skip
    time = {"median": median, "q1": median - spread / 2, "q3": median + spread / 2, "rounds": 5, "first": 2.0}
    return {
        "case": case, "peer": peer, "sizes": {"M": 4, "N": 8}, "dtype": "float32", "dropout": 0.0,
        "series": "", "complete": True,
        "times": {"forward": time}, "work": {"forward": {"bytes": 5_000_000_000, "flops": 0, "bound": "copy"}},
        "tokens": None, "peak_memory": 3 << 20, "session": 0,
    } | more  # fmt: skip


def a_run(*records: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "schema": results.SCHEMA, "version": results.VERSION, "topic": "layer_norm", "suite": "ops", "quick": False,
        "partial": False, "device": {"type": "cpu", "name": "A CPU", "slug": "a-cpu", "bf16_products": False},
        "versions": {"torch": "2"}, "commit": {"id": "f" * 40, "dirty": False},
        "sessions": [{"date": "2026-01-01 00:00", "load": 0.1, "floors": FLOORS}], "records": list(records),
        "missing": [],
    } | more  # fmt: skip
