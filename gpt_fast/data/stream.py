"""Stream of tokens, in memory or in files, and its windows in a shuffled order that is a pure function.

`WindowOrder.start(position)` is arithmetic, not a list. Any position of the shuffled stream is reached at once and in
constant memory, on any number of ranks, so a resumed run repeats and skips nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .stored_ids import StoredIds

_WORD = 2**64 - 1
_ROUNDS = 4
_CHUNK = 1 << 22


class TokenStream:
    """Arrays of token ids that are read as one after another.

    Only the ids that a caller asks for are read or copied. They come as int64.

    Args:
        arrays: Arrays of any integer dtype, in memory or in files.

    Example:
        ```python
        import numpy as np
        from gpt_fast import data

        stream = data.TokenStream([np.array([1, 2, 3]), np.array([4, 5])])
        print(stream.windows([0, 2], 3).tolist())  # [[1, 2, 3], [3, 4, 5]]
        ```
    """

    def __init__(self, arrays: Sequence[np.ndarray | StoredIds]):
        self.arrays = [array for array in arrays if len(array)]
        self.ends = np.cumsum([len(array) for array in self.arrays], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.arrays else 0

    def read(self, start: int, length: int) -> np.ndarray:
        """Return `length` ids of the stream from the position `start` on.

        Args:
            start: Position of the first id, 0 or more.
            length: Number of ids to read.

        Returns:
            Ids [length], int64. There are fewer if the stream ends before.
        """
        pieces = []
        which = int(np.searchsorted(self.ends, start, side="right"))
        while length > 0 and which < len(self.arrays):
            array = self.arrays[which]
            place = start - (int(self.ends[which]) - len(array))
            piece = array[place : place + length]
            pieces.append(piece.astype(np.int64))
            start, length, which = start + len(piece), length - len(piece), which + 1
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def part(self, start: int, stop: int) -> TokenStream:
        """Return the stream of the ids between two positions. Nothing is read from files yet.

        Args:
            start: Position of the first id.
            stop: Position behind the last id. Positions outside of the stream are cut off.

        Returns:
            A `TokenStream` of these ids, which shares the arrays and files of this stream.
        """
        parts, begin = [], 0
        for array in self.arrays:
            first, last = max(0, start - begin), min(len(array), stop - begin)
            if first < last:
                parts.append(array.part(first, last) if isinstance(array, StoredIds) else array[first:last])
            begin += len(array)
        return TokenStream(parts)

    def windows(self, starts: Sequence[int] | np.ndarray, seq_len: int) -> Tensor:
        """Return `seq_len` ids of the stream from each of some positions on.

        Args:
            starts: Positions of the windows' first ids [N].
            seq_len: Number of ids in each window.

        Returns:
            Windows [N, seq_len], int64. Each window has to end within the stream, which is not checked.
        """
        if len(starts) == 0:
            return torch.empty(0, seq_len, dtype=torch.int64)
        return torch.from_numpy(np.stack([self.read(int(start), seq_len) for start in starts]))

    def counts(self) -> np.ndarray:
        """Return how often each id occurs in the stream, which is read chunk by chunk.

        Returns:
            Counts [largest id + 1], int64, by id. The array is empty for an empty stream.
        """
        total = np.zeros(0, np.int64)
        for array in self.arrays:
            for first in range(0, len(array), _CHUNK):
                counts = np.bincount(array[first : first + _CHUNK])
                size = max(len(total), len(counts))
                total = np.pad(total, (0, size - len(total))) + np.pad(counts, (0, size - len(counts)))
        return total

    def require(self, seq_len: int, source: str = "the text") -> None:
        """Validate that the stream has at least one window of `seq_len` tokens.

        Args:
            seq_len: Tokens of a window.
            source: Name of the stream in the error message.

        Raises:
            ValueError: The stream has fewer tokens.
        """
        if len(self) < seq_len:
            raise ValueError(
                f"{source}: has {len(self):,} tokens, fewer than a window of {seq_len:,}; expected more text or fewer "
                "positions"
            )


@dataclass(frozen=True)
class WindowOrder:
    """Endless shuffled order of windows of `seq_len` tokens in a stream of `num_tokens` tokens.

    The order is made of passes over the stream. Each pass lays `per_pass` windows side by side, from an offset that
    depends on `seed` and the pass, and visits each window once in an order that also depends on them. Fewer tokens than
    two windows, at both ends of the stream, are left out of a pass.
    """

    num_tokens: int
    seq_len: int
    seed: int

    @property
    def per_pass(self) -> int:
        """Return the number of windows in one pass over the stream: one fewer than fit side by side, but at least 1."""
        return max(1, self.num_tokens // self.seq_len - 1)

    def start(self, position: int) -> int:
        """Return where in the stream window number `position` of the shuffled order begins.

        Args:
            position: The window's number in the order, counted from 0 over all passes.

        Returns:
            Index of the window's first token in the stream. The same seed and sizes always give the same one.
        """
        which, index = divmod(position, self.per_pass)
        room = min(self.seq_len - 1, self.num_tokens - self.per_pass * self.seq_len)
        offset = mix(self.seed, which, 0) % (room + 1)
        return offset + self.seq_len * shuffled(index, self.per_pass, mix(self.seed, which, 1))


def shuffled(index: int, size: int, key: int) -> int:
    """Return the place of `index` under a permutation of 0 … `size` - 1 that the integer `key` chooses.

    `index` is in this range. The permutation is a Feistel network on the next even number of bits, repeated until the
    result falls into the range.

    Returns:
        An integer in [0, size), a different one for each index, and the same one for the same arguments.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round in range(_ROUNDS):
            left, right = right, left ^ (mix(key, round, right) & mask)
        index = left << half | right
        if index < size:
            return index


def mix(*words: int) -> int:
    """Return a 64-bit hash of integers, in [0, 2**64): the finaliser of splitmix64 over each integer in turn.

    The order of the integers matters. Source: Steele et al. (2014).
    """
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state
