"""The training loop that every task shares: updates, logging, validation, checkpoints, and updates that fail."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .._files import finite
from ..data.batches import Batch
from ..heads import Head
from ..interrupts import Interrupted, Stop
from .engine import randomness
from .engine.transfer import Sent
from .engine.update import Engine
from .metrics import Metrics
from .profiling import trace
from .runs import checkpoints
from .runs.folder import Run
from .trackers import End, Tracked

MEMORY = 50  # updates over which the running mean of the loss forgets
THRESHOLD = 6.0  # standard deviations above it
Source = Callable[[int], Sequence[Batch]]  # an update, counted from 0, to this rank's parts of its batch


@dataclass
class Spikes:
    """A running mean and variance of the loss; a spike is a loss six standard deviations above the mean.

    Exponentially weighted over some fifty updates; the first fifty raise no alarm. A spike enters the mean only as
    far as the threshold, so that one alarm does not silence the next.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def see(self, loss: float) -> bool:
        """Add the loss of the next update to the running mean and variance. Return True if the loss is a spike.

        A spike lies more than six standard deviations above the mean of the losses before; that limit is added in its
        place. The first fifty losses are never spikes. A loss that is not finite is ignored, and the result is False.
        """
        if not math.isfinite(loss):
            return False
        limit = self.mean + THRESHOLD * math.sqrt(self.variance)
        spike = self.count >= MEMORY and loss > limit
        if spike:
            loss = limit
        self.count += 1
        share = max(1 / self.count, 1 / MEMORY)
        apart = loss - self.mean
        self.mean += share * apart
        self.variance = (1 - share) * (self.variance + share * apart * apart)
        return spike


@dataclass(frozen=True)
class Progress:
    """Figures for a progress display after each update."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    logged: Metrics | None  # the line that went into metrics.jsonl, on the steps that log
    mfu: float | None = None  # share of the device's peak, where that is known


@dataclass(frozen=True)
class LoopSettings:
    steps: int
    lr: float
    schedule: Callable[[int], float]  # update, counted from 0, to the factor on lr
    log_every: int
    valid_every: int
    checkpoint_every: int = 1000
    keep: int = 3
    max_skips: int = 10  # updates in a row that are not finite
    peak_flops: float | None = None
    flops_per_token: float = 0.0
    trackers: tuple[str, ...] = ()
    profile: bool = False
    patience: int | None = None  # validations in a row that may pass without a better one


@dataclass
class LoopState:
    """All that the loop remembers from one update to the next, in plain values: it goes into checkpoints."""

    step: int = 0
    losses: list[float] = field(default_factory=list)  # since the last line of metrics.jsonl
    skipped: int = 0
    skipped_in_a_row: int = 0
    spikes: Spikes = field(default_factory=Spikes)
    spike_count: int = 0
    tokens: int = 0
    seconds: float = 0.0
    metrics_bytes: int = 0  # of metrics.jsonl
    line: Metrics = field(default_factory=dict)  # the last one
    best: list[float] | None = None  # the key of the best validation
    best_metrics: Metrics = field(default_factory=dict)
    stale: int = 0  # validations since the best one

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoopState:
        """Return the state with the fields in `values`, which `dataclasses.asdict` made of a state for a checkpoint."""
        return cls(**(values | {"spikes": Spikes(**values["spikes"])}))


def intervals(
    steps: int, validations: int, log_every: int | None = None, valid_every: int | None = None
) -> dict[str, int]:
    """Return {"log_every", "valid_every"}: the updates between two lines of metrics.jsonl and between two validations.

    A `log_every` or `valid_every` that is given is kept. By default a run of `steps` updates logs every `steps` / 50
    updates (rounded down), at least 1 and at most 100. By default it validates about `validations` times, at intervals
    that are a multiple of `log_every`, so that every line covers the same number of updates.
    """
    log_every = log_every if log_every is not None else min(100, max(1, steps // 50))
    regular = log_every * max(1, round(steps / validations / log_every))
    return {"log_every": log_every, "valid_every": regular if valid_every is None else valid_every}


@dataclass
class Loop:
    """One training: `run()` updates the engine's model on `settings.steps` batches and returns the last line logged.

    A line of metrics.jsonl holds the step, the mean loss since the line before, the learning rate, the gradient's norm
    before clipping, tokens per second without the time spent in validation, how many updates were skipped so far, how
    many losses were spikes, the seconds spent in updates so far, and what `validate` returns on the steps that call it;
    the last step always does.

    An update whose loss or gradient is not finite changes nothing and is counted; more than `max_skips` in a row are an
    error, and the batch that began them is saved. With `better`, a key that is larger the better, the weights of the
    best validation are kept in best/, and `patience` ends the run after so many validations without a better one.
    """

    engine: Engine
    source: Source
    validate: Callable[[], Metrics]
    settings: LoopSettings
    run_folder: Run
    show: Callable[[Progress], None]
    say: Callable[[str], None] = print
    stop: Stop = field(default_factory=Stop)
    better: Callable[[Metrics], Sequence[float]] | None = None
    state: LoopState = field(default_factory=LoopState)
    seed: int = 0
    identity: dict[str, Any] = field(default_factory=dict)  # of the data: a resumed run has the same
    record: dict[str, Any] = field(default_factory=dict)  # what a reader of a checkpoint has to know of the run
    tracked: dict[str, Any] = field(default_factory=dict)  # what trackers show beside the curve
    save_best: Callable[[Head, Path], None] = Head.save_pretrained

    def __post_init__(self) -> None:
        self._pending: list[tuple[int, Tensor, Tensor]] = []  # (step, loss, skipped), not yet read off the device
        self._tokens = 0  # and seconds, since the last line
        self._seconds = 0.0
        self._shown = math.nan
        self._trackers: list[Tracked] | None = None

    def resume(self) -> None:
        """Load the newest intact checkpoint of the run folder. Without a checkpoint, change nothing.

        The model, the optimizers, the loop's state and the random generators continue where the checkpoint was saved,
        and lines of metrics.jsonl after it are removed. If the number of ranks has changed, the generators are seeded
        anew. The user is told from which update the run resumes. Every rank must call this. Raise `ValueError` if the
        checkpoint belongs to a run on other data or another model, or if all checkpoints are damaged.
        """
        world, folder = self.engine.world, self.run_folder.checkpoints
        good = checkpoints.newest_good(folder, self.say) if world.first else None
        step = world.number(-1 if good is None else checkpoints.step_of(good[0]))
        if step < 0:
            return
        path = folder / f"step-{step:09d}"
        manifest = checkpoints.read(path) if good is None else good[1]
        manifest["state"].pop("record", None)
        if manifest["state"].pop("data") != self.identity:
            raise ValueError(
                f"{path}: the run began on other data; expected the same to resume it, or --overwrite to start again"
            )
        self.state = LoopState.from_dict(manifest["state"])
        tensors = self.engine.state()
        states = randomness.states(self.engine.device, world.rank)
        same_ranks = manifest["ranks"] == world.size
        checkpoints.load(path, tensors | states if same_ranks else tensors, world)
        if same_ranks:
            randomness.restore(states, self.engine.device)
        else:
            randomness.seed(self.seed, world.rank, step)
        if world.first:
            self.say(f"resuming after update {step:,} of {self.settings.steps:,}")
            with (self.run_folder.folder / "metrics.jsonl").open("ab") as file:
                file.truncate(self.state.metrics_bytes)

    def run(self) -> Metrics:
        """Train until `settings.steps` or `settings.patience` ends the run. Return the last line of metrics.jsonl.

        The run folder moves to its final place before the first update. A last checkpoint is saved at the end, and
        trackers are closed in any case. While this method runs, a first signal ends the run only after an update, whose
        checkpoint is saved; then `Interrupted` is raised. Several ranks agree on this only at updates that log,
        validate or save. Raise `ValueError` if more than `settings.max_skips` updates in a row have a loss or gradient
        that is not finite.
        """
        state, settings, world = self.state, self.settings, self.engine.world
        sent = self._send() if self._continues() else None  # what is wrong with data shows here
        if world.first:
            self.run_folder.publish()
        world.wait()
        self.stop.deferred = True
        end: End = "failed"
        try:
            with self._trace() as profiler:
                while self._continues():
                    sent = self._update(sent or self._send())
                    if profiler is not None:
                        profiler.step()
            if state.step < settings.steps:
                self.say(
                    f"ended after update {state.step:,} of {settings.steps:,}: none of the last {state.stale} "
                    f"validations was better than that of update {int(state.best_metrics['step']):,}"
                )
            self._save_last()
            end = "finished"
            return state.line
        except Interrupted:
            end = "killed"
            raise
        finally:
            self.stop.deferred = False
            for tracker in self._trackers or ():
                tracker.close(end)

    def _continues(self) -> bool:
        """Return True if updates are left to `settings.steps` and `settings.patience` does not end the run.

        A patience of n ends the run when n validations in a row were no better than the best one. None never does.
        """
        patience = self.settings.patience
        return self.state.step < self.settings.steps and (patience is None or self.state.stale < patience)

    def _trace(self) -> AbstractContextManager[Any]:
        """Return a profiler that writes profile.json for some of the remaining updates, or a context that yields None.

        The profiler is returned on rank 0 with --profile, if updates are left. It records rank 0 alone, as all ranks
        do the same work.
        """
        updates = self.settings.steps - self.state.step if self._continues() else 0
        if not self.settings.profile or not self.engine.world.first or updates == 0:
            return nullcontext()
        return trace(self.run_folder.folder, updates, self.say)

    def _send(self) -> Sent:
        """Start copying this rank's micro-batches of the next update to the device. Return a handle for `_update`."""
        return self.engine.send(self.source(self.state.step))

    def _update(self, sent: Sent) -> Sent | None:
        """Make one update on the micro-batches in `sent`. Then log, validate and save a checkpoint if these are due.

        Then call `show` with the `Progress`. After a signal, save a checkpoint and raise `Interrupted`, unless this was
        the last update. Return the handle of the next update's micro-batches if the device is a GPU and an update is
        left, as their copy was then started beside this update. Else return None. Raise `ValueError` if too many
        updates in a row were skipped.
        """
        settings, state, engine = self.settings, self.state, self.engine
        began = time.perf_counter()
        lr = settings.lr * settings.schedule(state.step)
        loss, norm, skipped = engine.update(sent, lr)
        state.step += 1
        self._pending.append((state.step, loss, skipped))
        self._tokens += sent.tokens * engine.world.size
        ahead = self._send() if engine.device.type == "cuda" and state.step < settings.steps else None
        logs = state.step % settings.log_every == 0 or state.step == settings.steps
        validates = state.step % settings.valid_every == 0 or state.step == settings.steps
        saves = state.step % settings.checkpoint_every == 0 and state.step < settings.steps
        # Reading a loss waits for the device: on a GPU only where a line or a checkpoint needs it.
        if logs or validates or saves or state.step == 1 or engine.device.type == "cpu":
            self._settle()
        self._seconds += time.perf_counter() - began
        rate = self._rate
        logged = None
        if logs or validates:
            logged = self._log(lr, float(norm), validates)
        stopping = self._asked_to_stop(logs or validates or saves)
        if saves or (stopping and state.step < settings.steps):
            self.save()
        self.show(Progress(state.step, settings.steps, self._shown, rate, logged, self._mfu(rate)))
        if stopping and state.step < settings.steps:
            raise Interrupted(self.stop.signum or 15)
        return ahead

    def _asked_to_stop(self, may_wait: bool) -> bool:
        """Return True if a signal has asked any rank to stop.

        Signals reach the ranks at different times, so several ranks have to agree. They do so only if `may_wait`, which
        is True for updates after which the ranks wait for each other anyway. Otherwise the result is False with several
        ranks.
        """
        asked = self.stop.signum is not None
        if self.engine.world.size == 1:
            return asked
        return may_wait and self.engine.world.anyone(asked)

    def _settle(self) -> None:
        """Read the losses of updates since the last call off the device. Count skipped updates and spikes in `state`.

        The user gets a line about each skipped update and each spike. Losses of updates that were not skipped are added
        to `state.losses`; the progress display shows the mean of this list. Raise `ValueError` if more than
        `settings.max_skips` updates in a row were skipped.
        """
        state = self.state
        if not self._pending:
            return
        steps = [step for step, _, _ in self._pending]
        losses = torch.stack([loss for _, loss, _ in self._pending]).tolist()
        skips = torch.stack([skipped for _, _, skipped in self._pending]).tolist()
        self._pending = []
        for step, loss, skipped in zip(steps, losses, skips, strict=True):
            if skipped:
                state.skipped += 1
                state.skipped_in_a_row += 1
                self.say(f"update {step}: skipped, its loss ({loss}) or its gradient is not finite")
                if state.skipped_in_a_row > self.settings.max_skips:
                    self._give_up(step - state.skipped_in_a_row + 1, loss)
                continue
            state.skipped_in_a_row = 0
            if state.spikes.see(loss):
                state.spike_count += 1
                self.say(f"update {step}: the loss jumped to {loss:.3f}, the mean was {state.spikes.mean:.3f}")
            state.losses.append(loss)
        if state.losses:
            self._shown = math.fsum(state.losses) / len(state.losses)

    def _give_up(self, step: int, loss: float) -> None:
        """Save the batch of update `step` (from 1), the first of several that were skipped, and raise `ValueError`.

        Rank 0 writes bad-batch.safetensors in the run folder. The file holds the micro-batches of rank 0 alone, as
        tensors such as "tokens.0" and "labels.0", where 0 is the index of the micro-batch. The folder is then kept.
        `loss` is the loss of the latest update, for the message.
        """
        path = self.run_folder.folder / "bad-batch.safetensors"
        if self.engine.world.first:
            tensors = {
                f"{name}.{part}": tensor.contiguous()
                for part, batch in enumerate(self.source(step - 1))
                for name, tensor in batch.inputs().items()
            }
            save_file(tensors, path, metadata={"step": str(step)})
            self.run_folder.keep()
        raise ValueError(
            f"the training loss is {loss} or its gradient not finite at step {step}, and {self.settings.max_skips} "
            f"more updates had to be skipped after it; its batch is in {path}; "
            f"try a smaller --lr than {self.settings.lr:g}"
        )

    @property
    def _rate(self) -> float:
        """Return the tokens per second of all ranks since the last line of metrics.jsonl or checkpoint.

        Only time spent in updates counts, not in validation or saving. Without an update the result is 0.
        """
        return self._tokens / self._seconds if self._seconds else 0.0

    def _mfu(self, rate: float) -> float | None:
        """Return the share of all ranks' peak FLOP/s that is used at `rate` tokens per second.

        Return None if the settings have no peak rate. `rate` counts the tokens of all ranks.
        """
        peak = self.settings.peak_flops
        return rate * self.settings.flops_per_token / (peak * self.engine.world.size) if peak else None

    def _log(self, lr: float, norm: float, validates: bool) -> Metrics:
        """Write a line to metrics.jsonl and to the trackers, and return it as a dict. Validate first if `validates`.

        The keys are "step", "train_loss" (mean since the last line, NaN if all updates were skipped), "lr",
        "grad_norm", "tokens_per_second", "mfu" if it is known, "skipped", "spikes", "seconds", and those that the
        validation returns. "skipped" and "spikes" count updates since the run began. "seconds" is the time spent in
        updates since then, without validations and saving. `lr` and `norm` are the learning rate of the last update and
        its gradient's norm before clipping. A validation that is the best so far saves the model to best/. Every rank
        must call this, and only rank 0 writes, with null for numbers that are not finite. The mean loss and the rates
        of the next line begin anew.
        """
        state, rate = self.state, self._rate
        mean = math.fsum(state.losses) / len(state.losses) if state.losses else math.nan
        line: Metrics = {"step": state.step, "train_loss": mean, "lr": lr, "grad_norm": norm, "tokens_per_second": rate}
        if (mfu := self._mfu(rate)) is not None:
            line["mfu"] = mfu
        line |= {"skipped": state.skipped, "spikes": state.spike_count}
        line["seconds"] = round(state.seconds + self._seconds, 3)
        if validates:
            with self.engine.autocast():
                line |= self.validate()
            self._keep_best(line)
        if self.engine.world.first:
            path = self.run_folder.folder / "metrics.jsonl"
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(line)) + "\n")
            state.metrics_bytes = path.stat().st_size
            if self._trackers is None:  # made here, for the run folder has its name now
                folder = self.run_folder.folder
                self._trackers = [Tracked(name, folder, self.tracked) for name in self.settings.trackers]
            for tracker in self._trackers:
                tracker.add(line)
        state.line, state.losses = line, []
        state.tokens += self._tokens
        state.seconds += self._seconds
        self._tokens, self._seconds = 0, 0.0
        return line

    def _keep_best(self, line: Metrics) -> None:
        """Save the model to best/ if the validation in `line` is the best so far. Else count it in `state.stale`.

        Validations are compared by the key that `better` makes of `line`, a dict of metrics; the larger key is better.
        Do nothing for a run without `better`. Every rank must call this, and rank 0 decides and writes.
        """
        if self.better is None:
            return
        key = list(self.better(line))
        if self.engine.world.number(self.state.best is None or key > self.state.best):  # as the first rank says
            self.state.best, self.state.best_metrics = key, line
            model = self.engine.whole_model()
            if self.engine.world.first:
                self.save_best(model, self.run_folder.folder / "best")
            self.state.stale = 0
        else:
            self.state.stale += 1

    def _save_last(self) -> None:
        """Save a checkpoint of the last update, to resume the run for more steps, unless that update already has one.

        If it cannot be written, for example to a full disk, only tell the user.
        """
        if checkpoints.step_of(next(checkpoints.newest_first(self.run_folder.checkpoints), None)) == self.state.step:
            return
        try:
            self.save()
        except OSError as error:
            self.say(f"{error}; without this checkpoint the run cannot be resumed for more steps")

    def save(self) -> None:
        """Save a checkpoint of the current update in the run folder, and delete all but the newest `settings.keep`.

        Losses that are still on the device are read first. The folder is then kept even if the run fails later. The
        tokens per second of the next line of metrics.jsonl count from here. Every rank must call this. Raise `OSError`
        if the checkpoint cannot be written, and `ValueError` if too many updates in a row were skipped.
        """
        world = self.engine.world
        self._settle()
        self.state.tokens += self._tokens
        self.state.seconds += self._seconds
        self._tokens, self._seconds = 0, 0.0
        tensors = self.engine.state() | randomness.states(self.engine.device, world.rank)
        folder = self.run_folder.checkpoints
        state = asdict(self.state) | {"data": self.identity, "record": self.record}
        checkpoints.save(folder, self.state.step, tensors, state, self.settings.keep, world)
        if world.first:
            self.run_folder.keep()
