"""What goes wrong in a training curve: losses that jump, and updates that cannot be made."""

from __future__ import annotations

import math
from dataclasses import dataclass

MEMORY = 50  # updates over which the running mean forgets
THRESHOLD = 6.0  # standard deviations above it


@dataclass
class Spikes:
    """A running mean and variance of the loss; a spike is a loss six standard deviations above the mean.

    Exponentially weighted over some fifty updates; the first fifty raise no alarm. A spike enters the mean only as
    far as the threshold, so that one alarm does not silence the next.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def see(self, loss: float) -> bool:
        """Takes the next loss in and says whether it is a spike."""
        if not math.isfinite(loss):
            return False
        limit = self.mean + THRESHOLD * math.sqrt(self.variance)
        spike = self.count >= MEMORY and loss > limit
        if spike:
            loss = limit
        self.count += 1
        share = max(1 / self.count, 1 / MEMORY)
        apart = loss - self.mean
        self.mean += share * apart
        self.variance = (1 - share) * (self.variance + share * apart * apart)
        return spike
