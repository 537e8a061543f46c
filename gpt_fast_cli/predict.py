"""The command `gpt-fast predict`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .terminal import (
    AsJson,
    Device,
    Raw,
    check_decoded,
    err,
    print_json,
    print_table,
    require_train_extra,
    resolve_device,
    say,
    write_text,
)

if TYPE_CHECKING:
    from gpt_fast.training.predict import Prediction


def predict(
    source: Annotated[Path, typer.Option("--from", help="Run folder of a fine-tuned model.")],
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="One text to answer.")] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="The second text beside --text; repeated, the answers to choose from."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A table to answer row by row: .csv, .tsv, .jsonl, .json or .parquet."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the table there, with the columns prediction and probability."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out if it exists.")] = False,
    text_column: Annotated[str | None, typer.Option(help="Column with the text; by default that of training.")] = None,
    pair_column: Annotated[str | None, typer.Option(help="Column with the second text, or the answers.")] = None,
    columns: options.Columns = None,
    skip_ragged: options.SkipRagged = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of a written answer; by default 100, or half of the model's positions if that is less."
        ),
    ] = None,
    raw: Raw = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer with a fine-tuned model: the label of a text with its probability, a number, or a text.

    For [bold]--text[/bold], the answer is printed, of a classifier with the probability of each class. For
    [bold]--data[/bold], each row is printed behind its answer, or written to [bold]--out[/bold].

    [bold]Examples[/bold]

    gpt-fast predict --from runs/reviews --text "a fine film"

    gpt-fast predict --from runs/nli --text "A man sleeps." --pair "Nobody is awake."

    gpt-fast predict --from runs/reviews --data unread.csv --out answered.csv
    """
    require_train_extra()
    device = resolve_device(device)
    if (text is None) == (data is None):
        raise ValueError("expected either --text or --data" + ("" if text is None else ", not both"))
    for option, blank in (("--text", [text]), ("--pair", pair or [])):
        if any(value is not None and not value.strip() for value in blank):
            raise ValueError(f"{option}: empty; expected a text")
        for value in blank:
            check_decoded(option, value)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: expected 1 or more")
    if text is None and pair:
        raise ValueError("--pair: belongs to --text; a table's second text is named by --pair-column")
    if data is None:
        given = {"--text-column": text_column, "--pair-column": pair_column, "--out": out, "--columns": columns}
        for option in (name for name, value in given.items() if value is not None):
            raise ValueError(f"{option} {given[option]}: belongs to --data, not to --text")
        if skip_ragged:
            raise ValueError("--skip-ragged: belongs to --data, not to --text")
    if overwrite and out is None:
        raise ValueError("--overwrite: no --out; expected the table to write, too")
    from gpt_fast.data.reading.rows import row_options
    from gpt_fast.training.predict import check_target, write_predictions
    from gpt_fast.training.predict import predict as answer

    rows = row_options(columns, skip_ragged)
    if out is not None and data is not None:
        check_target(out, data, rows)
        if out.exists() and not overwrite:
            raise ValueError(f"--out {out}: exists; --overwrite replaces it")
    texts = () if text is None else (text, *(pair or []))
    with err.status("predicting"):
        task, table, found = answer(source, device, data, texts, text_column, pair_column, max_new_tokens, rows)
        if out is not None and data is not None:
            write_predictions(out, data, table, found, rows)
    if as_json:
        answers = [p.columns() | ({"probabilities": p.probabilities} if p.probabilities else {}) for p in found]
        print_json({"task": task.name, "data": table.source, "predictions": answers})
    elif text is not None:
        _print_one(found[0], raw)
    elif out is not None:
        say(f"{out}: {len(found):,} rows" + (f", {_counts(found)}" if task.classifies else ""))
    else:
        for row, prediction in zip(table.texts, found, strict=True):
            write_text("\t".join([*map(_shown, prediction.columns().values()), _line(row)]), raw)


def _print_one(prediction: Prediction, raw: bool) -> None:
    """Print the prediction for one text: its answer, and for a classifier a table with the probability of each class.

    If `raw`, control characters of an answer that is a number or a text are not escaped on a terminal.
    """
    if prediction.probabilities is None:
        write_text(_shown(prediction.answer), raw)
    else:
        print_table(str(prediction.answer), [(name, f"{p:.1%}") for name, p in prediction.probabilities.items()])


def _counts(found: list[Prediction]) -> str:
    """Return how often each answer was predicted, the most frequent first, as text such as "7 good, 3 bad"."""
    return ", ".join(f"{count:,} {label}" for label, count in Counter(p.answer for p in found).most_common())


def _shown(value: object) -> str:
    """Return a value as text on one line: a float with four significant digits, anything else cut to 100 characters."""
    return f"{value:.4g}" if isinstance(value, float) else _line(str(value))


def _line(text: str, width: int = 100) -> str:
    """Return a text on one line with white space collapsed; a longer one is cut to `width` characters, the last "…"."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 1]}…"
