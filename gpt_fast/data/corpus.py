"""Text in memory for pre-training: the user's files, or the Python standard library that every machine has."""

from __future__ import annotations

import sysconfig
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .._memory import available, utf8_size
from .._memory import size as in_bytes
from .reading.pipes import copied
from .sources import VALID_FRACTION as VALID_FRACTION
from .sources import Unit, held_out, plan
from .sources import documents as documents_of

STDLIB = "standard library"
# Folders of the standard library left out: what pip installed, tests (half of all the text, much of it generated),
# tables of characters, and the help topics, which are one 700 kB literal.
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
}
_COST = 8  # bytes of memory for each byte of text: the text, its pieces, and tokens of four bytes, up to one for a byte
_OVERHEAD = 64  # bytes of text that a document counts for besides its own
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "_sysconfig_vars")  # written anew on each machine


@dataclass(frozen=True)
class Document:
    """A text with its name.

    Attributes:
        name: Path below the folder in which the text was found, with forward slashes. For a row of a table, ":" and a
            number follow, which tells rows of one range of the table apart.
        text: The text.
    """

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and held-out documents.

    Attributes:
        source: "standard library", or the paths that were read.
        train: Documents for training.
        valid: Documents held out for validation.
    """

    source: str
    train: list[Document]
    valid: list[Document]


def read_corpus(paths: Sequence[Path] | None, text_column: str = "text") -> Corpus:
    r"""Read the text of some paths, or of the standard library, and hold out a tenth for validation.

    Each file of plain text is one document, and so is each row of a table. If there are ten files of plain text or
    more, whole files are held out, chosen by a hash of their names. If there are fewer, the last tenth of each is held
    out. Of the rows of tables, one in ten is held out. Rows without text are left out, with a warning. The same files
    always give the same split.

    Args:
        paths: Files, folders, .zip files, `hf:NAME` for a Hugging Face data set, or `-` for standard input. If it is
            None or empty, the text is the source of Python's standard library.
        text_column: Column of a table that holds the text.

    Returns:
        A `Corpus` with the documents for training and those for validation.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A path is empty or holds something else than text or a table, no document is left for training or
            for validation, the text takes more memory than is left, or this Python comes without its source.

    Example:
        ```python
        import pathlib, tempfile
        from gpt_fast import data

        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "text.txt")
            path.write_text("To be, or not to be.\n" * 100)
            print(len(data.read_corpus([path]).train))  # 1
        ```
    """
    if not paths:
        documents = read_stdlib()
        train, valid = split_by_file(documents, group_by_package=True)
        return Corpus(STDLIB, train, valid)
    source = ", ".join(map(str, paths))
    with copied([str(path) for path in paths]) as sources:
        found = _read(plan(sources, say=warnings.warn), text_column, source)
    for part, use in (("train", "training"), ("valid", "validation")):
        if not found[part]:
            raise ValueError(f"{source}: no document is for {use}; give more text")
    return Corpus(source, found["train"], found["valid"])


def read_documents(path: Path, text_column: str = "text") -> list[Document]:
    """Return all documents of one path, without holding any out for validation.

    `path` is a file, a folder, a .zip, `hf:NAME` for a Hugging Face data set, or `-` for standard input. Each file of
    plain text is one document, and so is each row of a table, whose text is in the column `text_column`. Rows without
    text are left out, with a warning. Raise `FileNotFoundError` if the path does not exist, and `ValueError` if it is
    empty, is neither text nor a table, or takes more memory than is left.
    """
    with copied([str(path)]) as sources:
        return _read(plan([], sources, say=warnings.warn), text_column, str(path))["valid"]


def _read(units: list[Unit], text_column: str, source: str) -> dict[str, list[Document]]:
    """Return {"train": documents, "valid": documents} with the text of `units`, each a range of a file or data set.

    A unit of plain text is for training or for validation. A unit of table rows may be for both: then each tenth row is
    for validation. A document is named like its file; ":" and a number follow for a row of a table. `text_column` is
    the column of a table that holds the text. Rows without text are left out, with one warning. `source` names the data
    in messages.

    Raises:
        ValueError: There is no text at all, or it takes more memory than is left. Too much text is refused before
            reading if its size is known, else at the row or piece with which it becomes too much.
    """
    room = available()
    _check_room(source, sum(unit.end - unit.start for unit in units if unit.kind == "text" and unit.end), room)
    size = 0
    texts: dict[str, list[tuple[str, list[str]]]] = {"train": [], "valid": []}
    empty = 0
    for unit in units:
        for number, (part, begins, text) in enumerate(documents_of(unit, text_column), start=1):
            size += utf8_size(text) + _OVERHEAD * begins
            _check_room(str(unit.file) if unit.kind != "hf" else unit.source, size, room)
            if not text:
                empty += 1
            elif begins:
                texts[part].append((unit.name if unit.kind == "text" else f"{unit.name}:{number}", [text]))
            else:
                texts[part][-1][1].append(text)
    if not any(map(str.strip, (piece for read in texts.values() for _, pieces in read for piece in pieces))):
        raise ValueError(f"{source}: empty; expected UTF-8 text")
    if empty:
        warnings.warn(f"{source}: {empty:,} rows without text in {text_column!r} are left out", stacklevel=3)
    return {part: [Document(name, "".join(pieces)) for name, pieces in read] for part, read in texts.items()}


def _check_room(source: str, size: int, room: int) -> None:
    """Raise `ValueError` if `size` bytes of text, at eight bytes of memory for each, take more than `room` bytes.

    `room` is the free memory in bytes. The eight bytes hold the text, its pieces and its tokens. `source` names the
    text in the message.

    Raises:
        ValueError: The text and its tokens need more than `room` bytes.
    """
    if _COST * size > room:
        raise ValueError(
            f"{source}: {in_bytes(size)} of text or more, held in memory with its tokens; expected at most "
            f"{in_bytes(room // _COST)}, by the memory that is left; gpt-fast prepare makes token files of any amount"
        )


def read_stdlib() -> list[Document]:
    """Return each module of this Python's standard library as a `Document`, sorted by path.

    A document's name is the module's path below the library's folder. Modules in `SKIPPED_FOLDERS`, such as tests and
    installed packages, files with `SKIPPED_PREFIXES`, blank modules and modules that are not in UTF-8 are left out.

    Raises:
        ValueError: There are fewer than 20 modules, because this Python comes without its source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.intersection(parts[:-1]) or parts[0].startswith(SKIPPED_PREFIXES):
            continue
        text = _utf8_or_none(path)
        if text and text.strip():
            documents.append(Document("/".join(parts), text))
    if len(documents) < 20:
        raise ValueError(
            f"{root}: this Python comes without the source of its standard library; name a corpus with --data"
        )
    return documents


def split_by_file(documents: list[Document], group_by_package: bool = False) -> tuple[list[Document], list[Document]]:
    """Hold out about a tenth of the text for validation, in whole documents.

    Documents are tried in the order of a hash of their names. Each is held out only if its number of characters fits
    into what is left of the tenth, so there may be none.

    Args:
        documents: The documents to split.
        group_by_package: Hold out a tenth of each top-level folder separately, instead of a tenth of all the text.

    Returns:
        (training, validation), two lists of documents in the order of `documents`.
    """
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(package(document.name) if group_by_package else "", []).append(document)
    names: set[str] = set()
    for group in groups.values():
        names |= held_out([(document.name, len(document.text)) for document in group])
    train = [document for document in documents if document.name not in names]
    valid = [document for document in documents if document.name in names]
    return train, valid


def package(name: str) -> str:
    """Return the first folder of a module's path, "json" for "json/decoder.py", or "" for a module in no folder."""
    return name.split("/")[0] if "/" in name else ""


def _utf8_or_none(path: Path) -> str | None:
    """Return the text of a file, or None if the file is not in UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
