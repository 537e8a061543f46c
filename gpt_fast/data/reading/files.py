"""Files that hold text, found and opened: compressed or not, in UTF-8 or with the byte order mark of UTF-16 or UTF-32.

Whatever the file, `open_utf8` gives its UTF-8 without a byte order mark, in constant memory.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

TEXT_BLOCK = 1 << 16
ROW = 1 << 26  # bytes, or characters, of one row of a table: a longer one is no row but a damaged or hostile file
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
TOKENS = ".bin"
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
_BOMS = (  # UTF-32's first: UTF-16's is its beginning
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# A file that begins like this is not the text that a user means, even if it is UTF-8.
_NO_TEXT = {
    b"%PDF": "a PDF; convert it to text",
    b"{\\rtf": "an RTF document; convert it to text",
    b"PK\x03\x04": "a zip archive or an office document; convert it to text, or name it .zip",
    b"PAR1": "a parquet table; name it .parquet",
    b"version https://git-lfs.": "a pointer of Git LFS; fetch the file itself with git lfs pull",
}


@dataclass(frozen=True, order=True)
class TextFile:
    """File of text or a table, or a member of a zip archive. `name` identifies the file wherever its folder lies."""

    path: Path
    name: str
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)

    @property
    def suffixes(self) -> tuple[str, str]:
        """Return the endings (format, compression) of the name in lower case, such as (".csv", ".gz").

        Either may be "". For a member of a zip archive they are the endings of the member's name. The compressions are
        .gz, .zst, .bz2 and .xz.
        """
        name = PurePosixPath(self.member or self.path.name.lower())
        packed = name.suffix.lower() if name.suffix.lower() in COMPRESSED else ""
        return PurePosixPath(name.name[: len(name.name) - len(packed)]).suffix.lower(), packed


@dataclass(frozen=True)
class Layout:
    """How a file holds its text: compression ("" for none), encoding, and length of the byte order mark in bytes."""

    compression: str
    encoding: str
    bom: int

    @property
    def plain(self) -> bool:
        """Return True if the file is not compressed and its encoding is UTF-8.

        For a member of a zip archive, the file is the unpacked member, so the compression by the archive does not
        count. If True, a byte's position in the file is its position in the text plus `bom`, the length of the byte
        order mark.
        """
        return not self.compression and self.encoding == "utf-8"


def find(path: Path) -> list[TextFile]:
    """Return the files at `path`: the file itself, or every file below a folder. A .zip archive becomes its members.

    The files of a folder are sorted by path, members by name. Hidden and empty files in folders and archives are
    skipped. Links are followed, and each folder and file is taken once, so links that form a loop do no harm. Raise
    `FileNotFoundError` if `path` does not exist or a link leads nowhere. Raise `ValueError` if every file that is found
    is empty, if none is found, or if an archive is damaged or has an encrypted member.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        found = _walk(path)
        if not found:
            raise ValueError(f"{path}: no files in this folder; expected UTF-8 text")
    else:
        found = [TextFile(path, path.name)]
    found = [member for file in found for member in ([file] if file.path.suffix.lower() != ".zip" else _members(file))]
    kept = [file for file in found if file.member or file.path.stat().st_size]
    if not kept:
        raise ValueError(f"{path}: empty; expected UTF-8 text")
    return kept


def kind_of(file: TextFile, in_folder: bool = False) -> str:
    """Return the format of a file, "text", "jsonl", "json", "csv", "tsv" or "parquet", by its name or else its content.

    The endings .csv, .tsv, .jsonl, .ndjson and .parquet decide alone. A .json file is "json" if it holds an array, and
    "jsonl" if it holds two or more objects, each on a line. A file without an ending is "jsonl" if its first line is an
    object. Other files are "text".

    `in_folder` is True if the file was found in a folder or an archive. A .json file with anything else, such as a
    package.json among source code, is then "text". If `in_folder` is False, a .json file with a single object on a
    single line is "jsonl", and one with anything else is an error.

    Raises:
        ValueError: The file is a token file (.bin), a tar archive, or a document that is not text, such as a PDF. Or it
            is a parquet table that is compressed or in an archive, or a .json file of a form that is not listed above.
    """
    suffix, packed = file.suffixes
    if suffix == TOKENS:
        raise ValueError(f"{file}: a token file by its name; expected text, or pretrain --data to read tokens")
    kind = KINDS.get(suffix, "text")
    if kind == "parquet":
        if packed or file.member:
            raise ValueError(f"{file}: a parquet table inside of another file; expected it unpacked")
        return kind
    if kind in ("csv", "tsv", "jsonl"):
        return kind
    with open_utf8(file) as opened:
        head = opened.read(TEXT_BLOCK)
    for magic, what in _NO_TEXT.items():
        if head.startswith(magic):
            raise ValueError(f"{file}: {what}; expected text")
    if head[257:262] == b"ustar":
        raise ValueError(f"{file}: a tar archive; unpack it and name the folder; expected text")
    if kind == "json":
        form = json_form(file)
        if form in ("json", "jsonl"):
            return form
        if in_folder:
            return "text"
        if form == "object" and _is_one_row(file):
            return "jsonl"
        raise ValueError(
            f"{file}: one JSON value; expected an array of rows, or a row on each line (named .txt it is read as text)"
        )
    if not suffix and _is_object(head.lstrip().partition(b"\n")[0]):
        return "jsonl"  # standard input has no name that tells
    return "text"


def json_form(file: TextFile) -> str:
    """Return the form of a JSON file: "json" for an array, "jsonl" for an object on each line, "object" for one object.

    Return "" for any other value and for a file of blank lines. Only the first two lines that are not blank are read.
    The form is "json" if the first line begins with "[". It is "jsonl" if the first line begins with "{" and ends with
    "}", and the second begins with "{". It is "object" for any other text that begins with "{", even a single line.
    """
    with open_utf8(file) as opened:
        head = opened.readline(ROW).lstrip()
        while head == b"" and (line := opened.readline(ROW)):
            head = line.lstrip()
        behind = b""
        while head.startswith(b"{") and behind == b"" and (line := opened.readline(ROW)):
            behind = line.lstrip()
    if head.startswith(b"{"):
        return "jsonl" if head.rstrip().endswith(b"}") and behind.startswith(b"{") else "object"
    return "json" if head.startswith(b"[") else ""


def too_long() -> str:
    """Return the message for a table's row of more than `ROW` (2**26) bytes, without the file's name."""
    return f"a row of more than {ROW:,} bytes; expected fewer"


@contextmanager
def open_utf8(file: TextFile, start: int = 0) -> Iterator[IO[bytes]]:
    """Yield a binary stream of the file's text in UTF-8, without a byte order mark, from byte `start` of that text on.

    A compressed file is decompressed, and text with the byte order mark of UTF-16 or UTF-32 is recoded. Bytes without
    such a mark are not checked to be UTF-8. The stream is closed when the block ends. Opening a damaged file, or
    reading it inside the block, raises `ValueError`.
    """
    with _named_damage(file):
        layout = layout_of(file)
        with _decompressed(file, layout.compression) as opened:
            if layout.plain and not file.member:
                opened.seek(layout.bom + start)
                yield opened
                return
            opened.read(layout.bom)
            if layout.encoding != "utf-8":
                opened = cast(IO[bytes], io.BufferedReader(_Recoded(file, opened, layout.encoding), TEXT_BLOCK))
            while start > 0 and (skipped := len(opened.read(min(start, TEXT_BLOCK)))):
                start -= skipped
            yield opened


def layout_of(file: TextFile) -> Layout:
    """Return the compression, the encoding and the length of the byte order mark of a file, found from its first bytes.

    The encoding is "utf-8" if there is no mark. Raise `ValueError` if the compression is not the one that the name's
    ending promises, or the file is damaged.
    """
    with _named_damage(file):
        with _raw(file) as raw:
            head = raw.read(8)
        compression = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")
        packed = file.suffixes[1]
        if packed and compression != COMPRESSED[packed]:
            raise ValueError(f"{file}: damaged, or not {COMPRESSED[packed]}; expected what its name says")
        if compression:
            with _decompressed(file, compression) as opened:
                head = opened.read(4)
        bom, encoding = next(((len(bom), name) for bom, name in _BOMS if head.startswith(bom)), (0, "utf-8"))
        return Layout(compression, encoding, bom)


def size_of(file: TextFile) -> int:
    """Return the length of the file's text in bytes of UTF-8, without a byte order mark.

    A file that is compressed, recoded or in an archive is read to its end to find its length. The length is cached as
    long as the file does not change.
    """
    layout = layout_of(file)
    if layout.plain and not file.member:
        return file.path.stat().st_size - layout.bom
    return _read_through(file, file.path.stat().st_mtime_ns)


def place_in_file(file: TextFile, place: int) -> str:
    """Return a position for a message: "byte 7", or "byte 7 of its text" for a file that is compressed or not in UTF-8.

    `place` counts the bytes of the file's text in UTF-8 without a byte order mark. The number in "byte 7" counts the
    mark, the number in "byte 7 of its text" does not.
    """
    layout = layout_of(file)
    return f"byte {place + layout.bom}" if layout.plain else f"byte {place} of its text"


def require(package: str, extra: str, why: str) -> None:
    """Check that the Python package `package` is installed. If not, raise `ValueError`.

    `why` is the file or data set that needs the package, such as "hf:imdb", and `extra` the extra of gpt-fast that
    installs it. The message is "WHY: needs PACKAGE; pip install gpt-fast[EXTRA]".
    """
    if find_spec(package) is None:
        raise ValueError(f"{why}: needs {package}; pip install gpt-fast[{extra}]")


@lru_cache(maxsize=4096)
def _read_through(file: TextFile, written: int) -> int:
    """Read the file and return the length of its text in bytes of UTF-8. The result is cached.

    `written` is the file's time of change in nanoseconds. It is part of the cache's key, so a file that has changed is
    read again.
    """
    with open_utf8(file) as opened:
        return sum(len(block) for block in iter(lambda: opened.read(1 << 20), b""))


def _walk(folder: Path) -> list[TextFile]:
    """Return each file below `folder` once, sorted by path, without hidden files and files in hidden folders.

    The name of each `TextFile` is its path below `folder`. Links are followed. If several paths lead to a file, a path
    that passes no link to a folder is preferred. Raise `FileNotFoundError` for a link that leads nowhere.
    """
    files: dict[str, Path] = {}
    folders, links = [folder], list[Path]()
    seen: set[tuple[int, int]] = set()
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        entries = sorted(
            (e for e in os.scandir(here) if not e.name.startswith(".")), key=lambda e: (e.is_symlink(), e.name)
        )
        for entry in entries:
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(Path(entry.path))
            elif entry.is_file():
                files.setdefault(os.path.realpath(entry.path), Path(entry.path))
            elif entry.is_symlink():
                raise FileNotFoundError(f"{entry.path}: a link to {os.readlink(entry.path)}, which is not there")
    return [TextFile(path, path.relative_to(folder).as_posix()) for path in sorted(files.values())]


def _members(file: TextFile) -> list[TextFile]:
    """Return the members of a zip archive as `TextFile`s, sorted by name, without folders and hidden or empty members.

    Raise `ValueError` if a member is encrypted or the archive is damaged.
    """
    with _named_damage(file), zipfile.ZipFile(file.path) as archive:
        kept = []
        for info in sorted(archive.infolist(), key=lambda info: info.filename):
            parts = PurePosixPath(info.filename).parts
            if info.is_dir() or not info.file_size or any(part.startswith((".", "__MACOSX")) for part in parts):
                continue
            if info.flag_bits & 1:
                raise ValueError(f"{file.path}/{info.filename}: encrypted; expected a member without a password")
            kept.append(TextFile(file.path, f"{file.name}/{info.filename}", info.filename))
        return kept


@contextmanager
def _raw(file: TextFile) -> Iterator[IO[bytes]]:
    """Yield a binary stream of the file's own bytes, still compressed and in the file's encoding.

    For a member of a zip archive these are the bytes of the member, taken out of the archive.
    """
    if not file.member:
        with file.path.open("rb") as opened:
            yield opened
        return
    with zipfile.ZipFile(file.path) as archive, archive.open(file.member) as member:
        yield member


@contextmanager
def _decompressed(file: TextFile, compression: str) -> Iterator[IO[bytes]]:
    """Yield a binary stream of the file's decompressed bytes, in the file's encoding.

    `compression` is "gzip", "zstd", "bzip2", "xz", or "" for none. Raise `ValueError` for zstd if pyarrow is not
    installed.
    """
    with _raw(file) as raw:
        if not compression:
            yield raw
        elif compression == "zstd":
            require("pyarrow", "hf", str(file))
            import pyarrow

            with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd") as stream:
                yield cast(IO[bytes], io.BufferedReader(stream, TEXT_BLOCK))
        else:
            opener: Any = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}[compression]
            with opener(raw, "rb") as stream:
                yield stream


@contextmanager
def _named_damage(file: TextFile) -> Iterator[None]:
    """Turn an error inside the block that means a damaged file or archive into a `ValueError` that names `file`.

    These are the errors of the modules that decompress, such as `zlib.error`, and an `OSError` without an errno. An
    `OSError` with an errno, which the operating system raised, passes unchanged, and so do all others.
    """
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{file}: damaged, or not what its name says ({error})") from None
    except OSError as error:
        if error.errno is not None:  # the disk's, not the archive's
            raise
        raise ValueError(f"{file}: damaged, or not what its name says ({error})") from None


def _is_one_row(file: TextFile) -> bool:
    """Return True if the file holds one JSON object on a single line, and nothing but blank lines beside it."""
    with open_utf8(file) as opened:
        lines = (line.strip() for line in iter(lambda: opened.readline(ROW), b""))
        first, second = next(filter(None, lines), b""), next(filter(None, lines), b"")
    return not second and _is_object(first)


def _is_object(line: bytes) -> bool:
    """Return True if `line` is one complete JSON object."""
    import json

    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


class _Recoded(io.RawIOBase):
    """Binary stream of a text in UTF-8, recoded from `stream`, which holds the text in `encoding`."""

    def __init__(self, file: TextFile, stream: IO[bytes], encoding: str):
        self._file, self._stream, self._encoding = file, stream, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)("strict")
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with the next bytes of UTF-8 and return how many, 0 at the end of the stream.

        Fewer bytes than the buffer has room for may be written. Raise `ValueError` if the stream is not in its
        encoding.
        """
        while not self._ready:
            block = self._stream.read(TEXT_BLOCK)
            try:
                self._ready = self._decoder.decode(block, final=not block).encode("utf-8")
            except UnicodeError as error:
                raise ValueError(
                    f"{self._file}: not {self._encoding.upper()} ({error}); expected what its mark says"
                ) from None
            if not block:
                break
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size
