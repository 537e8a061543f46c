"""Launch configurations: which row serves, devices too old, and the tuner that rewrites the table."""

import fcntl
import math
import re

import pytest
import torch

from gpt_fast.kernels import launch_configs as installed
from kernels import launch_configs
from kernels.launch_configs import ANY, Row
from tools import tune

TABLE = [
    Row("a", 80, 2, 64, (1,), "x"),
    Row("a", 80, 2, 128, (2,), "x"),
    Row("a", 90, 2, 128, (3,), "x"),
    Row("a", 80, 4, ANY, (4,), "x"),
    Row("b", 90, 4, ANY, (5,), "x"),
    Row("c", 86, 2, ANY, (6,), "x"),
    Row("c", 120, 2, ANY, (7,), "x"),
]


@pytest.mark.parametrize(
    ("kernel", "architecture", "element", "size", "config"),
    [
        pytest.param("a", 80, 2, 64, (1,), id="exact"),
        pytest.param("a", 80, 2, 65, (2,), id="next_size"),
        pytest.param("a", 86, 2, 3, (1,), id="newer_without_rows"),
        pytest.param("a", 100, 2, 64, (3,), id="newest_not_newer"),
        pytest.param("a", 89, 2, 64, (1,), id="between_two_architectures"),
        pytest.param("a", 120, 2, 64, (1,), id="newest_that_fits"),
        pytest.param("c", 120, 2, 64, (7,), id="its_own"),
        pytest.param("a", 90, 4, 1000, (4,), id="wider_element"),
        pytest.param("b", 90, 2, 5, (5,), id="element_up_to"),
        pytest.param("b", 80, 4, 5, (5,), id="older_than_all_rows"),
    ],
)
def test_the_row_that_serves(kernel, architecture, element, size, config, monkeypatch):
    monkeypatch.setattr(launch_configs, "TABLES", {"op": TABLE})
    launch_configs.forget()
    assert launch_configs.pick("op", kernel, architecture, element, size) == config


@pytest.mark.parametrize("op", launch_configs.TABLES)
def test_every_row_says_where_it_came_from(op):
    for row in launch_configs.TABLES[op]:
        assert re.match("compiled|computed|small|default|measured: ", row.source), row
        assert len(row.config) == len(tune.limits(row, op)), row


def test_a_gpu_too_old_gets_a_clear_message(monkeypatch):
    monkeypatch.setattr(installed.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(RuntimeError, match=r"Tesla T4 has compute capability 7\.5, the kernels want 8\.0 or newer"):
        installed.architecture.__wrapped__(torch.device("cuda"))


@pytest.mark.parametrize("op", launch_configs.TABLES)
def test_the_tuner_writes_what_it_reads(op):
    text = tune.PATH.read_text("utf-8")
    assert tune.rewritten(text, op, launch_configs.TABLES[op]) == text


def test_a_tuned_row_is_written_and_read_back():
    new = Row("fwd", 90, 2, 64, (64, 64, 4, 2), "measured: somewhere")
    rows = tune.with_row(launch_configs.TABLES["attention"], new)
    text = tune.rewritten(tune.PATH.read_text("utf-8"), "attention", rows)
    module: dict = {"__name__": "tables", "__package__": "kernels"}
    exec(compile(text, "tables.py", "exec"), module)
    assert module["TABLES"]["attention"] == rows and new in rows
    assert module["pick"]("attention", "fwd", 90, 2, 33) == new.config
    assert module["pick"]("attention", "fwd", 80, 2, 33) != new.config
    assert tune.with_row(rows, new._replace(config=(32, 32, 4, 2))).count(new) == 0


@pytest.mark.parametrize("op", launch_configs.TABLES)
def test_neighbours_differ_in_one_number_and_stay_in_range(op):
    for row in launch_configs.TABLES[op]:
        ranges = tune.limits(row, op)
        for candidate in tune.neighbours(row.config, ranges):
            changed = [
                index for index, pair in enumerate(zip(candidate, row.config, strict=True)) if len(set(pair)) > 1
            ]
            low, high = list(ranges.values())[changed[0]]
            assert len(changed) == 1 and low <= candidate[changed[0]] <= high


def test_the_climb_ends_at_the_fastest_that_runs():
    """Over the numbers' logarithms, away from what fails; nothing is measured twice."""
    seen = []

    def measure(config):
        seen.append(config)
        queries, keys, warps, stages = config
        if queries * keys > 8192:
            return math.inf
        return 1 + abs(math.log2(queries / 128)) + abs(math.log2(keys / 64)) + abs(warps - 8) + abs(stages - 3)

    assert tune.climb((16, 16, 4, 1), tune.LIMITS["attention"], measure) == (128, 64, 8, 3)
    assert len(seen) == len(set(seen))


def test_candidates_are_compared_with_what_serves(monkeypatch):
    """The first record is the shipped configuration; what does not run has no time, and the table stays as it was."""

    def timer(run):
        queries, keys, *_ = launch_configs.pick("attention", "fwd", 90, 2, 64)
        if queries * keys > 8192:
            raise RuntimeError("out of shared memory")
        return queries + keys

    monkeypatch.setattr(tune, "work", lambda op, row, device: lambda: None)
    before = list(launch_configs.TABLES["attention"])
    (row,) = [row for row in before if row[:4] == ("fwd", 90, 2, 64)]
    records = list(tune.compared("attention", row, 90, timer))
    assert launch_configs.TABLES["attention"] == before
    assert [record["config"] for record in records] == [
        row.config,
        *tune.neighbours(row.config, tune.limits(row, "attention")),
    ]
    assert [record["shipped"] for record in records] == [True] + [False] * (len(records) - 1)
    by_config = {record["config"]: record for record in records}
    assert by_config[row.config]["of_shipped"] == 1
    assert by_config[(64, *row.config[1:])]["of_shipped"] == (64 + 64) / (128 + 64)
    assert by_config[(256, *row.config[1:])]["ms"] is None


def test_processes_time_one_after_the_other(tmp_path):
    """The work runs once before, so that compiling it is shared; the lock is held while it is timed."""
    lock, events = tmp_path / "lock", []

    def timer(run):
        with lock.open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        events.append("timed")
        return 1.0

    assert tune.one_at_a_time(timer, lock)(lambda: events.append("ran")) == 1.0
    assert events == ["ran", "timed"]
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_tuner_refuses_without_a_gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr("sys.argv", ["tune"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        tune.main()
