"""Run folders: what training writes, all of it or none.

config.json, model.safetensors   the model, as `save_pretrained` writes it
tokenizer.json                   its tokenizer
metrics.jsonl                    one line per logged step
run.json                         how it came about and how it ended: data, settings, labels, baselines, last figures
loss.png                         the curves
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import GPTConfig

RUN_FILES = {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "run.json", "loss.png"}


@contextmanager
def new_run(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `out` and moves it there at the end of the block. If the block raises, or is
    interrupted, nothing of it stays and a run that was there before is untouched.

    `overwrite` replaces a run, never a folder that holds anything else.
    """
    out = out.resolve()
    _check_target(out, overwrite)
    try:
        made = _make_parents(out.parent)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ValueError(f"--out {out}: cannot write there ({error.strerror})") from None
    done = False
    try:
        yield work
        work.chmod(0o777 & ~_umask())  # mkdtemp's folders are the owner's alone
        _check_target(out, overwrite)  # someone may have written there meanwhile
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            out.rename(old / out.name)
            work.rename(out)
            shutil.rmtree(old)
        else:
            work.rename(out)
        done = True
    finally:
        if not done:
            shutil.rmtree(work, ignore_errors=True)
            for folder in made:
                if not any(folder.iterdir()):
                    folder.rmdir()


def check_run(folder: Path) -> None:
    """Raises unless `folder` holds what a run needs to be read."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder")
    missing = sorted({"config.json", "model.safetensors", "tokenizer.json"} - {path.name for path in folder.iterdir()})
    if missing:
        raise FileNotFoundError(f"{folder}: not a run of gpt-fast, {' and '.join(missing)} missing")


def read_record(folder: Path) -> dict[str, Any]:
    """What run.json says, or nothing where a model was saved without it."""
    path = folder / "run.json"
    return _read_object(path) if path.exists() else {}


def special_token(config: GPTConfig, name: str) -> int:
    """The id of a special token that a task cannot do without."""
    token = getattr(config, name)
    if token is None:
        raise ValueError(f"this model has no {name}; pre-train it with gpt-fast, or name the token's id in config.json")
    return int(token)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: wanted an object, got {type(value).__name__}")
    return value


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"--out {out}: is a file; wanted a folder that does not exist yet")
    foreign = sorted({path.name for path in out.iterdir()} - RUN_FILES)
    if foreign:
        raise FileExistsError(f"--out {out}: holds what no run wrote ({', '.join(foreign[:3])}); choose another folder")
    if not overwrite and any(out.iterdir()):
        raise FileExistsError(f"--out {out}: already holds a run; choose another folder or give --overwrite")


def _make_parents(folder: Path) -> list[Path]:
    """Creates `folder` and returns what had to be made, innermost first."""
    made = []
    while not folder.exists():
        made.append(folder)
        folder = folder.parent
    for path in reversed(made):
        path.mkdir()
    return made


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
