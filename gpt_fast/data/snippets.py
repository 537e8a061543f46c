"""Labelled table that needs no download: from which package of the standard library does a snippet come?

Ten packages with much source are the classes. Each module is cut into snippets of some lines. Import lines, and every
line that names any of the ten packages, are left out of all snippets, so the answer is never written in the text and
must be told from the code itself. Whole files are held out, the same ones that pre-training holds out: no validation
snippet comes from a file that the model has seen in either stage.
"""

from __future__ import annotations

import re

from .corpus import STDLIB, Document, package, read_corpus
from .tables import Table

NUM_CLASSES = 10
MIN_FILES = 8
MIN_CHARACTERS = 320  # of a snippet: about ten lines, fewer than 128 tokens of BPE
PER_CLASS = 500  # snippets of one package in training, so that none is more than a fair share
VALID_PER_CLASS = 60

_IMPORT = re.compile(r"\s*(from\s+[\w.]+\s+import\b|import\s+\w)")


def snippet_table() -> tuple[Table, Table]:
    """Return training and validation snippets of this Python's standard library, labelled by their package.

    Returns:
        (training, validation), two tables whose texts are snippets of source code and whose labels are names of
        packages. The same Python gives the same tables.

    Raises:
        ValueError: This Python comes without its source.

    Example:
        ```python
        from gpt_fast import data

        train, valid = data.snippet_table()
        print(len(set(train.labels)))  # 10
        ```
    """
    corpus = read_corpus(None)
    names = chosen_packages(corpus.train + corpus.valid)
    return _table(corpus.train, names, PER_CLASS), _table(corpus.valid, names, VALID_PER_CLASS)


def chosen_packages(documents: list[Document]) -> list[str]:
    """Return the names of the ten packages with the most text, sorted by name. There may be fewer than ten.

    Packages of fewer than eight files, and modules in no package, are left out. `documents` are modules, each named by
    its path below the standard library. The amount of text is its number of characters.
    """
    size: dict[str, int] = {}
    files: dict[str, int] = {}
    for document in documents:
        name = package(document.name)
        size[name] = size.get(name, 0) + len(document.text)
        files[name] = files.get(name, 0) + 1
    enough = [name for name in size if name and files[name] >= MIN_FILES]
    return sorted(sorted(enough, key=lambda name: -size[name])[:NUM_CLASSES])


def snippets(text: str, names: list[str]) -> list[str]:
    """Return the lines of `text` in snippets of whole lines, each of 320 characters or a little more.

    Blank lines, imports, and lines that contain one of the packages' `names`, in any case and also inside a word, are
    left out. A last snippet that is shorter is dropped.
    """
    named = re.compile("|".join(map(re.escape, names)), re.IGNORECASE)
    pieces, lines, length = [], [], 0
    for line in text.splitlines():
        if not line.strip() or _IMPORT.match(line) or named.search(line):
            continue
        lines.append(line)
        length += len(line) + 1
        if length >= MIN_CHARACTERS:
            pieces.append("\n".join(lines))
            lines, length = [], 0
    return pieces


def _table(documents: list[Document], names: list[str], per_class: int) -> Table:
    """Return the snippets of those documents that lie in the packages `names`, each labelled with its package.

    Rows are sorted by package, in the order of `names`. If a package has more than `per_class` snippets, about that
    many are taken, evenly spaced.
    """
    found: dict[str, list[str]] = {name: [] for name in names}
    for document in documents:
        if package(document.name) in found:
            found[package(document.name)] += snippets(document.text, names)
    table = Table(STDLIB, [], [])
    for name, texts in found.items():
        step = max(1.0, len(texts) / per_class)  # evenly over the package, not its first files alone
        kept = [texts[int(i * step)] for i in range(int(len(texts) / step))]
        table.texts.extend(kept)
        table.labels.extend([name] * len(kept))
    return table
