"""A stream of tokens, in memory or in files, and its windows in a shuffled order that is a pure function.

`WindowOrder.start(position)` is arithmetic, not a list: any position of the shuffled stream is reached at once and in
constant memory, on any number of ranks, so a run that goes on at a position repeats nothing and skips nothing.
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
    """Arrays of token ids, of any integer dtype and in memory or in files, read as one after another. Nothing is read
    or copied but what is asked for, which comes as int64."""

    def __init__(self, arrays: Sequence[np.ndarray | StoredIds]):
        self.arrays = [array for array in arrays if len(array)]
        self.ends = np.cumsum([len(array) for array in self.arrays], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.arrays else 0

    def read(self, start: int, length: int) -> np.ndarray:
        """`length` ids from `start` on, as int64."""
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
        """The stream of the ids from `start` to `stop`, of which none is read yet."""
        parts, begin = [], 0
        for array in self.arrays:
            first, last = max(0, start - begin), min(len(array), stop - begin)
            if first < last:
                parts.append(array.part(first, last) if isinstance(array, StoredIds) else array[first:last])
            begin += len(array)
        return TokenStream(parts)

    def windows(self, starts: Sequence[int] | np.ndarray, seq_len: int) -> Tensor:
        """`[N, seq_len]` int64 ids from each of `starts` on."""
        return torch.from_numpy(np.stack([self.read(int(start), seq_len) for start in starts]))

    def counts(self) -> np.ndarray:
        """How often each id occurs, read chunk by chunk."""
        total = np.zeros(0, np.int64)
        for array in self.arrays:
            for first in range(0, len(array), _CHUNK):
                counts = np.bincount(array[first : first + _CHUNK])
                size = max(len(total), len(counts))
                total = np.pad(total, (0, size - len(total))) + np.pad(counts, (0, size - len(counts)))
        return total

    def require(self, seq_len: int, source: str = "the text") -> None:
        """Raise `ValueError`, which names the source, where the stream does not fill one window."""
        if len(self) < seq_len:
            raise ValueError(
                f"{source}: has {len(self):,} tokens, fewer than a window of {seq_len:,}; expected more text or fewer "
                "positions"
            )


@dataclass(frozen=True)
class WindowOrder:
    """Windows of `seq_len` tokens of a stream of `num_tokens`, shuffled by `seed`, pass after pass without end.

    A pass lays `per_pass` windows side by side from an offset of its own, which depends on seed and pass, and visits
    each once in an order of its own; less than two windows of tokens at the ends are left out of it.
    """

    num_tokens: int
    seq_len: int
    seed: int

    @property
    def per_pass(self) -> int:
        return max(1, self.num_tokens // self.seq_len - 1)

    def start(self, position: int) -> int:
        """The token at which the window at `position`, counted from the beginning of training, starts."""
        which, index = divmod(position, self.per_pass)
        room = min(self.seq_len - 1, self.num_tokens - self.per_pass * self.seq_len)
        offset = mix(self.seed, which, 0) % (room + 1)
        return offset + self.seq_len * shuffled(index, self.per_pass, mix(self.seed, which, 1))


def shuffled(index: int, size: int, key: int) -> int:
    """The image of `index` under a permutation of [0, size) that `key` chooses: a Feistel network on the next even
    number of bits, repeated until it falls into the range."""
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
    """A hash of integers to 64 bits (the finaliser of splitmix64, Steele et al. 2014, over each word in turn)."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state
