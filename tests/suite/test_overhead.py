"""What a call costs before any work: that it is measured of the right calls, and shown."""

import json

import pytest
import torch

from benchmarks import environment, overhead
from gpt_fast import ops


def test_every_op_is_measured():
    assert set(overhead.SIZES) == set(ops.NAMES)


def test_operators_are_what_the_function_runs_and_no_more():
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((4, 8), (8,), (8,)))

    def both():
        y = ops.layer_norm(x * 2, weight, bias)
        return torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))

    again = overhead.operators(both)
    with overhead.Operators() as mode:
        again()
    assert len(mode.calls) == 2, "one forward, one backward, and no product by 2"


@pytest.mark.parametrize("op", overhead.SIZES)
def test_a_record_and_its_table(op, monkeypatch, tmp_path):
    monkeypatch.setattr(overhead, "CALLS", 2)
    monkeypatch.setattr(overhead, "ROUNDS", 3)
    measured = overhead.measure([op], "cpu", cpu_time=False)[op]
    for times in measured.values():
        assert set(times) == {"function", "operators", "PyTorch"}
        assert all(0 < time["q1"] <= time["median"] <= time["q3"] < 1 for time in times.values())
    record = {**environment.describe("cpu"), "date": "2026-01-01 00:00", "load": 0.5, "ops": {op: measured}}
    assert overhead.section(tmp_path) == []
    (tmp_path / overhead.FILE).write_text(json.dumps(record), encoding="utf-8")
    lines = overhead.section(tmp_path)
    assert sum(line.startswith(f"| {op}, ") for line in lines) == len(measured)
    median = measured[next(iter(measured))]["function"]["median"]
    assert any(f"| {median * 1e6:.1f} |" in line for line in lines)
