"""Learning-rate schedules: the factor in [0, 1] that multiplies the peak rate at an update counted from 0."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, total: int, warmup: int, final: float = 0.0) -> float:
    """Rises along a line over `warmup` updates, then falls along half a cosine and would reach `final` at update
    `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def warmup_linear(step: int, *, total: int, warmup: int) -> float:
    """Rises along a line over `warmup` updates, then falls along one and would reach 0 at update `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return (total - step) / max(1, total - warmup)
