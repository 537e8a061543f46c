"""Files of token ids, mapped into memory: ours, llm.c's and nanoGPT's.

Ours begin with 1,024 bytes: eight of magic, then JSON padded with spaces (`dtype`, `count`, `crc32` of all that
follows, `vocabulary`, a hash of the tokenizer's, and `document_token`, which begins each document), and hold the ids
behind them, little-endian. llm.c's have 256 int32 (magic, version, count) in front, nanoGPT's nothing; both are uint16.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .._files import replacing
from .corpus import VALID_FRACTION
from .stream import TokenStream
from .tokenizer import vocabulary_size

SUFFIX = ".bin"
MAGIC, HEADER = b"gptfast1", 1024
LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER = 20240520, 1, 1024
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_CHUNK = 1 << 22


@dataclass(frozen=True)
class TokenFile:
    path: Path
    tokens: np.ndarray
    header: dict[str, Any] | None  # None: not one of ours


def token_files(paths: Sequence[Path]) -> list[Path]:
    """The token files that `paths` name or hold; none where they are text. Both together are an error."""
    found: list[Path] = []
    text: list[Path] = []
    for path in paths:
        inside = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path] if path.suffix == SUFFIX else []
        found += inside
        text += [] if inside else [path]
    if found and text:
        raise ValueError(
            f"--data {text[0]}: no token file, and {found[0]} is one; wanted text alone or token files alone"
        )
    return found


def read_token_file(path: Path) -> TokenFile:
    """Maps a file; nothing but its header is read."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER)
    if head.startswith(MAGIC):
        header = _parse(path, head)
        dtype = DTYPES[header["dtype"]]
        wanted = HEADER + header["count"] * dtype.itemsize
        if size != wanted:
            raise ValueError(f"{path}: {size:,} bytes, wanted {wanted:,} by its header; it was cut off or added to")
        return TokenFile(path, _mapped(path, dtype, HEADER, header["count"]), header)
    dtype = DTYPES["uint16"]
    numbers = np.frombuffer(head[: len(head) // 4 * 4], "<i4")
    if len(numbers) >= 3 and numbers[0] == LLMC_MAGIC:
        version, count = int(numbers[1]), int(numbers[2])
        wanted = LLMC_HEADER + count * dtype.itemsize
        if version != LLMC_VERSION or size != wanted:
            raise ValueError(
                f"{path}: llm.c's version {version} with {size:,} bytes, wanted version {LLMC_VERSION} with {wanted:,}"
            )
        return TokenFile(path, _mapped(path, dtype, LLMC_HEADER, count), None)
    if size == 0 or size % dtype.itemsize:
        raise ValueError(f"{path}: {size} bytes, wanted a token file of gpt-fast, llm.c or nanoGPT (uint16)")
    return TokenFile(path, _mapped(path, dtype, 0, size // dtype.itemsize), None)


def write_token_file(
    path: Path, pieces: Iterable[np.ndarray], dtype: str, tokenizer: Tokenizer, document_token: int
) -> int:
    """Writes the ids of `pieces` under a temporary name, synced, and renames it; returns how many there are."""
    count = crc = 0
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(bytes(HEADER))
        for piece in pieces:
            content = piece.astype(DTYPES[dtype]).tobytes()
            crc = zlib.crc32(content, crc)
            count += len(piece)
            file.write(content)
        header = {"dtype": dtype, "count": count, "crc32": crc, "vocabulary": vocabulary_hash(tokenizer)}
        text = json.dumps(header | {"document_token": document_token}).encode()
        file.seek(0)
        file.write(MAGIC + text.ljust(HEADER - len(MAGIC)))
    return count


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """A hash of every token with its id."""
    vocabulary = sorted(tokenizer.get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def check_vocabulary(file: TokenFile, tokenizer: Tokenizer) -> None:
    if file.header is not None and file.header["vocabulary"] != vocabulary_hash(tokenizer):
        raise ValueError(f"{file.path}: made with another vocabulary than that of the tokenizer given; wanted its own")


def check_content(file: TokenFile, tokenizer: Tokenizer) -> int:
    """Reads the whole file once and returns its CRC-32. Raises where it is not the one in the header, or where an id is
    beyond the vocabulary."""
    crc, size = 0, vocabulary_size(tokenizer)
    for first in range(0, len(file.tokens), _CHUNK):
        piece = file.tokens[first : first + _CHUNK]
        crc = zlib.crc32(piece.tobytes(), crc)
        if (largest := int(piece.max())) >= size:
            raise ValueError(
                f"{file.path}: holds the id {largest}, the tokenizer has {size}; wanted the one it was made by"
            )
    if file.header is not None and crc != file.header["crc32"]:
        raise ValueError(f"{file.path}: damaged, its checksum is {crc:08x}, wanted {file.header['crc32']:08x}")
    return crc


def split_streams(files: Sequence[TokenFile]) -> tuple[TokenStream, TokenStream]:
    """Training and validation: files with "val" in their names are for validation; without any, the last tenth is."""
    valid = [file.tokens for file in files if "val" in file.path.name]
    train = [file.tokens for file in files if "val" not in file.path.name]
    if not train:
        raise ValueError(f"{files[0].path}: no file to train on, all are named for validation")
    if valid:
        return TokenStream(train), TokenStream(valid)
    cut = round(sum(map(len, train)) * (1 - VALID_FRACTION))
    before, after = [], []
    for array in train:
        before.append(array[:cut])
        after.append(array[cut:])
        cut = max(0, cut - len(array))
    return TokenStream(before), TokenStream(after)


def _mapped(path: Path, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    if count == 0:
        raise ValueError(f"{path}: holds no tokens")
    return np.memmap(path, dtype, "r", offset, (count,))


def _parse(path: Path, head: bytes) -> dict[str, Any]:
    try:
        header = json.loads(head[len(MAGIC) :])
        right = header["dtype"] in DTYPES and header["count"] >= 0 and isinstance(header["crc32"], int)
        right = right and isinstance(header["vocabulary"], str) and isinstance(header["document_token"], int)
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise ValueError(f"{path}: its header is damaged")
    return header
