"""Unsupervised pre-training: from text or token files to a run folder."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from gpt_fast_settings.declaration import did_you_mean, wrong_on_every_rank
from gpt_fast_settings.pretrain import PretrainSettings

from .. import _memory
from ..config import PRESETS, GPTConfig
from ..data.batches import Batch, lm_windows, unigram_entropy
from ..data.reading.pipes import is_piped
from ..data.stream import TokenStream
from ..data.tokenizer import check_kind, special_ids, vocabulary_size
from ..heads import GPTForCausalLM, GPTForMaskedLM, Head
from ..interrupts import Stop
from .engine import throughput
from .engine.distributed import World, launched_size, resolve_device
from .engine.optimizer import schedule
from .lm_data import LMData, Mask, WindowSource, check_division, lm_batch, masker, read_lm_data
from .metrics import Metrics, lm_loss
from .plots import plot_language_model
from .program import Record, Say, Session, Show, train
from .runs.folder import check_run, read_metrics, read_record, with_special_tokens
from .runs.load import load_head
from .runs.recipes import Recipe, complete, pretraining

OBJECTIVES: dict[str, type[Head]] = {"clm": GPTForCausalLM, "mlm": GPTForMaskedLM}
VALID_WINDOWS = 128
SMALL_SIZES: dict[str, Any] = {"num_layers": 4, "num_heads": 4, "hidden_dim": 128, "seq_len": 128, "dropout": 0.0}


def pretrain(settings: PretrainSettings, show: Show, say: Say, stop: Stop | None = None) -> Record:
    """Train a language model and write its run folder. Return the run's record, the content of run.json.

    `show(progress)` is called after each update with a `Progress`, and `say(line)` with lines for the user, both on
    rank 0 only. `stop` tells whether a signal has asked the run to end. With --resume, a finished run that is not asked
    for more steps is left as it is. Raise `ValueError` for settings that contradict each other, and for data or a
    folder that do not fit them.
    """
    with wrong_on_every_rank():
        check(settings)
    return train(settings, _pretrain, show, say, stop)


def check(settings: PretrainSettings) -> None:
    """Raise `ValueError` for settings that are wrong whatever the training text is, which is not read.

    These are: a batch size that micro-batches and ranks do not divide; more warmup than steps, except with --resume;
    --graph with options that it does not allow; an unknown preset or tokenizer; and pipes as --data with --resume.
    With --from, the options --preset, --layers, --heads, --dim and --tokenizer are errors too, because the run of
    --from decides them. Without --from, sizes that do not fit each other or the memory are errors too. Raise
    `FileNotFoundError` if the folder of --from holds no run.
    """
    if settings.resume:
        _refuse_pipes(settings)
    check_division(settings.batch_size, settings.accumulate, int(os.environ.get("WORLD_SIZE", "1")))
    if settings.warmup is not None and settings.warmup > settings.steps and not settings.resume:
        raise ValueError(f"--warmup {settings.warmup}: --steps is {settings.steps}; expected at most as many")
    _check_graph(settings)
    _check_names(settings)
    if settings.source is None:
        config = make_config(settings, num_tokens=1000)
        _check_pieces(settings, config.seq_len)
        _check_memory(settings, config)
        return
    check_run(settings.source)
    for name in ("preset", "layers", "heads", "dim", "tokenizer"):
        if (value := getattr(settings, name)) is not None:
            raise ValueError(f"--{name} {value}: --from {settings.source} has its own; leave one out")


def _check_names(settings: PretrainSettings) -> None:
    """Raise `ValueError` for an unknown preset or tokenizer, and if the heads do not divide the hidden dimension.

    Heads and dimension are those in `settings`, else the preset's, else a small model's (4 and 128). With --from they
    are not compared.
    """
    preset, tokenizer = settings.preset, settings.tokenizer
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"--preset {preset!r}: expected one of {', '.join(PRESETS)}{did_you_mean(preset, PRESETS)}")
    if tokenizer is not None:
        check_kind(tokenizer)
    sizes = PRESETS.get(str(preset), SMALL_SIZES)
    dim, heads = settings.dim or sizes["hidden_dim"], settings.heads or sizes["num_heads"]
    if settings.source is None and dim % heads:
        given = f"--heads {heads}" if settings.heads else f"--dim {dim}"
        raise ValueError(
            f"{given}: {dim} dimensions are not divisible by {heads} heads; expected a multiple of the heads"
        )


def _check_graph(settings: PretrainSettings) -> None:
    """Raise `ValueError` if --graph is combined with options whose updates no CUDA graph can hold.

    They are the CPU as the device, several processes, --optimizer muon, --objective mlm, --pack and --window-warmup.
    """
    if not settings.graph:
        return
    if resolve_device(settings.device) == "cpu":
        raise ValueError("--graph: --device is cpu; expected cuda, as a graph is CUDA's")
    if (ranks := launched_size()) > 1:
        raise ValueError(f"--graph: torchrun started {ranks} processes; expected one")
    if settings.optimizer == "muon":
        raise ValueError("--graph: --optimizer muon reads a value of the device in each update; expected adamw")
    if settings.objective == "mlm":
        raise ValueError("--graph: --objective mlm counts its labels on the host in each update; expected clm")
    for name, changes in (("--pack", settings.pack), ("--window-warmup", settings.window_warmup > 0)):
        if changes:
            raise ValueError(f"--graph: {name} gives updates of different shapes; expected one shape, without {name}")


def _check_pieces(settings: PretrainSettings, seq_len: int) -> None:
    """Raise `ValueError` if --window-warmup is given, which cuts windows into four, and 4 does not divide `seq_len`."""
    if settings.window_warmup and seq_len % 4:
        raise ValueError(
            f"--window-warmup {settings.window_warmup:g}: windows have {seq_len} positions; expected a multiple of 4, "
            "as they are cut into four pieces"
        )


def _check_memory(settings: PretrainSettings, config: GPTConfig) -> None:
    """Raise `ValueError` if the model with one micro-batch cannot fit into the available main memory of this machine.

    `config` is the configuration of the model. The memory of a GPU is not checked. The estimate counts only what is
    certainly needed, in float32. For training on a CPU these are weights, gradients, two moments and the input of each
    block. On a GPU, and with FSDP, only the weights count, because the model is first built in main memory.
    """
    on_cpu = resolve_device(settings.device) == "cpu" and settings.strategy != "fsdp"
    numbers = (4 if on_cpu else 1) * config.trunk_parameters()
    if on_cpu:
        tokens = settings.batch_size // settings.accumulate * config.seq_len
        numbers += config.num_layers * tokens * config.hidden_dim
    needed, left = 4 * numbers, _memory.available()
    if needed > left:
        raise ValueError(
            f"this model with its batch needs {_memory.size(needed)} of memory; expected at most "
            f"{_memory.size(left)}, which is left: give a smaller --dim, --layers, --seq-len or --batch-size"
        )


def _pretrain(session: Session[PretrainSettings]) -> Record:
    """Pre-train a language model, as a `Session` asks: read the data, make the model, train, write the run folder.

    A `Session` holds the settings, the run folder, the ranks, and the functions that report to the user. Settings that
    are None take the preset's values, or those of the run of --from. Return the run's record, the content of run.json.
    Raise `ValueError` if the data is too small or does not fit the settings.
    """
    run, ranks, say = session.run, session.ranks, session.say
    if run.kept:  # the command may have omitted what the run began with
        _refuse_pipes(session.settings)
        _check_graph(session.settings)
    settings = complete(session.settings, pretraining(session.settings.preset, session.settings.source))
    warmup = settings.warmup if settings.warmup is not None else min(2000, max(1, settings.steps // 10))
    settings = settings.changed(warmup=warmup)
    session = dataclasses.replace(session, settings=settings)
    data = read_lm_data(
        settings.data,
        _tokenizer_name(settings, run.folder, run.kept),
        _bpe_size(settings),
        ranks,
        settings.text_column,
        settings.raw_dtype,
    )
    say(data.summary)
    model = session.make_model(partial(make_model, settings, data.tokenizer))
    config, causal = model.config, settings.objective == "clm"
    entropy = unigram_entropy(data.valid.counts())
    say(f"{model.num_parameters():,} parameters; unigram entropy of the held-out text: {entropy:.3f} nats per token")

    data.train.require(config.seq_len, f"{data.source}, the part to train on")
    data.valid.require(config.seq_len, f"{data.source}, the part to validate on")
    mask = None if causal else masker(data.tokenizer, config)
    document_token = data.document_token if settings.pack else None
    if settings.pack and document_token is None:
        raise ValueError(f"--pack: nothing says which token begins a document in {data.source}; leave it out")
    recipe = Recipe.of(settings)
    origin: Record = {
        "command": "pretrain",
        "objective": settings.objective,
        "data": data.source,
        "tokenizer": str(settings.source or settings.tokenizer or "bpe"),
        "preset": settings.preset or (read_record(settings.source).get("preset") if settings.source else None),
        **dataclasses.asdict(recipe),
    }
    source = WindowSource(
        data.train, config.seq_len, settings.batch_size, settings.seed, mask, document_token, settings.accumulate,
        ranks.rank, ranks.size, round(settings.window_warmup * settings.steps),
    )  # fmt: skip
    _check_pieces(settings, config.seq_len)
    valid = validation_batches(data.valid, config.seq_len, settings.batch_size, mask, document_token)
    loop = session.make_loop(
        model,
        data.tokenizer,
        source,
        partial(validation, model, valid, ranks),
        lr=recipe.lr,
        steps=settings.steps,
        schedule=schedule(
            settings.schedule, total=settings.steps, warmup=warmup, final=recipe.final_lr, decay=settings.decay
        ),
        validations=10,
        identity=data.identity,
        record=origin,
        flops_per_token=lambda: throughput.flops_per_token(config, model.num_parameters(), causal),
    )
    last = loop.run()

    record = origin | {
        "train_tokens": len(data.train),
        "valid_tokens": len(data.valid),
        "steps": settings.steps,
        "parameters": model.num_parameters(),
        "train_loss": last["train_loss"],
        "valid_loss": last["valid_loss"],
        "unigram_entropy": entropy,
    }
    record |= session.facts(loop)
    whole = loop.engine.whole_model()
    if ranks.first:
        session.finish(whole, record, {"loss.png": partial(draw, run.folder, record)})
    ranks.wait()
    return record


def _refuse_pipes(settings: PretrainSettings) -> None:
    """Raise `ValueError` if a file of --data is a pipe, such as standard input. Call this only for a resumed run.

    A resumed run needs the text of its beginning, which a pipe no longer has.
    """
    for path in settings.data:
        if is_piped(path):
            raise ValueError(f"--resume: --data {path} is a pipe, whose text is gone once it was read; expected files")


def _tokenizer_name(settings: PretrainSettings, folder: Path, resumed: bool) -> str | None:
    """Return where the run's tokenizer comes from: a path as text, "bpe", "byte" or "char", or None for the default.

    It is the run's own `folder` for a resumed run, else the folder of --from, else the value of --tokenizer.
    """
    return str(folder) if resumed else str(settings.source) if settings.source else settings.tokenizer


def _bpe_size(settings: PretrainSettings) -> int:
    """Return the vocabulary size for a new BPE tokenizer: the preset's, or 4,096 without a preset."""
    return GPTConfig.preset(settings.preset).num_tokens if settings.preset else 4096


def draw(folder: Path, record: Record, path: Path) -> None:
    """Plot training and validation loss of the run in `folder` over the updates, as a PNG at `path`.

    The curves are read from metrics.jsonl. `record`, the content of run.json, gives the title and "unigram_entropy",
    which is drawn as a line.
    """
    title = f"Pre-training ({record['objective']}): {record['data']}"
    plot_language_model(read_metrics(folder), record["unigram_entropy"], title, path)


def make_model(settings: PretrainSettings, tokenizer: Tokenizer) -> Head:
    """Return the model to train, with the head for the objective --objective.

    It has new weights and the vocabulary of `tokenizer`, or with --from the weights and sizes of that run. Such a model
    gets embeddings for special tokens of `tokenizer` that it lacks, and --dropout replaces its three dropout rates.
    Raise `ValueError` if --seq-len differs from the positions of the run of --from.
    """
    head = OBJECTIVES[settings.objective]
    if settings.source is None:
        return head(make_config(settings, vocabulary_size(tokenizer), **special_ids(tokenizer)))
    overrides: dict[str, Any] = {}
    if settings.dropout is not None:
        names = ("embedding_dropout", "attention_dropout", "residual_dropout")
        overrides |= dict.fromkeys(names, settings.dropout)
    model = with_special_tokens(load_head(head, settings.source, **overrides), tokenizer)
    if settings.seq_len is not None and settings.seq_len != model.config.seq_len:
        raise ValueError(f"--seq-len {settings.seq_len}: --from {settings.source} has {model.config.seq_len} positions")
    return model


def make_config(settings: PretrainSettings, num_tokens: int, **tokens: int) -> GPTConfig:
    """Return the configuration of the preset with the sizes that the user gave in `settings`.

    `num_tokens` is the vocabulary size, and `tokens` are the ids of special tokens by their field of `GPTConfig`, such
    as `start_token`. Without a preset, the result is a GPT-2 of 4 layers, 4 heads, 128 dimensions and 128 positions,
    without dropout, unless `settings` give these.
    """
    given = {
        "num_layers": settings.layers,
        "num_heads": settings.heads,
        "hidden_dim": settings.dim,
        "seq_len": settings.seq_len,
        "dropout": settings.dropout,
    }
    sizes: dict[str, Any] = {} if settings.preset else {**SMALL_SIZES}
    sizes |= {name: value for name, value in given.items() if value is not None}
    return GPTConfig.preset(settings.preset or "gpt2", num_tokens=num_tokens, **sizes, **tokens)


def validation_batches(
    valid: TokenStream, seq_len: int, batch_size: int, mask: Mask | None, document_token: int | None
) -> list[Batch]:
    """Take at most 128 windows of `valid` and return them in batches. Windows and masks are the same in every call.

    The windows are evenly spaced over the stream. A window has `seq_len` tokens, and a batch at most `batch_size`
    windows. `mask(tokens, generator)` hides tokens and returns (inputs, labels); it is None for next-token prediction.
    If `document_token`, the id that begins a document, is given, the windows of a batch are packed into one row, in
    which attention does not cross documents. Raise `ValueError` if the stream is shorter than a window.
    """
    windows: Tensor = lm_windows(valid, seq_len, VALID_WINDOWS)
    generator = torch.Generator().manual_seed(0)
    return [lm_batch(tokens, mask, generator, document_token) for tokens in windows.split(batch_size)]


def validation(model: Head, batches: list[Batch], ranks: World) -> Metrics:
    """Return {"valid_loss": loss}, the mean loss in nats per predicted token over `batches`.

    The ranks divide the batches among them, so every rank must call this. All get the same result.
    """
    return {"valid_loss": lm_loss(model, batches, ranks)}


__all__ = ["LMData", "PretrainSettings", "pretrain"]
