"""The command `gpt-fast warmup`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .terminal import AsJson, print_json, print_table, require_train_extra


def warmup(
    source: Annotated[Path | None, typer.Option("--from", help="Run folder of a causal language model.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="notes, gpt1, gpt2, gpt2-medium, gpt2-large or gpt2-xl, instead of --from."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Windows in one forward pass: --batch-size of pretrain divided by its --accumulate.")
    ] = 16,
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="The --precision that pretrain will get.")
    ] = "float32",
    as_json: AsJson = False,
) -> None:
    """Compile the GPU kernels that a model needs, so that its first update and its first token do not wait.

    Triton keeps them in its cache on the disk, where every later process finds them. The command shows how many kernels
    it compiled, how many it found in the cache, and how long that took. It needs a CUDA device. If pretrain will get
    [bold]--accumulate[/bold] N, give its batch size divided by N as [bold]--batch-size[/bold] here.

    [bold]Examples[/bold]

    gpt-fast warmup --preset gpt2 --batch-size 8 --precision bfloat16

    gpt-fast warmup --from runs/lm
    """
    require_train_extra()
    from gpt_fast.training.warmup import choose, warm

    result = warm(choose(source, preset), batch_size, precision)
    if as_json:
        print_json(result)
        return
    rows = [
        (name, f"{result[name]['compiled']} kernels compiled, {result[name]['found']} found, "
         f"{result[name]['seconds']:.1f} s")
        for name in ("training", "generation")
    ]  # fmt: skip
    print_table("warm", [*rows, ("cache", result["cache"])])
