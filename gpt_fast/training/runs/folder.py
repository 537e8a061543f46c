"""Run folders: what training writes.

config.json, model.safetensors   the model, as `save_pretrained` writes it
tokenizer.json                   its tokenizer
settings.yaml                    every setting, resolved: `--config` takes it back
metrics.jsonl                    one line per logged step
run.json                         how it came about and how it ended: data, labels, baselines, last figures; written
                                 after the weights, so a folder that has it is finished
loss.png                         the curves; pictures are drawn last, and one that fails is a warning
checkpoints/, best/              what a run resumes from, stopped or for more steps, and the best weights so far
adapter_config.json, adapter_model.safetensors   of a run with --lora-rank, in the place of model.safetensors
tensorboard/, wandb/, mlflow.db, profile.json, confusion.png, bad-batch.safetensors
                                 where asked for, or where there is reason
"""

from __future__ import annotations

import fcntl
import glob
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer

from gpt_fast_settings.declaration import did_you_mean
from gpt_fast_settings.documents import checked_object, parse_json, read_bytes, read_object

from ..._files import replacing, sha256, write_text
from ...config import GPTConfig
from ...data.tokenizer import special_ids, vocabulary_size
from ...heads import Head
from ...interrupts import Interrupted
from . import adapters, checkpoints, schemas

SETTINGS = "settings.yaml"
_NEW, _OLD = ".new-", ".old-"  # hidden folders beside a run: one that is begun, and one that --overwrite moved away
RUN_FILES = {
    "config.json", "model.safetensors", "tokenizer.json", SETTINGS, "metrics.jsonl", "run.json", "loss.png",
    checkpoints.FOLDER,
}  # fmt: skip
OTHER_FILES = {
    *adapters.FILES,
    "best",
    "tensorboard",
    "wandb",
    "mlflow.db",
    "mlruns",
    "profile.json",
    "confusion.png",
    "bad-batch.safetensors",
}


class Run:
    """A run folder in the making: at first a hidden one beside `out`, which `publish` moves there.

    Until `keep` is called it is all or nothing: an error then leaves what was there before. Afterwards, that is from
    the first checkpoint on, the folder stays whatever happens.
    """

    def __init__(self, out: Path, folder: Path, overwrite: bool = False, resume_command: str = "--resume"):
        self.out = out
        self.resume_command = resume_command
        self.folder = folder
        self.overwrite = overwrite
        self.kept = False
        self._replaced: Path | None = None

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the run's checkpoints, which may not exist yet."""
        return self.folder / checkpoints.FOLDER

    def publish(self) -> None:
        """Move the hidden folder of a new run to its final place `out`. A second call does nothing.

        The training loop calls this before the first update, so that the metrics can be watched there. A run at `out`,
        which --overwrite replaces, is moved to a hidden folder beside it. Raise `FileExistsError` or `ValueError` if
        another run or process has taken the place in the meantime.
        """
        if self.folder == self.out:
            return
        _check_target(self.out, self.overwrite)  # someone may have written there meanwhile
        _check_idle(self.out)
        self.folder.chmod(0o777 & ~_umask())  # mkdtemp's folders are the owner's alone
        if self.out.exists():
            self._replaced = Path(tempfile.mkdtemp(prefix=f".{self.out.name}{_OLD}", dir=self.out.parent))
            self.out.rename(self._replaced / self.out.name)
        self.folder.rename(self.out)
        self.folder = self.out

    def keep(self) -> None:
        """Keep the run folder whatever happens next, and delete the run that it replaced.

        This is called at the first checkpoint and at the end of training: the folder is then worth more than the run
        that it replaced. The folder is moved to its final place if it is not there yet.
        """
        self.publish()
        self.kept = True
        if self._replaced is not None:
            shutil.rmtree(self._replaced, ignore_errors=True)
            self._replaced = None

    def discard(self) -> None:
        """Delete the run folder with all of its content. If it replaced a run, put that run back in its place."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._replaced is not None:
            (self._replaced / self.out.name).rename(self.out)
            self._replaced.rmdir()

    def reopen(self, settings: dict[str, Any]) -> None:
        """Let a run be resumed for more steps: write settings.yaml anew, and make a finished run a stopped one.

        `settings` has every setting with its value. For a finished run, run.json is deleted. If the run kept the
        weights of its best validation ("best_step" is in its record), they are copied to best/ first.
        """
        write_settings(self.folder, settings)
        if not is_finished(self.folder):
            return
        if "best_step" in read_record(self.folder):  # its weights are those of the best validation so far
            (self.folder / "best").mkdir(exist_ok=True)
            for name in ("config.json", "model.safetensors", *adapters.FILES):
                if not (self.folder / name).is_file():
                    continue
                with replacing(self.folder / "best" / name) as temporary:
                    shutil.copyfile(self.folder / name, temporary)
        (self.folder / "run.json").unlink()

    def what_is_left(self, signal: object) -> str:
        """Return a line for the user: what a run that `signal` stopped left on disk, and the command to resume it.

        `signal` is shown as text, such as "SIGINT". The line has one of four forms: nothing is left, the run is
        finished, it has weights but no checkpoint, or its newest checkpoint is named with the command. Nothing is left
        until `keep` was called.
        """
        if not self.kept:
            before = f"; {self.out} is what it was" if self._replaced is not None else ""
            return f"stopped by {signal}; nothing is left of this run{before}"
        if is_finished(self.out):
            return f"stopped by {signal}; the run in {self.out} is finished"
        newest = next(checkpoints.newest_first(self.checkpoints), None)
        if newest is None:
            return f"stopped by {signal}; the weights are in {self.out}, which has no checkpoint"
        step = checkpoints.step_of(newest)
        return f"stopped by {signal} after update {step:,}, whose checkpoint is saved; resume: {self.resume_command}"


@contextmanager
def new_run(
    out: Path, overwrite: bool = False, resume: bool = False, resume_command: str = "--resume"
) -> Iterator[Run]:
    """Yield a run in a hidden folder, which takes its place `out` at the end of the block, or when `publish` is called.

    If the block raises before a checkpoint is written, the new folder is deleted, and a run that was at `out` before is
    there again. `overwrite` replaces a run, but never a folder that holds anything else. With `resume`, a run at `out`
    with a checkpoint is yielded itself, and is never deleted. `resume` replaces an unfinished run without a checkpoint,
    and begins a new run if there is none. A run that a killed --overwrite moved away is put back first. The folder is
    locked against other processes inside the block. `resume_command` is shown to the user after an interruption.

    Raise `FileExistsError` if `out` holds anything but a run, or if it holds a run and neither option is given. Also
    raise it with `resume` if the run is finished and has no checkpoint. Raise `ValueError` if both options are given,
    another process trains there, or nothing can be written there.
    """
    out = out.resolve()
    if overwrite and resume:
        raise ValueError("--overwrite and --resume: one replaces the run, the other resumes it; expected one of them")
    put_back(out)
    if resume and any(checkpoints.newest_first(out / checkpoints.FOLDER)):
        run = Run(out, out, resume_command=resume_command)
        run.kept = True
        with _locked(out), _telling(run):
            yield run
        return
    overwrite = overwrite or (resume and not is_finished(out))
    _check_target(out, overwrite)
    _check_idle(out)
    try:
        made = _make_parents(out.parent)
        _sweep(out)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}{_NEW}", dir=out.parent))
        run = Run(out, folder, overwrite, resume_command)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot write there ({error.strerror})") from None
    try:
        with _locked(run.folder), _telling(run):
            yield run
            run.keep()
    finally:
        if not run.kept:
            run.discard()
            for folder in made:
                if not any(folder.iterdir()):
                    folder.rmdir()


@contextmanager
def _telling(run: Run) -> Iterator[None]:
    """If the block raises `Interrupted`, describe in its `saved` what is left on disk, and raise it again.

    If a checkpoint has been written, the new run's folder is kept first, and the run that it was to replace is deleted
    (see `Run.keep`). Other exceptions pass unchanged.
    """
    try:
        yield
    except Interrupted as stopped:
        if any(checkpoints.newest_first(run.checkpoints)):  # a second signal may come before the run knows of it
            run.keep()
        stopped.saved = run.what_is_left(stopped)
        raise


def _sweep(out: Path) -> None:
    """Delete the hidden folders beside `out` of runs that were begun for `out` and killed before their first update.

    A living process has its folder locked, and that folder stays.
    """
    for folder in _beside(out, _NEW):
        if _is_idle(folder):
            shutil.rmtree(folder, ignore_errors=True)


def put_back(out: Path) -> None:
    """Put back the run at `out` that --overwrite had moved away, if the new run was killed before its first checkpoint.

    The unfinished new run is deleted, and a warning is given. If the new run is finished or has a checkpoint, the run
    that was moved away is deleted instead. Do nothing while a living process trains there, or if nothing was moved
    away. Raise `FileExistsError` if the new run's folder holds what no run wrote.
    """
    if not all(map(_is_idle, _beside(out, _NEW))):
        return  # a living process is about to put its run there
    for folder in _beside(out, _OLD):
        before = folder / out.name
        if not before.is_dir():  # it is there again, or was being removed
            shutil.rmtree(folder, ignore_errors=True)
            continue
        if out.exists() and not _is_idle(out):
            continue
        if is_finished(out) or any(checkpoints.newest_first(out / checkpoints.FOLDER)):
            shutil.rmtree(folder, ignore_errors=True)  # the replacement is worth more
            continue
        if out.exists():
            _check_target(out, overwrite=True)
            shutil.rmtree(out)
        before.rename(out)
        folder.rmdir()
        warnings.warn(
            f"{out}: the run that --overwrite replaced is back, because its replacement was killed before its first "
            "checkpoint",
            stacklevel=2,
        )


def leftovers(folder: Path) -> list[Path]:
    """Return hidden folders of dead runs in and beside `folder`: begun runs, and runs that --overwrite moved away.

    They are sorted by path. Folders beside `folder` may belong to other runs. Folders that a living process has locked
    are left out.
    """
    places = {folder, folder.parent}
    found = {path for place in places if place.is_dir() for kind in (_NEW, _OLD) for path in place.glob(f".*{kind}*")}
    return sorted(path for path in found if path.is_dir() and _is_idle(path))


def _beside(out: Path, kind: str) -> list[Path]:
    """Return the hidden folders beside `out` that belong to it, sorted by path.

    `kind` is `_NEW` for the folders of runs that were begun, `_OLD` for those of runs that --overwrite moved away.
    """
    return sorted(path for path in out.parent.glob(f".{glob.escape(out.name)}{kind}*") if path.is_dir())


def _is_idle(folder: Path) -> bool:
    """Return True if no living process trains in `folder`: none has it locked. The folder has to exist."""
    try:
        with _locked(folder):
            return True
    except ValueError:
        return False


def write_extra(path: Path, write: Callable[[Path], object]) -> bool:
    """Call `write(path)` for a file that the run can do without, such as a picture. Return True if it succeeds.

    If it raises an exception, warn and return False. Call this after the weights and run.json are written, so that a
    failure costs the one file and not the run.
    """
    try:
        write(path)
    except Exception as error:  # noqa: BLE001 (matplotlib, TensorBoard and what they call raise errors of any type)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"{path}: not written ({reason})", stacklevel=2)
        return False
    return True


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write `settings`, each setting by name with its value, defaults too, to settings.yaml in `folder`."""
    write_text(folder / SETTINGS, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def is_finished(out: Path) -> bool:
    """Return True if the folder `out` holds a run.json, which training writes after the weights."""
    return (out / "run.json").exists()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder inside the block, so that no two processes train in it. The lock also ends with the process.

    Raise `ValueError` if it is locked already. The folder has to exist.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out {folder}: another process is training there") from None
        yield
    finally:
        os.close(handle)


def _check_idle(out: Path) -> None:
    """Raise `ValueError` if a living process trains in `out`. A folder that does not exist is accepted."""
    if out.exists():
        with _locked(out):
            pass


def _no_run(folder: Path) -> str:
    """Return the end of an error message about `folder`, which is not a run folder.

    It is "a file, no run folder" if the path exists, else "no such run folder", with a suggestion if a run beside it
    has a similar name.
    """
    if folder.exists():
        return "a file, no run folder"
    runs = [str(path.parent) for path in folder.parent.glob("*/config.json")]
    return f"no such run folder{did_you_mean(str(folder), runs)}"


def check_run(folder: Path) -> None:
    """Raise `FileNotFoundError` unless `folder` holds a run: config.json, tokenizer.json and weights.

    The weights may be model.safetensors, an adapter's, or those of a checkpoint. The files are not read. A run that a
    dead --overwrite moved away is put back first.
    """
    put_back(folder.absolute())
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: {_no_run(folder)}")
    there = {path.name for path in folder.iterdir()}
    if any(checkpoints.newest_first(folder / checkpoints.FOLDER)):
        there.add("model.safetensors")  # a stopped run, whose weights are in its checkpoints
    if adapters.WEIGHTS in there:
        there.add("model.safetensors")  # a run whose weights are its base's with an adapter
    missing = sorted({"config.json", "model.safetensors", "tokenizer.json"} - there)
    if missing == ["tokenizer.json"]:
        raise FileNotFoundError(
            f"{folder}: has a model and no tokenizer.json; put the one there that the model was trained with"
        )
    if missing:
        raise FileNotFoundError(f"{folder}: not a run of gpt-fast, {' and '.join(missing)} missing")


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of the run in `folder`: the content of run.json, a dict with the fields of `schemas.Record`.

    For a stopped run, return the record in its newest undamaged checkpoint, with a warning for each damaged one that is
    newer; without a checkpoint, return {}. Raise `ValueError` for a run.json that is no record of a run, and if all
    checkpoints are damaged.
    """
    path = folder / "run.json"
    if path.exists():
        record = read_object(path)
        schemas.check(path, schemas.Record, record)
        return record
    good = checkpoints.newest_good(folder / checkpoints.FOLDER, warnings.warn)
    return {} if good is None else dict(good[1]["state"].get("record", {}))


def check_weights(folder: Path, record: dict[str, Any], whole: bool) -> None:
    """Raise `ValueError` if the file of a run's weights, or of its adapter, has another size than `record` says.

    The run is in `folder`. `record` is the content of the run's run.json. If `whole`, compare the SHA-256 of the file
    too, which reads all of it. Raise `FileNotFoundError` if the file is missing. Records of older versions do not name
    the weights; then nothing is compared or raised, even if the file is missing.
    """
    expected, path = record.get("weights"), folder / (adapters.WEIGHTS if record.get("lora") else "model.safetensors")
    if not isinstance(expected, dict):
        return
    size = path.stat().st_size
    if size != expected.get("bytes"):
        raise ValueError(f"{path}: has {size:,} bytes; expected {expected.get('bytes'):,}, as run.json says")
    if whole and sha256(path) != expected.get("sha256"):
        raise ValueError(f"{path}: its SHA-256 is not that in run.json: the file was changed or damaged")


def special_token(config: GPTConfig, name: str) -> int:
    """Return the token id in the field `name` of the configuration. Raise `ValueError` if that field is None."""
    token = getattr(config, name)
    if token is None:
        raise ValueError(f"this model has no {name}; pre-train it with gpt-fast, or name the token's id in config.json")
    return int(token)


def with_special_tokens(model: Head, tokenizer: Tokenizer) -> Head:
    """Add the special tokens that the configuration of `model` lacks, with their ids in `tokenizer`. Return `model`.

    The model is changed in place. A model that `gpt-fast convert` made from a model of another library may lack special
    tokens. If ids are added and the tokenizer has more tokens than the model, the embeddings get rows for the missing
    tokens, and so does an output layer that is not tied. These rows begin near the mean of all other rows. Rows near 0
    would make the new tokens likelier than most others in a model whose logits are all far below 0.
    """
    config = model.config
    ids = {name: token for name, token in special_ids(tokenizer).items() if getattr(config, name) is None}
    before, size = config.num_tokens, vocabulary_size(tokenizer)
    if ids and size > before:
        model.resize_embeddings(size)
        layers = [model.trunk.token_emb, *([] if config.tied else [getattr(model, "output_layer", None)])]
        with torch.no_grad():
            for layer in layers:
                if layer is not None:
                    layer.weight[before:] += layer.weight[:before].mean(0)
    model.config = model.trunk.config = model.config.replace(**ids)
    return model


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.jsonl in order, each a dict of numbers by name, with NaN for null.

    Each line has a "step". A last line that a kill cut off is left out. Raise `FileNotFoundError` if the file is
    missing. Raise `ValueError` if it has more than 64 MiB, or for a line that is not a JSON object, has no "step", or
    holds anything but numbers and null.
    """
    path, lines = folder / "metrics.jsonl", []
    for number, content in enumerate(read_bytes(path).splitlines(keepends=True), start=1):
        if not content.endswith(b"\n"):
            break  # a kill may leave half a line
        where = Path(f"{path}, line {number}")
        line = checked_object(where, parse_json(where, content))
        schemas.check(where, schemas.Line, line)
        lines.append({name: math.nan if value is None else value for name, value in line.items()})
    return lines


def read_curve(folder: Path, field: str) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.jsonl that have `field`, in order, each a dict of numbers by name.

    `field` is the name of a metric. Raise `FileNotFoundError` if the file is missing. Raise `ValueError` if it is
    damaged or no line has the field; the message then lists the known fields.
    """
    if not (folder / "metrics.jsonl").is_file():
        what = "no run folder, it has no metrics.jsonl" if folder.is_dir() else _no_run(folder)
        raise FileNotFoundError(f"{folder}: {what}")
    lines = read_metrics(folder)
    kept = [line for line in lines if field in line]
    if not kept:
        known = sorted({name for line in lines for name in line})
        raise ValueError(f"{folder}: no {field} in its metrics; they have {', '.join(known) or 'no line yet'}")
    return kept


def _check_target(out: Path, overwrite: bool) -> None:
    """Raise `FileExistsError` unless a run may be written to `out`.

    It may if `out` does not exist, is an empty folder, or, with `overwrite`, holds nothing but files that a run writes.
    Temporary files of a killed process, which end in ".partial", count as those.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"--out {out}: is a file; expected a folder that does not exist yet")
    foreign = sorted({path.name for path in out.iterdir()} - RUN_FILES - OTHER_FILES)
    foreign = [name for name in foreign if not name.endswith(".partial")]  # a kill in the middle of a write
    if foreign:
        raise FileExistsError(f"--out {out}: holds what no run wrote ({', '.join(foreign[:3])}); choose another folder")
    if not overwrite and any(out.iterdir()):
        raise FileExistsError(
            f"--out {out}: already holds a run; choose another folder or give --overwrite, or --resume a stopped one"
        )


def _make_parents(folder: Path) -> list[Path]:
    """Create `folder` and its missing parents. Return the folders that were created, innermost first."""
    made = []
    while not folder.exists():
        made.append(folder)
        folder = folder.parent
    for path in reversed(made):
        path.mkdir()
    return made


def _umask() -> int:
    """Return the umask of this process. It is set to 0 for a moment, the only way to read it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
