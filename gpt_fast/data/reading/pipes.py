"""Standard input and named pipes. They can be read once, so they are copied to a file first."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..._disk import writing

STANDARD_INPUT = "-"


def is_piped(source: str | Path) -> bool:
    """Return True if `source` is "-" (standard input) or an existing path that is neither a file nor a folder.

    These are pipes and devices, which can be read only once. A path that does not exist gives False.
    """
    path = Path(source)
    return str(source) == STANDARD_INPUT or (path.exists() and not path.is_file() and not path.is_dir())


@contextmanager
def copied(sources: Sequence[str]) -> Iterator[list[str]]:
    """Yield `sources` with the path of a temporary copy in place of each pipe. The copies are removed at the end.

    A pipe is standard input ("-") or a named pipe, which can be read only once. Without a pipe, the sources are yielded
    as a list and nothing else happens. With one, a `ValueError` raised inside the block is raised again as a plain
    `ValueError`, whose message names the pipe instead of its copy. Raise `OSError` if the folder for temporary files
    has no space left, and `ValueError` for a device that may give bytes without end.
    """
    if not any(map(is_piped, sources)):
        yield list(sources)
        return
    with tempfile.TemporaryDirectory(prefix="gpt-fast-") as folder:
        copies = [
            _copy(source, Path(folder, str(i))) if is_piped(source) else source for i, source in enumerate(sources)
        ]
        try:
            yield copies
        except ValueError as error:
            message = str(error)
            for copy, source in zip(copies, sources, strict=True):
                if copy != source:
                    message = message.replace(copy, "standard input" if source == STANDARD_INPUT else source)
            raise ValueError(message) from None


def _ends(path: Path) -> bool:
    """Return True if reading the pipe or device at `path` ends at some time.

    This is so for pipes, and for a terminal, by Ctrl-D. It is not for a disk and other devices, such as /dev/zero.
    """
    if path.is_block_device():
        return False
    if not path.is_char_device():
        return True
    with path.open("rb") as file:
        return file.isatty()


def _copy(source: str, folder: Path) -> str:
    """Copy standard input ("-") or a named pipe to a new file in `folder`, which is made. Return the file's path.

    The file is called "standard-input", or like the pipe. Raise `ValueError` if `source` is a device that may give
    bytes without end, and `OSError` if the copy cannot be written.
    """
    is_input = source == STANDARD_INPUT
    if not is_input and not _ends(Path(source)):
        raise ValueError(f"{source}: is a device; expected a file, a folder or a pipe")
    folder.mkdir()
    path = folder / ("standard-input" if is_input else Path(source).name)
    with writing(path, f"nothing of {'standard input' if is_input else source} is left; TMPDIR names another folder"):
        if is_input:
            with path.open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        else:
            with Path(source).open("rb") as pipe, path.open("wb") as file:
                shutil.copyfileobj(pipe, file)
    return str(path)
