"""Integer tensors from ids: one long stream cut into windows for language models, padded rows for tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """What a head's forward takes: `tokens` `[B, T]`, `labels` (`[B, T]`, or `[B]` for a classifier), and for padded
    rows `lengths` `[B]`."""

    tokens: Tensor
    labels: Tensor
    lengths: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if x is None else x.to(device, non_blocking=True) for x in self))  # type: ignore[arg-type]

    def num_tokens(self) -> int:
        return self.tokens.numel() if self.lengths is None else int(self.lengths.sum())


def token_stream(documents: Iterable[list[int]], start_token: int) -> Tensor:
    """All documents one after another, each behind a start token, as one int32 tensor."""
    pieces = [torch.tensor([start_token, *ids], dtype=torch.int32) for ids in documents]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)


def random_windows(stream: Tensor, seq_len: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Without end, `[B, T]` windows of `stream` that begin at random places."""
    _check_stream(stream, seq_len)
    offsets = torch.arange(seq_len)
    while True:
        starts = torch.randint(stream.numel() - seq_len + 1, (batch_size, 1), generator=generator)
        yield stream[starts + offsets].long()


def lm_windows(stream: Tensor, seq_len: int, most: int | None = None) -> Tensor:
    """Windows `[N, T]` that lie side by side, at most `most` of them and then evenly spread over the whole stream. A
    rest shorter than a window is left out."""
    _check_stream(stream, seq_len)
    windows = stream[: stream.numel() // seq_len * seq_len].view(-1, seq_len)
    if most is not None and len(windows) > most:
        windows = windows[torch.arange(most) * len(windows) // most]
    return windows.long()


def unigram_entropy(tokens: Tensor) -> float:
    """`H = -Σ p_v log p_v` in nats per token, with `p` the share of each id in `tokens` themselves.

    No model that ignores context, not even one fitted to this very text, has a lower loss on it.
    """
    counts = torch.bincount(tokens.flatten().long()).double()
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log()).sum())


def classification_input(ids: list[int], seq_len: int, start_token: int, extract_token: int) -> list[int]:
    """`start text extract`, the text cut off at its end where the three do not fit into `seq_len`."""
    return [start_token, *ids[: seq_len - 2], extract_token]


def pad_rows(rows: Sequence[list[int]], pad_token: int) -> tuple[Tensor, Tensor]:
    """Rows padded on the right: `tokens` `[B, T]` and `lengths` `[B]`."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), pad_token)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, lengths


def classification_batches(
    rows: Sequence[list[int]], labels: Tensor, batch_size: int, pad_token: int, generator: torch.Generator | None = None
) -> Iterator[Batch]:
    """One pass over `rows` and their `labels` `[N]` in batches, in the order of `generator`'s shuffle, or as they
    stand."""
    N = len(rows)
    order = torch.arange(N) if generator is None else torch.randperm(N, generator=generator)
    for chosen in order.split(batch_size):
        tokens, lengths = pad_rows([rows[i] for i in chosen.tolist()], pad_token)
        yield Batch(tokens, labels[chosen], lengths)


def _check_stream(stream: Tensor, seq_len: int) -> None:
    if stream.numel() < seq_len:
        raise ValueError(
            f"the text has {stream.numel()} tokens, fewer than a window of {seq_len}; give more text or fewer positions"
        )
