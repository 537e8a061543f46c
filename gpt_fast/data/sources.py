"""Sources of data, cut into units: ranges of text that can be read on their own.

A source is a file, a folder, a .zip, or a Hugging Face data set (`hf:NAME`). Its text is read by `documents`.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

from .reading import rows
from .reading.cuts import WINDOW, Keeps, next_place, pieces
from .reading.files import TEXT_BLOCK, TextFile, find, kind_of, layout_of, open_utf8, place_in_file, size_of
from .reading.rows import HF
from .reading.separated import Say, ignore, tsv_quoting

UNIT = 8 << 20  # bytes of a file in one unit
ROWS = 10_000  # rows of a data set in one unit
PERIOD = 10  # of so many rows one is for validation
VALID_FRACTION = 0.1  # the share of a text, a table or token files that is held out for validation
WHOLE_FILES = 10  # of so many files whole ones are held out, of fewer the last tenth of each


@dataclass(frozen=True)
class Unit:
    """Part of a source that can be read on its own: bytes of a text, row groups of a parquet table, or rows.

    `start` and `end` count bytes of the file's text in UTF-8, row groups, or rows of a Hugging Face data set. An `end`
    of None is the end of the file. `part` is "train", "valid", or for rows also "both": then one row in ten is for
    validation. `begins` is True if a document begins at `start`. `name` identifies the file and `member` is its name
    inside a zip archive.
    """

    source: str
    kind: str  # text, jsonl, json, csv, tsv, parquet or hf
    start: int
    end: int | None
    part: str
    begins: bool = True
    row: int = 0  # of rows: how many count as before it, when one of ten is chosen
    name: str = ""
    member: str = ""  # of a zip archive

    @property
    def file(self) -> TextFile:
        """Return the file, or the member of a zip archive, that holds this unit. No unit of a data set has one."""
        return TextFile(Path(self.source), self.name, self.member)


def plan(data: Sequence[str], valid: Sequence[str] = (), keeps: Keeps | None = None, say: Say = ignore) -> list[Unit]:
    """Return the units of all sources, first from `valid`, then from `data`, each in the order given.

    A unit is a range of a file, or rows of a data set, for training, for validation or for both (see `Unit`). A source
    is the path of a file, a folder or a .zip, or `hf:NAME` for a Hugging Face data set. The same files always give the
    same units. Sources in `valid` serve validation, and sources in `data` training. If `valid` is empty, a tenth
    of `data` is held out: every tenth row of tables, whole text files if there are ten or more, else the last tenth of
    each text file. `keeps(text, index)` is True if a cut of a text at that index changes no token (see `keeps_tokens`);
    None allows each cut. `say` is called with a message about the quotes of each .tsv that has any.

    Raises:
        FileNotFoundError: A source does not exist.
        ValueError: A source cannot be read.
    """
    chosen = [(source, "valid") for source in valid] + [(source, "train" if valid else "both") for source in data]
    found = [(source, part, [] if source.startswith(HF) else find(Path(source))) for source, part in chosen]
    named = _distinct([file for _, _, files in found for file in files])
    kinds = {file: kind_of(file, Path(source).is_dir() or bool(file.member)) for source, _, fs in found for file in fs}
    sizes = [(named[f], size_of(f)) for _, part, files in found for f in files if part == "both" and kinds[f] == "text"]
    held = held_out(sizes) if len(sizes) >= WHOLE_FILES else None
    units: list[Unit] = []
    for source, part, files in found:
        if source.startswith(HF):
            count = len(rows.data_set(source))
            units += [
                Unit(source, "hf", i, min(i + ROWS, count), part, row=i, name=source) for i in range(0, count, ROWS)
            ]
        for file in files:
            whole = part
            if part == "both" and kinds[file] == "text" and held is not None:
                whole = "valid" if named[file] in held else "train"
            units += _units(TextFile(file.path, named[file], file.member), kinds[file], whole, keeps)
            if kinds[file] == "tsv" and (told := tsv_quoting(units[-1].file)[1]):
                say(told)
    return units


def held_out(sizes: Sequence[tuple[str, int]]) -> set[str]:
    """Return the names of about a tenth of some files, by size. `sizes` holds the (name, size) of each file.

    Files are tried in the order of a hash of their names. Each is taken only if its size fits into what is left of a
    tenth of all sizes. So the result may be empty, and the same `sizes` always give the same one.
    """
    names: set[str] = set()
    room = VALID_FRACTION * sum(size for _, size in sizes)
    for name, size in sorted(sizes, key=lambda entry: hashlib.sha256(entry[0].encode()).digest()):
        if size <= room:
            names.add(name)
            room -= size
    return names


def documents(unit: Unit, text_column: str, keeps: Keeps | None = None) -> Iterator[tuple[str, bool, str]]:
    """Yield (part, begins, text) for each piece of the text in a unit, which is a range of the data (see `Unit`).

    `part` is "train" or "valid", and `begins` is True if a document begins with this piece. `text` has at most 32,768
    characters, or is "" for a table's row without text. Each row of a table is a document. In a unit for both parts,
    each tenth row is "valid". `text_column` is the column of a table to read. `keeps(text, index)` is True if a cut of
    a text at that index changes no token; None allows each cut. Raise `ValueError` for text that is not UTF-8 or holds
    NUL bytes, and for rows without the column.
    """
    if unit.kind == "text":
        begins = unit.begins
        for piece in pieces(_decoded(unit), keeps):
            yield unit.part, begins, piece
            begins = False
        return
    for number, text in enumerate(_rows(unit, text_column), start=unit.row):
        part = unit.part if unit.part != "both" else "valid" if number % PERIOD == PERIOD - 1 else "train"
        if not text:
            yield part, True, ""
        begins = True
        for piece in pieces(iter([text]), keeps):
            yield part, begins, piece
            begins = False


def place_to_cut(file: TextFile, place: int, end: int, keeps: Keeps | None = None) -> int:
    """Return the position of a byte, from `place` on, at which the file's text can be cut.

    `next_place` searches the 65,536 bytes from `place` on, or fewer if `end` comes first, for the best index. If it
    finds none, or the bytes are not UTF-8, the result is the first byte from `place` on that begins a character.
    `place`, `end` and the result count bytes of the file's text in UTF-8. `keeps(text, index)` is True if a cut at that
    index changes no token; None allows each cut.
    """
    with open_utf8(file, place) as opened:
        window = opened.read(min(WINDOW, end - place))
    first = next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), len(window))
    try:
        text = codecs.getincrementaldecoder("utf-8")("strict").decode(window[first:])
    except UnicodeDecodeError:  # reading the text will name the place
        return place + first
    cut = next_place(text, keeps)
    return place + first + (len(text[:cut].encode()) if cut is not None else 0)


def _distinct(files: Sequence[TextFile]) -> dict[TextFile, str]:
    """Return {file: name} with a different name for each file: its own, with parent folders in front as needed.

    Two entries for the same file on disk keep the same name. Files are chosen for validation by a hash of their names.
    If many files had one name, all or none would be chosen.
    """
    names = {file: file.name for file in files}
    real = {file: (os.path.realpath(file.path), file.member) for file in names}
    while True:
        owners: dict[str, set[tuple[str, str]]] = {}
        for file, name in names.items():
            owners.setdefault(name, set()).add(real[file])
        changed = False
        for file, name in names.items():
            if len(owners[name]) > 1:
                base = _with_parent(file, name)
                changed |= base != name
                names[file] = base
        if not changed:
            return names


def _with_parent(file: TextFile, name: str) -> str:
    """Return `name` with one more parent folder of the file's path in front, or `name` if the path has no more.

    `name` is the end of the file's path, such as "text.txt", which becomes "books/text.txt". For a member of a zip
    archive, `name` is the end of the archive's path followed by the member's name. The folder is put in front of the
    archive: "a.zip/text.txt" becomes "books/a.zip/text.txt".
    """
    parts = Path(os.path.abspath(file.path)).parts
    depth = name.removesuffix(f"/{file.member}" if file.member else "").count("/") + 2
    if depth > len(parts):
        return name
    return "/".join([*parts[-depth:], *([file.member] if file.member else [])])


def _units(file: TextFile, kind: str, part: str, keeps: Keeps | None) -> list[Unit]:
    """Return the units (see `Unit`) of one file: ranges of its text, row groups of a parquet table, or the whole file.

    `kind` is the file's format (see `kind_of`). `part` is "train", "valid", or "both" if a tenth of the file is to be
    held out. For "both", the last tenth of a text file makes units for "valid" and the rest units for "train". Units of
    tables keep the part "both".

    Text and JSON lines are cut into ranges of about 8 MiB. A file that is compressed, recoded or in an archive is not
    cut: it makes one unit, or for text with "both" one unit for each of the two parts. A parquet table makes a unit for
    each row group, and a file of another format makes one unit. `keeps(text, index)` is True if a cut of a text at that
    index changes no token; None allows each cut.
    """
    unit = partial(Unit, str(file.path), kind, name=file.name, member=file.member)
    if kind == "parquet":
        ends = list(accumulate(rows.parquet_groups(file)))
        return [unit(i, i + 1, part, row=first) for i, first in enumerate([0, *ends[:-1]][: len(ends)])]
    seekable = layout_of(file).plain and not file.member
    if kind != "text" and not (kind == "jsonl" and seekable):
        return [unit(0, None, part)]
    size = size_of(file)
    if kind == "jsonl":
        cuts = _line_cuts(file, size)
        # The rows of earlier units are not counted. Steps of 3 let units with few rows hold out one of ten, too.
        return [unit(a, b, part, row=3 * i) for i, (a, b) in enumerate(zip([0, *cuts], [*cuts, size], strict=True))]
    if part != "both":
        ranges = [(0, size, part)]
    else:
        cut = min(size, place_to_cut(file, size - max(1, size // PERIOD), size, keeps))
        ranges = [(0, cut, "train"), (cut, size, "valid")]
    units: list[Unit] = []
    for start, end, which in ranges:
        begin, begins = start, True
        while begin < end:
            stop = min(end, begin + UNIT)
            if stop < end:
                stop = min(end, place_to_cut(file, stop, end, keeps)) if seekable else end
            units.append(unit(begin, stop, which, begins))
            begin, begins = stop, False
    return units


def _line_cuts(file: TextFile, size: int) -> list[int]:
    """Return positions in bytes, each 8 MiB or a little more behind the one before, at which lines of a file begin.

    The first is that far behind the beginning of the file's text, from which positions count. The file is uncompressed
    UTF-8, and `size` is the length of its text in bytes. A short file has no such position.
    """
    cuts: list[int] = []
    place = UNIT
    while place < size:
        with open_utf8(file, place - 1) as opened:
            while (line := opened.readline(TEXT_BLOCK)) and not line.endswith(b"\n"):
                place += len(line)
            place += len(line) - 1
        if place >= size:
            break
        cuts.append(place)
        place += UNIT
    return cuts


def _decoded(unit: Unit) -> Iterator[str]:
    """Yield the text of a unit (see `Unit`) of a text file, block by block: bytes `start` to `end` of the file's text.

    Raise `ValueError` if the file is not UTF-8, has a NUL byte, or has become shorter.
    """
    file, place = unit.file, unit.start
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    with open_utf8(file, unit.start) as opened:
        while True:
            wanted = TEXT_BLOCK if unit.end is None else min(TEXT_BLOCK, unit.end - place)
            block = opened.read(wanted) if wanted else b""
            if not block and unit.end is not None and place < unit.end:
                raise ValueError(f"{file}: changed while it was read; expected {unit.end} bytes of text")
            begin = place - len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                where = place_in_file(file, begin + error.start)
                raise ValueError(f"{file}: not UTF-8 ({where}: {error.reason}); convert it or leave it out") from None
            if "\0" in text:
                where = place_in_file(file, begin + len(text[: text.index("\0")].encode()))
                raise ValueError(
                    f"{file}: has a NUL byte ({where}); expected text in UTF-8, or in UTF-16 with a byte order mark"
                )
            if text:
                yield text
            if not block:
                return
            place += len(block)


def _rows(unit: Unit, text_column: str) -> Iterator[str]:
    """Return an iterator over the text in `text_column` of each row of a unit (see `Unit`), "" for a row without text.

    The unit is a part of a table or of a Hugging Face data set. Reading a row without the column raises `ValueError`.
    """
    if unit.kind == "hf":
        assert unit.end is not None
        found = rows.data_set_rows(unit.source, unit.start, unit.end, text_column)
        return rows.column_texts(unit.source, found, text_column)
    found = rows.file_rows(unit.file, unit.kind, start=unit.start, end=unit.end, column=text_column)
    return rows.column_texts(str(unit.file), found, text_column)
