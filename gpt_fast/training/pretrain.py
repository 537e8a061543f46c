"""Unsupervised pre-training: from text to a run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .. import GPTConfig, GPTForCausalLM, GPTForMaskedLM
from ..checkpoint import write_json
from ..data.batches import Batch, lm_windows, random_windows, token_stream, unigram_entropy
from ..data.corpus import Corpus, Document, read_corpus
from ..data.masking import mask_tokens
from ..data.tokenizer import encode_documents, make_tokenizer, save_tokenizer, special_ids, vocabulary_size
from ..heads import Head
from .evaluation import lm_loss
from .loop import LoopSettings, Metrics, Progress, fit, intervals
from .plot import plot_language_model
from .runs import new_run, read_metrics, special_token
from .schedules import warmup_cosine

OBJECTIVES: dict[str, type[Head]] = {"clm": GPTForCausalLM, "mlm": GPTForMaskedLM}
VALID_WINDOWS = 128


@dataclass(frozen=True)
class PretrainSettings:
    """The options of `gpt-fast pretrain`; a size that is None is the preset's, or without a preset that of a small
    GPT-2."""

    out: Path
    data: tuple[Path, ...] = ()
    objective: str = "clm"
    tokenizer: str = "bpe"
    preset: str | None = None
    layers: int | None = None
    heads: int | None = None
    dim: int | None = None
    seq_len: int | None = None
    dropout: float | None = None
    steps: int = 1000
    batch_size: int = 16
    lr: float | None = None
    seed: int = 0
    overwrite: bool = False
    device: str = "cpu"


def pretrain(
    settings: PretrainSettings, show: Callable[[Progress], None], say: Callable[[str], None]
) -> dict[str, Any]:
    """Trains a language model and writes its run folder; returns what goes into run.json."""
    head = OBJECTIVES.get(settings.objective)
    if head is None:
        raise ValueError(f"--objective {settings.objective}: wanted one of {', '.join(OBJECTIVES)}")
    if settings.batch_size < 1:
        raise ValueError(f"--batch-size {settings.batch_size}: wanted at least 1")
    make_config(settings, num_tokens=1000)  # wrong sizes shall fail before the corpus is read
    with new_run(settings.out, settings.overwrite) as folder:
        corpus = read_corpus(settings.data)
        tokenizer = make_tokenizer(settings.tokenizer, (d.text for d in corpus.train), bpe_size(settings.preset))
        train, valid = streams(tokenizer, corpus)
        config = make_config(settings, vocabulary_size(tokenizer), **special_ids(tokenizer))
        say(f"{corpus.source}: {_count(corpus.train, train)} to train on, {_count(corpus.valid, valid)} held out")

        torch.manual_seed(settings.seed)
        model = head(config).to(settings.device)
        entropy = unigram_entropy(valid)
        say(f"{head.__name__}: {model.num_parameters():,} parameters, vocabulary of {config.num_tokens:,}")
        say(f"unigram entropy of the held-out text: {entropy:.3f} nats per token")

        mask = masker(tokenizer, config) if settings.objective == "mlm" else None
        generator = torch.Generator().manual_seed(settings.seed)
        windows = random_windows(train, config.seq_len, settings.batch_size, generator)
        lr = settings.lr if settings.lr is not None else default_lr(settings.preset)
        loop = LoopSettings(
            settings.steps,
            lr,
            partial(warmup_cosine, total=settings.steps, warmup=min(2000, max(1, settings.steps // 10))),
            **intervals(settings.steps, validations=10),
        )
        check = partial(validation, model, valid, mask, settings)
        began = time.perf_counter()
        last = fit(model, lm_batches(windows, mask, generator), check, loop, folder / "metrics.jsonl", show)

        record = {
            "command": "pretrain",
            "objective": settings.objective,
            "data": corpus.source,
            "tokenizer": settings.tokenizer,
            "train_tokens": train.numel(),
            "valid_tokens": valid.numel(),
            "steps": settings.steps,
            "batch_size": settings.batch_size,
            "lr": lr,
            "seed": settings.seed,
            "device": settings.device,
            "torch": torch.__version__,
            "parameters": model.num_parameters(),
            "seconds": round(time.perf_counter() - began, 1),
            "train_loss": last["train_loss"],
            "valid_loss": last["valid_loss"],
            "unigram_entropy": entropy,
        }
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder / "tokenizer.json")
        write_json(folder / "run.json", record)
        title = f"Pre-training ({settings.objective}): {corpus.source}"
        plot_language_model(read_metrics(folder), entropy, title, folder / "loss.png")
    return record


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


def bpe_size(preset: str | None) -> int:
    """The preset's own vocabulary, 4,096 without one."""
    return GPTConfig.preset(preset).num_tokens if preset else 4096


def default_lr(preset: str | None) -> float:
    """The paper's for the published sizes; a small model takes, and needs, more."""
    return 2.5e-4 if preset else 2e-3


def streams(tokenizer: Tokenizer, corpus: Corpus) -> tuple[Tensor, Tensor]:
    """The training and the validation text as one row of ids each."""
    start = special_ids(tokenizer)["start_token"]
    train, valid = (
        token_stream(encode_documents(tokenizer, [d.text for d in part]), start)
        for part in (corpus.train, corpus.valid)
    )
    return train, valid


Mask = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]


def masker(tokenizer: Tokenizer, config: GPTConfig) -> Mask:
    """`mask_tokens` for this vocabulary."""
    special = set(special_ids(tokenizer).values())
    ordinary = torch.tensor([i for i in sorted(tokenizer.get_vocab(True).values()) if i not in special])
    return partial(mask_tokens, mask_token=special_token(config, "mask_token"), ordinary=ordinary)


def lm_batches(windows: Iterator[Tensor], mask: Mask | None, generator: torch.Generator) -> Iterator[Batch]:
    """Labels are the tokens themselves, or with `mask` the hidden ones."""
    for tokens in windows:
        yield Batch(tokens, tokens) if mask is None else Batch(*mask(tokens, generator))


def validation(model: Head, valid: Tensor, mask: Mask | None, settings: PretrainSettings) -> Metrics:
    """The loss on the same windows, and behind the same masks, at every call."""
    tokens = lm_windows(valid, model.config.seq_len, VALID_WINDOWS)
    inputs, labels = (tokens, tokens) if mask is None else mask(tokens, torch.Generator().manual_seed(0))
    return {"valid_loss": lm_loss(model, inputs, labels, causal=mask is None, batch_size=settings.batch_size)}


def _count(documents: list[Document], stream: Tensor) -> str:
    return f"{len(documents)} files with {stream.numel():,} tokens"
