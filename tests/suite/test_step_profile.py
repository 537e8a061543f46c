"""Test the profile of a training step: its counts and times, and that a profile without a kernel fails."""

import json
import sys

import pytest
import torch

from benchmarks import step_profile
from benchmarks.catalogue import cases

SMALLEST = min(cases(step_profile.TOPIC, "cpu"), key=lambda case: (case.size.get("layers", 12), case.size["B"]))


def test_launches_and_times_are_those_of_one_step():
    x = torch.randn(64, 64)

    def step():
        for _ in range(2):
            torch.mm(x, x)
        torch.relu(x)

    rows = {row["kernel"]: row for row in step_profile.kernels_of(step, "cpu")}
    assert rows["aten::mm"]["launches"] == 2
    assert rows["aten::relu"]["launches"] == 1
    times = [row["us"] for row in rows.values()]
    assert times == sorted(times, reverse=True)


def test_the_command_writes_the_time_of_a_step_and_its_kernels(monkeypatch, tmp_path, capsys):
    path = tmp_path / "profile.json"
    monkeypatch.setattr(step_profile, "cases", lambda topic, device: [SMALLEST])
    monkeypatch.setattr(step_profile, "STEPS", 1)
    monkeypatch.setattr(sys, "argv", ["step_profile", "--device", "cpu", "--out", str(path)])
    step_profile.main()
    found = json.loads(path.read_text("utf-8"))
    assert found["case"] == SMALLEST.name
    assert list(found["seconds"]) == ["gpt_fast"]
    assert found["seconds"]["gpt_fast"] > 0
    assert any(row["kernel"].startswith("gpt_fast::mlp_backward") for row in found["kernels"])
    assert "step_profile: gpt_fast" in capsys.readouterr().out


def test_a_profile_without_a_kernel_fails(monkeypatch):
    """A profile without kernels fails. This happens if the profiler may not read the device's counters."""
    monkeypatch.setattr(step_profile, "cases", lambda topic, device: [SMALLEST])
    monkeypatch.setattr(step_profile, "STEPS", 1)
    monkeypatch.setattr(step_profile, "kernels_of", lambda step, device: [])
    monkeypatch.setattr(sys, "argv", ["step_profile", "--device", "cpu"])
    with pytest.raises(SystemExit, match="the profiler recorded no kernel"):
        step_profile.main()
