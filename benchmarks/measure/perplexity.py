"""Perplexity of a trained run by the precision of its weights: `python -m benchmarks.measure.perplexity RUN`."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from gpt_fast import GPT, DecodeSession
from gpt_fast.data.batches import lm_windows, token_stream
from gpt_fast.data.corpus import read_corpus
from gpt_fast.data.tokenizer import encode_documents
from gpt_fast.generation.steps import WEIGHTS
from gpt_fast.heads import Head
from gpt_fast.training.runs.folder import special_token
from gpt_fast.training.runs.load import load_generator, run_tokenizer


def run_perplexities(folder: Path, windows: int = 64) -> dict[str, float]:
    """Return {precision of the weights: perplexity} of a trained model on held-out text, computed on the CPU.

    `folder` is the folder of the training run. The text is the held-out part of Python's standard library, of which at
    most `windows` windows of the model's sequence length are used, evenly spaced. The precisions are those in
    `WEIGHTS`, such as "float32" and "int8".
    """
    model = load_generator(folder, "cpu").eval()
    texts = [document.text for document in read_corpus(None).valid]
    ids = encode_documents(run_tokenizer(folder, model), texts)
    stream = token_stream(ids, special_token(model.config, "start_token"))
    tokens = lm_windows(stream, model.config.seq_len)
    return perplexities(model, tokens[:: max(1, len(tokens) // windows)][:windows])


def perplexities(model: GPT | Head, tokens: Tensor) -> dict[str, float]:
    """Return {precision of the weights: perplexity} of the model on token windows [B, T], for each of `WEIGHTS`.

    WEIGHTS has "float32", "bfloat16", "int8" and "int8-a16". The last two have the same int8 weights, but "int8" rounds
    the inputs of products to 8 bits, "int8-a16" to 16 bits. A new `DecodeSession` for each precision predicts every
    token of a window but the first, in one decode step each. The model must be on the CPU.
    """
    found = {}
    for weights in WEIGHTS:
        session = DecodeSession(model, batch=len(tokens), weights=weights)
        losses = []
        for t in range(tokens.shape[1] - 1):
            logits = session.step(tokens[:, t].contiguous())
            losses.append(torch.nn.functional.cross_entropy(logits.double(), tokens[:, t + 1], reduction="none"))
        found[weights] = torch.cat(losses).mean().exp().item()
    return found


def main() -> None:
    """Print the perplexity of a trained model on held-out text, one line for each precision of the model's weights.

    Each line also has the difference from the perplexity with float32 weights, in percent. `run_perplexities` computes
    the figures. The one argument on the command line is the folder of the training run that has the model. Exit with a
    usage line for any other number of arguments.
    """
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.measure.perplexity RUN")
    found = run_perplexities(Path(sys.argv[1]))
    for name, value in found.items():
        print(f"  {name:12} perplexity {value:.4f} ({value / found['float32'] - 1:+.3%})")


if __name__ == "__main__":
    main()
