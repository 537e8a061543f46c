"""`gpt-fast evaluate`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, Device, err, print_json, print_table, require_train_extra, resolve_device


def evaluate(
    source: Annotated[Path, typer.Option("--from", help="Run folder of the model.")],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A labelled table for a classifier, a file or folder of text for a language model. Without it a model "
            "of the standard library takes the files held out from it.",
        ),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column with the label.")] = "label",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measures a model on held-out data, beside what a constant answer or a model without context would reach.

    [bold]Examples[/bold]

    gpt-fast evaluate --from runs/lm --data novel.txt

    gpt-fast evaluate --from runs/reviews --data test.jsonl --label-column stars --json
    """
    require_train_extra()
    device = resolve_device(device)
    from ..training.evaluate import evaluate as measure

    with err.status("evaluating"):
        result = measure(source, data, text_column, label_column, device)
    if as_json:
        print_json(result)
        return
    if result["task"] == "classification":
        rows = [
            ("accuracy", f"{result['accuracy']:.1%}, always the commonest label: {result['majority_accuracy']:.1%}"),
            ("macro F1", f"{result['macro_f1']:.3f}, always the commonest label: {result['majority_macro_f1']:.3f}"),
            ("cross-entropy", f"{result['loss']:.3f} nats"),
            ("rows", f"{result['examples']:,}"),
        ]
    elif result["task"] == "regression":
        rows = [("squared error", f"{result['mse']:.4g}, always the mean: {result['mean_mse']:.4g}")]
        rows += [("correlation", f"{result['pearson']:.3f}")] if "pearson" in result else []
        rows += [("rows", f"{result['examples']:,.0f}")]
    else:
        rows = [
            ("loss", f"{result['loss']:.3f} nats per token"),
            ("unigram entropy", f"{result['unigram_entropy']:.3f} nats per token, without any context"),
            ("perplexity", f"{result['perplexity']:,.1f}"),
            ("tokens", f"{result['tokens']:,}"),
        ]
        rows += [("bits per byte", f"{result['bits_per_byte']:.3f}")] if "bits_per_byte" in result else []
    print_table(f"{source} on {result['data']}", rows)
