"""Checkpoints that a kill at any moment, a full disk or a flipped bit cannot turn into silent damage.

checkpoints/step-000001000/   one checkpoint
  shard-*.safetensors           the tensors, a file for each rank, by torch.distributed.checkpoint
  checkpoint.json               the rest of the state, and the size and SHA-256 of every file; its own sum is in it
checkpoints/latest            the name of the newest one

A checkpoint is written under a temporary name, synced and renamed; `latest` moves after that, and older ones go last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from gpt_fast_settings.documents import read_bytes, read_object

from ..._files import PARTIAL, sha256, sync, write_json, write_text
from ..engine.distributed import World
from . import schemas

FOLDER, MANIFEST, LATEST = "checkpoints", "checkpoint.json", "latest"
_PREFIX, _FORMAT = "step-", "gpt_fast checkpoint"


class Damaged(ValueError):
    """A checkpoint is not what was written."""


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int, world: World) -> None:
    """Write the checkpoint of update `step` into `folder`, a run's checkpoints/, and remove all but the newest `keep`.

    `tensors` are those that training resumes from, by name. `state` is everything else that is kept, a dict of JSON
    values (see `schemas.State`). Every rank of `world` calls this with its own tensors, and returns when the checkpoint
    is written. The checkpoint is the folder step-000001000 for update 1,000, and the file `latest` names it then.

    Raises:
        OSError: The checkpoint cannot be written. The checkpoints before are then untouched.
    """
    name = f"{_PREFIX}{step:09d}"
    partial = folder / f".{name}{PARTIAL}"
    if world.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.wait()
    try:
        _write_tensors(partial, tensors, world)
        world.wait()
        if world.first:
            _seal(partial, {"format": _FORMAT, "step": step, "ranks": world.size, "state": state})
            shutil.rmtree(folder / name, ignore_errors=True)  # of a run that went on from an older one
            partial.rename(folder / name)
            sync(folder)
            write_text(folder / LATEST, name + "\n")
            _prune(folder, keep)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    world.wait()


def newest_first(folder: Path) -> Iterator[Path]:
    """Yield the checkpoints' paths in `folder`: the one that the file `latest` names, then all others, newest first.

    Nothing is yielded if there is no such folder. If `latest` is missing or names no checkpoint, the newest comes
    first. The checkpoints are complete but may be damaged.
    """
    if not folder.is_dir():
        return
    names = (path for path in folder.iterdir() if path.name.startswith(_PREFIX))
    found = sorted((path for path in names if path.name.removeprefix(_PREFIX).isdecimal()), reverse=True)
    try:
        named = read_bytes(folder / LATEST, limit=100).decode("utf-8", "replace").strip()
    except (OSError, ValueError):  # missing, or no name
        named = ""
    yield from sorted(found, key=lambda path: path.name != named)


def step_of(path: Path | None) -> int:
    """Return the number of the update in the name of a checkpoint's folder, 1000 for step-000001000, or -1 for None."""
    return -1 if path is None else int(path.name.removeprefix(_PREFIX))


def newest_good(folder: Path, say: Callable[[str], object]) -> tuple[Path, dict[str, Any]] | None:
    """Return (path, manifest) of the newest undamaged checkpoint in `folder`, or None if there is no checkpoint.

    The manifest is the content of checkpoint.json (see `read`). All files of the checkpoints that are tried are read.
    `say` is called with a line for each damaged checkpoint that is newer. Raise `ValueError` if there are checkpoints
    and all are damaged.
    """
    damaged = []
    for path in newest_first(folder):
        try:
            return path, read(path)
        except Damaged as error:
            damaged.append(str(error))
            say(f"{error}; trying the one before")
    if damaged:
        raise ValueError(f"{folder}: no checkpoint is whole ({damaged[0]}); start again with --overwrite")
    return None


def read(path: Path) -> dict[str, Any]:
    """Return the manifest of the checkpoint at `path`: the content of its checkpoint.json without its own "sha256".

    It is a dict with "format", "step", "ranks", "state" and "files", {name: [size in bytes, SHA-256]}. All files are
    read and compared with "files". Raise `Damaged` if checkpoint.json, or any file that it lists, is missing or is not
    as it was written, or if there is another file.
    """
    try:
        manifest = read_object(path / MANIFEST, non_finite=True)  # a loss may be NaN
        total = manifest.pop("sha256", None)
        if manifest.get("format") != _FORMAT or total != _sum_of(manifest):
            raise ValueError("its checksum is wrong")
        schemas.check(path / MANIFEST, schemas.Manifest, manifest)
    except (OSError, ValueError) as error:
        raise Damaged(f"{path}: {MANIFEST} is missing or damaged ({_without(error, path / MANIFEST)})") from None
    present = {file.name for file in path.iterdir()} - {MANIFEST}
    if present != set(manifest["files"]):
        wrong = ", ".join(sorted(present ^ set(manifest["files"])))
        raise Damaged(f"{path}: files are missing or do not belong there ({wrong})")
    for name, (size, _) in manifest["files"].items():
        file = path / name
        if not file.is_file():  # a pipe or a device has no end to read to
            raise Damaged(f"{file}: damaged, it is no regular file; expected {size:,} bytes")
        if file.stat().st_size != size:
            raise Damaged(f"{file}: damaged, it has {file.stat().st_size:,} bytes; expected {size:,}")
    for name, written in _sums(path).items():
        if written != manifest["files"][name]:
            raise Damaged(f"{path / name}: damaged, its bytes are not those that were written")
    return manifest


def load(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Copy the tensors of the checkpoint at `path` into the tensors of the same names in `tensors`, in place.

    Any number of ranks may have written it. Every rank of `world` calls this. Other tensors of the checkpoint are
    ignored. Raise `ValueError` if a tensor is missing there or has another shape.
    """
    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")
            dcp.load(_with_a_dimension(tensors), storage_reader=reader, no_dist=world.size == 1)
    except CheckpointException as error:
        raise ValueError(f"{path}: does not fit this model ({_cause(error)})") from None


def _write_tensors(path: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Write the tensors of all ranks into the folder `path`, as safetensors files. Raise `OSError` if that fails.

    Every rank of `world` calls this with its own `tensors`, by name.
    """
    writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # unavailable in one process, as it should be
            dcp.save(_with_a_dimension(tensors), storage_writer=writer, no_dist=world.size == 1)
    except CheckpointException as error:
        raise OSError(f"{path.parent}: the checkpoint cannot be written ({_cause(error)})") from None


def _with_a_dimension(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return `tensors` with views of shape [1] in place of scalars.

    The safetensors reader takes slices, which a scalar does not allow.
    """
    return {name: tensor.view(1) if tensor.ndim == 0 else tensor for name, tensor in tensors.items()}


def _cause(error: CheckpointException) -> str:
    """Return the message of the first failure in a checkpoint error, on one line, with single spaces.

    For a failure without a message, return the name of its type.
    """
    exception, _ = next(iter(error.failures.values()))
    return " ".join(str(exception).split()) or type(exception).__name__


def _seal(path: Path, manifest: dict[str, Any]) -> None:
    """Flush all files of the checkpoint folder `path` to disk, then write its checkpoint.json.

    This adds to the dict `manifest`, in place, "files", {name: [size in bytes, SHA-256]}, and "sha256", the checksum of
    all else in it. checkpoint.json holds the result.
    """
    for file in path.iterdir():
        sync(file)
    manifest["files"] = _sums(path)
    manifest["sha256"] = _sum_of(manifest)
    write_json(path / MANIFEST, manifest)


def _without(error: Exception, path: Path) -> str:
    """Return the text of `error` without a leading "PATH: ", the name of the file `path`."""
    return str(error).removeprefix(f"{path}: ")


def _sums(path: Path) -> dict[str, list[Any]]:
    """Return {name: [size in bytes, SHA-256]} of each file in the checkpoint folder `path`, except checkpoint.json."""
    files = sorted(file for file in path.iterdir() if file.name != MANIFEST)
    with ThreadPoolExecutor(8) as pool:
        return {
            file.name: [file.stat().st_size, digest]
            for file, digest in zip(files, pool.map(sha256, files), strict=True)
        }


def _sum_of(manifest: dict[str, Any]) -> str:
    """Return the SHA-256, in hexadecimal digits, of a manifest as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints in `folder`, and folders of half-written or removed ones.

    Newest is the one that the file `latest` names, then those of the latest updates. A checkpoint is renamed before its
    files are deleted, so no checkpoint is ever seen without some of its files.
    """
    for path in list(newest_first(folder))[keep:]:
        path.rename(folder / f".{path.name}.removed")
    for path in folder.iterdir():
        if path.is_dir() and path.name.startswith(f".{_PREFIX}"):
            shutil.rmtree(path)
