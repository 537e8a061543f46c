"""The command `gpt-fast pretrain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gpt_fast_settings.pretrain import PretrainSettings

from . import options
from .terminal import AsJson, print_table


@options.from_settings(PretrainSettings)
def pretrain(
    settings: PretrainSettings,
    more_data: Annotated[list[Path] | None, typer.Argument(hidden=True)] = None,
    as_json: AsJson = False,
) -> None:
    """Train a language model on plain text and write a run folder.

    Several paths may follow [bold]--data[/bold]. The text is split by file into training and validation. The validation
    loss is printed beside the unigram entropy of the same text: the loss that the best model without any context
    reaches.

    [bold]Examples[/bold]

    gpt-fast pretrain --out runs/lm

    gpt-fast pretrain --data books/ notes.txt --tokenizer byte --layers 6 --dim 256 --steps 5000 --out runs/books

    gpt-fast pretrain --preset gpt1 --objective mlm --data corpus/ --out runs/gpt1-mlm

    gpt-fast pretrain --config runs/books/settings.yaml --out runs/books --resume

    torchrun --nproc-per-node 8 --no-python gpt-fast pretrain --strategy fsdp --preset gpt2-xl --data tokens/ --out xl
    """
    if more_data and not settings.data:
        raise ValueError(f"unexpected argument {more_data[0]}; text to train on goes behind --data")
    from gpt_fast.training.pretrain import pretrain as train

    if more_data:
        settings = settings.model_copy(update={"data": (*settings.data, *more_data)})
    record = options.train("pre-training", train, settings, as_json)
    if record is None:
        return
    rows = [
        ("validation loss", f"{record['valid_loss']:.3f} nats per token"),
        ("unigram entropy", f"{record['unigram_entropy']:.3f} nats per token, without any context"),
        ("time", f"{record['seconds']:.0f} s"),
        ("run folder", options.run_folder(settings.out)),
    ]
    print_table("pre-trained", rows)
