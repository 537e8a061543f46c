"""The training loop that every task shares: updates, logging, validation."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from .optimizer import make_optimizer

Metrics = dict[str, float]


@dataclass(frozen=True)
class Progress:
    """What a progress display needs after each update."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    logged: Metrics | None  # the line that went into metrics.jsonl, on the steps that log


@dataclass(frozen=True)
class LoopSettings:
    steps: int
    lr: float
    schedule: Callable[[int], float]  # update, counted from 0, to the factor on lr
    log_every: int
    valid_every: int
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


def intervals(steps: int, validations: int) -> dict[str, int]:
    """`log_every` for some fifty lines, or one every hundred updates of a long run, and `valid_every` as a multiple of
    it, so that every line of metrics.jsonl covers the same number of updates."""
    log_every = min(100, max(1, steps // 50))
    return {"log_every": log_every, "valid_every": log_every * max(1, round(steps / validations / log_every))}


def fit(
    model: nn.Module,
    batches: Iterator[Batch],
    validate: Callable[[], Metrics],
    settings: LoopSettings,
    metrics_file: Path,
    show: Callable[[Progress], None],
) -> Metrics:
    """Updates `model` on `settings.steps` batches and returns the last line logged.

    A line holds the step, the mean loss since the line before, the learning rate, the gradient's norm before
    clipping, tokens per second without the time spent in validation, and what `validate` returns on the steps that
    call it; the last step always does. A loss that is not finite is an error.
    """
    if settings.steps < 1:
        raise ValueError(f"--steps {settings.steps}: wanted at least 1")
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, settings.lr, settings.weight_decay)
    losses: list[Tensor] = []
    tokens, seconds, shown_loss, rate = 0, 0.0, math.nan, 0.0
    line: Metrics = {}
    with metrics_file.open("w", encoding="utf-8") as file:
        for step in range(1, settings.steps + 1):
            model.train()
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * settings.schedule(step - 1)
            batch = next(batches)
            loss, norm = update(model, optimizer, batch.to(device), settings.max_grad_norm)
            losses.append(loss)
            tokens += batch.num_tokens()
            logs = step % settings.log_every == 0 or step == settings.steps
            validates = step % settings.valid_every == 0 or step == settings.steps
            logged = None
            if logs or validates or step == 1:
                shown_loss = float(torch.stack(losses).mean())  # the one wait for the device
                if not math.isfinite(shown_loss):
                    raise ValueError(
                        f"the training loss is {shown_loss} at step {step}; try a smaller --lr than {settings.lr:g}"
                    )
            seconds += time.perf_counter() - began
            rate = tokens / seconds
            if logs or validates:
                line = {"step": step, "train_loss": shown_loss, "lr": optimizer.param_groups[0]["lr"]}
                line |= {"grad_norm": float(norm), "tokens_per_second": rate}
                if validates:
                    line |= validate()
                file.write(json.dumps(line) + "\n")
                file.flush()
                losses, tokens, seconds, logged = [], 0, 0.0, line
            show(Progress(step, settings.steps, shown_loss, rate, logged))
    return line


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, max_grad_norm: float
) -> tuple[Tensor, Tensor]:
    """One forward, backward and step; returns the loss and the gradient's norm before clipping, both still on the
    device."""
    loss = model(batch.tokens, batch.labels, lengths=batch.lengths).loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return loss.detach(), norm
