"""The command `gpt-fast evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .terminal import (
    AsJson,
    Device,
    err,
    metric_rows,
    print_json,
    print_table,
    require_train_extra,
    resolve_device,
    say,
)


def evaluate(
    source: Annotated[Path, typer.Option("--from", help="Run folder of the model.")],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A labelled table for a classifier; for a language model whatever pretrain --data takes. A model of "
            "Python's standard library can be measured without it, on the files that training held out.",
        ),
    ] = None,
    raw_dtype: Annotated[
        str | None, typer.Option(metavar="uint16|uint32", help="The type of ids in token files without a header.")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column with the text; by default that of training.")] = None,
    pair_column: Annotated[str | None, typer.Option(help="Column with the second text, or the answers.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column with the label.")] = None,
    skip_label: options.SkipLabel = None,
    columns: options.Columns = None,
    skip_ragged: options.SkipRagged = False,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens between the beginnings of two windows of text: 1 to the model's number of positions, of which "
            "half is usual. Without it windows do not overlap."
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            metavar="lambada|hellaswag",
            help="Score a language model on LAMBADA or HellaSwag. --data is the file of that test, or has its columns.",
        ),
    ] = None,
    confusion: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw a classifier's confusion matrix there.")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure a model on held-out data, beside what a constant answer or a model without context would reach.

    A language model's loss on text, or a fine-tuned model's metrics on a table, are printed. A model that was trained
    on Python's standard library needs no [bold]--data[/bold]: it is measured on what its training held out. With
    [bold]--form[/bold] a language model predicts the last word of passages (lambada) or chooses among endings
    (hellaswag), and its accuracy is printed.

    [bold]Examples[/bold]

    gpt-fast evaluate --from runs/lm --data novel.txt

    gpt-fast evaluate --from runs/lm --data novel.txt --stride 64

    gpt-fast evaluate --from runs/gpt2 --data hellaswag_val.jsonl --form hellaswag

    gpt-fast evaluate --from runs/reviews --data test.jsonl --label-column stars --json
    """
    require_train_extra()
    device = resolve_device(device)
    if confusion is not None and confusion.suffix.lower() != ".png":
        raise ValueError(f"--confusion {confusion}: expected a name that ends in .png")
    if raw_dtype not in (None, "uint16", "uint32"):
        raise ValueError(f"--raw-dtype {raw_dtype}: expected uint16 or uint32")
    from gpt_fast.data.reading.rows import row_options
    from gpt_fast.training.evaluate import evaluate as measure

    rows = row_options(columns, skip_ragged)
    with err.status("evaluating"):
        result = measure(
            source, data, text_column, label_column, device, pair_column, confusion, skip_label or (), rows, raw_dtype,
            stride, form,
        )  # fmt: skip
    if as_json:
        print_json(result)
    else:
        print_table(f"{source} on {result['data']}", metric_rows(result))
    if "confusion" in result:
        say(result["confusion"])
