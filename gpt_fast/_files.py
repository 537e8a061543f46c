"""Files that a reader sees whole or not at all, whatever happens to the process that writes them."""

import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # the ending of a temporary name: a kill in the middle of a write leaves such a file


@contextmanager
def replacing(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield the path of a new empty file beside `path`, which takes the name of `path` when the block ends.

    The new file replaces a file that has this name. If the block raises, the new file is removed and `path` stays as it
    was. The temporary name is unpredictable and the file is created exclusively, so no symbolic link is followed. With
    `flush` the content has reached the disk before the name changes, and so has the new name on return. Raises
    `OSError` where the file cannot be written, for example in a folder that does not exist.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{PARTIAL}")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # not mkstemp: others may read it
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # some writers make a file that only its owner can read
        if flush:
            sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if flush:
        sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a new empty folder beside `path`, which takes the name of `path` when the block ends, with the mode 0o755.

    Missing parents of `path` are made. If the block or the renaming raises, the folder is removed, and so are the
    parents made for it that are empty. Raises `OSError` where the folder cannot be made, or if `path` is a file or a
    folder with content.
    """
    made = [folder for folder in path.parents if not folder.exists()]  # innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp's folders are the owner's alone
        folder.rename(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            if not any(parent.iterdir()):
                parent.rmdir()
        raise


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, as 64 lower-case hexadecimal digits."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    r"""Write `text` to `path` in UTF-8, so that readers see the old file or the whole new one.

    A lone surrogate, which UTF-8 cannot hold, becomes an escape such as \ud800. Raises `OSError` where the file cannot
    be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON in UTF-8, indented by 2, so that readers see the old file or the whole new one.

    Text beyond ASCII is not escaped. NaN and infinities become NaN and Infinity, which strict parsers refuse: see
    `finite`.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def finite(value: Any) -> Any:
    """Return `value`, nested dicts and lists for JSON, with None for each float that is NaN or infinite.

    The argument is not changed: dicts and lists are copied, and tuples become lists. Keys and other values stay as they
    are.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def sync(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, have reached the disk.

    Raises `OSError` if that fails.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
