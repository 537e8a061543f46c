"""Integer tensors from ids: one long stream cut into windows for language models, padded rows for tasks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ..config import IGNORE
from .stream import TokenStream
from .tokenizer import encoded_pieces

_CHUNK = 1 << 22  # ids in one array


class Batch(NamedTuple):
    """What a head's forward takes: `tokens` `[B, T]`, `labels` (`[B, T]`, or `[B]` for a classifier), for padded rows
    `lengths` `[B]`, for rows packed into one `cu_seqlens` `[n + 1]`; and `weight`, the number of predictions that the
    mean loss is over. All int64 but `cu_seqlens`, which is int32, and the labels of a regression, which are float32."""

    tokens: Tensor
    labels: Tensor
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    weight: int = 1

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`, copied without waiting where they are pinned."""
        return Batch(*(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self))  # type: ignore[arg-type]

    def pinned(self) -> Batch:
        """The batch with its CPU tensors in pinned memory, which a GPU reads by itself."""
        return Batch(*(x.pin_memory() if isinstance(x, Tensor) and x.is_cpu else x for x in self))  # type: ignore[arg-type]

    def inputs(self) -> dict[str, Tensor]:
        """The arguments of a head's forward."""
        return {name: x for name, x in self._asdict().items() if isinstance(x, Tensor)}

    def num_tokens(self) -> int:
        """How many tokens are real."""
        return self.tokens.numel() if self.lengths is None else int(self.lengths.sum())


def token_stream(documents: Iterable[list[int]], start_token: int | None) -> TokenStream:
    """All documents one after another, each behind a start token if there is one: ids as int32, in memory. Raises
    `OverflowError` for an id that int32 does not hold."""
    begin = [] if start_token is None else [start_token]
    pieces = [np.array([*begin, *ids], dtype=np.int32) for ids in documents]
    return TokenStream([np.concatenate(pieces)] if pieces else [])


def text_stream(tokenizer: Tokenizer, texts: Iterable[str], start_token: int | None) -> TokenStream:
    """The tokens of all texts one after another, as `token_stream` has them, encoded piece by piece: this takes four
    bytes of memory for each token, and little more."""
    begin = np.array([] if start_token is None else [start_token], np.int32)
    arrays: list[np.ndarray] = []
    waiting: list[np.ndarray] = []
    length = 0
    for begins, ids in encoded_pieces(tokenizer, texts):
        waiting += [begin, np.array(ids, np.int32)] if begins else [np.array(ids, np.int32)]
        length += len(ids)
        if length >= _CHUNK:
            arrays.append(np.concatenate(waiting))
            waiting, length = [], 0
    return TokenStream([*arrays, *([np.concatenate(waiting)] if waiting else [])])


def lm_windows(stream: TokenStream, seq_len: int, most: int | None = None) -> Tensor:
    """Windows `[N, T]` int64 that lie side by side, at most `most` of them and then evenly spread over the whole
    stream; the same ones each time. A rest shorter than a window is left out. Raises `ValueError` for a stream of less
    than one window."""
    stream.require(seq_len)
    N = len(stream) // seq_len
    kept = N if most is None else min(N, most)
    return stream.windows([i * N // kept * seq_len for i in range(kept)], seq_len)


def packed(batch: Batch, windows: Tensor, document_token: int) -> Batch:
    """A batch of `windows` `[B, T]` as one row `[1, B·T]` whose sequences are the windows' documents, each begun by
    `document_token`: attention does not cross from one to another."""
    B, T = windows.shape
    begins = windows == document_token
    begins[:, 0] = True
    (starts,) = begins.flatten().nonzero(as_tuple=True)
    cu_seqlens = torch.cat([starts, torch.tensor([B * T])]).int()
    return batch._replace(tokens=batch.tokens.view(1, -1), labels=batch.labels.view(1, -1), cu_seqlens=cu_seqlens)


def causal_batch(tokens: Tensor) -> Batch:
    """Next-token prediction within each window `[B, T]`: its first token has no predecessor and is not asked for."""
    labels = tokens.clone()
    labels[:, 0] = IGNORE
    return Batch(tokens, labels, weight=tokens.shape[0] * (tokens.shape[1] - 1))


def unigram_entropy(counts: np.ndarray) -> float:
    """`H = -Σ p_v log p_v` in nats per token, with `p` the share of each id in a text that has it `counts` `[V]` times.

    No model that ignores context, not even one fitted to this very text, has a lower loss on it. Computed in float64.
    Raises `ValueError` where no id occurs. Source: Shannon (1948), "A Mathematical Theory of Communication".
    """
    if not counts.sum() > 0:
        raise ValueError("unigram_entropy: counts are all 0; expected a text of one token or more")
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
