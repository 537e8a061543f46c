"""The report of `accelerate`, and the patches that it plans."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.nn as nn


class Replaced(NamedTuple):
    """A module whose computation an op took over.

    Attributes:
        name: Name of the module in the model.
        kind: Class of the module.
        op: Name of the op in `gpt_fast.ops`.
    """

    name: str
    kind: str
    op: str


class LeftAlone(NamedTuple):
    """A module that keeps its own computation.

    Attributes:
        name: Name of the module in the model.
        kind: Class of the module.
        reason: Why the module keeps its own computation.
    """

    name: str
    kind: str
    reason: str


@dataclass
class Report:
    """Report of what `accelerate` replaced and what it left alone. `print` shows it.

    Attributes:
        replaced: Name, class (`kind`) and op of each module whose computation an op took over.
        left: Name, class and reason of each module that keeps its own computation.
        notes: Further remarks.

    Example:
        ```python
        import torch
        import gpt_fast

        layer = torch.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
        print(len(gpt_fast.accelerate(layer).replaced) > 0)  # True
        ```
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
        """Append an entry for a module to `replaced` or, if there is a `reason`, to `left`.

        Args:
            name: Name of the module in the model, as in `named_modules()`.
            module: The module. Its class name goes into the entry.
            op: Name of the op in `gpt_fast.ops` that takes the computation over. Not recorded if there is a reason.
            reason: Why the module is left alone, or None if it is replaced.
        """
        kind = type(module).__name__
        if reason is None:
            self.replaced.append(Replaced(name, kind, op))
        else:
            self.left.append(LeftAlone(name, kind, reason))


class Patch(NamedTuple):
    """Planned change of a module: its new forward, None to keep its own, and instance attributes to set, by name."""

    module: nn.Module
    forward: Callable | None
    attributes: dict[str, Any]
