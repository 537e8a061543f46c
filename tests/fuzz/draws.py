"""Draw random sizes, dtypes, memory layouts, dropout options and values for the fuzz tests."""

import os
import random
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from tests import numerics

T = TypeVar("T")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Zero, one, primes, and the kernels' block sizes with their neighbours.
SIZES = (0, 1, 1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 23, 31, 32, 33, 47, 61, 64, 65, 97, 127, 128, 129, 131, 257, 300)
SEEDS = (-(2**63), 2**63 - 1, -1, 0, 1, 2**32, 2**32 - 1, -(2**32))
SITES = (0, 0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1)
# No dropout, a threshold of 0 (which drops nothing), of 1, usual probabilities, and a threshold of 65536 (drops all).
PROBABILITIES = (0.0, 0.0, 0.0, 1e-9, 2**-17, 0.1, 0.3, 0.5, 0.999, 1 - 2**-18)


class Draw:
    """Source of the random choices of one draw. Equal (op, seed, index) give equal choices and values."""

    def __init__(self, op: str, seed: int, index: int) -> None:
        self.random = random.Random(f"{op} {seed} {index}")
        torch.manual_seed(self.random.getrandbits(63))
        self.poisoned = False  # True if inputs hold NaN, infinities or numbers that overflow

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def pick(self, choices: Sequence[T]) -> T:
        return self.random.choice(choices)

    def size(self, largest: int, smallest: int = 0) -> int:
        """Return a size in [smallest, largest]. 40 % are at most 17; in the interpreter 90 % are at most 40."""
        largest = min(largest, 40) if INTERPRETED and self.chance(0.9) else largest
        limit = min(largest, 17) if self.chance(0.4) else largest
        return self.pick([size for size in SIZES if smallest <= size <= limit] or [smallest])

    def shape(self, rows: int, *last: int) -> tuple[int, ...]:
        """Return a shape [..., *last] with zero to three leading dimensions and about `rows` rows at most.

        3 % of the shapes have more than 1,024 rows, the most that the C++ kernels take at once.
        """
        if not INTERPRETED and self.chance(0.03):
            return (self.pick((1025, 1041, 1100)), *last)
        count = self.pick((0, 1, 1, 1, 2, 2, 3))
        sizes, left = [], max(1, rows)
        for _ in range(count):
            size = self.size(left)
            sizes.append(size)
            left = max(1, left // max(1, size))
        return (*sizes, *last)

    def dtype(self) -> torch.dtype:
        return self.pick(numerics.DTYPES)

    def values(self, shape: Sequence[int], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Return mostly normal values. Some draws are zeros, a constant, integers, or larger or smaller values."""
        kind = self.random.random()
        x = torch.randn(tuple(shape))
        if kind < 0.03:
            x = torch.zeros_like(x)
        elif kind < 0.06:
            x = torch.full_like(x, self.pick((1.0, -2.0, 0.375)))
        elif kind < 0.09:
            x = x.round()
        elif kind < 0.15:
            x = x * self.pick((8.0, 0.01))
        return (x * scale).to(dtype)

    def tensor(
        self, shape: Sequence[int], dtype: torch.dtype, scale: float = 1.0, *, grad: float = 0.85, lay: bool = True
    ) -> Tensor:
        """Return a leaf with random values and a random layout, which requires a gradient with probability `grad`."""
        x = self.values(shape, dtype, scale)
        x = self.laid_out(x) if lay else x
        return x.detach().requires_grad_(self.chance(grad))

    def laid_out(self, x: Tensor) -> Tensor:
        """Return x in another memory layout. Expanded and overlapping layouts repeat values of x."""
        kind = self.random.random()
        if kind < 0.4 or x.dim() == 0:
            return x.contiguous()
        if kind < 0.6:  # a random order of the dimensions in memory
            order = self.random.sample(range(x.dim()), x.dim())
            back = [order.index(dim) for dim in range(x.dim())]
            return x.permute(order).contiguous().permute(back)
        if kind < 0.78 or x.numel() == 0:
            return self.sliced(x)
        if kind < 0.9:  # strides of zero
            dims = [dim for dim in range(x.dim()) if self.chance(0.4)] or [self.random.randrange(x.dim())]
            narrow = x
            for dim in dims:
                narrow = narrow.narrow(dim, 0, 1)
            return narrow.contiguous().expand(x.shape)
        return self.overlapping(x)

    def sliced(self, x: Tensor) -> Tensor:
        """Return x as a slice, with offsets and steps, of a larger tensor whose other elements are NaN or maximal."""
        steps = [self.pick((1, 1, 2, 3)) for _ in range(x.dim())]
        ends = [(self.pick((0, 0, 1, 3)), self.pick((0, 0, 1, 3))) for _ in range(x.dim())]
        sizes = [sum(end) + size * step for size, step, end in zip(x.shape, steps, ends, strict=True)]
        fill = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max if x.dtype != torch.bool else True
        view = torch.full(sizes, fill, dtype=x.dtype)
        for dim, (step, (first, _)) in enumerate(zip(steps, ends, strict=True)):
            last = first + x.shape[dim] * step
            view = view.movedim(dim, 0)[first:last:step].movedim(0, dim)
        return view.copy_(x)

    def overlapping(self, x: Tensor) -> Tensor:
        """Return a view of x's first values whose rows overlap in memory."""
        strides = [self.pick((0, 1, 1, 2, 3)) for _ in x.shape]
        needed = 1 + sum(stride * (size - 1) for stride, size in zip(strides, x.shape, strict=True))
        source = x.flatten().repeat(needed // x.numel() + 1)
        return source.as_strided(x.shape, strides)

    def dropout(self) -> dict:
        """Return dropout_p, seed and site, or sometimes no options for p = 0."""
        p = self.pick(PROBABILITIES)
        if p == 0.0 and self.chance(0.5):
            return {}
        value = self.pick(SEEDS) if self.chance(0.5) else self.random.randrange(-(2**63), 2**63)
        seed = torch.tensor(value).reshape(self.pick(((), (1,), (1, 1))))
        site = self.pick(SITES) if self.chance(0.7) else self.random.randrange(2**32)
        return {"dropout_p": p, "seed": seed, "site": site}

    def poison(self, x: Tensor | None, where: Tensor | None = None) -> None:
        """Put a NaN, an infinity or, in float16, a number near the largest into one to three places of x.

        Only places where `where` is True are chosen. Elements that share memory change together.
        """
        if x is None:
            return
        places = torch.ones(x.shape, dtype=torch.bool) if where is None else where
        found = places.nonzero()
        if not len(found):
            return
        values = [float("nan"), float("inf"), float("-inf")] + [60000.0, -60000.0] * (x.dtype == torch.float16)
        with torch.no_grad():
            for _ in range(self.pick((1, 1, 2, 3))):
                x[tuple(found[self.random.randrange(len(found))].tolist())] = self.pick(values)
