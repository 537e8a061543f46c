"""The settings of pre-training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .declaration import option
from .training import DATA, MODEL, TRAINING, Count, Decay, NotNegative, Size, TrainingSettings


class PretrainSettings(TrainingSettings):
    """Options of `gpt-fast pretrain`.

    A size or rate that is None is that of the preset, or without a preset that of a small GPT-2.
    """

    command: ClassVar[str] = "pretrain"

    data: tuple[Path, ...] = option(
        (),
        "Files, folders or .zip archives of text or tables (.jsonl, .json, .csv, .tsv, .parquet), hf:NAME[:SPLIT], - "
        "for standard input; or token files (.bin): those of gpt-fast prepare, llm.c's and, with --raw-dtype, "
        "nanoGPT's. Without it: the source of Python's standard library.",
        panel=DATA,
        metavar="PATH…",
    )
    tokenizer: str | None = option(
        None,
        "bpe (the default) and char learn from the training text; PATH is a tokenizer.json. Token files take the one "
        "beside them.",
        panel=DATA,
        metavar="bpe|byte|char|PATH",
    )
    text_column: str = option("text", "Column or field with the text, of tables.", panel=DATA)
    raw_dtype: Literal["uint16", "uint32"] | None = option(
        None, "The type of ids in token files without a header; nanoGPT's are uint16.", panel=DATA
    )
    pack: bool = option(False, "Attention does not cross from one document to the next.", panel=DATA)
    source: Path | None = option(
        None,
        "Run folder of a language model to continue from, of either objective: its weights, sizes and tokenizer.",
        panel=MODEL,
    )
    objective: Literal["clm", "mlm"] = option("clm", "Predict the next token, or hidden ones.", panel=MODEL)
    preset: str | None = option(
        None,
        "notes, gpt1, gpt2, gpt2-medium, gpt2-large or gpt2-xl; sizes given beside it replace its own. Without it: a "
        "GPT-2 of 4 layers, 4 heads, 128 dimensions and 128 positions, without dropout.",
        panel=MODEL,
        metavar="NAME",
    )
    layers: Size | None = option(None, "Decoders.", panel=MODEL)
    heads: Size | None = option(None, "Attention heads in each.", panel=MODEL)
    dim: Size | None = option(None, "Hidden dimensions.", panel=MODEL)
    seq_len: Annotated[int, Field(ge=2, le=2**28)] | None = option(None, "Positions: tokens seen at once.", panel=MODEL)
    dropout: Decay | None = option(None, "Of embeddings, attention and residuals.", panel=MODEL)
    steps: Count = option(1000, "Updates. --resume takes more than before.", panel=TRAINING, resume="more")
    batch_size: Count = option(16, "Windows of text in an update.", panel=TRAINING)
    lr: NotNegative | None = option(
        None,
        "Peak learning rate; 2e-3, with a preset the published one, with --from that run's.",
        panel=TRAINING,
    )
    schedule: Literal["cosine", "wsd", "linear", "constant"] = option(
        "cosine",
        "After the warm-up: along half a cosine, flat and then down at the end (wsd), along a line, or flat.",
        panel=TRAINING,
    )
    final_lr: float | None = option(
        None,
        "Share of the peak rates that a schedule falls to: 0, with a preset of GPT-2 0.1.",
        panel=TRAINING,
        ge=0,
        le=1,
    )
    warmup: Count | None = option(
        None, "Updates until the peak learning rate: 2,000, but at most a tenth of all.", panel=TRAINING
    )
    window_warmup: Decay = option(
        0.0,
        "Share of the updates, the first ones, in which windows are cut: into four for the first half of it, then into "
        "two. A piece does not see the others.",
        panel=TRAINING,
    )
    weight_decay: NotNegative | None = option(
        None, "Of matrices; nothing else decays. 0.01, with a preset of GPT-2 0.1.", panel=TRAINING
    )
    beta1: Decay | None = option(None, "Of AdamW: 0.9.", panel=TRAINING)
    beta2: Decay | None = option(None, "0.99, with a preset of GPT-1 0.999, of GPT-2 0.95.", panel=TRAINING)
    graph: bool = option(
        False,
        "Run an update as one CUDA graph: one GPU, AdamW, and batches of one shape. Same bits, less work for the host.",
        panel=TRAINING,
        resume="free",
    )
