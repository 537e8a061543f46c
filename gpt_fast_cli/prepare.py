"""The command `gpt-fast prepare`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .terminal import AsJson, counting_bar, print_json, print_table, require_train_extra, say


def prepare(
    out: Annotated[Path, typer.Option(help="Folder for train.bin, valid.bin and tokenizer.json.")],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="PATH…",
            help="Files, folders or .zip archives: of plain text (a file is a document) or tables (a row is one: "
            ".jsonl, .json, .csv, .tsv, .parquet), compressed too (.gz, .zst, .bz2, .xz); hf:NAME or hf:NAME:SPLIT; - "
            "for standard input.",
        ),
    ],
    more_data: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    valid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="Held-out data, given as for --data. Without it a tenth of the data is held out.",
        ),
    ] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="bpe|byte|char|PATH",
            help="bpe and char learn from at most 100 MB of the training text; PATH is a tokenizer.json.",
        ),
    ] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="Tokens that bpe learns.")] = 32_768,
    text_column: Annotated[str, typer.Option(help="Field or column with the text.")] = "text",
    processes: Annotated[
        int | None, typer.Option(help="Processes that tokenise; by default one for each core.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace token files that --out already holds.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn text of any size into token files, which pretrain reads piece by piece.

    The folder gets train.bin, valid.bin, tokenizer.json and data.json. The numbers of tokens and documents are printed.
    Several paths may follow [bold]--data[/bold]. Without [bold]--valid[/bold] about a tenth is held out for validation:
    every tenth row of tables, whole text files if there are ten or more, else the last tenth of each text file. If the
    command is stopped, the same command resumes.

    [bold]Examples[/bold]

    gpt-fast prepare --data books/ web.jsonl.gz --out tokens

    gpt-fast prepare --data hf:wikitext:train --tokenizer runs/lm/tokenizer.json --out tokens
    """
    require_train_extra()
    from gpt_fast.data.prepare import PrepareSettings
    from gpt_fast.data.prepare import prepare as run
    from gpt_fast.interrupts import caught

    settings = PrepareSettings(
        out=out,
        data=(*data, *(more_data or ())),
        valid=tuple(valid or ()),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        text_column=text_column,
        processes=processes if processes is not None else os.cpu_count() or 1,
        overwrite=overwrite,
    )
    with caught(), counting_bar("tokenising") as show:
        record = run(settings, show, say)
    if as_json:
        print_json({"out": str(out), **record})
        return
    rows = [
        (part, f"{record[f'{part}_tokens']:,} tokens, {record[f'{part}_documents']:,} documents")
        for part in ("train", "valid")
    ]
    print_table(f"{out}: {record['dtype']}, a vocabulary of {record['vocabulary']:,}", rows)
