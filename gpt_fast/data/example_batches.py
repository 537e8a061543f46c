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
    """Ids of the tokens around a row's texts, and of padding.

    Attributes:
        start: Id before the first text.
        delimiter: Id between two texts.
        extract: Id behind the last text.
        pad: Id of padding.
    """

    start: int
    delimiter: int
    extract: int
    pad: int


@dataclass(frozen=True)
class Context:
    """Text in which a span is found.

    Attributes:
        text: The text.
        begin: Position of its first token in the sequence.
        offsets: (begin, end) of each token's characters in `text`, `end` excluded.
        answer: The answer, or "" for none.
    """

    text: str
    begin: int
    offsets: list[tuple[int, int]]
    answer: str = ""


@dataclass(frozen=True)
class Example:
    """One row of a table as a model takes it.

    Attributes:
        sequences: One sequence, two orders of a pair, or one sequence for each answer.
        target: A class, a number, a list with 1 for each class that the row has, or the first and last position of a
            span.
        answer: Position at which a text to be generated begins, or None.
        tags: A class for each token of tagged text, -100 where none counts, or None.
        context: Text in which a span is found, or None.
    """

    sequences: list[list[int]]
    target: float | list[float] | list[int] = 0
    answer: int | None = None
    tags: list[int] | None = None
    context: Context | None = None


def task_input(texts: Sequence[Sequence[int]], seq_len: int, marks: Marks) -> list[int]:
    """Return the ids of a row: `start text extract`, or `start first delimiter second extract`, and so on.

    If the ids do not fit into `seq_len`, the longest text is cut at its end, again and again until they do.

    Args:
        texts: Ids of each text, without special tokens.
        seq_len: Largest number of ids.
        marks: Special ids to put in front of, between and behind the texts.

    Returns:
        Ids of the row, at most `seq_len`.

    Raises:
        ValueError: The ids of `marks` alone do not fit.

    Example:
        ```python
        from gpt_fast import data

        marks = data.Marks(start=0, delimiter=1, extract=2, pad=3)
        print(data.task_input([[7, 8], [9]], 16, marks))  # [0, 7, 8, 1, 9, 2]
        ```

    Note:
        Source: Radford et al. (2018), section 3.3.
    """
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
    """Return (`tokens` [B, T], `lengths` [B]), both int64: rows of ids, padded on the right to the longest row T.

    `rows` holds one list of ids or more. `pad_token` fills the padding. `lengths` is the number of ids in each row
    before padding.
    """
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), pad_token)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, lengths


def task_batch(examples: Sequence[Example], pad_token: int, numbers: bool = False) -> Batch:
    """Return examples as one `Batch`, padded with `pad_token` to the longest row T.

    `tokens` are [B, T] int64, or [B, S, T] if each example has S > 1 sequences, and `lengths` [B] or [B, S]. `labels`
    are the `target`s of the examples, [B] or [B, L], int64, or float32 if `numbers`. If the first example has an
    `answer` (text to be generated), `labels` are [B, T] instead: the ids from position `answer` on, and -100 elsewhere.
    Else if it has `tags`, they are the `tags`, [B, T], padded with -100. `weight` is the number of labels other than
    -100 for text to be generated, and B otherwise.
    """
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
    """Yield all examples in their order as batches, each padded to its longest row.

    Args:
        examples: The examples.
        batch_size: Examples of a batch B.
        pad_token: Id of padding.
        numbers: True if the targets are numbers for a regression or a multi-label loss, False if they are classes.

    Yields:
        A batch of `batch_size` examples, or fewer in the last one. `tokens` are [B, T] int64, or [B, S, T] if each
        example has S > 1 sequences, and `lengths` [B] or [B, S]. Labels are [B], or [B, L] if targets are lists, in
        int64, or in float32 with `numbers`. For text to be generated or tagged they are [B, T], -100 where a token does
        not count.

    Raises:
        ValueError: The batch size is below 1.

    Example:
        ```python
        from gpt_fast import data

        examples = [data.Example([[0, 7, 2]], 1), data.Example([[0, 7, 8, 2]], 0)]
        (batch,) = data.task_batches(examples, batch_size=2, pad_token=3)
        print(batch.tokens.shape, batch.lengths)  # torch.Size([2, 4]) tensor([3, 4])
        ```
    """
    if batch_size < 1:
        raise ValueError(f"task_batches: batch_size is {batch_size}; expected at least 1")
    for first in range(0, len(examples), batch_size):
        yield task_batch(examples[first : first + batch_size], pad_token, numbers)
