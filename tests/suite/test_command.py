"""Test `python -m benchmarks`, and `gpt-fast bench`, which runs it."""

import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from benchmarks import catalogue
from benchmarks.measure import runner, timing
from benchmarks.measure.environment import ROOT
from benchmarks.topic import OURS
from gpt_fast_cli import bench
from tests.command_line import ENVIRONMENT
from tests.suite.figures import FLOORS, a_run, record


@pytest.fixture(scope="module")
def suite():
    """Return `suite(*options)`, which runs `python -m benchmarks` in this process."""
    from benchmarks import __main__ as command

    def run(*options, capsys):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["benchmarks", *map(str, options)])
            patch.setattr(command, "err_console", Console(stderr=True, highlight=False, width=200))
            with pytest.raises(SystemExit) as stop:
                command.main()
        return stop.value.code or 0, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        pytest.param(["--suite", "speed"], ["--suite is speed", "ops, train, decode"], id="suite"),
        pytest.param(["--device", "tpu"], ["--device is tpu", "auto, cpu or cuda"], id="device"),
        pytest.param(["--suite", "mlp", "--out", "file"], ["file/", "Not a directory"], id="a file as folder"),
        pytest.param(["--compare", "ours.json", "none.json"], ["none.json"], id="no file"),
        pytest.param(["--compare", "ours.json", "other.json"], ["other.json: not a results file"], id="another file"),
        pytest.param(["--compare", "ours.json", "old.json"], ["old.json: a results file of version 0"], id="version"),
        pytest.param(["--compare", "ours.json", "empty"], ["no results in this folder"], id="empty folder"),
        pytest.param(["--compare", "ours.json"], ["--compare"], id="one of two"),
        pytest.param(
            ["--device", "cuda"], ["sees no CUDA device"], id="no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_bad_input(suite, options, messages, tmp_path, monkeypatch, capsys):
    """Bad input gives an error message on stderr without a traceback, and exit code 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "old.json").write_text(json.dumps(a_run(version=0)))
    (tmp_path / "ours.json").write_text(json.dumps(a_run(record())))
    (tmp_path / "empty").mkdir()
    code, out, err = suite(*options, capsys=capsys)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert all(message in err for message in messages), err


def test_compare_prints_what_moved(suite, tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(a_run(record(), record(peer="torch"), record(case="M=5 float32"))))
    new.write_text(json.dumps(a_run(record(median=0.5), record(peer="torch"), record("M=5 float32", median=1.5))))
    code, out, err = suite("--compare", old, new, capsys=capsys)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if OURS in line]
    assert [row[-6:] for row in rows] == [[OURS, "1", "s", "500", "ms", "0.50"], [OURS, "1", "s", "1.5", "s", "1.50"]]
    assert "3 figures in both: 1 faster, 1 slower, 1 within the noise" in out


def test_one_op_from_the_command_to_its_page(suite, tmp_path, monkeypatch, capsys):
    """The command prints a table for each case and writes the results and the page."""
    monkeypatch.setattr(runner, "run_tests", lambda topic, device: "")
    monkeypatch.setattr(runner, "measure_floors", lambda device, cpu_time: FLOORS.items())
    monkeypatch.setattr(runner, "QUICK", timing.Budget(0.0, 2))
    code, out, err = suite(
        "--suite", "decode_attention", "--device", "cpu", "--quick", "--out", tmp_path, capsys=capsys
    )
    assert code == 0, err
    (page,) = tmp_path.glob("*/README.md")
    assert str(page) in err
    cases = catalogue.cases(catalogue.ops()["decode_attention"], "cpu", quick=True)
    for case in cases:
        assert f"decode_attention {case.name}" in out
        assert f"**{case.name}**" in page.read_text("utf-8")
    assert len([line for line in out.splitlines() if line.strip().startswith(OURS)]) == len(cases)


# ---- gpt-fast bench


def test_gpt_fast_bench_hands_over_in_a_checkout(cli, tmp_path):
    """`gpt-fast bench` passes its options to the suite and exits with the suite's exit code."""
    result = cli("bench", "--compare", tmp_path / "none.json", tmp_path / "none.json")
    assert result.code == 2
    assert "benchmarks: " in result.err
    assert "none.json" in result.err
    shown = cli("bench", "--help")
    assert shown.code == 0
    for option in ("--suite", "--device", "--quick", "--out", "--resume", "--cpu-time", "--compare"):
        assert option in shown.out


def test_gpt_fast_bench_elsewhere_says_where_the_suite_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"in a checkout of gpt_fast.*python -m benchmarks"):
        bench.bench(None)


def test_pytest_collects_the_cases():
    """`pytest benchmarks` collects tests for every topic."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    for topic in catalogue.topics().values():
        assert f"[{topic.suite} {topic.name} " in done.stdout, topic.name
