"""`gpt-fast pretrain`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .terminal import AsJson, Device, print_json, print_table, require_train_extra, resolve_device


def pretrain(
    out: Annotated[Path, typer.Option(help="Run folder to create.", rich_help_panel="Run")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH…",
            help="Files or folders of UTF-8 text, or of token files (.bin): those of gpt-fast prepare, llm.c's and "
            "nanoGPT's. Without it: the source of Python's standard library.",
            rich_help_panel="Data",
        ),
    ] = None,
    more_data: Annotated[list[Path] | None, typer.Argument(hidden=True)] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Run folder of a language model to go on from, of either objective: its weights, sizes and tokenizer.",
            rich_help_panel="Model",
        ),
    ] = None,
    objective: Annotated[
        str, typer.Option(metavar="clm|mlm", help="Predict the next token, or hidden ones.", rich_help_panel="Model")
    ] = "clm",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="bpe|byte|char|PATH",
            help="bpe (the default) and char learn from the training text; PATH is a tokenizer.json. Token files take "
            "the one beside them.",
            rich_help_panel="Data",
        ),
    ] = None,
    pack: Annotated[
        bool,
        typer.Option("--pack", help="Attention does not cross from one document to the next.", rich_help_panel="Data"),
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="notes, gpt1, gpt2, gpt2-medium, gpt2-large or gpt2-xl; sizes given beside it replace its own. "
            "Without it: a GPT-2 of 4 layers, 4 heads, 128 dimensions and 128 positions, without dropout.",
            rich_help_panel="Model",
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Decoders.", rich_help_panel="Model")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads in each.", rich_help_panel="Model")] = None,
    dim: Annotated[int | None, typer.Option(help="Hidden dimensions.", rich_help_panel="Model")] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Positions: tokens seen at once.", rich_help_panel="Model")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Of embeddings, attention and residuals.", rich_help_panel="Model")
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates.", rich_help_panel="Training")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Windows of text in an update.", rich_help_panel="Training")] = 16,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate; 2e-3, with a preset the published one, with --from that run's.",
            rich_help_panel="Training",
        ),
    ] = None,
    final_lr: Annotated[
        float | None,
        typer.Option(
            help="Share of it that the cosine ends at: 0, with a preset of GPT-2 0.1.", rich_help_panel="Training"
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            help="Updates until the peak learning rate: 2,000, but at most a tenth of all.", rich_help_panel="Training"
        ),
    ] = None,
    accumulate: options.Accumulate = 1,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            help="Of matrices; nothing else decays. 0.01, with a preset of GPT-2 0.1.", rich_help_panel="Training"
        ),
    ] = None,
    beta1: Annotated[float | None, typer.Option(help="Of AdamW: 0.9.", rich_help_panel="Training")] = None,
    beta2: Annotated[
        float | None,
        typer.Option(help="0.99, with a preset of GPT-1 0.999, of GPT-2 0.95.", rich_help_panel="Training"),
    ] = None,
    max_grad_norm: options.MaxGradNorm = 1.0,
    precision: options.Precision = "float32",
    compile: options.Compile = False,
    checkpoint_activations: options.CheckpointActivations = False,
    max_skips: options.MaxSkips = 10,
    strategy: options.Strategy = None,
    seed: Annotated[int, typer.Option(help="Of weights, batches and dropout.", rich_help_panel="Training")] = 0,
    device: Device = "auto",
    config: options.Config = None,
    log_every: options.LogEvery = None,
    checkpoint_every: options.CheckpointEvery = 1000,
    keep_checkpoints: options.KeepCheckpoints = 3,
    tensorboard: options.TensorBoard = False,
    overwrite: options.Overwrite = False,
    resume: options.Resume = False,
    as_json: AsJson = False,
) -> None:
    """Trains a language model on plain text and writes a run folder.

    The text is split by file into training and validation. The validation loss is printed beside the unigram entropy of
    the same text: what the best model without any context reaches.

    [bold]Examples[/bold]

    gpt-fast pretrain --out runs/lm

    gpt-fast pretrain --data books/ notes.txt --tokenizer byte --layers 6 --dim 256 --steps 5000 --out runs/books

    gpt-fast pretrain --preset gpt1 --objective mlm --data corpus/ --out runs/gpt1-mlm

    gpt-fast pretrain --config runs/books/settings.yaml --out runs/books --resume

    torchrun --nproc-per-node 8 --no-python gpt-fast pretrain --strategy fsdp --preset gpt2-xl --data tokens/ --out xl
    """
    given = locals()
    require_train_extra()
    if more_data and not data:
        raise ValueError(f"unexpected argument {more_data[0]}; text to train on goes behind --data")
    device = resolve_device(device)
    from gpt_fast.training.pretrain import PretrainSettings
    from gpt_fast.training.pretrain import pretrain as train

    settings = options.settings_from(PretrainSettings, given, data=(*(data or ()), *(more_data or ())), device=device)
    with options.training_session("pre-training") as session:
        record = train(settings, *session)
    if options.follows():
        return
    if as_json:
        print_json({"out": str(out), **record})
        return
    rows = [
        ("validation loss", f"{record['valid_loss']:.3f} nats per token"),
        ("unigram entropy", f"{record['unigram_entropy']:.3f} nats per token, without any context"),
        ("time", f"{record['seconds']:.0f} s"),
        ("run folder", options.run_folder(out)),
    ]
    print_table("pre-trained", rows)
