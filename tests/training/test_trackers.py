"""wandb and MLflow get every line of metrics.jsonl. Stand-ins take the calls where the packages are not installed."""

import json
import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest

from gpt_fast.training import pretrain
from gpt_fast_settings.pretrain import PretrainSettings

pytestmark = pytest.mark.usefixtures("one_thread")


def ignore(*_: object) -> None:
    """Stands for a display."""


class Calls:
    """Records calls of any method."""

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

    def run(tracker: str, data: str = "t.txt") -> list[dict]:
        settings = PretrainSettings(
            out=tmp_path / "run", data=(tmp_path / data,), tokenizer="byte", layers=1, heads=2, dim=16, seq_len=16,
            steps=4, batch_size=4, log_every=1, tracker=tracker,
        )  # fmt: skip
        pretrain.pretrain(settings, ignore, ignore)
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
    assert options["config"]["objective"] == "clm" and options["group"] == "run"
    steps = [options["step"] for _, options in run.of("log")]
    assert steps == [1, 2, 3, 4] == [line["step"] for line in lines]
    assert [args[0] | {"step": i + 1} for i, (args, _) in enumerate(run.of("log"))] == lines
    assert run.made[-1][0] == "finish"


def test_mlflow(monkeypatch, train, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client, uris = Calls(), []
    stand_in(monkeypatch, "mlflow", MlflowClient=lambda tracking_uri: uris.append(tracking_uri) or client)
    lines = train("mlflow")
    assert uris == [f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}"]
    assert client.of("create_run") == [(("7",), {"run_name": "run"})]
    assert (("r1", "objective", "clm"), {}) in client.of("log_param")
    logged = [{"step": options["step"], args[1]: args[2]} for args, options in client.of("log_metric")]
    expected = [{"step": line["step"], name: line[name]} for line in lines for name in line if name != "step"]
    assert logged == expected
    assert client.made[-1] == ("set_terminated", ("r1",), {})


def test_a_run_whose_tracker_fails_is_whole(monkeypatch, train, tmp_path):
    """One warning, not one for every line."""
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


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_itself_writes_offline(train, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    train("wandb")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_itself_has_the_curve(train, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lines = train("mlflow")
    client = MlflowClient(tracking_uri=f"sqlite:///{Path(tmp_path / 'run' / 'mlflow.db')}")
    experiment = client.get_experiment_by_name("gpt-fast")
    (run,) = client.search_runs([experiment.experiment_id])
    curve = client.get_metric_history(run.info.run_id, "train_loss")
    assert sorted((point.step, point.value) for point in curve) == [
        (line["step"], line["train_loss"]) for line in lines
    ]
