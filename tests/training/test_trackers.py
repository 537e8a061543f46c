"""wandb and MLflow get every line of metrics.jsonl. Stand-ins take the calls where the packages are not installed."""

import json
import struct
import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest

from gpt_fast.interrupts import Interrupted
from gpt_fast.training import pretrain
from gpt_fast_settings.pretrain import PretrainSettings
from tests.command_line import SMALL, succeed

pytestmark = pytest.mark.usefixtures("one_thread")


def ignore(*_: object) -> None:
    """Stand in for a display."""


class Calls:
    """Object that records calls of any method. The method `fails` raises."""

    def __init__(self, fails: str = ""):
        self.made: list[tuple[str, tuple, dict]] = []
        self.fails = fails

    def __getattr__(self, name: str):
        def call(*args, **options):
            self.made.append((name, args, options))
            if name == self.fails:
                raise RuntimeError("no line today")
            return types.SimpleNamespace(experiment_id="7", info=types.SimpleNamespace(run_id="r1"))

        return call

    def of(self, name: str) -> list[tuple[tuple, dict]]:
        return [(args, options) for called, args, options in self.made if called == name]


def stand_in(monkeypatch, name: str, **members) -> None:
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    for member, value in members.items():
        setattr(module, member, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def train(tmp_path):
    (tmp_path / "t.txt").write_text("".join(f"the fox runs {i % 7} times\n" for i in range(200)))

    def run(tracker: str, data: str = "t.txt", show=ignore) -> list[dict]:
        settings = PretrainSettings(
            out=tmp_path / "run", data=(tmp_path / data,), tokenizer="byte", layers=1, heads=2, dim=16, seq_len=16,
            steps=4, batch_size=4, log_every=1, tracker=tracker,
        )  # fmt: skip
        pretrain.pretrain(settings, show, ignore)
        return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize("mode", [None, "online"])
def test_wandb(monkeypatch, train, tmp_path, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    run, inits = Calls(), []
    stand_in(monkeypatch, "wandb", init=lambda **options: inits.append(options) or run)
    lines = train("wandb")
    (options,) = inits
    assert options["mode"] == (mode or "offline") and options["dir"] == str(tmp_path / "run")
    assert options["group"] == options["name"] == "run"
    told = options["config"]  # settings with defaults and resolved values
    assert {name: told[name] for name in ("objective", "steps", "seed", "lr", "beta2")} == {
        "objective": "clm", "steps": 4, "seed": 0, "lr": 2e-3, "beta2": 0.99
    }  # fmt: skip
    steps = [options["step"] for _, options in run.of("log")]
    assert steps == [1, 2, 3, 4] == [line["step"] for line in lines]
    assert [args[0] | {"step": i + 1} for i, (args, _) in enumerate(run.of("log"))] == lines
    assert run.made[-1] == ("finish", (), {"exit_code": 0})


class Named(tuple):
    """Stand-in for MLflow's Metric and Param."""

    def __new__(cls, *values):
        return tuple.__new__(cls, values)


@pytest.fixture
def mlflow(monkeypatch) -> Calls:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = Calls()
    stand_in(
        monkeypatch, "mlflow", MlflowClient=lambda tracking_uri: client.made.append((tracking_uri, (), {})) or client
    )
    stand_in(monkeypatch, "mlflow.entities", Metric=Named, Param=Named)
    return client


def test_mlflow(mlflow, train, tmp_path):
    lines = train("mlflow")
    assert mlflow.made[0][0] == f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}"
    assert mlflow.of("create_run") == [(("7",), {"run_name": "run"})]
    (_, first), *batches = mlflow.of("log_batch")
    assert ("objective", "clm") in first["params"]
    logged = [{"step": batch["metrics"][0][3]} | {m[0]: m[1] for m in batch["metrics"]} for _, batch in batches]
    assert logged == lines
    assert mlflow.made[-1] == ("set_terminated", ("r1", "FINISHED"), {})


@pytest.mark.parametrize(
    ("raised", "status"), [(Interrupted(15), "KILLED"), (ValueError("wrong"), "FAILED")], ids=["stopped", "failed"]
)
def test_the_tracker_knows_how_a_run_ended(monkeypatch, mlflow, train, raised, status):
    """A run that a signal or an error ended is not finished for the tracker."""

    def show(progress) -> None:
        if progress.step == 2:
            raise raised

    run = Calls()
    stand_in(monkeypatch, "wandb", init=lambda **_: run)
    for name, calls, last in (
        ("mlflow", mlflow, ("set_terminated", ("r1", status), {})),
        ("wandb", run, ("finish", (), {"exit_code": 1})),
    ):
        with pytest.raises(type(raised)):
            train(name, show=show)
        assert calls.made[-1] == last


def test_a_run_whose_tracker_fails_is_whole(monkeypatch, train, tmp_path):
    """A tracker that fails at every line gives one warning."""
    stand_in(monkeypatch, "wandb", init=lambda **_: Calls(fails="log"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(train("wandb")) == 4
    told = [str(each.message) for each in caught if "not written" in str(each.message)]
    assert told == [f"{tmp_path / 'run' / 'wandb'}: not written (RuntimeError: no line today)"]
    assert (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_told_before_data_is_read(monkeypatch, train, name):
    monkeypatch.setattr("gpt_fast.training.trackers.find_spec", lambda _: None)
    with pytest.raises(ValueError) as raised:
        train(name, "none")
    assert str(raised.value) == f"--tracker {name}: needs {name}, which is not installed; pip install gpt-fast[{name}]"


# --- the packages themselves ---


@pytest.fixture(params=["wandb", "mlflow"])
def tracked(request, cli, data, tmp_path) -> tuple[str, Path, list[dict]]:
    """Return a tracker's name, a run of `gpt-fast pretrain --tracker`, and the lines of its metrics.jsonl."""
    name = request.param
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: the extra {name}")
    out = tmp_path / "run"
    options = [*SMALL, "--steps", 4, "--log-every", 1, "--tokenizer", "byte", "--tracker", name]
    result = succeed(cli("pretrain", "--data", data.text, "--out", out, *options))
    assert "not written" not in result.err and name not in result.out
    return name, out, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_package_itself_has_the_curve(tracked):
    name, out, lines = tracked
    settings, curve, end = (wandb_run if name == "wandb" else mlflow_run)(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert curve == lines
    assert settings["objective"] == "clm" and int(settings["dim"]) == 16 and float(settings["lr"]) == 2e-3
    assert end == (0 if name == "wandb" else "FINISHED")


def wandb_run(out: Path) -> tuple[dict, list[dict], int]:
    """Return the settings, the lines and the exit code in the file that `wandb sync` reads."""
    from wandb.proto import wandb_internal_pb2 as messages

    (path,) = (out / "wandb").glob("offline-run-*/*.wandb")
    settings, lines, end = {}, [], None
    for record in map(messages.Record.FromString, log_records(path.read_bytes())):
        if record.HasField("run"):
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            lines.append({key.removeprefix("_"): items[key] for key in items if key not in ("_timestamp", "_runtime")})
        elif record.HasField("exit"):
            end = record.exit.exit_code
    return settings, lines, end


def log_records(data: bytes) -> list[bytes]:
    """Return the records of a log in LevelDB's format: blocks of 32 KiB with pieces of (checksum, length, kind, bytes).

    wandb's log begins with seven bytes of its own.
    """
    at, piece, found = 7, b"", []
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        piece += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(piece)
            piece = b""
    return found


def mlflow_run(out: Path) -> tuple[dict, list[dict], str]:
    """Return the settings, the lines and the status in the database that `mlflow ui` reads."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{out / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("gpt-fast").experiment_id])
    lines: dict[int, dict] = {}
    for metric in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, metric):
            lines.setdefault(point.step, {"step": point.step})[metric] = point.value
    return run.data.params, [lines[step] for step in sorted(lines)], run.info.status
