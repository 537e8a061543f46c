"""Test the benchmark suite with `--device cuda`: each op and implementation runs, as a CUDA graph if it can be one."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import catalogue
from benchmarks.measure import runner
from benchmarks.measure.calls import prepare
from benchmarks.measure.graphs import capture
from benchmarks.report import results
from benchmarks.topic import BF16, OURS
from tools.fakecuda.record import watch

if os.environ.get("FAKECUDA_CAPABILITY", "90") != "90" or os.environ.get("FAKECUDA_DEVICES", "1") != "1":
    pytest.skip("the benchmarks run on one device as sm_90", allow_module_level=True)

OPS = {name: topic for name, topic in catalogue.ops().items() if catalogue.cases(topic, "cuda")}


@pytest.mark.parametrize("name", OPS)
def test_our_calls_are_captured(name: str, watched: Callable) -> None:
    """A graph holds every launch of a call, forward and backward, so its time excludes the host's work."""
    topic = OPS[name]
    for case in topic.small_cases("cuda", BF16):
        function, inputs = topic.peers[0].build(case), topic.inputs(case)
        for passes in topic.passes:
            replays = capture(lambda f=function, i=inputs, p=passes: prepare(f, [i, i], p))
            with watched() as seen:
                for replay in replays.calls:
                    replay()
            assert [entry.kind for entry in seen.launches() if entry.kind != "fill"] == ["graph", "graph"]
            assert replays.host > 0


def test_a_call_that_waits_is_timed_directly() -> None:
    x = torch.zeros(4, device="cuda")
    assert runner._captured(lambda: [lambda: x.sum().item()]) is None
    assert runner._captured(lambda: [x.sum]) is not None


@pytest.mark.parametrize("name", ["layer_norm", "decode_attention"])
def test_a_run_of_the_suite(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick cases run with every peer. The op's tests, which the suite runs first, need values and are left out."""
    monkeypatch.setattr(runner, "run_tests", lambda topic, device: "")
    monkeypatch.setattr(runner, "QUICK", runner.Budget(0.0, 1))
    with watch() as seen:
        outcome = runner.run([OPS[name]], runner.Settings("cuda", quick=True, out=tmp_path))
    assert seen.refusals == []
    (file,) = outcome.files
    run = results.read(file)
    records = [record for record in run["records"] if record["peer"] == OURS]
    assert records
    assert all(time["host"] > 0 for record in records for time in record["times"].values())
    missing = [entry["reason"] for entry in run["missing"]]  # PyTorch's SDPA needs cuDNN, which the stand-in lacks
    assert [reason for reason in missing if "cuDNN" not in reason and "not installed" not in reason] == []


@pytest.mark.parametrize("name", ["prefill", "finetuning_step", "handwritten_step"])
def test_a_run_of_a_job(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first case of each job runs with one layer. test_gpu_script.py covers the other jobs of `make gpu`."""
    (topic,) = catalogue.select(name)
    monkeypatch.setattr(runner, "QUICK", runner.Budget(0.0, 1))
    first = catalogue.cases(topic, "cuda", quick=True)[0]
    case = dataclasses.replace(first, sizes=(*first.sizes, ("layers", 1)), peers=(OURS, "plain", "as written"))
    monkeypatch.setattr(runner, "cases", lambda topic, device, quick=False: [case])
    with watch() as seen:
        outcome = runner.run([topic], runner.Settings("cuda", quick=True, untested=True, out=tmp_path))
    assert seen.refusals == []
    (file,) = outcome.files
    assert OURS in {record["peer"] for record in results.read(file)["records"]}
