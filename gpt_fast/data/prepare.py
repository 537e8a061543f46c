"""Text, however much, to token files: cut into units of work, tokenised by several processes, joined.

A unit is a part of a file, or of a data set. Its tokens are written to a file of their own, whole or not at all. So a
preparation that was stopped, also while it joined these files, resumes from them.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from gpt_fast_settings.documents import read_object

from .._disk import NotWritten, writing
from .._files import PARTIAL, replacing, write_json
from ..config import SPECIAL_TOKENS
from ..interrupts import Interrupted
from .reading.cuts import Keeps, keeps_tokens
from .reading.pipes import copied, is_piped
from .sources import Unit, documents, plan
from .token_files import DTYPES, write_token_file
from .tokenizer import (
    check_kind,
    encode_documents,
    make_tokenizer,
    parse_tokenizer,
    save_tokenizer,
    special_ids,
    vocabulary_size,
)

SAMPLE = 100 << 20  # characters that a vocabulary is learned from
PARTS, RECORD = ".parts", "data.json"
FILES = ("train.bin", "valid.bin", "tokenizer.json", RECORD)
_JOINING = re.compile(rf"\.({'|'.join(map(re.escape, FILES))})\.[0-9a-f]+{re.escape(PARTIAL)}")  # left by a kill
_COUNTS = ("train_documents", "train_tokens", "valid_documents", "valid_tokens")
_FIELDS = {"data": list, "tokenizer": str, "dtype": str, "plan": str, **dict.fromkeys(("vocabulary", *_COUNTS), int)}
_BATCH, _BATCH_TEXT = 256, 1 << 18  # pieces, and characters, that are encoded at once
_CHUNK = 1 << 20  # ids that are copied at once


@dataclass(frozen=True)
class PrepareSettings:
    """Options of `gpt-fast prepare`, by the names of the command line."""

    out: Path
    data: tuple[str, ...]
    valid: tuple[str, ...] = ()
    tokenizer: str = "bpe"
    vocab_size: int = 32_768
    text_column: str = "text"
    processes: int = 1
    overwrite: bool = False


def prepare(settings: PrepareSettings, show: Callable[[int, int], None], say: Callable[[str], None]) -> dict[str, Any]:
    """Write train.bin, valid.bin, tokenizer.json and data.json into `settings.out`. Return the content of data.json.

    This is a dict. `data` (a list) and `tokenizer` are the settings of that name. `vocabulary` is the vocabulary size,
    `dtype` the type of the ids, "uint16" or "uint32", and `plan` a hash of the inputs. The numbers of documents and
    tokens are `train_documents`, `train_tokens`, `valid_documents` and `valid_tokens`. `show(done, total)` is called
    with the number of units (ranges of the data) that are done and of all units. `say` is called with each message for
    the user.

    Raise `FileNotFoundError` if an input does not exist. Raise `FileExistsError` if `settings.out` is a file, holds
    files that this command did not write, or holds tokens of other inputs and `settings.overwrite` is False. Raise
    `ValueError` for an option out of range, and for data that cannot be read or leaves training or validation without
    text. Raise `ChildProcessError` if a worker process was killed. After a kill, a signal or a full disk, the same call
    resumes.
    """
    check_kind(settings.tokenizer)
    for option, value, least, most in (
        ("--processes", settings.processes, 1, 1024),
        ("--vocab-size", settings.vocab_size, len(SPECIAL_TOKENS) + 256, 2**28),
    ):
        if not least <= value <= most:
            raise ValueError(f"{option} {value}: expected {least} to {most:,}")
    out = settings.out
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out}: is a file; expected a folder")
    with copied(settings.data) as data, copied(settings.valid) as valid:
        originals = dict(zip([*data, *valid], [*settings.data, *settings.valid], strict=True))
        units = plan(data, valid, _keeps(settings.tokenizer), say)
        made_from = [_described(units, originals), _inputs(settings, units, originals)]
        plan_hash = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
        return _in_folder(settings, units, plan_hash, show, say)


def _in_folder(
    settings: PrepareSettings,
    units: list[Unit],
    plan_hash: str,
    show: Callable[[int, int], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write train.bin, valid.bin, tokenizer.json and data.json into `settings.out`. Return the content of data.json.

    `prepare` lists its keys. `units` are ranges of the data to tokenise, and `plan_hash` identifies the inputs. If the
    folder already holds the files of that hash, this function returns at once. If a stopped run with that hash left the
    token files of single units, it resumes from them. With `settings.overwrite`, it deletes the folder first instead.
    `show(done, total)` is called with the number of units that are done and of all units, `say` with messages for the
    user.

    Raise `FileExistsError`, before anything is deleted, if the folder holds files that this command did not write.
    Without `settings.overwrite`, also raise it for tokens of other inputs. Raise `ValueError` for bad data, after the
    files that were made from it are deleted. Raise `ChildProcessError` if a worker process was killed, and `OSError` if
    a file cannot be read or written. Both messages state how many units are done. An `Interrupted` passes through with
    the same statement in its attribute `saved`.
    """
    out, parts = settings.out, settings.out / PARTS
    if (
        not settings.overwrite
        and _record(out / RECORD).get("plan") == plan_hash
        and all((out / name).exists() for name in FILES)
    ):
        _sweep(out)
        shutil.rmtree(parts, ignore_errors=True)
        say(f"{out}: prepared from the same data already, nothing is left to do")
        return _record(out / RECORD)
    inside = {path.name for path in out.iterdir()} if out.exists() else set()
    foreign = sorted(name for name in inside - {PARTS, *FILES} if not _JOINING.fullmatch(name))
    if foreign:
        raise FileExistsError(
            f"--out {out}: holds what this command did not write ({foreign[0]}); choose another folder"
        )
    resumed = not settings.overwrite and _made_from(parts / "plan.json") == plan_hash
    if inside and not resumed:
        if not settings.overwrite:
            raise FileExistsError(f"--out {out}: holds other data, or a part of it; give --overwrite to replace it")
        (out / RECORD).unlink(missing_ok=True)  # first: it says that the others are whole
        shutil.rmtree(out)
    existed = out.exists()
    try:
        parts.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        write_json(parts / "plan.json", {"plan": plan_hash})
        return _prepare(settings, units, plan_hash, show, say)
    except Interrupted as stopped:
        stopped.saved = f"stopped by {stopped}; {_progress(parts, len(units))}, and the same command resumes"
        raise
    except BrokenProcessPool:
        raise ChildProcessError(
            f"--out {out}: a worker was killed, perhaps for want of memory; {_progress(parts, len(units))}, and the "
            "same command with fewer --processes resumes"
        ) from None
    except NotWritten as error:
        progress = f"{_progress(parts, len(units))}, and the same command resumes"
        raise NotWritten(error.errno, f"{error.strerror}; {progress}") from None
    except OSError as error:
        raise OSError(
            error.errno,
            f"--out {out}: {error.strerror or error}; {_progress(parts, len(units))}, and the same command resumes",
        ) from None
    except ValueError:
        # Bad input: the parts that were made of it are of no use.
        shutil.rmtree(parts if existed else out, ignore_errors=True)
        raise


def _prepare(
    settings: PrepareSettings,
    units: list[Unit],
    plan_hash: str,
    show: Callable[[int, int], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Tokenise the units that are not done yet, join the tokens of all units and write data.json.

    A unit is a range of the data; see `Unit`. The tokenizer is made first, unless a stopped run left it. Then the
    tokens of each unit are written to the subfolder .parts of `settings.out`. The caller has to make this subfolder,
    and `_prepare` removes it at the end. train.bin, valid.bin and tokenizer.json are written before data.json.
    `plan_hash` identifies the inputs and goes into data.json. `show(done, total)` is called with the number of units
    that are done and of all units, `say` with messages for the user. Return the content of data.json. Raise
    `ValueError` if no document is for training or none for validation.
    """
    parts = settings.out / PARTS
    if not (parts / "tokenizer.json").exists():
        texts = sample(units, settings.text_column) if settings.tokenizer in ("bpe", "char") else []
        made = make_tokenizer(settings.tokenizer, texts, settings.vocab_size)
        with writing(parts / "tokenizer.json", "it is made anew"):
            save_tokenizer(made, parts / "tokenizer.json")
    text = (parts / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = parse_tokenizer(text)
    dtype = "uint16" if vocabulary_size(tokenizer) <= 2**16 else "uint32"
    jobs = [(i, unit, text, str(parts), dtype, settings.text_column) for i, unit in enumerate(units)]
    waiting = [job for job in jobs if not _is_done(parts, job[0], dtype)]
    if len(waiting) < len(jobs):
        say(f"resuming: {len(jobs) - len(waiting)} of {len(jobs)} parts were done before")
    done = len(jobs) - len(waiting)
    show(done, len(jobs))
    for _ in _run(waiting, settings.processes):
        done += 1
        show(done, len(jobs))

    reports = [json.loads((parts / f"{i:06d}.json").read_text()) for i in range(len(units))]
    for part, use in (("train", "training"), ("valid", "validation")):
        if not any(report[part]["documents"] for report in reports):
            raise ValueError(f"{', '.join(settings.data)}: no document is for {use}; give more text, or --valid")
    if empty := sum(report["empty"] for report in reports):
        say(f"{empty:,} rows without text in {settings.text_column!r} are left out")
    counts: dict[str, int] = {}
    for part in ("train", "valid"):
        start = special_ids(tokenizer)["start_token"]
        ids = _chunks([parts / f"{i:06d}.{part}" for i in range(len(units))], DTYPES[dtype])
        counts[f"{part}_documents"] = sum(report[part]["documents"] for report in reports)
        path = settings.out / f"{part}.bin"
        with writing(path, "it is made anew"):
            counts[f"{part}_tokens"] = write_token_file(path, ids, dtype, tokenizer, start)
    with writing(settings.out / "tokenizer.json", "it is made anew"):
        save_tokenizer(tokenizer, settings.out / "tokenizer.json")
    record = {"data": list(settings.data), "tokenizer": settings.tokenizer, "vocabulary": vocabulary_size(tokenizer)}
    record |= {"dtype": dtype, **counts, "plan": plan_hash}
    write_json(settings.out / RECORD, record)
    shutil.rmtree(parts)
    return record


def _keeps(tokenizer: str) -> Keeps | None:
    """Return a function `keeps(text, index)` that is True if a cut at that index of a text changes no token, or None.

    `tokenizer` is a kind ("bpe", "byte" or "char") or the path of a tokenizer.json. For a kind the result is None: the
    indices at which the module `cuts` cuts a text never change a token of these tokenizers, so none has to be tested.
    """
    return None if tokenizer in ("bpe", "byte", "char") else keeps_tokens(make_tokenizer(tokenizer, [], 0))


def _described(units: Sequence[Unit], originals: dict[str, str]) -> list[dict[str, Any]]:
    """Return the fields of each unit as a dict by name. The dicts go into the hash that identifies the inputs.

    `originals` maps the path of a source, or of a pipe's temporary copy, to the name that the user gave. This name
    replaces the path in the field "source".
    """
    return [asdict(unit) | {"source": originals.get(unit.source, unit.source)} for unit in units]


def _inputs(settings: PrepareSettings, units: Sequence[Unit], originals: dict[str, str]) -> list[Any]:
    """Return [files, tokenizer, vocabulary size, text column]: what the token files depend on besides the units.

    The last three are the settings of that name. `files` has [path, size in bytes, time of change in nanoseconds] for
    each file of the units and for the tokenizer's. A pipe has [name, SHA-256 of the content] instead, and a Hugging
    Face data set has no entry. `originals` maps the path of a pipe's temporary copy to the pipe's name. The result is
    hashed as JSON.
    """
    paths = dict.fromkeys(unit.source for unit in units if unit.kind != "hf")
    if Path(settings.tokenizer).exists():
        tokenizer = Path(settings.tokenizer)
        paths[str(tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer)] = None
    stamps: list[list[Any]] = []
    for path in paths:
        if path in originals and is_piped(originals[path]):
            content = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    content.update(block)
            stamps.append([originals[path], content.hexdigest()])
        else:
            status = Path(path).stat()
            stamps.append([path, status.st_size, status.st_mtime_ns])
    return [stamps, settings.tokenizer, settings.vocab_size, settings.text_column]


def _run(jobs: Sequence[tuple], processes: int) -> Iterator[int]:
    """Call `tokenise(*job)` for each job in up to `processes` worker processes. Yield a job's index when it is done.

    A job is the tuple of the arguments of `tokenise`, of which the index is the first. Jobs may end in any order. With
    one process or a single job, this process itself does the work.

    An error in a job ends the workers and is raised. After a `ValueError`, all jobs that precede the failed job in
    `jobs` are finished first. If some of them fail too, the error of the one that comes first in `jobs` is raised. A
    killed worker raises `BrokenProcessPool`.
    """
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            yield tokenise(*job)
        return
    # Nothing is written to this pipe. Its end, which this process alone holds, closes with it, however it dies.
    watched, held = os.pipe()
    try:
        # Forked workers share the modules; each tokenises on one core.
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(processes, len(jobs)), context, _start_worker, (watched, held)) as pool:
            try:
                futures = [pool.submit(tokenise, *job) for job in jobs]
                for future in as_completed(futures):
                    if isinstance(future.exception(), ValueError):
                        for earlier in futures:  # these began before it
                            earlier.result()
                    yield future.result()
            except BaseException:
                os.close(held)  # the workers end now, in the middle of a unit
                held = -1
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        os.close(watched)
        if held >= 0:
            os.close(held)


def _start_worker(watched: int, held: int) -> None:
    """Set up a worker process: it tokenises on one core, ignores Ctrl-C, and ends at SIGTERM and with its parent.

    `watched` and `held` are the read end and the write end of a pipe on which nothing is written. This function closes
    `held` in the worker. Only the parent keeps it open, so a read from `watched` returns when the parent ends. A thread
    waits for that.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.close(held)
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()


def _end_with(watched: int) -> None:
    """Wait until the parent ends or closes its end of a pipe, the write end. Then end this process.

    `watched` is the file descriptor of the read end. The exit code is 1, and no clean-up code runs.
    """
    os.read(watched, 1)  # returns when the parent's end is closed
    os._exit(1)


def tokenise(index: int, unit: Unit, tokenizer: str, parts: str, dtype: str, text_column: str) -> int:
    """Tokenise a unit (a range of the data, see `Unit`) and write its ids into the folder `parts`. Return `index`.

    `index` is the unit's number. For 7 the files are 000007.train and 000007.valid, which hold raw ids of type `dtype`
    ("uint16" or "uint32"). Last comes 000007.json, with the numbers of documents, tokens and rows without text. Each
    document begins with the start token. Rows without text are left out. `tokenizer` is the text of a tokenizer.json.
    `text_column` is the column of a table that holds the text.
    """
    made, keeps = _tokenizer(tokenizer)
    start = special_ids(made)["start_token"]
    report: dict[str, Any] = {part: {"documents": 0, "tokens": 0} for part in ("train", "valid")} | {"empty": 0}
    batch: list[tuple[str, bool, str]] = []
    with writing(Path(parts, f"{index:06d}"), "its part is made anew"), ExitStack() as stack:
        files = {}
        for part in ("train", "valid"):
            temporary = stack.enter_context(replacing(Path(parts, f"{index:06d}.{part}"), flush=False))
            files[part] = stack.enter_context(temporary.open("wb"))

        def flush() -> None:
            """Encode the texts of `batch`, append their ids to the files, count them in `report`, and clear `batch`.

            All of these are local variables of `tokenise`: `batch` holds (part, begins, text), `files` the open files
            by part. A text that begins a document gets the start token in front.
            """
            encoded = encode_documents(made, [text for *_, text in batch])
            for (part, begins, _), ids in zip(batch, encoded, strict=True):
                files[part].write(np.array([start, *ids] if begins else ids, DTYPES[dtype]).tobytes())
                report[part]["documents"] += begins
                report[part]["tokens"] += len(ids) + begins
            batch.clear()

        length = 0
        for part, begins, text in documents(unit, text_column, keeps):
            if not text:
                report["empty"] += 1
                continue
            batch.append((part, begins, text))
            length += len(text)
            if len(batch) == _BATCH or length >= _BATCH_TEXT:
                flush()
                length = 0
        flush()
    write_json(Path(parts, f"{index:06d}.json"), report)
    return index


@lru_cache(maxsize=1)
def _tokenizer(text: str) -> tuple[Tokenizer, Keeps]:
    """Return (tokenizer, function `keeps(text, index)`) for the text of a tokenizer.json. The last result is cached.

    The function returns True if a cut of the text at that index changes no token.
    """
    tokenizer = parse_tokenizer(text)
    return tokenizer, keeps_tokens(tokenizer)


def _chunks(paths: Sequence[Path], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield the ids in files of raw ids of type `dtype`, file by file, as arrays of at most 2**20 ids."""
    for path in paths:
        with path.open("rb") as file:
            while len(ids := np.fromfile(file, dtype, _CHUNK)):
                yield ids


def _is_done(parts: Path, index: int, dtype: str) -> bool:
    """Return True if unit `index` has a report in the folder `parts`, and its files have the sizes that it states.

    The report is a file such as 000007.json; if it is damaged, return False. `dtype` is the type of the ids in the
    files, "uint16" or "uint32".
    """
    try:
        report = read_object(parts / f"{index:06d}.json")
        counts = [
            report["empty"],
            *(report[part][name] for part in ("train", "valid") for name in ("tokens", "documents")),
        ]
        sizes = {part: report[part]["tokens"] * DTYPES[dtype].itemsize for part in ("train", "valid")}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    files = {part: parts / f"{index:06d}.{part}" for part in sizes}
    return all(type(count) is int for count in counts) and all(
        file.exists() and file.stat().st_size == sizes[part] for part, file in files.items()
    )


def _sweep(out: Path) -> None:
    """Remove the temporary files that a killed preparation left in the folder `out` and in its subfolder .parts.

    In `out` itself, these are only the partial copies of train.bin, valid.bin, tokenizer.json and data.json. In .parts,
    if that folder exists, they are all files whose name ends in .partial. Every other file stays.
    """
    for path in [*out.iterdir(), *((out / PARTS).iterdir() if (out / PARTS).exists() else ())]:
        if _JOINING.fullmatch(path.name) or (path.parent != out and path.name.endswith(PARTIAL)):
            path.unlink()


def _progress(parts: Path, units: int) -> str:
    """Return the progress for a message, "3 of 8 parts are done in FOLDER": FOLDER is `parts`, and 8 is `units`.

    3 is the number of units whose report, a file such as 000007.json, is in the folder.
    """
    done = sum(1 for path in parts.glob("*.json") if path.stem.isdigit()) if parts.exists() else 0
    return f"{done} of {units} parts are done in {parts}"


def _made_from(path: Path) -> str | None:
    """Return the hash of the inputs that a stopped preparation was working on.

    `path` is the plan.json that it left in the folder .parts. The hash is in the field "plan". Return None if the file
    is missing or damaged, or has no such field.
    """
    try:
        return read_object(path).get("plan")
    except (OSError, ValueError):
        return None


def _record(path: Path) -> dict[str, Any]:
    """Return the content of the data.json at `path`: a dict as `prepare` returns it.

    Its fields are data, tokenizer, dtype, plan, vocabulary, and train_documents, train_tokens, valid_documents and
    valid_tokens. Return {} if the file is missing or damaged, lacks a field, or has one of another type.
    """
    try:
        record = read_object(path)
    except (OSError, ValueError):
        return {}
    return record if all(type(record.get(name)) is kind for name, kind in _FIELDS.items()) else {}


def sample(units: Sequence[Unit], text_column: str) -> Iterator[str]:
    """Yield pieces of the training text of `units`, from which a vocabulary is learned.

    The generator stops after the piece that brings the sum to 100 × 2**20 characters or more, or at the end of the
    data. Units are taken from all over the data, in the order of a hash. Text for validation is skipped. `text_column`
    is the column of a table that holds the text. Rows without text yield "".
    """
    room = SAMPLE
    for unit in sorted(units, key=lambda unit: hashlib.sha256(repr(unit).encode()).digest()):
        if unit.part == "valid":
            continue
        for part, _, text in documents(unit, text_column):
            if part == "train":
                room -= len(text)
                yield text
            if room <= 0:
                return
