"""The command `gpt-fast generate`."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .terminal import (
    AsJson,
    Device,
    Raw,
    check_decoded,
    piped_text,
    print_json,
    require_train_extra,
    resolve_device,
    write_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tokenizers import Tokenizer
    from torch import Tensor

    from gpt_fast import GPTConfig


def generate(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            help="Run folder of a language model, or of one fine-tuned to write or answer.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[Path | None, typer.Option("--from", help="The run folder, by its option.")] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Text to continue. Without it a pipe or file at standard input is read, or a document is begun.",
        ),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Question to answer from the prompt, for a model fine-tuned on such tasks."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens to add; fewer where the model ends the document. 100, or what the model's positions leave, "
            "unless given."
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="How many continuations to write, all at once.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy; higher is more varied.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most probable tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the fewest tokens that reach this probability.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that the text already contains become less probable.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End a continuation before this text; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed writes the same text.")] = None,
    sliding: Annotated[
        bool, typer.Option("--sliding", help="Beyond the model's positions, continue from the latest tokens alone.")
    ] = False,
    weights: Annotated[
        Literal["float32", "bfloat16", "int8", "int8-a16"] | None,
        typer.Option(
            help="Precision of the weights on a CPU, by default the model's. int8 also rounds activations to 8 bits in "
            "products, int8-a16 to 16 bits."
        ),
    ] = None,
    raw: Raw = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Continue a prompt, and write the text as it is drawn.

    One continuation is printed behind its prompt, token by token. Several are printed at the end, each below a line
    with its number. [bold]--json[/bold] prints the prompt, each added text with its number of new tokens, and the
    tokens per second. On a CPU the weights keep the model's precision unless [bold]--weights[/bold] is given. With
    int8 and int8-a16 they are 8-bit integers, and products with them round activations, to 8 and to 16 bits.

    [bold]Examples[/bold]

    gpt-fast generate runs/lm --prompt "def read(self" --temperature 0

    echo "import os" | gpt-fast generate runs/lm

    gpt-fast generate runs/lm --prompt "class " --top-p 0.9 --seed 7 --max-new-tokens 500 --sliding

    gpt-fast generate runs/lm --prompt "import " --num-samples 5 --stop "class " --weights int8
    """
    require_train_extra()
    if (run is None) == (source is None):
        given = "no run folder" if run is None else f"{run} and --from {source}"
        raise ValueError(f"{given}; expected one, as gpt-fast generate RUN or by --from RUN")
    source = source or run
    assert source is not None
    device = resolve_device(device)
    if num_samples < 1:
        raise ValueError(f"--num-samples {num_samples}: expected 1 or more")
    if max_new_tokens is not None and max_new_tokens < 0:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: expected 0 or more")
    with _named_by_option():
        from gpt_fast.generation.sampling import Sampling

        Sampling(temperature, top_k, top_p, repetition_penalty)  # raises, before a model is read
    if any(not text for text in stop or []):
        raise ValueError("--stop '': expected a text, not nothing")
    if prompt is None:
        prompt = piped_text()
    for option, text in [("--prompt", prompt), ("--question", question), *(("--stop", text) for text in stop or [])]:
        check_decoded(option, text)
    import torch

    from gpt_fast.generation.text import generate as continue_text
    from gpt_fast.training.runs.load import load_generator, run_tokenizer
    from gpt_fast.training.tasks import writes_answers, writing_prompt

    model = load_generator(source, device)
    tokenizer = run_tokenizer(source, model)
    ids, end = writing_prompt(source, model.config, tokenizer, prompt, question)
    ends = [] if end is None else [end]
    room = model.config.seq_len - len(ids)
    if max_new_tokens is None:
        max_new_tokens = 100 if sliding else min(100, room)
        if max_new_tokens < 1:
            raise ValueError(
                f"--prompt: has {len(ids):,} tokens, and {source} has {model.config.seq_len:,} positions; "
                "expected fewer tokens, or --sliding"
            )
    if max_new_tokens > room and not sliding:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens}: the prompt has {len(ids):,} tokens, and {source} has "
            f"{model.config.seq_len:,} positions; expected at most {max(0, room):,}, or --sliding"
        )
    _check_memory(num_samples, len(ids), max_new_tokens, model.config)
    # An answer to a question was learned as a text of its own.
    context = [] if writes_answers(source) else ids
    samples = [_Text(tokenizer, prompt, context, stop or [], ends) for _ in range(num_samples)]
    streams = num_samples == 1 and not as_json

    def write(new: Tensor) -> None:
        """Add the tokens of one decode step, one for each of the outer `samples`, and print the text that is complete.

        Text is printed only for a single sample without --json, at first the prompt. Raise `_Finished`, which ends the
        generation, when each sample has ended.
        """
        if streams and not samples[0].drawn:  # not before it is clear that the prompt will do
            write_text(prompt, raw, nl=False)
        for sample, token in zip(samples, new.tolist(), strict=True):
            sample.add(token)
        if streams:
            write_text(samples[0].settled(), raw, nl=False)
        if all(sample.done for sample in samples):
            raise _Finished

    began = time.perf_counter()
    with contextlib.suppress(_Finished), _named_by_option():
        continue_text(
            model,
            torch.tensor([ids] * num_samples, device=device),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            stop_tokens=ends,
            seed=seed,
            sliding=sliding,
            weights=weights,
            stream=write,
        )
    seconds = time.perf_counter() - began
    drawn = sum(len(sample.drawn) for sample in samples)
    if as_json:
        found = [{"text": sample.text(), "new_tokens": len(sample.drawn)} for sample in samples]
        several = {"samples": found} if num_samples > 1 else found[0]
        print_json({"prompt": prompt, **several, "tokens_per_second": drawn / seconds})
    elif streams:
        write_text(samples[0].rest(), raw)
    else:
        for number, sample in enumerate(samples, 1):
            write_text(f"--- {number}", raw)
            write_text(prompt + sample.text(), raw)


@contextlib.contextmanager
def _named_by_option() -> Iterator[None]:
    """Raise a `ValueError` of the block that names an argument of `gpt_fast.generate` with the option's name instead.

    The message "gpt_fast.generate: top_k is 0; expected …, or None" becomes "--top-k 0: expected …", for example. Other
    errors are raised unchanged.
    """
    try:
        yield
    except ValueError as error:
        found = re.fullmatch(r"gpt_fast\.generate: (\w+) is (.+); (expected .+?)(?:, or None)?", str(error))
        if found is None:
            raise
        raise ValueError(f"--{found[1].replace('_', '-')} {found[2]}: {found[3]}") from None


def _check_memory(num_samples: int, prompt: int, new: int, config: GPTConfig) -> None:
    """Raise `ValueError` if the samples' tokens, and their keys and values in 16 bits, need more memory than is free.

    `prompt` and `new` are the numbers of tokens in the prompt and to be generated for each sample. Keys and values are
    kept for at most `config.seq_len` tokens.
    """
    from gpt_fast import _memory

    length = prompt + new
    kept = 4 * config.num_layers * config.hidden_dim * min(length, config.seq_len)
    needed, left = (kept + 8 * length) * num_samples, _memory.available()
    if needed > left:
        option = f"--num-samples {num_samples}" if num_samples > 1 else f"--max-new-tokens {new}"
        raise ValueError(
            f"{option}: needs {_memory.size(needed)} of memory or more; expected at most "
            f"{_memory.size(left)}, which is left"
        )


class _Finished(Exception):
    """Exception by which the function that gets the tokens ends `generate`: every sample has met a text to stop at."""


class _Text:
    """One continuation of a prompt: the tokens drawn, and the text that they add, up to a stop text.

    `context` are the prompt's ids, `prompt` its text. `stop` are texts and `ends` token ids that end the continuation.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: str, context: Sequence[int], stop: Sequence[str], ends: Sequence[int]
    ):
        from gpt_fast.data.tokenizer import decode, keeps_text

        self.tokenizer = tokenizer
        self.context = context
        start = decode(tokenizer, context, special=False)
        self.has_space = prompt[-1:].isspace() and not start[-1:].isspace()  # typed, but not in the tokens
        self.keeps_text = keeps_text(tokenizer)
        self.before = ""  # the text without the last token
        self.stop = stop
        self.ends = ends
        self.drawn: list[int] = []
        self.done = False
        self.written = 0

    def add(self, token: int) -> None:
        """Append the id of a drawn token to this continuation of a prompt. Do nothing if its text has ended.

        Set `done` if this token ends the text: it is one of the token ids in `ends`, or it completes one of the texts
        in `stop`.
        """
        if self.done:
            return
        if not self.keeps_text:
            self.before = self._decoded()
        self.drawn.append(token)
        self.done = token in self.ends or (bool(self.stop) and len(self.text()) < len(self._decoded()))

    def text(self) -> str:
        """Return the text that the drawn tokens add to the prompt, up to the first stop text in it (exclusive)."""
        text = self._decoded()
        found = [text.find(stop) for stop in self.stop if stop in text]
        return text[: min(found)] if found else text

    def settled(self) -> str:
        """Return the text that can be printed now and that no call returned before. Later tokens will not change it.

        The result is "" while the text ends in an incomplete character; `rest` returns what then remains. Until the
        text has ended, its end is also held back if a stop text may begin there. So is the text of the last token, if
        the tokenizer's decoder may change it for the next token, for example by joining "'" and "s".
        """
        from gpt_fast.data.tokenizer import shared_start

        text = self.text()
        if not self.keeps_text and not self.done:  # the last token may yet change, as an apostrophe before its s
            text = shared_start(text, self.before)
        if text.endswith("\ufffd"):  # a character of several bytes, until its last one is there
            return ""
        held = 0
        if not self.done:
            held = max(
                (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
            )  # fmt: skip
        settled = text[self.written : max(self.written, len(text) - held)]
        self.written = max(self.written, len(text) - held)
        return settled

    def rest(self) -> str:
        """Return the text that `settled` has not returned. It is called after the last token."""
        return self.text()[self.written :]

    def _decoded(self) -> str:
        """Return the whole text that the drawn tokens add to the prompt, stop texts included.

        If the tokenizer drops white space at the end of the prompt, the text's first space is removed, because the
        prompt is printed with its white space.
        """
        from gpt_fast.data.tokenizer import added_text

        text = added_text(self.tokenizer, self.context, self.drawn)
        return text.removeprefix(" ") if self.has_space else text
