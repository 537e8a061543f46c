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
    """Arguments of a head's forward pass, with the number of predictions in them.

    Attributes:
        tokens: Token ids [B, T], int64. Examples with S sequences have [B, S, T].
        labels: Labels [B, T], or [B] or [B, L] for a classifier, int64, or float32 for a regression.
        lengths: Real tokens of padded rows [B], or [B, S], int64.
        cu_seqlens: Bounds [n + 1] of sequences that are packed into one row, int32.
        weight: Number of predictions that the mean loss is over.
    """

    tokens: Tensor
    labels: Tensor
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    weight: int = 1

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`. Pinned tensors are copied asynchronously.

        Args:
            device: Device to copy the tensors to.

        Returns:
            A new batch with the tensors there and the same `weight`.
        """
        return Batch(*(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self))  # type: ignore[arg-type]

    def pinned(self) -> Batch:
        """Return the batch with its CPU tensors in pinned (page-locked) memory, which a GPU copies asynchronously.

        Returns:
            A new batch. Tensors on another device are kept as they are.
        """
        return Batch(*(x.pin_memory() if isinstance(x, Tensor) and x.is_cpu else x for x in self))  # type: ignore[arg-type]

    def inputs(self) -> dict[str, Tensor]:
        """Return the tensors of the batch by name: the keyword arguments of a head's forward pass.

        Returns:
            A dict with `tokens` and `labels`, and with `lengths` and `cu_seqlens` if the batch has them. `weight` is no
            tensor and is left out.
        """
        return {name: x for name, x in self._asdict().items() if isinstance(x, Tensor)}

    def num_tokens(self) -> int:
        """Return how many tokens of the batch are not padding.

        Returns:
            The sum of `lengths`, or the number of elements of `tokens` if `lengths` is None.
        """
        return self.tokens.numel() if self.lengths is None else int(self.lengths.sum())


def token_stream(documents: Iterable[list[int]], start_token: int | None) -> TokenStream:
    """Return all documents as one stream of int32 ids in memory, each behind a start token if there is one.

    Args:
        documents: Ids of each document.
        start_token: Id to put in front of each document, or None to put nothing there.

    Returns:
        A `TokenStream`, which reads ids by their position.

    Raises:
        OverflowError: An id does not fit into int32.

    Example:
        ```python
        from gpt_fast import data

        stream = data.token_stream([[5, 6], [7]], start_token=1)
        print(stream.read(0, len(stream)).tolist())  # [1, 5, 6, 1, 7]
        ```
    """
    begin = [] if start_token is None else [start_token]
    pieces = [np.array([*begin, *ids], dtype=np.int32) for ids in documents]
    return TokenStream([np.concatenate(pieces)] if pieces else [])


def text_stream(tokenizer: Tokenizer, texts: Iterable[str], start_token: int | None) -> TokenStream:
    """Return the ids of all texts, encoded with `tokenizer`, as one `TokenStream` of int32 in memory.

    The id `start_token` is put in front of each text, unless it is None. No other special token is added. Long texts
    are encoded in pieces, so this function takes four bytes of memory for each token, and little more.
    """
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
    """Return adjacent windows of a stream. The tokens behind the last full window are dropped.

    Args:
        stream: Stream of token ids.
        seq_len: Tokens of a window T.
        most: Largest number of windows to return, or None for all of them. If the stream has more windows, evenly
            spaced ones are returned, the same ones each time.

    Returns:
        Windows [N, T], int64.

    Raises:
        ValueError: The stream has fewer than `seq_len` tokens, or `most` is less than 1.

    Example:
        ```python
        from gpt_fast import data

        stream = data.token_stream([list(range(10))], start_token=None)
        print(data.lm_windows(stream, 4).tolist())  # [[0, 1, 2, 3], [4, 5, 6, 7]]
        ```
    """
    if most is not None and most < 1:
        raise ValueError(f"lm_windows: most has {most}; expected at least 1")
    stream.require(seq_len)
    N = len(stream) // seq_len
    kept = N if most is None else min(N, most)
    return stream.windows([i * N // kept * seq_len for i in range(kept)], seq_len)


def packed(batch: Batch, windows: Tensor, document_token: int) -> Batch:
    """Return a batch of B windows as one row [1, B·T] with `cu_seqlens`, so that attention does not cross documents.

    `windows` [B, T] are the token ids of the batch before any were masked, on the CPU. A sequence begins at each
    window's start and at each `document_token`, the id that begins a document. `cu_seqlens` [n + 1], int32, holds the
    first positions of the n sequences and B·T. The tokens and labels of `batch` are only reshaped to [1, B·T], and its
    other fields are kept.
    """
    B, T = windows.shape
    begins = windows == document_token
    begins[:, 0] = True
    (starts,) = begins.flatten().nonzero(as_tuple=True)
    cu_seqlens = torch.cat([starts, torch.tensor([B * T])]).int()
    return batch._replace(tokens=batch.tokens.view(1, -1), labels=batch.labels.view(1, -1), cu_seqlens=cu_seqlens)


def causal_batch(tokens: Tensor) -> Batch:
    """Return a batch for next-token prediction within each window of `tokens` [B, T].

    Its labels [B, T] are the tokens themselves, not shifted, with -100 (no label) for the first token of each window.
    Its `weight` is the number of predictions B·(T - 1).
    """
    labels = tokens.clone()
    labels[:, 0] = IGNORE
    return Batch(tokens, labels, weight=tokens.shape[0] * (tokens.shape[1] - 1))


def unigram_entropy(counts: np.ndarray) -> float:
    """Return the entropy of the relative frequencies of the ids in a text, in nats per token.

    H = -Σ p_v log p_v, with p_v the share of id v among all ids.

    Args:
        counts: How often each id occurs [V].

    Returns:
        H.

    Raises:
        ValueError: No id occurs.

    Example:
        ```python
        import numpy as np
        from gpt_fast import data

        print(round(data.unigram_entropy(np.array([3, 3, 0])), 3))  # 0.693
        ```

    Note:
        No model that ignores context, not even one fitted to this very text, has a lower loss on it. The sum is
        float64.

        Source: Shannon (1948), "A Mathematical Theory of Communication".
    """
    if not counts.sum() > 0:
        raise ValueError("unigram_entropy: counts are all 0; expected a text of one token or more")
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
