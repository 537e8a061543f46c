"""Draw a token from logits: repetition penalty, temperature, top-k, top-p, min-p."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-30  # float32 cannot divide by less; below it the most probable token alone is left


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Options of drawing a token, applied in this order: repetition_penalty, temperature, top_k, top_p, min_p.

    The constructor raises `ValueError` for values out of range. None switches an option off.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    min_p: float | None = None

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, "0 (greedy) or more", lambda x: 0 <= x < math.inf)
        _check_number(
            "repetition_penalty", self.repetition_penalty, "more than 0, 1 for none", lambda x: 0 < x < math.inf
        )
        if self.top_k is not None and (not _is_integer(self.top_k) or self.top_k < 1):
            raise ValueError(f"gpt_fast.generate: top_k is {self.top_k!r}; expected an integer of 1 or more, or None")
        if self.top_p is not None:
            _check_number("top_p", self.top_p, "more than 0 and at most 1, or None", lambda x: 0 < x <= 1)
        if self.min_p is not None:
            _check_number("min_p", self.min_p, "0 to 1, or None", lambda x: 0 <= x <= 1)


def _is_integer(value: object) -> bool:
    """Return True for an integer of Python or numpy. A bool does not count."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _check_number(name: str, value: object, expected: str, fits: Callable[[float], bool]) -> None:
    """Raise `ValueError` unless `value` is a real number, not a bool, for which `fits(float(value))` is True.

    `name` and `expected` (a description of the valid values) are for the message.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not fits(float(value)):
        raise ValueError(f"gpt_fast.generate: {name} is {value!r}; expected {expected}")


def sample(
    logits: Tensor,
    options: Sampling,
    *,
    generator: torch.Generator | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Draw one token for each row of `logits` [B, V], in float32, from their softmax after the changes in `options`.

    The changes are repetition penalty, temperature, top_k, top_p and min_p, in this order. With a temperature of 0 the
    token is the most probable one. `seen` [B, V], Bool, is True for the tokens to which the repetition penalty applies;
    None switches the penalty off. `generator` is the source of randomness, torch's default generator if it is None.

    Returns:
        Token ids [B], int64.

    Raises:
        ValueError: Logits are NaN or +inf; -inf is allowed.
    """
    logits = logits.float()
    if bool(damaged(logits).any()):
        raise ValueError(DAMAGED)
    return draw(logits, options, generator=generator, seen=seen)


DAMAGED = "gpt_fast.generate: the model's logits hold NaN or infinity; its weights are damaged or its training diverged"


def damaged(logits: Tensor) -> Tensor:
    """Return a Bool tensor [B], True for each row of `logits` [B, V] that has NaN or +inf in it; -inf is no damage."""
    return ~(logits.amax(dim=-1) < math.inf)  # NaN compares false as well, and amax passes it on


def draw(
    logits: Tensor,
    options: Sampling,
    *,
    generator: torch.Generator | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Draw one token id [B] for each row of float32 `logits` [B, V], as `sample` does, but without validating them.

    `options` holds the temperature (0 takes the most probable token), the repetition penalty and the limits top_k,
    top_p and min_p. `seen` [B, V], Bool, is True for the tokens to which the repetition penalty applies; None switches
    the penalty off. `generator` is the source of randomness, torch's default generator if it is None. Nothing in this
    function synchronises with the device, so a CUDA graph can capture it.
    """
    if seen is not None and options.repetition_penalty != 1:
        logits = penalise(logits, seen, options.repetition_penalty)
    largest, best = logits.max(dim=-1)
    if options.temperature < LEAST_TEMPERATURE:
        return best
    scaled = (logits - largest[:, None]) / options.temperature  # ≤ 0: a small temperature cannot overflow upwards
    if options.top_k is not None:
        scaled = keep_top_k(scaled, options.top_k)
    if options.top_p is not None and options.top_p < 1:
        scaled = keep_top_p(scaled, options.top_p)
    if options.min_p:
        scaled = keep_min_p(scaled, options.min_p)
    # The largest of p / e, e exponentially distributed, is a draw from p, and one kernel that graphs can hold.
    noise = torch.empty_like(scaled).exponential_(generator=generator)
    return (scaled.softmax(dim=-1) / noise).argmax(dim=-1)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return `logits` [B, V] with the repetition penalty applied where `seen` [B, V] is True.

    There positive logits are divided and negative ones multiplied by `penalty`, as in Keskar et al. (2019).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return `logits` [B, V] with -inf everywhere but at each row's k largest. A k above V keeps all."""
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -math.inf).scatter_(-1, ids, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return `logits` [B, V] with -inf everywhere but at the most probable tokens of each row.

    Kept is the smallest number of tokens whose probabilities add up to at least `p`, and at least one.
    """
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    # In float64, so that the order in which a GPU adds decides nothing.
    probabilities = values.double().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # what the more probable ones have reached already
    first = torch.arange(logits.shape[-1], device=logits.device) == 0
    values = values.masked_fill((before >= p) & ~first, -math.inf)
    return torch.empty_like(logits).scatter_(-1, ids, values)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Return `logits` [B, V] with -inf at tokens whose probability is below `p` > 0 times the row's largest."""
    least = logits.amax(dim=-1, keepdim=True) + math.log(p)
    return logits.masked_fill(logits < least, -math.inf)
