"""Test that the study of overhead measures the right calls and shows them."""

import pytest
import torch

from benchmarks import catalogue
from benchmarks.jobs import overhead
from benchmarks.measure import environment
from benchmarks.report import pages, results
from gpt_fast import ops


def test_every_op_is_measured():
    assert [topic.name for topic in overhead.measured_ops()] == list(ops.NAMES)


def test_operators_are_what_the_function_runs_and_no_more():
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((4, 8), (8,), (8,)))

    def both():
        y = ops.layer_norm(x * 2, weight, bias)
        return torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))

    again = overhead.operators(both)
    with overhead.Operators() as mode:
        again()
    assert len(mode.calls) == 2, "one forward, one backward, and no product by 2"


@pytest.mark.parametrize("op", ops.NAMES)
def test_a_record_and_its_table(op, monkeypatch, tmp_path):
    monkeypatch.setattr(overhead, "CALLS", 2)
    monkeypatch.setattr(overhead, "ROUNDS", 3)
    monkeypatch.setattr(overhead, "measured_ops", lambda: [catalogue.ops()[op]])
    measured = overhead.measure("cpu", quick=True, cpu_time=False)["ops"][op]
    for times in measured.values():
        assert set(times) == {"function", "operators", "PyTorch"}
        assert all(0 < time["q1"] <= time["median"] <= time["q3"] < 1 for time in times.values())
    head = {"schema": results.SCHEMA, "version": results.VERSION, "topic": "overhead", "suite": "ops", "quick": True}
    facts = environment.describe("cpu") | {"date": "2026-01-01 00:00", "load": 0.5}
    results.write(head | facts | {"ops": {op: measured}}, tmp_path / "overhead.json")
    lines = pages.study_sections(tmp_path)
    assert sum(line.startswith(f"| {op}, ") for line in lines) == len(measured)
    median = measured[next(iter(measured))]["function"]["median"]
    assert any(f"| {median * 1e6:.1f} |" in line for line in lines)
