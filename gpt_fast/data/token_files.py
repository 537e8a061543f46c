"""Files of token ids, read where they are asked for: ours, llm.c's and, by an explicit option, files without a header.

Ours begin with 1,024 bytes: eight of magic, JSON padded with spaces, and the CRC-32 of these 1,020 bytes. The JSON
holds `dtype`, `count`, `crc32` of the ids, `vocabulary` (a hash of the tokenizer's) and `document_token`, which begins
each document. The ids follow, little-endian. llm.c's files have 256 int32 (magic, version, count, zeros) in front of
ids that are uint16, or uint32 for Llama 3. nanoGPT's have nothing in front; only `raw_dtype` tells what they hold.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .. import _llmc
from .._files import replacing
from .sources import VALID_FRACTION
from .stored_ids import StoredIds
from .stream import TokenStream
from .tokenizer import vocabulary_size

SUFFIX = ".bin"
MAGIC, HEADER = b"gptfast2", 1024
OLD_MAGIC = b"gptfast1"  # its header has no checksum
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_CHUNK = 1 << 22
_CHECKED = HEADER - 4  # bytes of the header in front of its own checksum
_HIGH_WORDS = 16  # the upper halves of uint32 ids are below this for any vocabulary of up to a million
_FOR_VALIDATION = re.compile(r"(?<![a-z])val(id|idation)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class TokenFile:
    """An open token file: its path, its ids and the fields of its header, which are None for another library's file."""

    path: Path
    tokens: StoredIds
    header: dict[str, Any] | None  # None: not one of ours


def token_files(paths: Sequence[Path]) -> list[Path]:
    """Return the token files (.bin) among `paths` and directly in the folders among them, or [] if there are none.

    The files are in the order of `paths`, and sorted by name within a folder. Raise `ValueError` if there are both
    token files and paths without one.
    """
    found: list[Path] = []
    text: list[Path] = []
    for path in paths:
        inside = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path] if path.suffix == SUFFIX else []
        found += inside
        text += [] if inside else [path]
    if found and text:
        raise ValueError(
            f"--data {text[0]}: no token file, and {found[0]} is one; expected text alone or token files alone"
        )
    return found


def read_token_file(path: Path, raw_dtype: str | None = None) -> TokenFile:
    """Open a token file as a `TokenFile`: its path, its ids and the fields of its header. The ids are not read yet.

    The file is one of this library, of llm.c, or has no header. For the last two, `TokenFile.header` is None. For a
    file without a header `raw_dtype` has to name the type of its ids, "uint16" or "uint32"; for the others it has to be
    None. Raise `FileNotFoundError` if there is no such file. Raise `ValueError` if it is damaged, of an earlier version
    or another kind, of another size than its header states, or holds no ids.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a token file")
    with path.open("rb") as file:
        head = file.read(HEADER)
    # One of the two survives any single damage, so a damaged file of ours is never taken for a raw one.
    ours = head.startswith(MAGIC) or head[len(MAGIC) :].startswith(b'{"dtype": ')
    foreign = _llmc.magic(head)
    if raw_dtype is not None and (ours or foreign is not None):
        kind = "gpt-fast" if ours else "llm.c"
        raise ValueError(f"--raw-dtype {raw_dtype}: {path} has a header of {kind}; expected a file without a header")
    if head.startswith(OLD_MAGIC):
        raise ValueError(
            f"{path}: a token file of an earlier gpt-fast, whose header has no checksum; expected one of this version: "
            f"{_prepare_command(path)}"
        )
    if ours:
        header = _parse(path, head)
        dtype = DTYPES[header["dtype"]]
        _check_size(path, HEADER, header["count"], dtype)
        return TokenFile(path, _opened(path, dtype, HEADER, header["count"]), header)
    if foreign is not None:
        dtype, count = _llmc_header(path, head, foreign)
        _check_size(path, 4 * _llmc.HEADER, count, dtype)
        return TokenFile(path, _opened(path, dtype, 4 * _llmc.HEADER, count), None)
    size = path.stat().st_size
    if raw_dtype is None:
        raise ValueError(
            f"{path}: {size:,} bytes without a header of gpt-fast or llm.c; expected one, or --raw-dtype uint16 "
            "(nanoGPT's files) or uint32"
        )
    if raw_dtype not in DTYPES:
        raise ValueError(f"{path}: --raw-dtype {raw_dtype}; expected one of {', '.join(DTYPES)}")
    dtype = DTYPES[raw_dtype]
    if size == 0 or size % dtype.itemsize:
        raise ValueError(f"{path}: {size:,} bytes; expected a multiple of {dtype.itemsize} for {raw_dtype} ids")
    return TokenFile(path, _opened(path, dtype, 0, size // dtype.itemsize), None)


def write_token_file(
    path: Path, pieces: Iterable[np.ndarray], dtype: str, tokenizer: Tokenizer, document_token: int
) -> int:
    """Write a token file that holds the ids of `pieces`, one array after the other, and return the number of ids.

    The header stores `dtype` ("uint16" or "uint32"), the number of ids, a checksum, a hash of the tokenizer's
    vocabulary, and `document_token`, the id that begins each document. The token itself is not added to the ids. The
    ids have to fit `dtype`; this is not checked. The file is written under a temporary name and renamed when it is
    complete.
    """
    count = crc = 0
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(bytes(HEADER))
        for piece in pieces:
            content = piece.astype(DTYPES[dtype]).tobytes()
            crc = zlib.crc32(content, crc)
            count += len(piece)
            file.write(content)
        header = {"dtype": dtype, "count": count, "crc32": crc, "vocabulary": vocabulary_hash(tokenizer)}
        file.seek(0)
        file.write(pack_header(header | {"document_token": document_token}))
    return count


def pack_header(fields: dict[str, Any]) -> bytes:
    """Return the 1,024 bytes of a token file's header: magic bytes, `fields` as JSON, and a checksum of both.

    `fields` has the keys dtype, count, crc32, vocabulary and document_token, which `write_token_file` explains. Their
    JSON is padded with spaces to 1,012 bytes and must not be longer. Neither the keys nor the length are checked.
    """
    head = MAGIC + json.dumps(fields).encode().ljust(_CHECKED - len(MAGIC))
    return head + struct.pack("<I", zlib.crc32(head))


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """Return the SHA-256, in hexadecimal digits, of all tokens with their ids, added tokens included."""
    vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def check_vocabulary(file: TokenFile, tokenizer: Tokenizer) -> None:
    """Raise `ValueError` if the file's header has the hash of another vocabulary than the tokenizer's.

    A file whose format stores no such hash (`file.header` is None) is accepted.
    """
    if file.header is not None and file.header["vocabulary"] != vocabulary_hash(tokenizer):
        raise ValueError(
            f"{file.path}: made with another vocabulary than that of the tokenizer given; expected its own"
        )


def check_content(file: TokenFile, tokenizer: Tokenizer) -> int:
    """Read all ids of a token file once and return their CRC-32.

    Raise `ValueError` if an id lies beyond the tokenizer's vocabulary, or the CRC-32 differs from the header's. For a
    file without a checksum (`file.header` is None), also raise it if all ids are 0, or if the uint16 ids look like the
    halves of uint32 ids: every second one is nearly 0.
    """
    crc, size = 0, vocabulary_size(tokenizer)
    even = odd = 0  # the largest ids at even and at odd places
    for first in range(0, len(file.tokens), _CHUNK):
        piece = file.tokens[first : first + _CHUNK]
        crc = zlib.crc32(piece.tobytes(), crc)
        even = max(even, int(piece[::2].max()))
        odd = max(odd, int(piece[1::2].max(initial=0)))
        if (largest := max(even, odd)) >= size:
            raise ValueError(
                f"{file.path}: holds the id {largest}, the tokenizer has {size}; expected the tokenizer, and the type "
                f"of ids, that it was made with"
            )
    if file.header is not None:
        if crc != file.header["crc32"]:
            raise ValueError(
                f"{file.path}: damaged, its ids have the checksum {crc:08x}; expected {file.header['crc32']:08x}"
            )
    elif even == odd == 0:
        raise ValueError(f"{file.path}: all {len(file.tokens):,} ids are 0; expected the tokens of a text")
    elif file.tokens.dtype.itemsize == 2 and odd < _HIGH_WORDS <= even:
        raise ValueError(f"{file.path}: every second uint16 is nearly 0, as in a file of uint32; expected uint16 ids")
    return crc


def split_streams(files: Sequence[TokenFile]) -> tuple[TokenStream, TokenStream]:
    """Return (training stream, validation stream) of the ids in token files, each in the order of `files`.

    Files whose names contain the word val, valid or validation, in any case, are for validation. If there are none, the
    last tenth of all ids is. Raise `ValueError` if no file is left for training.
    """
    valid = [file.tokens for file in files if _FOR_VALIDATION.search(file.path.name)]
    train = [file.tokens for file in files if not _FOR_VALIDATION.search(file.path.name)]
    if not train:
        raise ValueError(f"{files[0].path}: no file to train on, all are named for validation")
    if valid:
        return TokenStream(train), TokenStream(valid)
    stream = TokenStream(train)
    cut = round(len(stream) * (1 - VALID_FRACTION))
    return stream.part(0, cut), stream.part(cut, len(stream))


def _opened(path: Path, dtype: np.dtype, offset: int, count: int) -> StoredIds:
    """Return `count` ids of type `dtype` from byte `offset` of the file at `path` on. They are not read yet.

    Raise `ValueError` if `count` is 0.
    """
    if count == 0:
        raise ValueError(f"{path}: holds no ids; expected at least one")
    return StoredIds(path, dtype, offset, count)


def _check_size(path: Path, header: int, count: int, dtype: np.dtype) -> None:
    """Raise `ValueError` unless the file has the size of a header of `header` bytes and `count` ids of type `dtype`."""
    size, expected = path.stat().st_size, header + count * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path}: {size:,} bytes; expected {expected:,} by its header, so it was cut off or added to")


def _llmc_header(path: Path, head: bytes, number: int) -> tuple[np.dtype, int]:
    """Return (dtype of the ids, number of ids) of llm.c's token file that begins with the bytes `head`.

    `head` has 1,024 bytes, or fewer if the file is shorter. `number` is llm.c's magic number in its first four bytes,
    and `path` is for messages. Raise `ValueError` if the number is that of another kind of file, or the header is cut
    off or damaged.
    """
    if number not in _llmc.TOKENS:
        raise ValueError(f"{path}: {_llmc.describe(number)}, by llm.c; expected a token file")
    if len(head) < 4 * _llmc.HEADER:
        raise ValueError(
            f"{path}: {len(head)} bytes; expected a header of {4 * _llmc.HEADER} by llm.c, so it was cut off"
        )
    version, dtype = _llmc.TOKENS[number]
    _, found, count, *rest = (int(word) for word in np.frombuffer(head, "<i4"))
    if found != version:
        raise ValueError(f"{path}: llm.c's version {found}; expected {version} ({dtype}) under magic {number}")
    if count < 1 or any(rest):
        raise ValueError(
            f"{path}: its header by llm.c is damaged (count {count}); expected a count of 1 or more, then zeros"
        )
    return DTYPES[dtype], count


def _parse(path: Path, head: bytes) -> dict[str, Any]:
    """Return the fields of a token file's header: dtype, count, crc32, vocabulary and document_token.

    `head` is the file's first 1,024 bytes, and `path` is for messages. Raise `ValueError` if the first bytes or the
    checksum are wrong, or a field is missing or has another type.
    """
    checked, crc = head[:_CHECKED], head[_CHECKED:HEADER]
    if not head.startswith(MAGIC) or crc != struct.pack("<I", zlib.crc32(checked)):
        raise ValueError(f"{path}: its header is damaged; expected one whose checksum is right")
    try:
        header = json.loads(checked[len(MAGIC) :])
        right = header["dtype"] in DTYPES and type(header["count"]) is int and header["count"] >= 0
        right = right and type(header["crc32"]) is int and type(header["document_token"]) is int
        right = right and type(header["vocabulary"]) is str
    except (ValueError, KeyError, TypeError, RecursionError):
        right = False
    if not right:
        raise ValueError(f"{path}: its header is damaged; expected dtype, count, crc32, vocabulary and document_token")
    return header


def _prepare_command(path: Path) -> str:
    """Return the command line of `gpt-fast prepare` that makes the token file at `path` anew, for a message.

    It is "gpt-fast prepare --data DATA --tokenizer TOKENIZER.json --out NEW_FOLDER". DATA are the sources that a
    readable data.json beside the file lists, else the placeholder TEXT.
    """
    try:
        data = json.loads((path.parent / "data.json").read_text(encoding="utf-8"))["data"]
        text = " ".join(map(shlex.quote, data))
    except (OSError, ValueError, KeyError, TypeError):
        text = "TEXT"
    return f"gpt-fast prepare --data {text} --tokenizer TOKENIZER.json --out NEW_FOLDER"
