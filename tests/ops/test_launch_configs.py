"""Test launch configurations: the choice of a row, GPUs that are too old, the tuner, and a user's own table."""

import fcntl
import json
import math
import re
import warnings

import pytest
import torch
import triton

from gpt_fast import tuning
from gpt_fast.kernels import launch_configs
from gpt_fast.kernels.launch_configs import ANY, Row
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


@pytest.fixture(autouse=True)
def forgotten():
    """Forget after each test which rows served in it."""
    yield
    launch_configs.forget()


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
        assert len(tuning.complete(row.config, tuning.limits(row, op))) == len(tuning.limits(row, op)), row


@pytest.mark.parametrize("op", launch_configs.CANDIDATES)
def test_candidates_are_predictions_of_classes_that_are_tuned(op):
    tuned = {(row.kernel, row.element, row.size) for row in tuning.classes(op)}
    for row in launch_configs.CANDIDATES[op]:
        launch_configs.check_row(op, row)
        assert row.source.startswith("predicted: ")
        assert (row.kernel, row.element, row.size) in tuned
        ranges = tuning.limits(row, op).values()
        assert all(low <= number <= high for number, (low, high) in zip(row.config, ranges, strict=True))


def test_a_gpu_too_old_gets_a_clear_message(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(RuntimeError, match=r"Tesla T4 has compute capability 7\.5, the kernels want 8\.0 or newer"):
        launch_configs.architecture.__wrapped__(torch.device("cuda"))


@pytest.mark.parametrize("op", launch_configs.TABLES)
def test_the_tuner_writes_what_it_reads(op):
    text = tune.PATH.read_text("utf-8")
    assert tune.rewritten(text, op, launch_configs.TABLES[op]) == text


def test_a_tuned_row_is_written_and_read_back():
    new = Row("fwd", 90, 2, 64, (64, 64, 4, 2), "measured: somewhere")
    rows = launch_configs.with_row(launch_configs.TABLES["attention"], new)
    text = tune.rewritten(tune.PATH.read_text("utf-8"), "attention", rows)
    module: dict = {"__name__": "tables", "__package__": "gpt_fast.kernels"}
    exec(compile(text, "tables.py", "exec"), module)
    assert module["TABLES"]["attention"] == rows and new in rows
    assert module["pick"]("attention", "fwd", 90, 2, 33) == new.config
    assert module["pick"]("attention", "fwd", 80, 2, 33) != new.config
    assert launch_configs.with_row(rows, new._replace(config=(32, 32, 4, 2))).count(new) == 0


@pytest.mark.parametrize("op", launch_configs.TABLES)
@pytest.mark.parametrize("architecture", [89, 90, 120])
def test_a_row_of_ones_own_changes_its_own_class_of_shapes_alone(op, architecture, monkeypatch):
    """An architecture that was served by an older one's rows keeps them for all other sizes, kernels and elements."""
    stock = launch_configs.TABLES[op]
    for row in tuning.classes(op):
        own = row._replace(architecture=architecture, config=tuple(number + 1 for number in row.config))
        monkeypatch.setitem(launch_configs.TABLES, op, stock)
        launch_configs.forget()
        keys = [(other.kernel, other.element, other.size) for other in tuning.classes(op)]
        before = {key: launch_configs.pick(op, key[0], architecture, *key[1:]) for key in keys}
        monkeypatch.setitem(launch_configs.TABLES, op, launch_configs.with_row(stock, own))
        launch_configs.forget()
        after = {key: launch_configs.pick(op, key[0], architecture, *key[1:]) for key in keys}
        assert after == before | {(row.kernel, row.element, row.size): own.config}


@pytest.mark.parametrize("op", launch_configs.TABLES)
def test_neighbours_differ_in_one_number_and_stay_in_range(op):
    for row in launch_configs.TABLES[op]:
        ranges = tuning.limits(row, op)
        config = tuning.complete(row.config, ranges)
        for candidate in tuning.neighbours(config, ranges):
            changed = [index for index, pair in enumerate(zip(candidate, config, strict=True)) if len(set(pair)) > 1]
            low, high = list(ranges.values())[changed[0]]
            assert len(changed) == 1 and low <= candidate[changed[0]] <= high


def test_the_climb_ends_at_the_fastest_that_runs():
    """The climb finds the fastest configuration although others fail, and measures no configuration twice."""
    seen = []

    def measure(config):
        seen.append(config)
        queries, keys, warps, stages, *_ = config
        if queries * keys > 8192:
            return math.inf
        return 1 + abs(math.log2(queries / 128)) + abs(math.log2(keys / 64)) + abs(warps - 8) + abs(stages - 3)

    assert tuning.climb((16, 16, 4, 1, 0, 0), [], tuning.LIMITS["attention"], measure) == (128, 64, 8, 3, 0, 0)
    assert len(seen) == len(set(seen))


def test_the_climb_begins_at_the_fastest_candidate():
    """The climb starts at the fastest candidate, and so finds a minimum that the first configuration cannot reach."""

    def measure(config):
        return {(16,): 5.0, (64,): 3.0, (128,): 2.0}.get(config, 9.0)

    ranges = {"rows": (1, 1024)}
    assert tuning.climb((16,), [], ranges, measure) == (16,)
    assert tuning.climb((16,), [(64,), (512,)], ranges, measure) == (128,)


def test_candidates_are_compared_with_what_serves(monkeypatch):
    """The first record is the shipped configuration. Configurations that fail have no time. The table is unchanged."""

    def timer(run):
        queries, keys, *_ = launch_configs.pick("attention", "fwd", 90, 2, 64)
        if queries * keys > 8192:
            raise RuntimeError("out of shared memory")
        return queries + keys

    monkeypatch.setattr(tuning, "work", lambda op, row, device: lambda: None)
    before = list(launch_configs.TABLES["attention"])
    (row,) = [row for row in before if row[:4] == ("fwd", 90, 2, 64)]
    with launch_configs.shipped_alone():
        records = list(tuning.compared("attention", row, 90, timer))
    shipped = tuning.complete(row.config, tuning.limits(row, "attention"))
    assert launch_configs.TABLES["attention"] == before
    neighbours = tuning.neighbours(shipped, tuning.limits(row, "attention"))
    assert [record["config"] for record in records] == list(
        dict.fromkeys([shipped, *tuning.candidates("attention", row, 90), *neighbours])
    )
    assert [record["shipped"] for record in records] == [True] + [False] * (len(records) - 1)
    by_config = {record["config"]: record for record in records}
    assert by_config[shipped]["of_shipped"] == 1
    assert by_config[(64, *shipped[1:])]["of_shipped"] == (64 + 64) / (128 + 64)
    assert by_config[(256, *shipped[1:])]["ms"] is None


def test_processes_time_one_after_the_other(tmp_path):
    """The work first runs once without the lock, so that processes compile at the same time. Timing holds the lock."""
    lock, events = tmp_path / "lock", []

    def timer(run):
        with lock.open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        events.append("timed")
        return 1.0

    assert tuning.one_at_a_time(timer, lock)(lambda: events.append("ran")) == 1.0
    assert events == ["ran", "timed"]
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_tuner_refuses_without_a_gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr("sys.argv", ["tune", "--compare", "never-written"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        tune.main()


# ---- a user's own table ----------------------------------------------------------------------------------------------

CARD = "A card"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the folder of the user's tables, and pretend that the machine has a GPU named CARD."""
    monkeypatch.setenv(launch_configs.FOLDER, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: CARD)
    launch_configs.forget()
    yield tmp_path
    launch_configs.forget()


def tune_chunks(folder, fastest=5632, names=("linear_cross_entropy",), device=CARD):
    """Tune with a fake timer for which chunks of `fastest` rows are fastest."""

    def timer(run):
        rows = launch_configs.pick("linear_cross_entropy", "chunk", 90, 2, 768)[0]
        return 1 + abs(math.log2(rows / fastest))

    path = launch_configs.user_table("sm_90")
    return path, list(tuning.tune(list(names), path, 90, device, timer))


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(tuning, "work", lambda op, row, device: lambda: None)


def test_a_tuned_row_serves_and_the_shipped_ones_stay(folder, no_work):
    chunk = ("linear_cross_entropy", "chunk", 90, 2, 768)
    assert launch_configs.pick(*chunk) == (2816,)
    shipped = launch_configs.pick("linear_cross_entropy", "chunk", 80, 2, 768)
    path, rows = tune_chunks(folder)
    assert path.parent == folder
    assert ("linear_cross_entropy", (5632,)) in [(op, row.config) for op, row, new in rows if new]
    assert launch_configs.pick(*chunk) == (5632,)
    assert launch_configs.pick("linear_cross_entropy", "chunk", 80, 2, 768) == shipped
    with launch_configs.shipped_alone():
        assert launch_configs.pick(*chunk) == (2816,)
    assert launch_configs.pick(*chunk) == (5632,)


def test_tuning_starts_from_what_is_shipped_and_keeps_rows_of_other_ops(folder, no_work):
    tune_chunks(folder, fastest=5632)
    path = launch_configs.user_table("sm_90")
    _, before = launch_configs.read_table(path)
    list(tuning.tune(["embedding"], path, 90, CARD, lambda run: 1.0))
    assert launch_configs.read_table(path)[1]["linear_cross_entropy"] == before["linear_cross_entropy"]
    tune_chunks(folder, fastest=2816)
    _, after = launch_configs.read_table(path)
    assert not [row for row in after.get("linear_cross_entropy", []) if (row.kernel, row.size) == ("chunk", 768)]


def test_an_empty_variable_means_no_table(folder, no_work, monkeypatch):
    tune_chunks(folder)
    monkeypatch.setenv(launch_configs.FOLDER, "")
    launch_configs.forget()
    assert launch_configs.user_table("sm_90") is None
    assert launch_configs.pick("linear_cross_entropy", "chunk", 90, 2, 768) == (2816,)


def test_without_the_variable_the_table_is_in_the_users_settings(monkeypatch, tmp_path):
    monkeypatch.delenv(launch_configs.FOLDER, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    assert launch_configs.user_table("sm_90") == tmp_path / "settings/gpt_fast/launch_configs/sm_90.json"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert launch_configs.user_table("sm_90") == tmp_path / ".config/gpt_fast/launch_configs/sm_90.json"


ROW = {"op": "attention", "kernel": "fwd", "architecture": 90, "element": 2, "size": 64, "config": [64, 64, 4, 2]}
DAMAGED = {
    "cut_off": ('{"format": 1, "rows": [', "Expecting value"),
    "no_object": ("[]", "list indices"),
    "no_rows": ('{"format": 1, "device": "A card", "triton": "3"}', "KeyError 'rows'"),
    "another_format": ('{"format": 2}', "format is 2; expected 1"),
    "unknown_op": ({"op": "softcap"}, "a row of softcap fwd, which has no such kernel"),
    "unknown_kernel": ({"kernel": "sideways"}, "a row of attention sideways"),
    "a_number_too_few": ({"config": [64, 64, 4]}, r"\[64, 64, 4\] for attention fwd"),
    "no_number": ({"config": [64, 64, 4, "2"]}, "for attention fwd"),
    "no_config": ({"config": None}, "not iterable"),
    "another_field": ({"more": 1}, "unexpected keyword"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_table_is_said_to_be_damaged(content, message, folder):
    if isinstance(content, dict):
        rows = [ROW | {"source": "measured: A card"} | content]
        content = json.dumps({"format": 1, "device": CARD, "triton": triton.__version__, "rows": rows})
    path = launch_configs.user_table("sm_90")
    path.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=message) as raised:
        launch_configs.pick("attention", "fwd", 90, 2, 64)
    line = str(raised.value)
    assert "\n" not in line and str(path) in line and line.endswith("remove it, or run gpt-fast tune")


@pytest.mark.parametrize("other", [{"device": "Another card"}, {"triton": "0.1"}], ids=["device", "triton"])
def test_a_table_of_another_gpu_or_triton_does_not_serve(other, folder, no_work):
    path, _ = tune_chunks(folder)
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | other), "utf-8")
    launch_configs.forget()
    with pytest.warns(UserWarning, match=r"was measured on .*; expected A card with .*: run gpt-fast tune"):
        assert launch_configs.pick("linear_cross_entropy", "chunk", 90, 2, 768) == (2816,)
    with warnings.catch_warnings():  # the warning appears only once
        warnings.simplefilter("error")
        assert launch_configs.pick("linear_cross_entropy", "chunk", 90, 2, 1024) == (4224,)


def test_a_measured_table_is_shipped(folder, no_work, monkeypatch, tmp_path):
    path, _ = tune_chunks(folder)
    copy = tmp_path / "launch_configs.py"
    copy.write_text(tune.PATH.read_text("utf-8"), "utf-8")
    monkeypatch.setattr(tune, "PATH", copy)
    tune.ship(path)
    module: dict = {"__name__": "tables", "__package__": "gpt_fast.kernels"}
    exec(compile(copy.read_text("utf-8"), "tables.py", "exec"), module)
    with monkeypatch.context() as patch:
        patch.setenv(launch_configs.FOLDER, "")
        assert module["pick"]("linear_cross_entropy", "chunk", 90, 2, 768) == (5632,)


def test_the_command_writes_the_table(folder, no_work, monkeypatch, capsys):
    from gpt_fast_cli.tune import tune as command

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch_configs, "architecture", lambda device: 90)
    monkeypatch.setattr(tuning, "median", lambda run: float(launch_configs.pick("embedding", "rows", 90, 4, 768)[0]))
    command(["embedding"], as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["file"] == str(launch_configs.user_table("sm_90"))
    assert [(row["config"][0], row["new"]) for row in shown["rows"]] == [(1, True)]
    assert launch_configs.pick("embedding", "rows", 90, 4, 768)[0] == 1


@pytest.mark.parametrize(
    ("names", "has_gpu", "message"),
    [
        (["attention"], False, "attention has no table on cpu; expected linear"),
        (["softcap"], True, "softcap has no table on cuda; expected one of"),
    ],
    ids=["no_gpu", "unknown_op"],
)
def test_the_command_refuses(names, has_gpu, message, monkeypatch):
    from gpt_fast_cli.tune import tune as command

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    with pytest.raises(ValueError, match=message):
        command(names, as_json=False)
