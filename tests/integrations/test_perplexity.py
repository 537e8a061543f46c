"""Perplexity by `gpt_fast.score` against transformers' recipe on transformers' own model."""

import math

import pytest
import torch

import gpt_fast
from gpt_fast import GPTForCausalLM
from tests.hf_models import P, V, make


def windows_of_the_recipe(model, tokens, stride):
    """Return (loss, labels) of each window of `tokens` [1, T], as transformers' guide on perplexity cuts them."""
    found, previous_end = [], 0
    for begin in range(0, tokens.shape[1], stride):
        end = min(begin + P, tokens.shape[1])
        labels = tokens[:, begin:end].clone()
        labels[:, : -(end - previous_end)] = -100
        with torch.no_grad():
            found.append((float(model(tokens[:, begin:end], labels=labels).loss), labels))
        previous_end = end
        if end == tokens.shape[1]:
            break
    return found


def recipe_perplexity(windows):
    """Return the guide's own figure, which counts one token too few in every window but the first."""
    counts = [int((labels != -100).sum()) - 1 for _, labels in windows]
    losses = [loss for loss, _ in windows]
    return math.exp(sum(loss * count for loss, count in zip(losses, counts, strict=True) if count) / sum(counts))


def exact_perplexity(windows):
    counts = [int((labels[:, 1:] != -100).sum()) for _, labels in windows]
    return math.exp(sum(loss * count for (loss, _), count in zip(windows, counts, strict=True) if count) / sum(counts))


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "OpenAIGPTLMHeadModel"])
@pytest.mark.parametrize("length", [P - 3, P, 3 * P, 71])
@pytest.mark.parametrize("stride", [1, 7, P])
def test_windows_are_those_of_the_recipe(name, length, stride):
    theirs = make(name).double().eval()
    ours = GPTForCausalLM.from_hf(theirs)
    tokens = torch.randint(V, (1, length))
    windows = windows_of_the_recipe(theirs, tokens, stride)
    scores = gpt_fast.score(ours, tokens, stride=stride)
    perplexity = math.exp(-scores.log_probs.double().sum() / scores.predicted.sum())
    assert perplexity == pytest.approx(exact_perplexity(windows), rel=1e-6)
    # The means of the same log-probabilities over each window give the guide's figure too.
    ends = [min(i * stride + P, length) for i in range(len(windows))]
    means = [
        (-scores.log_probs[:, a:b].double().sum() / scores.predicted[:, a:b].sum(), labels)
        for a, b, (_, labels) in zip([0, *ends], ends, windows, strict=False)
    ]
    assert recipe_perplexity(means) == pytest.approx(recipe_perplexity(windows), rel=1e-6)
    if stride == P and length > P:
        assert perplexity == pytest.approx(recipe_perplexity(windows), rel=1e-6)  # no window overlaps another
