"""`gpt-fast convert`"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .terminal import AsJson, err, print_json, print_table


def convert(
    source: Annotated[
        Path, typer.Option("--from", help="Run folder of gpt-fast, or folder of a transformers GPT-2 or GPT-1 model.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")],
    head: Annotated[
        str | None,
        typer.Option(
            metavar="clm|mlm|classifier",
            help="From transformers: the model to make, with the trunk's weights and all else that both have. Without "
            "it the one that holds every weight; a model that has no such head is refused.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Converts a model to transformers' GPT-2 or GPT-1 and back, bit for bit: which way, the folder tells.

    Both sides are safetensors; nothing is unpickled. A folder that lacks a weight, or has one that its config.json does
    not name, is refused, and so is a model that the other library cannot hold. OpenAI's original TensorFlow files of
    GPT-2 are not read: transformers converts them.

    [bold]Examples[/bold]

    gpt-fast convert --from runs/lm --out exported/lm

    gpt-fast convert --from models/gpt2 --out runs/gpt2 --head classifier
    """
    if find_spec("transformers") is None:
        raise ValueError("this command needs transformers; pip install gpt-fast[hf]")
    from gpt_fast.integrations.huggingface.folder import convert_folder

    with err.status("converting"):
        result = convert_folder(source, out, head)
    if as_json:
        print_json(result)
    else:
        print_table(
            f"{out}", [("model", result["model"]), ("from", result["from"]), ("numbers", f"{result['numbers']:,}")]
        )
