"""Unsupervised pre-training: from text or token files to a run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .._files import write_json
from ..config import GPTConfig
from ..data.batches import Batch, lm_windows, unigram_entropy
from ..data.stream import TokenStream
from ..data.tokenizer import save_tokenizer, special_ids, vocabulary_size
from ..heads import GPTForCausalLM, GPTForMaskedLM, Head
from ..interrupts import Stop
from .engine import randomness, throughput
from .engine.distributed import World, settings_of, world
from .engine.optimizer import warmup_cosine
from .engine.update import PRECISIONS, Engine, EngineSettings
from .lm_data import LMData, Mask, WindowSource, lm_batch, masker, read_lm_data
from .loop import Loop, LoopSettings, Progress, intervals
from .metrics import Metrics, lm_loss
from .plots import plot_language_model
from .runs.folder import (
    Run,
    check_run,
    is_finished,
    new_run,
    read_metrics,
    read_record,
    with_special_tokens,
    write_extra,
)
from .runs.recipes import Recipe, complete, pretraining
from .runs.resume import SETTINGS, read_settings, take_up, write_settings

OBJECTIVES: dict[str, type[Head]] = {"clm": GPTForCausalLM, "mlm": GPTForMaskedLM}
VALID_WINDOWS = 128
# What may differ when a run is taken up again; all else says what is trained.
FREE = {
    "out", "overwrite", "resume", "device", "strategy", "accumulate", "compile", "checkpoint_activations",
    "tensorboard", "log_every", "checkpoint_every", "keep_checkpoints", "max_skips",
}  # fmt: skip


@dataclass(frozen=True)
class PretrainSettings:
    """The options of `gpt-fast pretrain`; what is None is the preset's, or without a preset that of a small GPT-2."""

    out: Path
    data: tuple[Path, ...] = ()
    source: Path | None = None  # --from
    objective: str = "clm"
    tokenizer: str | None = None
    pack: bool = False
    preset: str | None = None
    layers: int | None = None
    heads: int | None = None
    dim: int | None = None
    seq_len: int | None = None
    dropout: float | None = None
    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    lr: float | None = None
    warmup: int | None = None
    final_lr: float | None = None
    weight_decay: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    max_grad_norm: float = 1.0
    precision: str = "float32"
    compile: bool = False
    checkpoint_activations: bool = False
    seed: int = 0
    log_every: int | None = None
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    max_skips: int = 10
    tensorboard: bool = False
    overwrite: bool = False
    resume: bool = False
    device: str = "cpu"
    strategy: str | None = None


def pretrain(
    settings: PretrainSettings,
    show: Callable[[Progress], None],
    say: Callable[[str], None],
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Trains a language model and writes its run folder; returns what goes into run.json."""
    check(settings)
    if settings.resume and is_finished(settings.out):
        say(f"{settings.out}: finished, nothing is left to do")
        return read_record(settings.out)
    with world(settings.strategy, settings.device) as ranks:
        if not ranks.first:
            return _pretrain(
                settings, Run(settings.out.resolve(), settings.out.resolve()), ranks, _nothing, _nothing, stop
            )
        with new_run(settings.out, settings.overwrite, settings.resume) as run:
            return _pretrain(settings, run, ranks, show, say, stop)


def check(settings: PretrainSettings) -> None:
    """What is wrong whatever the text says shall fail before it is read."""
    if settings.objective not in OBJECTIVES:
        raise ValueError(f"--objective {settings.objective}: wanted one of {', '.join(OBJECTIVES)}")
    if settings.warmup is not None and settings.warmup < 1:
        raise ValueError(f"--warmup {settings.warmup}: wanted at least 1")
    if settings.lr is not None and not settings.lr >= 0:
        raise ValueError(f"--lr {settings.lr}: wanted 0 or more")
    if settings.final_lr is not None and not 0 <= settings.final_lr <= 1:
        raise ValueError(f"--final-lr {settings.final_lr}: wanted a share of the peak rate, from 0 to 1")
    if settings.source is None:
        make_config(settings, num_tokens=1000)
    else:
        check_run(settings.source)
    EngineSettings.of(complete(settings, pretraining(settings.preset, settings.source)))
    if settings.source is None:
        return
    options = {
        "preset": "--preset",
        "layers": "--layers",
        "heads": "--heads",
        "dim": "--dim",
        "tokenizer": "--tokenizer",
    }
    for name, option in options.items():
        if getattr(settings, name) is not None:
            raise ValueError(f"{option} {getattr(settings, name)}: --from {settings.source} has its own; leave one out")


def _pretrain(
    settings: PretrainSettings,
    run: Run,
    ranks: World,
    show: Callable[[Progress], None],
    say: Callable[[str], None],
    stop: Stop | None,
) -> dict[str, Any]:
    began = ranks.values(read_settings(run.folder / SETTINGS) if run.kept else {})  # it is gone on with
    settings = take_up(run.folder, began, settings, FREE)
    settings = complete(settings, pretraining(settings.preset, settings.source))
    warmup = settings.warmup if settings.warmup is not None else min(2000, max(1, settings.steps // 10))
    settings = dataclasses.replace(settings, warmup=warmup)
    bpe_size = GPTConfig.preset(settings.preset).num_tokens if settings.preset else 4096
    named = str(run.folder) if run.kept else str(settings.source) if settings.source else settings.tokenizer
    data = read_lm_data(settings.data, named, bpe_size, ranks)
    say(data.summary)
    torch.manual_seed(settings.seed)
    model = make_model(settings, data.tokenizer).to(ranks.device)
    config, causal = model.config, settings.objective == "clm"
    entropy = unigram_entropy(data.valid.counts())
    say(f"{model.num_parameters():,} parameters; unigram entropy of the held-out text: {entropy:.3f} nats per token")
    if ranks.rank:
        randomness.seed(settings.seed, ranks.rank)

    mask = None if causal else masker(data.tokenizer, config)
    document_token = data.document_token if settings.pack else None
    if settings.pack and document_token is None:
        raise ValueError("--pack: nothing says which token begins a document in these files")
    recipe = Recipe.of(settings)
    engine = Engine(model, recipe.lr, EngineSettings.of(settings), ranks)
    parameters = model.num_parameters() if ranks.strategy != "fsdp" or ranks.size == 1 else None
    loop_settings = LoopSettings(
        settings.steps,
        recipe.lr,
        partial(warmup_cosine, total=settings.steps, warmup=warmup, final=recipe.final_lr),
        **intervals(settings.steps, validations=10, log_every=settings.log_every),
        checkpoint_every=settings.checkpoint_every,
        keep=settings.keep_checkpoints,
        max_skips=settings.max_skips,
        tensorboard=settings.tensorboard,
        peak_flops=throughput.peak_flops(engine.device, PRECISIONS[settings.precision]),
        flops_per_token=throughput.flops_per_token(config, parameters or model.num_parameters(), causal),
    )
    source = WindowSource(
        data.train, config.seq_len, settings.batch_size, settings.seed, mask, document_token, settings.accumulate,
        ranks.rank, ranks.size,
    )  # fmt: skip
    valid = validation_batches(data.valid, config.seq_len, settings.batch_size, mask, document_token)
    if ranks.first and not run.kept:
        write_settings(run.folder, settings)
        save_tokenizer(data.tokenizer, run.folder / "tokenizer.json")
    loop = Loop(
        engine, source, partial(validation, model, valid, ranks), loop_settings, run, show, say, stop or Stop(),
        seed=settings.seed, identity=data.identity,
    )  # fmt: skip
    if run.kept or ranks.size > 1:
        loop.resume()
    last = loop.run()

    record = {
        "command": "pretrain",
        "objective": settings.objective,
        "data": data.source,
        "tokenizer": str(settings.source or settings.tokenizer or "bpe"),
        "train_tokens": len(data.train),
        "valid_tokens": len(data.valid),
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "preset": settings.preset or (read_record(settings.source).get("preset") if settings.source else None),
        **dataclasses.asdict(recipe),
        "seed": settings.seed,
        "device": settings.device,
        "precision": settings.precision,
        "torch": torch.__version__,
        "parameters": model.num_parameters(),
        "seconds": round(loop.state.seconds, 1),
        "skipped": loop.state.skipped,
        "spikes": loop.state.spike_count,
        "train_loss": last["train_loss"],
        "valid_loss": last["valid_loss"],
        "unigram_entropy": entropy,
    } | settings_of(ranks)
    whole = engine.whole_model()
    if ranks.first:
        finish(run, whole, record)
    ranks.wait()
    return record


def finish(run: Run, model: Head, record: dict[str, Any]) -> None:
    """Write the weights, then run.json, which marks the folder as finished, then the picture."""
    model.save_pretrained(run.folder)
    run.keep()
    write_json(run.folder / "run.json", record)
    write_extra(run.folder / "loss.png", partial(draw, run.folder, record))


def draw(folder: Path, record: dict[str, Any], path: Path) -> None:
    title = f"Pre-training ({record['objective']}): {record['data']}"
    plot_language_model(read_metrics(folder), record["unigram_entropy"], title, path)


def make_model(settings: PretrainSettings, tokenizer: Tokenizer) -> Head:
    """A new model, or the one of --from with this objective's head: trunk and output layer go on from its weights."""
    head = OBJECTIVES[settings.objective]
    if settings.source is None:
        return head(make_config(settings, vocabulary_size(tokenizer), **special_ids(tokenizer)))
    overrides: dict[str, Any] = {}
    if settings.dropout is not None:
        names = ("embedding_dropout", "attention_dropout", "residual_dropout")
        overrides |= dict.fromkeys(names, settings.dropout)
    model = with_special_tokens(head.from_pretrained(settings.source, **overrides), tokenizer)
    if settings.seq_len is not None and settings.seq_len != model.config.seq_len:
        raise ValueError(f"--seq-len {settings.seq_len}: --from {settings.source} has {model.config.seq_len} positions")
    return model


def make_config(settings: PretrainSettings, num_tokens: int, **tokens: int) -> GPTConfig:
    """The preset with the sizes that were given; without a preset, GPT-2's block in a size that trains in minutes on
    a CPU."""
    small = {"num_layers": 4, "num_heads": 4, "hidden_dim": 128, "seq_len": 128, "dropout": 0.0}
    given = {
        "num_layers": settings.layers,
        "num_heads": settings.heads,
        "hidden_dim": settings.dim,
        "seq_len": settings.seq_len,
        "dropout": settings.dropout,
    }
    sizes = {} if settings.preset else small
    sizes |= {name: value for name, value in given.items() if value is not None}
    return GPTConfig.preset(settings.preset or "gpt2", num_tokens=num_tokens, **sizes, **tokens)


def validation_batches(
    valid: TokenStream, seq_len: int, batch_size: int, mask: Mask | None, document_token: int | None
) -> list[Batch]:
    """The same windows, behind the same masks, at every validation."""
    windows: Tensor = lm_windows(valid, seq_len, VALID_WINDOWS)
    generator = torch.Generator().manual_seed(0)
    return [lm_batch(tokens, mask, generator, document_token) for tokens in windows.split(batch_size)]


def validation(model: Head, batches: list[Batch], ranks: World) -> Metrics:
    return {"valid_loss": lm_loss(model, batches, ranks)}


def _nothing(_: object) -> None:
    """Ranks other than the first do not print."""


__all__ = ["LMData", "PretrainSettings", "pretrain"]
