"""Experiment trackers beside metrics.jsonl: TensorBoard's events, wandb and MLflow.

wandb and MLflow write into the run folder unless their own environment variables name a server.
"""

from __future__ import annotations

import math
import os
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from .metrics import Metrics
from .runs.folder import write_extra

# Where each writes inside the run folder.
PLACES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow.db"}
PROJECT = "gpt-fast"  # of wandb, and MLflow's experiment
End = Literal["finished", "failed", "killed"]


class Tracker(Protocol):
    def add(self, line: Metrics) -> None: ...

    def close(self, end: End) -> None: ...


def require(name: str | None) -> None:
    """Raise `ValueError` if the package of the tracker called `name` is not installed. None stands for no tracker."""
    if name is not None and find_spec(name) is None:
        raise ValueError(f"--tracker {name}: needs {name}, which is not installed; pip install gpt-fast[{name}]")


class Tracked:
    """A tracker that a run can do without, made with the first line. A failure is one warning, and the last call."""

    def __init__(self, name: str, run: Path, settings: dict[str, Any]):
        self._path = run / PLACES[name]
        self._name, self._settings = name, settings
        self._tracker: Tracker | None = None
        self._works = True

    def add(self, line: Metrics) -> None:
        """Log a line of metrics, {name: number}, unless an earlier call has failed.

        The first call opens the tracker. Any exception becomes a warning, and turns the tracker off for good.
        """
        if self._works:
            self._works = write_extra(self._path, lambda path: self._opened(path, line).add(line))

    def close(self, end: End) -> None:
        """Close the tracker if one was opened. `end` says how the run ended: "finished", "failed" or "killed".

        A tracker that has failed is not closed. A failure of closing is a warning. In any case, the hook for exceptions
        in threads that TensorBoard's tracker has set is removed.
        """
        if self._tracker is None:
            return
        tracker = self._tracker
        if self._works:
            write_extra(self._path, lambda path: tracker.close(end))
        if isinstance(tracker, TensorBoard):
            tracker.release()

    def _opened(self, path: Path, line: Metrics) -> Tracker:
        """Return the `TensorBoard`, `Wandb` or `MLflow` that this object was made for. The first call creates it.

        `path` is tensorboard/, wandb/ or mlflow.db in the run folder. `line` is the first line of metrics to be logged:
        TensorBoard drops what was logged before from that step on. Later calls ignore both arguments.
        """
        if self._tracker is not None:
            return self._tracker
        if self._name == "tensorboard":
            self._tracker = TensorBoard(path, line)
        elif self._name == "wandb":
            self._tracker = Wandb(path.parent, self._settings)
        else:
            self._tracker = MLflow(path.parent, self._settings)
        return self._tracker


class TensorBoard:
    """Writer of events. Its thread meets a full disk; the next call raises that error, and no traceback is printed."""

    def __init__(self, folder: Path, line: Metrics):
        from torch.utils.tensorboard import SummaryWriter

        self._hook = threading.excepthook
        threading.excepthook = self._ignore
        self._writer = SummaryWriter(str(folder), purge_step=int(line["step"]))

    def _ignore(self, raised: threading.ExceptHookArgs) -> None:
        """Ignore an exception of one of tensorboard's threads. Pass any other to the previous exception hook.

        Python calls this when an exception ends a thread. `raised` holds the exception and the thread.
        """
        if not type(raised.thread).__module__.startswith("tensorboard."):
            self._hook(raised)

    def add(self, line: Metrics) -> None:
        """Log each metric of a line, {name: number}, except "step", at the line's update, `line["step"]`."""
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(line["step"]))

    def close(self, end: End) -> None:
        """Write all events that are pending, and close the file. `end`, how the run ended, is ignored."""
        self._writer.close()

    def release(self) -> None:
        """Restore `threading.excepthook`, the hook for exceptions in threads, that this object has replaced."""
        threading.excepthook = self._hook


class Wandb:
    """A run of wandb, offline unless WANDB_MODE says otherwise.

    `wandb sync RUN/wandb/offline-run-*` sends it later. A resumed run is another one of the same group.
    """

    def __init__(self, run: Path, settings: dict[str, Any]):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=os.environ.get("WANDB_RUN_GROUP", run.name),
            name=os.environ.get("WANDB_NAME", run.name),
            dir=str(run),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=settings,
        )

    def add(self, line: Metrics) -> None:
        """Log all metrics of a line, {name: number}, except "step", at the line's update, `line["step"]`."""
        self._run.log({name: value for name, value in line.items() if name != "step"}, step=int(line["step"]))

    def close(self, end: End) -> None:
        """Finish the run of wandb: as a success if `end` is "finished", as a failure if "failed" or "killed"."""
        self._run.finish(exit_code=int(end != "finished"))


class MLflow:
    """A run of MLflow, in the run folder's mlflow.db unless MLFLOW_TRACKING_URI names a server.

    `mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db` shows it. A resumed run is another one of the same name.
    """

    def __init__(self, run: Path, settings: dict[str, Any]):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run.resolve() / PLACES['mlflow']}")
        self._client = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        made = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._id = self._client.create_run(made, run_name=run.name).info.run_id
        self._metric = Metric
        self._client.log_batch(self._id, params=[Param(name, str(value)[:500]) for name, value in settings.items()])

    def add(self, line: Metrics) -> None:
        """Log the metrics of a line, {name: number}, at the line's update, `line["step"]`, in one request.

        "step" itself, and metrics that are NaN or infinite, are left out. A request for each metric took eight times as
        long.
        """
        step, now = int(line["step"]), time.time_ns() // 1_000_000
        self._client.log_batch(
            self._id,
            metrics=[
                self._metric(name, value, now, step)
                for name, value in line.items()
                if name != "step" and math.isfinite(value)
            ],
        )

    def close(self, end: End) -> None:
        """Finish the run of MLflow with the status FINISHED, FAILED or KILLED: `end` in capitals."""
        self._client.set_terminated(self._id, end.upper())
