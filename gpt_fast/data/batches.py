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
        """Return the batch with its tensors on a device, copied without waiting if they are pinned.

        Args:
            device: The device.

        Returns:
            The batch there.
        """
        return Batch(*(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self))  # type: ignore[arg-type]

    def pinned(self) -> Batch:
        """Return the batch with its CPU tensors in pinned memory, which a GPU reads by itself.

        Returns:
            The batch in pinned memory.
        """
        return Batch(*(x.pin_memory() if isinstance(x, Tensor) and x.is_cpu else x for x in self))  # type: ignore[arg-type]

    def inputs(self) -> dict[str, Tensor]:
        """Return the arguments of a head's forward pass.

        Returns:
            Tensors by name.
        """
        return {name: x for name, x in self._asdict().items() if isinstance(x, Tensor)}

    def num_tokens(self) -> int:
        """Return how many tokens are real.

        Returns:
            The number.
        """
        return self.tokens.numel() if self.lengths is None else int(self.lengths.sum())


def token_stream(documents: Iterable[list[int]], start_token: int | None) -> TokenStream:
    """Return all documents as one stream of int32 ids in memory, each behind a start token if there is one.

    Args:
        documents: Ids of each document.
        start_token: Id before each document, or None.

    Returns:
        The stream.

    Raises:
        OverflowError: int32 does not hold an id.

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
    """Return the tokens of all texts as one stream, as `token_stream` does, encoded piece by piece.

    This takes four bytes of memory for each token, and little more.
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
    """Return windows of a stream that lie side by side. A rest shorter than a window is left out.

    Args:
        stream: The stream.
        seq_len: Tokens of a window T.
        most: Largest number of windows, which are then evenly spread over the whole stream, the same ones each time.

    Returns:
        Windows [N, T], int64.

    Raises:
        ValueError: The stream has less than one window.

    Example:
        ```python
        from gpt_fast import data

        stream = data.token_stream([list(range(10))], start_token=None)
        print(data.lm_windows(stream, 4).tolist())  # [[0, 1, 2, 3], [4, 5, 6, 7]]
        ```
    """
    stream.require(seq_len)
    N = len(stream) // seq_len
    kept = N if most is None else min(N, most)
    return stream.windows([i * N // kept * seq_len for i in range(kept)], seq_len)


def packed(batch: Batch, windows: Tensor, document_token: int) -> Batch:
    """Return a batch of `windows` [B, T] as one row [1, B·T], so that attention does not cross documents.

    Its sequences are the windows' documents. `document_token` begins each document.
    """
    B, T = windows.shape
    begins = windows == document_token
    begins[:, 0] = True
    (starts,) = begins.flatten().nonzero(as_tuple=True)
    cu_seqlens = torch.cat([starts, torch.tensor([B * T])]).int()
    return batch._replace(tokens=batch.tokens.view(1, -1), labels=batch.labels.view(1, -1), cu_seqlens=cu_seqlens)


def causal_batch(tokens: Tensor) -> Batch:
    """Return a batch for next-token prediction within each window [B, T]. The first token of a window has no label."""
    labels = tokens.clone()
    labels[:, 0] = IGNORE
    return Batch(tokens, labels, weight=tokens.shape[0] * (tokens.shape[1] - 1))


def unigram_entropy(counts: np.ndarray) -> float:
    """Return the entropy of the shares of ids in a text, in nats per token.

    H = -Σ p_v log p_v, with p_v the share of id v.

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
