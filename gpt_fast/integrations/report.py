"""What `accelerate` says it did, and what it is about to do."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.nn as nn


class Replaced(NamedTuple):
    """A module whose computation an op took over."""

    name: str
    kind: str
    op: str


class LeftAlone(NamedTuple):
    """A module that keeps its own computation, and why."""

    name: str
    kind: str
    reason: str


@dataclass
class Report:
    """What `accelerate` did; `print` shows it.

    `replaced` has the name, the class (`kind`) and the op of each module whose computation an op took over, `left` the
    name, the class and the reason of each that keeps its own, `notes` whatever else there is to say.
    """

    replaced: list[Replaced] = field(default_factory=list)
    left: list[LeftAlone] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"gpt_fast: {len(self.replaced)} modules replaced, {len(self.left)} left alone"]
        for (kind, op), count in Counter((entry.kind, entry.op) for entry in self.replaced).items():
            lines.append(f"  {count:>3} × {kind} → {op}")
        lines += [f"  left alone: {entry.name or 'the model'} ({entry.kind}): {entry.reason}" for entry in self.left]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def note(self, name: str, module: nn.Module, op: str, reason: str | None) -> None:
        """The module was replaced, or left alone for a reason."""
        kind = type(module).__name__
        if reason is None:
            self.replaced.append(Replaced(name, kind, op))
        else:
            self.left.append(LeftAlone(name, kind, reason))


class Patch(NamedTuple):
    """What one module gets: a forward, if its own does not do, and attributes that its class lacks."""

    module: nn.Module
    forward: Callable | None
    attributes: dict[str, Any]
