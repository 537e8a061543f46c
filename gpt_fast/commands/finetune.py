"""`gpt-fast finetune`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import training_options as shared
from .common import AsJson, Device, print_json, print_table, require_train_extra, resolve_device


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
    text_column: Annotated[str, typer.Option(help="Column with the text.", rich_help_panel="Data")] = "text",
    label_column: Annotated[str, typer.Option(help="Column with the label.", rich_help_panel="Data")] = "label",
    task: Annotated[
        str,
        typer.Option(
            metavar="classification|regression",
            help="Cross-entropy over labels, or mean squared error of numbers.",
            rich_help_panel="Training",
        ),
    ] = "classification",
    epochs: Annotated[int, typer.Option(help="Passes over the table.", rich_help_panel="Training")] = 3,
    batch_size: Annotated[int, typer.Option(help="Rows in an update.", rich_help_panel="Training")] = 32,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate; a quarter of pre-training's, as in the paper.", rich_help_panel="Training"
        ),
    ] = None,
    lm_weight: Annotated[
        float,
        typer.Option(help="λ of the joint loss: task + λ · language model.", rich_help_panel="Training"),
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the new layer, batches and dropout.", rich_help_panel="Training")] = 0,
    accumulate: shared.Accumulate = 1,
    weight_decay: shared.WeightDecay = 0.01,
    max_grad_norm: shared.MaxGradNorm = 1.0,
    precision: shared.Precision = "float32",
    compile: shared.Compile = False,
    checkpoint_activations: shared.CheckpointActivations = False,
    max_skips: shared.MaxSkips = 10,
    device: Device = "auto",
    config: shared.Config = None,
    log_every: shared.LogEvery = None,
    checkpoint_every: shared.CheckpointEvery = 1000,
    keep_checkpoints: shared.KeepCheckpoints = 3,
    tensorboard: shared.TensorBoard = False,
    overwrite: shared.Overwrite = False,
    resume: shared.Resume = False,
    as_json: AsJson = False,
) -> None:
    """Trains a classifier or regressor on a labelled table, from a pre-trained model's weights.

    Each row is put as start, text, extract; the new layer reads the last hidden state of the extract token. Text beyond
    the model's positions is cut off. Accuracy and macro F1 are printed beside those of always answering the commonest
    label.

    [bold]Examples[/bold]

    gpt-fast finetune --from runs/lm --out runs/packages

    gpt-fast finetune --from runs/lm --train reviews.csv --valid held_out.csv --label-column stars --out runs/reviews

    gpt-fast finetune --from runs/lm --train essays.tsv --task regression --label-column grade --out runs/grades
    """
    given = locals()
    require_train_extra()
    device = resolve_device(device)
    from ..training.finetune import FinetuneSettings
    from ..training.finetune import finetune as fit

    settings = shared.settings_from(FinetuneSettings, given, device=device)
    with shared.training_session("fine-tuning") as session:
        record = fit(settings, *session)
    if as_json:
        print_json({"out": str(out), **record})
        return
    if task == "regression":
        rows = [("squared error", f"{record['valid_mse']:.4g}, always the mean: {record['mean_mse']:.4g}")]
        if "valid_pearson" in record:
            rows.append(("correlation", f"{record['valid_pearson']:.3f}"))
    else:
        rows = [
            (
                "accuracy",
                f"{record['valid_accuracy']:.1%}, always the commonest label: {record['majority_accuracy']:.1%}",
            ),
            (
                "macro F1",
                f"{record['valid_macro_f1']:.3f}, always the commonest label: {record['majority_macro_f1']:.3f}",
            ),
        ]
    rows += [("time", f"{record['seconds']:.0f} s"), ("run folder", f"{out}, with the curves in loss.png")]
    print_table("fine-tuned, on held-out rows", rows)
