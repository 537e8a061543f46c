"""Where text comes from: files and folders, compressed ones, tables in JSON lines, Hugging Face data sets.

Every source is cut into units, ranges that can be read on their own.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

UNIT = 16 << 20  # bytes of a file in one unit
PERIOD = 10  # of so many rows one is for validation
PREFIX = "hf:"
# A place where cutting a text changes no token of byte-level BPE, whose words end before or after white space.
_CUT = re.compile(rb"[!-~]\n(?=[!-~])")


@dataclass(frozen=True)
class Unit:
    """`start` to `end` of a source: bytes (uncompressed ones of a .gz), or rows of a data set. `part` is train, valid
    or, for rows, both: then one of ten is for validation. `begins`: does a text begin here, or go on?"""

    source: str
    kind: str  # text, jsonl or hf
    start: int
    end: int
    part: str
    begins: bool = True


def text_files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_dir():
        found = [path]
    else:
        found = [f for f in sorted(path.rglob("*")) if f.is_file() and not _hidden(f.relative_to(path))]
        if not found:
            raise ValueError(f"{path}: no files in this folder")
    kept = [f for f in found if f.stat().st_size]
    if not kept:
        raise ValueError(f"{path}: empty; wanted UTF-8 text")
    return kept


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def kind_of(path: Path) -> str:
    return "jsonl" if path.name.removesuffix(".gz").endswith(".jsonl") else "text"


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def size_of(path: Path) -> int:
    """Bytes, uncompressed."""
    if path.suffix != ".gz":
        return path.stat().st_size
    return _uncompressed(path, path.stat().st_mtime_ns)


@lru_cache
def _uncompressed(path: Path, written: int) -> int:
    try:
        with _open(path) as file:
            return sum(len(chunk) for chunk in iter(lambda: file.read(1 << 20), b""))
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: damaged, or not gzip ({error})") from None


def cut_into_units(path: Path, kind: str, start: int, end: int, part: str) -> list[Unit]:
    """A range of a file in units; a .gz, which can only be read from its beginning, in one."""
    units: list[Unit] = []
    while start < end:
        stop = end if path.suffix == ".gz" else min(end, start + UNIT)
        if stop < end:
            stop = place_to_cut(path, stop, end, rb"\n" if kind == "jsonl" else None)
        units.append(Unit(str(path), kind, start, stop, part, begins=not units))
        start = stop
    return units


def place_to_cut(path: Path, place: int, end: int, pattern: bytes | None = None) -> int:
    """The first byte from `place` on where a line begins, `end` where none does."""
    search = re.compile(pattern) if pattern else _CUT
    with _open(path) as file:
        file.seek(place)
        while place < end:
            block = file.read(1 << 16)
            if not block:
                return end
            if found := search.search(block):
                return min(end, place + found.end())
            # Two bytes again, so that no cut at a block's end is missed.
            back = min(2, len(block) - 1)
            place += len(block) - back
            file.seek(place)
    return end


def documents(unit: Unit, text_column: str) -> Iterator[tuple[str, bool, str]]:
    """(part, does a document begin here?, text) for each piece of a unit."""
    if unit.kind == "text":
        yield from _pieces(unit)
        return
    for number, text in enumerate(_rows(unit, text_column)):
        part = unit.part if unit.part != "both" else "valid" if number % PERIOD == PERIOD - 1 else "train"
        if text:
            yield part, True, text


def _pieces(unit: Unit) -> Iterator[tuple[str, bool, str]]:
    """A text's range, no more than a unit of it at a time."""
    path, place, begins = Path(unit.source), unit.start, unit.begins
    rest = b""
    with _open(path) as file:
        file.seek(place)
        while place < unit.end:
            block = file.read(min(UNIT, unit.end - place))
            if not block:
                raise ValueError(f"{path}: changed while it was read")
            place += len(block)
            block = rest + block
            cuts = [found.end() for found in _CUT.finditer(block)] if place < unit.end else [len(block)]
            cut = cuts[-1] if cuts else 0
            if cut:
                yield unit.part, begins, _decode(path, block[:cut], place - len(block))
                begins = False
            rest = block[cut:]


def _decode(path: Path, content: bytes, place: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 (byte {place + error.start}: {error.reason}); convert it or leave it out"
        ) from None


def _rows(unit: Unit, text_column: str) -> Iterator[str]:
    if unit.kind == "hf":
        table = data_set(unit.source)
        if text_column not in table.column_names:
            raise ValueError(
                f"{unit.source}: no column {text_column!r}; it has {', '.join(map(repr, table.column_names))}"
            )
        yield from (str(text) for text in table[unit.start : unit.end][text_column])
        return
    path, place = Path(unit.source), unit.start
    with _open(path) as file:
        file.seek(place)
        while place < unit.end:
            line = file.readline()
            if not line:
                return
            if line.strip():
                yield _field(path, place, _decode(path, line, place), text_column)
            place += len(line)


def _field(path: Path, place: int, line: str, text_column: str) -> str:
    try:
        row = json.loads(line.lstrip("\ufeff"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, byte {place}: not JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
        got = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{path}, byte {place}: wanted an object with text in {text_column!r}, got {got}")
    return row[text_column]


def data_set(source: str) -> Any:
    """`hf:NAME` or `hf:NAME:SPLIT` of the Hub, or a folder that `save_to_disk` wrote."""
    from importlib.util import find_spec

    if find_spec("datasets") is None:
        raise ValueError(f"{source}: needs datasets; pip install gpt-fast[hf]")
    return _load_data_set(source)


@lru_cache(maxsize=4)
def _load_data_set(source: str) -> Any:
    import datasets

    name, _, split = source.removeprefix(PREFIX).partition(":")
    try:
        if Path(name).is_dir():
            table = datasets.load_from_disk(name)
            return table if isinstance(table, datasets.Dataset) else table[split or "train"]
        return datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{source}: cannot be loaded ({error})") from None
