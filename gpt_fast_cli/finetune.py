"""`gpt-fast finetune`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .terminal import AsJson, Device, metric_rows, print_json, print_table, require_train_extra, resolve_device


def finetune(
    source: Annotated[Path, typer.Option("--from", help="Run folder of the pre-trained model.", rich_help_panel="Run")],
    out: Annotated[Path, typer.Option(help="Run folder to create.", rich_help_panel="Run")],
    scratch: Annotated[
        bool,
        typer.Option(
            "--scratch",
            help="Take sizes and tokenizer alone and draw the weights anew: what does pre-training bring?",
            rich_help_panel="Training",
        ),
    ] = False,
    train: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Labelled table: .csv, .tsv or .jsonl. Without it: snippets of Python's standard library, to be told "
            "apart by the package that they come from.",
            rich_help_panel="Data",
        ),
    ] = None,
    valid: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Table to validate on; without it a tenth of --train's rows.", rich_help_panel="Data"
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Train on this many rows, drawn by --seed, and not on all.", rich_help_panel="Data"),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            help="Column with the text: text; premise, sentence1, question, prompt or context by the task.",
            rich_help_panel="Data",
        ),
    ] = None,
    pair_column: Annotated[
        str | None,
        typer.Option(
            help="Column with the second text: hypothesis, sentence2 or question by the task. For multiple-choice the "
            "answers: columns with commas between them, or one of lists (choices).",
            rich_help_panel="Data",
        ),
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column with the label (label), or the answer.", rich_help_panel="Data")
    ] = None,
    task: Annotated[
        str,
        typer.Option(
            metavar="TASK",
            help="classification, entailment, similarity, multiple-choice, regression, generation or "
            "question-answering.",
            rich_help_panel="Training",
        ),
    ] = "classification",
    numbers: Annotated[
        bool,
        typer.Option("--numbers", help="Similarity as a number, by its squared error.", rich_help_panel="Training"),
    ] = False,
    epochs: Annotated[int, typer.Option(help="Passes over the table.", rich_help_panel="Training")] = 3,
    batch_size: Annotated[int, typer.Option(help="Rows in an update.", rich_help_panel="Training")] = 32,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate; 6.25e-5, a quarter of pre-training's for models without a preset.",
            rich_help_panel="Training",
        ),
    ] = None,
    lm_weight: Annotated[
        float,
        typer.Option(help="λ of the joint loss: task + λ · language model.", rich_help_panel="Training"),
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the new layer, batches and dropout.", rich_help_panel="Training")] = 0,
    accumulate: options.Accumulate = 1,
    weight_decay: options.WeightDecay = 0.01,
    beta1: options.Beta1 = 0.9,
    beta2: options.Beta2 = 0.999,
    max_grad_norm: options.MaxGradNorm = 1.0,
    precision: options.Precision = "float32",
    compile: options.Compile = False,
    checkpoint_activations: options.CheckpointActivations = False,
    max_skips: options.MaxSkips = 10,
    strategy: options.Strategy = None,
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
    """Trains a pre-trained model for a task, on a labelled table.

    A row is put as start, text, extract, a pair with a delimiter between its texts; a new layer reads the last hidden
    state of the extract token. Similarity reads a pair in both orders, multiple choice scores one sequence for each
    answer. Generation and question answering train the model itself to write the answer. Text beyond the model's
    positions is cut off. The weights of the best validation are kept.

    [bold]Examples[/bold]

    gpt-fast finetune --from runs/lm --out runs/packages

    gpt-fast finetune --from runs/lm --train reviews.csv --valid held_out.csv --label-column stars --out runs/reviews

    gpt-fast finetune --from runs/lm --train essays.tsv --task regression --label-column grade --out runs/grades

    gpt-fast finetune --from runs/lm --train nli.jsonl --task entailment --out runs/nli

    gpt-fast finetune --from runs/lm --train quiz.csv --task multiple-choice --pair-column a,b,c,d --out runs/quiz
    """
    given = locals()
    require_train_extra()
    device = resolve_device(device)
    from gpt_fast.training.finetune import FinetuneSettings
    from gpt_fast.training.finetune import finetune as fit

    settings = options.settings_from(FinetuneSettings, given, device=device)
    with options.training_session("fine-tuning") as session:
        record = fit(settings, *session)
    if options.follows():
        return
    if as_json:
        print_json({"out": str(out), **record})
        return
    measured = {name.removeprefix("valid_"): value for name, value in record.items() if name not in ("valid_rows",)}
    lines = metric_rows(measured)
    lines += [("time", f"{record['seconds']:.0f} s"), ("run folder", options.run_folder(out))]
    print_table("fine-tuned, on held-out rows", lines)
