"""Common part of every training: processes, run folder, settings of a resumed run, loop, record."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from tokenizers import Tokenizer

from gpt_fast_settings.declaration import read_file, wrong_on_every_rank
from gpt_fast_settings.resume import asks_for_more, resumed
from gpt_fast_settings.training import TrainingSettings

from .._files import finite, sha256, write_json
from ..data.tokenizer import save_tokenizer
from ..heads import Head
from ..interrupts import Stop
from ..model_folder import write_config
from . import trackers
from .engine import randomness, throughput
from .engine.distributed import World, resolve_device, settings_of, world
from .engine.update import PRECISIONS, Engine, EngineSettings
from .loop import Loop, LoopSettings, Progress, Source, intervals
from .metrics import Metrics
from .runs import checkpoints
from .runs.folder import (
    SETTINGS,
    Run,
    check_weights,
    is_finished,
    new_run,
    put_back,
    read_record,
    write_extra,
    write_settings,
)

S = TypeVar("S", bound=TrainingSettings)
Record = dict[str, Any]
Show = Callable[[Progress], None]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Session(Generic[S]):
    """One training on one rank. Ranks other than the first print nothing."""

    settings: S
    run: Run
    ranks: World
    show: Show
    say: Say
    stop: Stop

    def make_model(self, make: Callable[[], Head]) -> Head:
        """Seed torch's generators, and return the model that `make()` returns, on this rank's device.

        Every rank draws the same weights from the run's seed. Random numbers that are drawn later, as for dropout,
        differ from rank to rank.
        """
        torch.manual_seed(self.settings.seed)
        model = make().to(self.ranks.device)
        if self.ranks.rank:
            randomness.seed(self.settings.seed, self.ranks.rank)
        return model

    def make_loop(
        self,
        model: Head,
        tokenizer: Tokenizer,
        source: Source,
        validate: Callable[[], Metrics],
        *,
        lr: float,
        steps: int,
        schedule: Callable[[int], float],
        validations: int,
        identity: dict[str, Any],
        record: Record,
        better: Callable[[Metrics], Sequence[float]] | None = None,
        flops_per_token: Callable[[], float] | None = None,
        valid_every: int | None = None,
        patience: int | None = None,
        save_best: Callable[[Head, Path], None] = Head.save_pretrained,
    ) -> Loop:
        """Return the training loop, at its beginning or at the checkpoint that it resumes from.

        Rank 0 writes the settings, the `tokenizer` and the configuration of `model` into the folder of a new run.
        `source(step)` returns this rank's micro-batches of update `step`, counted from 0. `validate()` returns the
        metrics of a validation. A run has about `validations` of them, unless `valid_every` sets the updates between
        two. `steps` is the number of updates, `lr` the peak learning rate, and `schedule(step)` its factor in update
        `step`, counted from 0. `identity` describes the data as JSON values; a run resumes only if it is the same.
        `record` holds the entries of run.json that are known before the training. Every checkpoint has them, for
        readers of a stopped run.

        `better(metrics)` returns a key that is larger for a better model. `save_best(model, folder)` then saves the
        best model, and training ends early after `patience` validations in a row that were no better. Without `better`,
        no best model is saved. With `flops_per_token`, which returns the FLOPs of a token's forward and backward pass,
        the loop logs the MFU, the share of the device's peak rate. Raise `ValueError` if the run cannot be resumed.
        """
        settings, run, ranks = self.settings, self.run, self.ranks
        engine = Engine(model, lr, EngineSettings.of(settings), ranks)
        loop_settings = LoopSettings(
            steps,
            lr,
            schedule,
            **intervals(steps, validations, settings.log_every, valid_every),
            checkpoint_every=settings.checkpoint_every,
            keep=settings.keep_checkpoints,
            max_skips=settings.max_skips,
            trackers=("tensorboard",) * settings.tensorboard + ((settings.tracker,) if settings.tracker else ()),
            profile=settings.profile,
            patience=patience,
            peak_flops=throughput.peak_flops(engine.device, PRECISIONS[settings.precision])
            if flops_per_token
            else None,
            flops_per_token=flops_per_token() if flops_per_token else 0.0,
        )
        if ranks.first and not run.kept:
            write_settings(run.folder, settings.saved())
            write_config(model, model.config, run.folder)
            save_tokenizer(tokenizer, run.folder / "tokenizer.json")
        loop = Loop(
            engine, source, validate, loop_settings, run, self.show, self.say, self.stop, better, seed=settings.seed,
            identity=identity, record=record, tracked=settings.saved() | record, save_best=save_best,
        )  # fmt: skip
        if run.kept or ranks.size > 1:
            loop.resume()
        return loop

    def facts(self, loop: Loop) -> Record:
        """Return the entries of run.json that every training has. `loop` is the training loop, after its last update.

        They are the settings "batch_size", "seed", "device", "precision", "optimizer" and "schedule"; "torch", its
        version; "seconds", spent in updates; "skipped" and "spikes", numbers of updates; "ranks", their number; and
        "strategy" if there are several ranks.
        """
        settings = self.settings
        return {
            "batch_size": settings.batch_size,
            "seed": settings.seed,
            "device": settings.device,
            "precision": settings.precision,
            "optimizer": settings.optimizer,
            "schedule": settings.schedule,
            "torch": torch.__version__,
            "seconds": round(loop.state.seconds, 1),
            "skipped": loop.state.skipped,
            "spikes": loop.state.spike_count,
        } | settings_of(self.ranks)

    def finish(
        self,
        model: Head,
        record: Record,
        pictures: Mapping[str, Callable[[Path], object]],
        measure: Callable[[], Record] = dict,
        write: Callable[[Path], Path] | None = None,
    ) -> None:
        """Write the weights, then run.json, which marks the folder as finished, delete best/, then write the pictures.

        The weights are those of `model`, in model.safetensors. If `write` is given, `write(folder)` writes others in
        their place and returns their path. `record` gets the entries of the dict that `measure()` returns when the
        weights are on disk, and "weights", {"bytes", "sha256"} of their file. It is changed in place, then written to
        run.json, with null for numbers that are not finite. `pictures` maps the name of a file to a function that draws
        it at a path. A picture that fails is a warning. Only rank 0 calls this.
        """
        folder = self.run.folder
        path = folder / "model.safetensors"
        if write is None:
            model.save_pretrained(folder)
        else:
            path = write(folder)
        self.run.keep()
        record |= measure() | {"weights": {"bytes": path.stat().st_size, "sha256": sha256(path)}}
        write_json(folder / "run.json", finite(record))
        shutil.rmtree(folder / "best", ignore_errors=True)
        for name, draw in pictures.items():
            write_extra(folder / name, draw)


def train(settings: S, body: Callable[[Session[S]], Record], show: Show, say: Say, stop: Stop | None) -> Record:
    """Call `body` with the `Session` of a training, which writes to the run folder `settings.out`.

    A `Session` holds the settings, the run folder, the ranks, and the functions that report to the user. Return the
    record that `body` returns, the content of run.json. With --resume, return at once the record of a run that is
    finished and is not asked for more steps or epochs. `show(progress)` is called after each update, and `say(line)`
    with lines for the user, both on rank 0 only. `stop` tells whether a signal has asked the run to end; None stands
    for no signals. If `body` raises before a checkpoint is written, the new folder is deleted. Raise `ValueError` or
    `FileExistsError` if the folder or the settings do not allow the training.
    """
    out = settings.out
    trackers.require(settings.tracker)
    if os.environ.get("RANK", "0") == "0":
        put_back(out.absolute())
    if settings.resume and is_finished(out):
        record = read_record(out)
        check_weights(out, record, whole=True)
        if (command := record.get("command", settings.command)) != settings.command:
            raise ValueError(
                f"--resume: {out} is a run of gpt-fast {command}; expected one of gpt-fast {settings.command}"
            )
        saved = read_file(out / SETTINGS) if (out / SETTINGS).is_file() else {}
        more = asks_for_more(settings, saved)
        resumed(settings, out / SETTINGS, saved, finished=True)  # raises for options that the run did not begin with
        if not more:
            say(f"{out}: finished, nothing is left to do")
            return record
        if not any(checkpoints.newest_first(out / checkpoints.FOLDER)):
            raise ValueError(
                f"--{more[0]} {more[1]}: {out} is finished and has no checkpoint to resume; expected one, or "
                f"gpt-fast {settings.command} --from {out}, which begins with its weights"
            )
    settings = settings.model_copy(update={"device": resolve_device(settings.device)})
    with world(settings.strategy, settings.device) as ranks:
        begin = partial(_resumed, settings, ranks=ranks, stop=stop or Stop())
        if not ranks.first:
            out = settings.out.resolve()
            return body(begin(Run(out, out), show=ignore, say=ignore))
        with new_run(settings.out, settings.overwrite, settings.resume, settings.resume_command(ranks.size)) as run:
            return body(begin(run, show=show, say=say))


def _resumed(settings: S, run: Run, ranks: World, show: Show, say: Say, stop: Stop) -> Session[S]:
    """Return this rank's `Session` of a training, with the settings that the run in `run` is trained with.

    Every rank calls this, for a new run as well as for one that is resumed. A new run is trained with `settings`. A run
    is resumed if its folder has a checkpoint. It keeps the settings that it began with, except for those that
    `gpt_fast_settings.resume.resumed` takes from `settings`. If the user asks for more steps or epochs, rank 0 saves
    the new number in the run folder, and makes a finished run a stopped one. `ranks` is the world of all ranks as this
    rank sees it. The session keeps `show(progress)` and `say(line)`, which report to the user, and `stop`, which tells
    whether a signal has come. Raise `OptionError`, a `ValueError`, for options that do not agree with the run or each
    other.
    """
    path = run.folder / SETTINGS
    saved = ranks.values(read_file(path) if run.kept else {})
    more = asks_for_more(settings, saved)
    with wrong_on_every_rank():
        settings = resumed(settings, path, saved) if saved else settings
        check_optimizer(settings)
    if more and ranks.first:
        run.reopen(saved | {more[0]: more[1]})
    return Session(settings, run, ranks, show, say, stop)


def check_optimizer(settings: TrainingSettings) -> None:
    """Raise `ValueError` for --muon-lr without --optimizer muon, and for a strategy or rate that Muon does not allow.

    Muon needs whole matrices, so it does not work with --strategy fsdp. In each update, Muon's learning rate is AdamW's
    rate times the ratio --muon-lr / --lr. So with Muon, --lr 0 is an error unless --muon-lr is 0 too.
    """
    if settings.optimizer != "muon":
        if settings.muon_lr is not None:
            raise ValueError(f"--muon-lr {settings.muon_lr:g}: --optimizer is {settings.optimizer}; expected muon")
        return
    if settings.strategy == "fsdp":
        raise ValueError(
            "--optimizer muon: orthogonalises whole matrices, of which --strategy fsdp leaves a rank a share; expected "
            "--strategy ddp"
        )
    if settings.lr == 0 and settings.muon_lr != 0:
        raise ValueError("--lr 0: Muon's rate follows that of AdamW; expected more than 0 with --optimizer muon")


def ignore(_: object) -> None:
    """Do nothing with the argument. Ranks other than 0, which print nothing, call this in place of `show` and `say`."""
