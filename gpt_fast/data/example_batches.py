"""Examples of the labelled tasks, with their start, delimiter and extract tokens, padded into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import IGNORE
from .batches import Batch


@dataclass(frozen=True)
class Marks:
    """The ids that stand before, between and behind a row's texts, and that of padding."""

    start: int
    delimiter: int
    extract: int
    pad: int


@dataclass(frozen=True)
class Context:
    """The text that a span is found in: where its tokens begin in the sequence, which characters each of them stands
    for, and the answer, "" for none."""

    text: str
    begin: int
    offsets: list[tuple[int, int]]
    answer: str = ""


@dataclass(frozen=True)
class Example:
    """One row of a table as a model takes it: its sequences (one; two orders of a pair; one for each answer) and its
    target: a class, a number, a list with 1 for each class that it has, or the first and last position of a span. Text
    to be generated has the position where it begins, tagged text a class for each token, -100 where none counts."""

    sequences: list[list[int]]
    target: float | list[float] | list[int] = 0
    answer: int | None = None
    tags: list[int] | None = None
    context: Context | None = None


def task_input(texts: Sequence[Sequence[int]], seq_len: int, marks: Marks) -> list[int]:
    """`start text extract`, or `start first delimiter second extract`, and so on. Where all do not fit into `seq_len`
    the longest loses its end until they do. Raises `ValueError` where the ids of `marks` alone do not fit. Source:
    Radford et al. (2018), section 3.3."""
    if seq_len < len(texts) + 1:
        raise ValueError(f"task_input: {len(texts)} texts in {seq_len} positions; expected at least {len(texts) + 1}")
    lengths = [len(text) for text in texts]
    over = sum(lengths) + len(texts) + 1 - seq_len
    while over > 0:
        longest = max(lengths)
        which = lengths.index(longest)
        others = [length for i, length in enumerate(lengths) if i != which]
        cut = min(over, max(1, longest - max(others, default=0)))
        lengths[which] -= cut
        over -= cut
    row: list[int] = []
    for text, length in zip(texts, lengths, strict=True):
        row += [marks.delimiter if row else marks.start, *text[:length]]
    return [*row, marks.extract]


def pad_rows(rows: Sequence[list[int]], pad_token: int) -> tuple[Tensor, Tensor]:
    """Rows padded on the right: `tokens` `[B, T]` and `lengths` `[B]`."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), pad_token)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, lengths


def task_batch(examples: Sequence[Example], pad_token: int, numbers: bool = False) -> Batch:
    """Examples as one batch: tokens `[B, T]`, or `[B, S, T]` where each has several sequences, with lengths; labels
    `[B]`, or `[B, L]` where targets are lists, float32 where they are `numbers`, or for generated or tagged text
    `[B, T]`, -100 on all that does not count."""
    B, S = len(examples), len(examples[0].sequences)
    tokens, lengths = pad_rows([row for example in examples for row in example.sequences], pad_token)
    if examples[0].answer is not None:
        place = torch.arange(tokens.shape[1])
        begin = torch.tensor([example.answer for example in examples])
        asked = (place >= begin[:, None]) & (place < lengths[:, None])
        return Batch(tokens, tokens.masked_fill(~asked, IGNORE), lengths, weight=int(asked.sum()))
    if examples[0].tags is not None:
        tags, _ = pad_rows([example.tags or [] for example in examples], IGNORE)
        return Batch(tokens, tags, lengths, weight=B)
    labels = torch.tensor([example.target for example in examples], dtype=torch.float32 if numbers else torch.int64)
    if S > 1:
        tokens, lengths = tokens.view(B, S, -1), lengths.view(B, S)
    return Batch(tokens, labels, lengths, weight=B)


def task_batches(
    examples: Sequence[Example], batch_size: int, pad_token: int, numbers: bool = False
) -> Iterator[Batch]:
    """All examples in their order, `batch_size` at a time, each batch padded to its longest row.

    Of a batch `tokens` are `[B, T]` int64, or `[B, S, T]` where each example has S sequences, and `lengths` `[B]` or
    `[B, S]`; labels are `[B]`, or `[B, L]` where targets are lists, int64 or with `numbers` float32, or for text to be
    written or tagged `[B, T]`, -100 on all that does not count. Raises `ValueError` for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"task_batches: batch_size is {batch_size}; expected at least 1")
    for first in range(0, len(examples), batch_size):
        yield task_batch(examples[first : first + batch_size], pad_token, numbers)
