"""Comparison of a model on its kernels with the pure-PyTorch reference, and of runs with each other.

Do the two models agree, and how fast is each? How soon does each run reach a loss?
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _memory, ops
from ..data.batches import Batch
from ..heads import Head
from .engine.update import Engine, EngineSettings
from .runs.folder import read_curve, read_record, special_token
from .runs.load import load_run

SEED = 1234
Mode = Callable[[], AbstractContextManager[object]]


def compare(
    folder: Path, device: str, batch_size: int, repeats: int, show: Callable[[int, int], None]
) -> dict[str, Any]:
    """Compare a run's model on its kernels ("fused") with the pure-PyTorch reference, in results and in speed.

    The run is in `folder`, and its model runs on `device`, "cpu" or "cuda". The folder is not changed. The batch has
    `batch_size` random rows. For the results, each mode makes a forward and a backward pass with dropout, with the same
    masks. For the speed, each trains a copy of the model: one update to warm up, then `repeats` timed ones, in turns.
    `show(done, repeats)` is called after each pair of updates, with `done` 0 after the first pair, which warms up.

    Return "device"; "batch", the shape of the tokens; "kernels", {op: "triton", "cpp" or "reference"}, which says what
    serves each op; "logits" and "gradients", {"largest", "relative"} each; "fused_tokens_per_second" and
    "reference_tokens_per_second", both medians; "fused_spread" and "reference_spread", each [minimum, maximum]; and
    "speedup", the ratio of the medians. "largest" is the largest difference of an element, and "relative" the largest
    ratio of a tensor's difference to its largest reference value. Raise `ValueError` if the batch needs more memory
    than is available.
    """
    model = load_run(folder, device)
    config = model.config
    tokens = batch_size * config.seq_len
    needed, left = 4 * tokens * (2 + config.num_layers * config.hidden_dim), _memory.available()
    if needed > left:  # the least: the ids, and the input of each block in float32
        raise ValueError(
            f"--batch-size {batch_size}: needs {_memory.size(needed)} of memory or more; expected at most "
            f"{_memory.size(left)}, which is left"
        )
    batch = random_batch(model, batch_size).to(torch.device(device))
    fused = logits_and_gradients(model, batch, nullcontext)
    exact = logits_and_gradients(model, batch, ops.use_reference)
    result: dict[str, Any] = {
        "device": device,
        "batch": list(batch.tokens.shape),
        "kernels": {op: ops.serving(op, torch.device(device).type) for op in ops.NAMES},
        "logits": difference([fused[0]], [exact[0]]),
        "gradients": difference(fused[1], exact[1]),
    }
    speeds: dict[str, list[float]] = {"fused": [], "reference": []}
    modes: list[tuple[str, Mode]] = [("fused", nullcontext), ("reference", ops.use_reference)]
    engines = {name: Engine(copy.deepcopy(model), 1e-4, EngineSettings()) for name, _ in modes}
    for repeat in range(repeats + 1):
        for name, mode in modes if repeat % 2 else reversed(modes):
            with mode():
                speed = batch.num_tokens() / step_seconds(engines[name], batch)
            if repeat:  # the first of each warms up
                speeds[name].append(speed)
        show(repeat, repeats)
    for name, measured in speeds.items():
        result[f"{name}_tokens_per_second"] = statistics.median(measured)
        result[f"{name}_spread"] = [min(measured), max(measured)]
    result["speedup"] = result["fused_tokens_per_second"] / result["reference_tokens_per_second"]
    return result


def compare_runs(folders: Sequence[Path], loss: float | None, metric: str) -> dict[str, Any]:
    """Return how soon each run's `metric` first falls to `loss`, as {"metric", "loss", "runs"}.

    "runs" has a dict for each folder: "run", the folder as text; "best", the lowest `metric`; "optimizer", "adamw" or
    "muon"; "step"; and "seconds". The last two are the updates and the seconds of training until `metric` falls to
    `loss`, interpolated linearly between two lines. Both are None if the run never reaches `loss`, and "seconds" also
    if the run did not log it. If `loss` is None, it is the lowest value that all runs reach. `metric` is a field of
    metrics.jsonl, such as "valid_loss". Raise `FileNotFoundError` for a folder without metrics.jsonl, and `ValueError`
    if no line of it has `metric`.
    """
    curves = {folder: read_curve(folder, metric) for folder in folders}
    best = {folder: min(line[metric] for line in curve) for folder, curve in curves.items()}
    if loss is None:
        loss = max(best.values())
    rows = []
    for folder, curve in curves.items():
        record = read_record(folder)
        row = {"run": str(folder), "best": best[folder], "optimizer": record.get("optimizer", "adamw")}
        rows.append(row | {name: first_at(curve, metric, loss, name) for name in ("step", "seconds")})
    return {"metric": metric, "loss": loss, "runs": rows}


def first_at(curve: Sequence[dict[str, float]], metric: str, loss: float, field: str) -> float | None:
    """Return the value of `field` where `metric` first falls to `loss` or below, interpolated between two lines.

    `curve` holds lines of a run's metrics.jsonl in their order, each a dict of numbers with `metric` in it. If the
    first line is at or below `loss` already, its own value is returned. Return None if `metric` never falls to `loss`,
    or if one of the two lines lacks `field`. Lines in which `metric` is NaN are skipped.
    """
    before: dict[str, float] | None = None
    for line in curve:
        if line[metric] <= loss:
            if field not in line or (before is not None and field not in before):
                return None
            if before is None:
                return float(line[field])
            share = (before[metric] - loss) / (before[metric] - line[metric])
            return before[field] + share * (line[field] - before[field])
        before = line if line[metric] == line[metric] else before  # NaN is no loss
    return None


def random_batch(model: Head, batch_size: int) -> Batch:
    """Return a batch of `batch_size` rows of random tokens, with random labels of the kind that the model's head takes.

    A row has as many tokens as the model has positions. For a head that reads a pair or choices, it has two or four
    sequences of that length. For heads of labelled tasks, each sequence has a random number of real tokens, at least
    half of all. The last of them is the extract token. The batch is on the CPU. The same model and size always give the
    same batch. Raise `ValueError` for a head of a labelled task without an extract token.
    """
    config = model.config
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(config.num_tokens, (batch_size, config.seq_len), generator=generator)
    name = type(model).__name__
    if name == "GPTForCausalLM":
        return Batch(tokens, tokens)
    if name == "GPTForMaskedLM":
        return Batch(tokens, tokens.masked_fill(torch.rand(tokens.shape, generator=generator) >= 0.15, -100))
    sequences = {"GPTForSimilarity": 2, "GPTForMultipleChoice": 4}.get(name, 1)
    tokens = torch.randint(config.num_tokens, (batch_size * sequences, config.seq_len), generator=generator)
    lengths = torch.randint(config.seq_len // 2, config.seq_len + 1, (len(tokens),), generator=generator)
    tokens[torch.arange(len(tokens)), lengths - 1] = special_token(config, "extract_token")
    if sequences > 1:
        tokens, lengths = tokens.view(batch_size, sequences, -1), lengths.view(batch_size, sequences)
    if name == "GPTForMultipleChoice":
        return Batch(tokens, torch.randint(sequences, (batch_size,), generator=generator), lengths)
    if name == "GPTForTokenClassification":
        return Batch(tokens, torch.randint(config.num_labels, tokens.shape, generator=generator), lengths)
    if name == "GPTForQuestionAnswering":
        return Batch(tokens, lengths[:, None] - torch.tensor([2, 1]), lengths)
    if config.problem == "multi_label":
        return Batch(tokens, torch.rand(batch_size, config.num_labels, generator=generator).round(), lengths)
    if config.problem == "regression":
        return Batch(tokens, torch.randn(batch_size, generator=generator), lengths)
    return Batch(tokens, torch.randint(config.num_labels, (batch_size,), generator=generator), lengths)


def logits_and_gradients(model: nn.Module, batch: Batch, mode: Mode) -> tuple[Tensor, list[Tensor]]:
    """Return (logits, gradients) of one forward and backward pass of the loss on `batch`.

    Both are copies. `gradients` is a list in the order of the model's parameters, without those that have no gradient.
    The pass runs inside `mode()`: `nullcontext` for the kernels, `ops.use_reference` for the reference. Torch's
    generators are seeded with the same number, so that dropout masks are the same in every call. The model stays in
    training mode, with the gradients in its parameters.
    """
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(SEED)  # the same dropout masks every time
    with mode():
        out = model(batch.tokens, batch.labels, lengths=batch.lengths, logits=True)
        out.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return out.logits.detach().clone(), gradients


def difference(got: list[Tensor], wanted: list[Tensor]) -> dict[str, float]:
    """Return how far the tensors `got` lie from the tensors `wanted`, as {"largest": number, "relative": number}.

    The lists are compared tensor by tensor, so both have the same shapes in the same order. "largest" is the largest
    `|got - wanted|` of all elements. Each pair of tensors has a ratio: its largest difference divided by its largest
    `|wanted|`, or the difference itself if that `|wanted|` is 0. "relative" is the largest ratio. For empty lists both
    are 0.
    """
    largest, relative = 0.0, 0.0
    for a, b in zip(got, wanted, strict=True):
        apart, scale = float((a - b).abs().max()), float(b.abs().max())
        largest = max(largest, apart)
        relative = max(relative, apart / scale if scale else apart)
    return {"largest": largest, "relative": relative}


def step_seconds(engine: Engine, batch: Batch) -> float:
    """Train the engine's model on `batch` for one update, and return the seconds until the device has finished it.

    The learning rate is 1e-4.
    """
    began = time.perf_counter()
    engine.update([batch], 1e-4).loss.item()  # waits for the device
    return time.perf_counter() - began
