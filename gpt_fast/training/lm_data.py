"""Data of a language model: text or token files become streams, and an update's number becomes its batches."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..config import IGNORE, GPTConfig
from ..data.batches import Batch, causal_batch, packed, text_stream
from ..data.corpus import Document, read_corpus
from ..data.masking import mask_tokens
from ..data.reading.pipes import is_piped
from ..data.stream import TokenStream, WindowOrder, mix
from ..data.token_files import check_content, check_vocabulary, read_token_file, split_streams, token_files
from ..data.tokenizer import load_tokenizer, make_tokenizer, parse_tokenizer, special_ids
from .engine.distributed import World
from .runs.folder import special_token

Mask = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]


def masker(tokenizer: Tokenizer, config: GPTConfig) -> Mask:
    """Return a function that hides tokens for masked language modelling in the vocabulary of `tokenizer`.

    The function takes token ids [B, T] and a generator. It returns (inputs, labels), [B, T] each: 15 % of the ordinary
    tokens are chosen, and most of them replaced by the mask token. Labels are the original ids of the chosen tokens and
    -100 elsewhere. Special tokens are never chosen. Raise `ValueError` if `config` has no mask token.
    """
    special = set(special_ids(tokenizer).values())
    ordinary = torch.tensor([i for i in sorted(tokenizer.get_vocab(True).values()) if i not in special])
    return partial(mask_tokens, mask_token=special_token(config, "mask_token"), ordinary=ordinary)


def lm_batch(
    tokens: Tensor, mask: Mask | None, generator: torch.Generator, document_token: int | None, pieces: int = 1
) -> Batch:
    """Return windows of token ids `[B, T]` as a batch for next-token prediction, or with `mask` for masked prediction.

    `mask(tokens, generator)` hides tokens and returns (inputs, labels), both [B, T]. Each window is then cut into
    `pieces` shorter windows of equal length, so `pieces` has to divide T. If `document_token`, the id that begins a
    document, is given, all windows are packed into one row, in which attention does not cross documents or windows. The
    batch's `weight` is the number of predictions.
    """
    length = tokens.shape[1] // pieces
    if mask is None:
        tokens = tokens.reshape(-1, length)
        batch = causal_batch(tokens)
    else:
        inputs, labels = (x.reshape(-1, length) for x in mask(tokens, generator))
        tokens = tokens.reshape(-1, length)
        batch = Batch(inputs, labels, weight=int(labels.ne(IGNORE).sum()))
    if document_token is None:
        return batch
    return packed(batch, tokens, document_token)


def check_division(batch_size: int, parts: int, ranks: int) -> None:
    """Raise `ValueError` unless `batch_size` is a multiple of `parts` · `ranks`: `parts` micro-batches on each rank."""
    if batch_size % (parts * ranks):
        among = f"{parts} parts" + (f" on each of {ranks} ranks" if ranks > 1 else "")
        raise ValueError(
            f"--batch-size {batch_size}: cannot be divided evenly among {among}; expected a multiple of {parts * ranks}"
        )


@dataclass(frozen=True)
class WindowSource:
    """The batches of a run, as a function of the update: `source(step)` is this rank's parts of update `step`.

    Update s takes the windows at positions s·batch_size to (s + 1)·batch_size of the shuffled stream, whatever the
    number of ranks and parts they are divided among. The masks of a window are seeded by its position. Before update
    `warmup` / 2 windows are cut into four, and into two before update `warmup`.
    """

    stream: TokenStream
    seq_len: int
    batch_size: int
    seed: int
    mask: Mask | None = None
    document_token: int | None = None
    parts: int = 1
    rank: int = 0
    ranks: int = 1
    warmup: int = 0

    def __post_init__(self) -> None:
        self.stream.require(self.seq_len)
        check_division(self.batch_size, self.parts, self.ranks)

    def __call__(self, step: int) -> Sequence[Batch]:
        """Return this rank's micro-batches of update `step`, counted from 0.

        The result has `parts` batches. The windows of `seq_len` tokens of the stream are taken in a shuffled order. An
        update takes the next `batch_size` windows, of which this rank takes its share. Each window is cut into four
        before update `warmup` / 2, and into two from there to update `warmup`. The same step always gives the same
        batches.
        """
        each = self.batch_size // (self.parts * self.ranks)
        first = step * self.batch_size + self.rank * self.parts * each
        pieces = 1 if step >= self.warmup else 2 if 2 * step >= self.warmup else 4
        begins = range(first, first + self.parts * each, each)
        return [self._part(range(begin, begin + each), pieces) for begin in begins]

    def _part(self, positions: Sequence[int], pieces: int) -> Batch:
        """Return one batch of the windows at `positions` in the shuffled order, each cut into `pieces` shorter windows.

        The order (`WindowOrder`) shuffles the windows of `seq_len` tokens, not the tokens. A position is the number of
        a window in this order, counted from 0. With a mask, the masks of a window depend only on the run's seed and the
        window's position.
        """
        order = WindowOrder(len(self.stream), self.seq_len, self.seed)
        tokens = self.stream.windows([order.start(position) for position in positions], self.seq_len)
        # One generator for each part would give other masks to other divisions of the same windows.
        mask = None if self.mask is None else partial(mask_each, mask=self.mask, seed=self.seed, positions=positions)
        return lm_batch(tokens, mask, torch.Generator(), self.document_token, pieces)


def mask_each(
    tokens: Tensor, generator: torch.Generator, *, mask: Mask, seed: int, positions: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return (inputs, labels), both [B, T]: `mask` applied to each row of `tokens` [B, T] by itself.

    `mask(row, generator)` hides tokens of a row [1, T] and returns (inputs, labels), both [1, T]. Before each row,
    `generator` is seeded anew with a hash of `seed` and the row's entry in `positions`, one for each row. So the masks
    of a row do not depend on the other rows.
    """
    rows = [
        mask(row[None], generator.manual_seed(mix(seed, position, 2) >> 1))
        for row, position in zip(tokens, positions, strict=True)
    ]
    inputs, labels = zip(*rows, strict=True)
    return torch.cat(inputs), torch.cat(labels)


@dataclass(frozen=True)
class LMData:
    """Training and validation streams with their tokenizer.

    `document_token` begins each document. `identity` shows whether a resumed run reads the data of its beginning.
    """

    source: str
    tokenizer: Tokenizer
    train: TokenStream
    valid: TokenStream
    document_token: int | None
    identity: dict[str, Any]
    summary: str


def read_lm_data(
    paths: Sequence[Path],
    tokenizer: str | None,
    bpe_size: int,
    ranks: World,
    text_column: str = "text",
    raw_dtype: str | None = None,
) -> LMData:
    """Return the `LMData` of a language model: token files (.bin) mapped into memory, or text that is tokenised here.

    It has a stream of tokens for training and one that is held out, and the tokenizer. `paths` are either token files
    or text; without paths, the text is the source of Python's standard library. `tokenizer` is "bpe", "byte", "char" or
    a path. If it is None, text gets a new BPE tokenizer of `bpe_size` tokens, and token files take the tokenizer.json
    beside the first of them. Rank 0 of `ranks` makes the tokenizer and reads token files through once to check them;
    every rank must call this. `text_column` is the column of a table with the text. `raw_dtype`, "uint16" or "uint32",
    is the dtype of token files without a header. Raise `ValueError` if the files are damaged or the arguments do not
    fit them, or for a pipe with several ranks.
    """
    files = token_files(paths)
    if files:
        return _read_token_files(files, tokenizer, ranks, raw_dtype)
    if raw_dtype is not None:
        raise ValueError(f"--raw-dtype {raw_dtype}: --data names text; expected token files (.bin)")
    if ranks.size > 1 and any(map(is_piped, paths)):
        raise ValueError("--data: one process alone can read a pipe; expected files under torchrun")
    corpus = read_corpus(paths, text_column)
    made = make_tokenizer(tokenizer or "bpe", (d.text for d in corpus.train), bpe_size).to_str() if ranks.first else ""
    shared = parse_tokenizer(ranks.text(made))
    start = special_ids(shared)["start_token"]
    train, valid = (
        text_stream(shared, (document.text for document in part), start) for part in (corpus.train, corpus.valid)
    )
    return LMData(
        corpus.source, shared, train, valid, start,
        {"tokens": len(train), "crc32": crc(train)},
        f"{corpus.source}: {_count(corpus.train, train)} to train on, {_count(corpus.valid, valid)} held out",
    )  # fmt: skip


def _read_token_files(paths: Sequence[Path], named: str | None, ranks: World, raw_dtype: str | None) -> LMData:
    """Return the `LMData` of token files, which are mapped into memory and checked against their tokenizer.

    `named` is the path of the tokenizer, or None for the tokenizer.json beside the first file. `raw_dtype`, "uint16" or
    "uint32", is the dtype of files without a header. Rank 0 of `ranks` reads the files through to check them. The
    result has a training and a held-out stream, and `identity` has the checksums of the files. Raise `ValueError` if a
    check fails, if there is no tokenizer, or if `named` is "bpe", "byte" or "char".
    """
    if named in ("bpe", "byte", "char"):
        raise ValueError(f"--tokenizer {named}: {paths[0]} holds tokens already; expected their tokenizer.json")
    files = [read_token_file(path, raw_dtype) for path in paths]
    beside = paths[0].parent / "tokenizer.json"
    if named is None and not beside.is_file():
        raise ValueError(f"{paths[0]}: no tokenizer.json beside it; name it with --tokenizer PATH")
    tokenizer = load_tokenizer(Path(named) if named else beside)
    sums = []
    for file in files:
        check_vocabulary(file, tokenizer)
        if ranks.first:
            sums.append(check_content(file, tokenizer))
    train, valid = split_streams(files)
    headers = [file.header for file in files if file.header is not None]
    document = headers[0]["document_token"] if headers else tokenizer.token_to_id("<|endoftext|>")
    source = ", ".join(map(str, paths))
    return LMData(
        source, tokenizer, train, valid, document,
        ranks.values({"tokens": len(train), "crc32": sums}),
        f"{source}: {len(train):,} tokens to train on, {len(valid):,} held out",
    )  # fmt: skip


def crc(stream: TokenStream) -> int:
    """Return the CRC-32 of all tokens of a stream, as the bytes of the arrays in which the stream holds them."""
    value = 0
    for array in stream.arrays:
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


def _count(documents: list[Document], stream: TokenStream) -> str:
    """Return "N documents with M tokens" for a message: the length of `documents`, and that of their token stream."""
    return f"{len(documents):,} documents with {len(stream):,} tokens"
