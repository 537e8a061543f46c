"""`gpt-fast generate`"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import AsJson, Device, print_json, require_train_extra, resolve_device

if TYPE_CHECKING:
    from torch import Tensor


def generate(
    source: Annotated[Path, typer.Option("--from", help="Run folder of a language model (objective clm).")],
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="Text to go on from; without it a document is begun.")
    ] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add; fewer where the model ends the document.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher is more varied.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most probable tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the fewest tokens that reach this probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed writes the same text.")] = None,
    sliding: Annotated[
        bool, typer.Option("--sliding", help="Beyond the model's positions, go on from the latest tokens.")
    ] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Writes text that goes on from a prompt, as it is drawn.

    [bold]Examples[/bold]

    gpt-fast generate --from runs/lm --prompt "def read(self" --temperature 0

    gpt-fast generate --from runs/lm --prompt "class " --top-p 0.9 --seed 7 --max-new-tokens 500 --sliding
    """
    require_train_extra()
    device = resolve_device(device)
    import torch

    from ..data.tokenizer import decode, encode
    from ..generation import generate as continue_text
    from ..training.evaluate import load_generator, run_tokenizer
    from ..training.runs import special_token

    model = load_generator(source, device)
    tokenizer = run_tokenizer(source, model)
    start = special_token(model.config, "start_token")
    ids = encode(tokenizer, prompt) or [start]
    drawn: list[int] = []
    written = ""

    def write(new: Tensor) -> None:
        nonlocal written
        if not as_json and not drawn:  # not before it is clear that the prompt will do
            typer.echo(prompt, nl=False)
        drawn.append(int(new[0]))
        text = decode(tokenizer, drawn, special=False)
        # A character of several bytes is written when its last one is there.
        if not as_json and not text.endswith("\ufffd"):
            typer.echo(text[len(written) :], nl=False)
            written = text

    began = time.perf_counter()
    continue_text(
        model,
        torch.tensor([ids], device=device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=[start],
        seed=seed,
        sliding=sliding,
        stream=write,
    )
    seconds = time.perf_counter() - began
    text = decode(tokenizer, drawn, special=False)
    if as_json:
        result = {"prompt": prompt, "text": text, "new_tokens": len(drawn), "tokens_per_second": len(drawn) / seconds}
        print_json(result)
    else:
        typer.echo(text[len(written) :])
