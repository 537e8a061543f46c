"""Plain text to pre-train on: files and folders of the user's, or the Python standard library that every machine
has."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STDLIB = "standard library"
VALID_FRACTION = 0.1  # the share of a text, a table or token files that is held out for validation
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
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "_sysconfig_vars")  # written anew on each machine


@dataclass(frozen=True)
class Document:
    """A text with its name: the path below the folder that it was found in, with forward slashes."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out; `source` is "standard library" or the paths they were read from."""

    source: str
    train: list[Document]
    valid: list[Document]


def read_corpus(paths: Sequence[Path] | None) -> Corpus:
    """The text of `paths` (files, or folders with all that is in them), or of the standard library where there are
    none, split into nine parts for training and one for validation. The same files always give the same split.

    Of ten files or more whole ones are held out, chosen by a hash of their names; of fewer the last tenth of each.
    Raises `FileNotFoundError` for a path that does not exist, `ValueError` for one that is empty or not UTF-8, and
    where this Python comes without its source.
    """
    if not paths:
        documents = read_stdlib()
        train, valid = split_by_file(documents, group_by_package=True)
        return Corpus(STDLIB, train, valid)
    documents = [document for path in paths for document in read_path(path)]
    train, valid = split_by_file(documents) if len(documents) >= 10 else split_by_lines(documents)
    return Corpus(", ".join(map(str, paths)), train, valid)


def read_stdlib() -> list[Document]:
    """The modules of the running Python's standard library in the order of their names, without the few not in
    UTF-8."""
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


def read_path(path: Path) -> list[Document]:
    """The text of a file, or of every file below a folder but hidden ones. What is not UTF-8, or empty, is an error."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.is_file() and not _hidden(f.relative_to(path))]
        if not files:
            raise ValueError(f"{path}: no files in this folder")
        documents = [Document(f.relative_to(path).as_posix(), read_text(f)) for f in files]
    else:
        documents = [Document(path.name, read_text(path))]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"{path}: empty; wanted UTF-8 text")
    return documents


def read_text(path: Path) -> str:
    """The file's text, line ends and all."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 (byte {error.start}: {error.reason}); convert it or leave it out"
        ) from None


def split_by_file(documents: list[Document], group_by_package: bool = False) -> tuple[list[Document], list[Document]]:
    """A tenth of the text, in whole files taken in the order of their names' hashes while they fit, is held out: of
    all files, or of each top-level folder on its own."""
    groups: dict[str, list[Document]] = {}
    for document in documents:
        groups.setdefault(package(document.name) if group_by_package else "", []).append(document)
    names: set[str] = set()
    for group in groups.values():
        names |= held_out([(document.name, len(document.text)) for document in group])
    train = [document for document in documents if document.name not in names]
    valid = [document for document in documents if document.name in names]
    return train, valid


def held_out(sizes: Sequence[tuple[str, int]]) -> set[str]:
    """The names of a tenth of what has these names and sizes, taken in the order of the names' hashes while they
    fit."""
    names: set[str] = set()
    room = VALID_FRACTION * sum(size for _, size in sizes)
    for name, size in sorted(sizes, key=lambda entry: hashlib.sha256(entry[0].encode()).digest()):
        if size <= room:
            names.add(name)
            room -= size
    return names


def split_by_lines(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """With too few files to hold whole ones out, the last tenth of each, cut at the end of a line where there is
    one."""
    train, valid = [], []
    for document in documents:
        cut = int(len(document.text) * (1 - VALID_FRACTION))
        cut = document.text.rfind("\n", 0, cut) + 1 or cut
        train.append(Document(document.name, document.text[:cut]))
        valid.append(Document(document.name, document.text[cut:]))
    return train, valid


def package(name: str) -> str:
    """The top-level package of a module's path, "" for a module that is in none."""
    return name.split("/")[0] if "/" in name else ""


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _utf8_or_none(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
