"""Errors of a disk that is full or fails, with the file's name and what is left."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_OF_RUST = re.compile(r"\(os error (\d+)\)")  # in the messages of safetensors and tokenizers


class NotWritten(OSError):
    """A file that could not be written because the disk is full or fails, with a message for the user."""


@contextmanager
def writing(path: Path, left: str) -> Iterator[None]:
    """Raise `NotWritten` in place of an exception in the block that means a full or failing disk.

    Other exceptions pass. `number_of` decides by the errno: no space, quota exceeded, file too large, or I/O error. The
    message names `path`, the file that is written, and ends with `left`. `left` is a clause without a full stop that
    tells the user what is left, such as "the file before is as it was". A `NotWritten` from the block passes unchanged.
    This context manager writes nothing itself.
    """
    try:
        yield
    except NotWritten:
        raise
    except Exception as error:  # safetensors, tokenizers and torch raise errors of their own for a full disk
        number = number_of(error)
        if number is None:
            raise
        raise NotWritten(number, f"{path}: not written ({os.strerror(number)}); {left}") from None


def number_of(error: BaseException) -> int | None:
    """Return the errno of an error that means a full or failing disk, or None for any other error.

    Such an errno is ENOSPC, EDQUOT, EFBIG or EIO. It is read from "(os error N)" in the message, as libraries in Rust
    write it, else from the attribute `errno`.
    """
    found = _OF_RUST.search(str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    return number if number in _FAILS else None
