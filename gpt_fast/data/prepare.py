"""Text, however much, to token files: cut into units of work, tokenised by several processes, joined.

A unit is a part of a file, or of a data set. Its tokens are written to a file of their own, whole or not at all, so
that what was done when a preparation was stopped need not be done again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .._files import replacing, write_json
from .corpus import held_out
from .sources import (
    PERIOD,
    PREFIX,
    Unit,
    cut_into_units,
    data_set,
    documents,
    kind_of,
    place_to_cut,
    size_of,
    text_files,
)
from .token_files import DTYPES, write_token_file
from .tokenizer import encode_documents, make_tokenizer, parse_tokenizer, save_tokenizer, special_ids, vocabulary_size

ROWS = 10_000  # rows of a data set in one unit
SAMPLE = 100 << 20  # bytes that a vocabulary is learned from
PARTS, RECORD = ".parts", "data.json"


@dataclass(frozen=True)
class PrepareSettings:
    """The options of `gpt-fast prepare`."""

    out: Path
    data: tuple[str, ...]
    valid: tuple[str, ...] = ()
    tokenizer: str = "bpe"
    vocab_size: int = 32_768
    text_column: str = "text"
    processes: int = 1
    overwrite: bool = False


def prepare(settings: PrepareSettings, show: Callable[[int, int], None], say: Callable[[str], None]) -> dict[str, Any]:
    """Writes train.bin, valid.bin, tokenizer.json and data.json into `settings.out`; returns what data.json says."""
    if settings.processes < 1:
        raise ValueError(f"--processes {settings.processes}: wanted at least 1")
    out = settings.out
    units = plan(settings)
    plan_hash = hashlib.sha256(json.dumps([list(map(asdict, units)), _inputs(settings)]).encode()).hexdigest()
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out}: is a file; wanted a folder")
    parts = out / PARTS
    if _made_from(out / RECORD) == plan_hash and not settings.overwrite:
        say(f"{out}: prepared from the same data already, nothing is left to do")
        return json.loads((out / RECORD).read_text(encoding="utf-8"))
    known = {RECORD, PARTS, "train.bin", "valid.bin", "tokenizer.json"}
    foreign = sorted({path.name for path in out.iterdir()} - known) if out.exists() else []
    if foreign:
        raise FileExistsError(
            f"--out {out}: holds what this command did not write ({foreign[0]}); choose another folder"
        )
    going_on = _made_from(parts / "plan.json") == plan_hash and not settings.overwrite
    if out.exists() and any(out.iterdir()) and not going_on:
        if not settings.overwrite:
            raise FileExistsError(f"--out {out}: holds other data, or a part of it; give --overwrite to replace it")
        shutil.rmtree(out)
    existed = out.exists()
    try:
        parts.mkdir(parents=True, exist_ok=True)
        write_json(parts / "plan.json", {"plan": plan_hash})
        return _prepare(settings, units, plan_hash, show, say)
    except OSError as error:
        raise OSError(error.errno, f"--out {out}: {error.strerror}") from None
    except ValueError:
        # Bad input: what was done of it is of no use.
        shutil.rmtree(parts if existed else out, ignore_errors=True)
        raise


def _prepare(
    settings: PrepareSettings,
    units: list[Unit],
    plan_hash: str,
    show: Callable[[int, int], None],
    say: Callable[[str], None],
) -> dict[str, Any]:
    parts = settings.out / PARTS
    if not (parts / "tokenizer.json").exists():
        texts = sample(units, settings.text_column) if settings.tokenizer in ("bpe", "char") else []
        made = make_tokenizer(settings.tokenizer, texts, settings.vocab_size)
        save_tokenizer(made, parts / "tokenizer.json")
    text = (parts / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = parse_tokenizer(text)
    dtype = "uint16" if vocabulary_size(tokenizer) <= 2**16 else "uint32"
    jobs = [(i, unit, text, str(parts), dtype, settings.text_column) for i, unit in enumerate(units)]
    waiting = [job for job in jobs if not _is_done(parts, job[0], dtype)]
    if len(waiting) < len(jobs):
        say(f"going on: {len(jobs) - len(waiting)} of {len(jobs)} parts were done before")
    done = len(jobs) - len(waiting)
    show(done, len(jobs))
    for _ in _run(waiting, settings.processes):
        done += 1
        show(done, len(jobs))

    reports = [json.loads((parts / f"{i:06d}.json").read_text()) for i in range(len(units))]
    counts: dict[str, int] = {}
    for part in ("train", "valid"):
        documents = sum(report[part]["documents"] for report in reports)
        if documents == 0:
            raise ValueError(
                f"no document is for {'training' if part == 'train' else 'validation'}; give more text, or --valid"
            )
        pieces = (np.fromfile(parts / f"{i:06d}.{part}", DTYPES[dtype]) for i in range(len(units)))
        start = special_ids(tokenizer)["start_token"]
        tokens = write_token_file(settings.out / f"{part}.bin", pieces, dtype, tokenizer, start)
        counts |= {f"{part}_documents": documents, f"{part}_tokens": tokens}
    save_tokenizer(tokenizer, settings.out / "tokenizer.json")
    record = {"data": list(settings.data), "tokenizer": settings.tokenizer, "vocabulary": vocabulary_size(tokenizer)}
    record |= {"dtype": dtype, **counts, "plan": plan_hash}
    write_json(settings.out / RECORD, record)
    shutil.rmtree(parts)
    return record


def plan(settings: PrepareSettings) -> list[Unit]:
    """The units of all sources, in their order: the same for the same files."""
    chosen = [(source, "valid") for source in settings.valid]
    chosen += [(source, "train" if settings.valid else "both") for source in settings.data]
    files: list[tuple[Path, str, str, str]] = []
    units: list[Unit] = []
    for source, part in chosen:
        if source.startswith(PREFIX):
            rows = len(data_set(source))
            units += [Unit(source, "hf", i, min(i + ROWS, rows), part) for i in range(0, rows, ROWS)]
        else:
            root = Path(source) if Path(source).is_dir() else Path(source).parent
            found = text_files(Path(source))
            files += [(path, path.relative_to(root).as_posix(), kind_of(path), part) for path in found]
    texts = [(name, size_of(path)) for path, name, kind, part in files if kind == "text" and part == "both"]
    valid = held_out(texts) if len(texts) >= 10 else None
    for path, name, kind, part in files:
        if kind == "jsonl" or part != "both":
            units += cut_into_units(path, kind, 0, size_of(path), part)
        elif valid is not None:
            units += cut_into_units(path, kind, 0, size_of(path), "valid" if name in valid else "train")
        else:  # too few files to hold whole ones out: the last tenth of each
            size = size_of(path)
            cut = place_to_cut(path, size - size // PERIOD, size)
            units += cut_into_units(path, kind, 0, cut, "train") + cut_into_units(path, kind, cut, size, "valid")
    return units


def _inputs(settings: PrepareSettings) -> list[Any]:
    """All that the result depends on besides the units: files by size and time."""
    paths = [
        path
        for source in (*settings.data, *settings.valid)
        if not source.startswith(PREFIX)
        for path in text_files(Path(source))
    ]
    if Path(settings.tokenizer).exists():
        paths.append(Path(settings.tokenizer))
    stamps = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    return [stamps, settings.tokenizer, settings.vocab_size, settings.text_column]


def _run(jobs: Sequence[tuple], processes: int) -> Iterator[int]:
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            yield tokenise(*job)
        return
    # Forked workers share the modules; each tokenises on one core.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), initializer=_one_core) as pool:
        futures = [pool.submit(tokenise, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _one_core() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def tokenise(index: int, unit: Unit, tokenizer: str, parts: str, dtype: str, text_column: str) -> int:
    """Writes a unit's tokens for training and for validation, and then the report that says so."""
    return _tokenise(index, unit, _tokenizer(tokenizer), Path(parts), DTYPES[dtype], text_column)


@lru_cache(maxsize=1)
def _tokenizer(text: str) -> Tokenizer:
    return parse_tokenizer(text)


def _tokenise(index: int, unit: Unit, tokenizer: Tokenizer, parts: Path, dtype: np.dtype, text_column: str) -> int:
    start = special_ids(tokenizer)["start_token"]
    report: dict[str, dict[str, int]] = {}
    collected: dict[str, list[np.ndarray]] = {"train": [], "valid": []}
    counts = {"train": 0, "valid": 0}
    batch: list[tuple[str, bool, str]] = []

    def flush() -> None:
        for (part, begins, _), ids in zip(
            batch, encode_documents(tokenizer, [text for *_, text in batch]), strict=True
        ):
            collected[part].append(np.array([start, *ids] if begins else ids, dtype))
            counts[part] += begins
        batch.clear()

    for row in documents(unit, text_column):
        batch.append(row)
        if len(batch) == 256:
            flush()
    flush()
    for part, pieces in collected.items():
        tokens = np.concatenate(pieces) if pieces else np.empty(0, dtype)
        with replacing(parts / f"{index:06d}.{part}", flush=False) as temporary:
            tokens.tofile(temporary)
        report[part] = {"documents": counts[part], "tokens": len(tokens)}
    write_json(parts / f"{index:06d}.json", report)
    return index


def _is_done(parts: Path, index: int, dtype: str) -> bool:
    report = parts / f"{index:06d}.json"
    if not report.exists():
        return False
    sizes = json.loads(report.read_text())
    return all(
        (parts / f"{index:06d}.{part}").stat().st_size == sizes[part]["tokens"] * DTYPES[dtype].itemsize
        for part in ("train", "valid")
    )


def _made_from(path: Path) -> str | None:
    return json.loads(path.read_text(encoding="utf-8")).get("plan") if path.is_file() else None


def sample(units: Sequence[Unit], text_column: str) -> Iterator[str]:
    """Training text for a vocabulary, at most 100 MB, units taken from all over the data."""
    room = SAMPLE
    for unit in sorted(units, key=lambda unit: hashlib.sha256(repr(unit).encode()).digest()):
        for part, _, text in documents(unit, text_column):
            if part == "train" and room > 0:
                room -= len(text)
                yield text
