"""Small random models of transformers' GPT-2 and GPT-1 classes, and inputs for each."""

import copy

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
transformers.utils.logging.set_verbosity_error()

V, P, C, H, LAYERS = 61, 20, 32, 4, 2
PAD = 7
CLASSES = (
    "GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel", "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification", "GPT2ForQuestionAnswering", "OpenAIGPTModel", "OpenAIGPTLMHeadModel",
    "OpenAIGPTDoubleHeadsModel", "OpenAIGPTForSequenceClassification",
)  # fmt: skip
LM_HEADS = ("GPT2LMHeadModel", "OpenAIGPTLMHeadModel")
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "summary_first_dropout": 0.0}


def make(name: str, dropout: float | None = 0.0, **options):
    """A model whose biases and gains are random too, so that none hides a mistake. dropout None keeps the default."""
    sizes = {"vocab_size": V, "n_positions": P, "n_embd": C, "n_layer": LAYERS, "n_head": H, "num_labels": 3}
    sizes |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
    if dropout is not None:
        sizes |= dict.fromkeys(NO_DROPOUT, dropout)
        if name == "GPT2ForTokenClassification":
            sizes["classifier_dropout"] = dropout
    attention = options.pop("attn_implementation", None)
    kind = getattr(transformers, name)
    config = kind.config_class(**sizes | options)
    if attention is not None:
        config._attn_implementation = attention
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def twins(name: str, dropout: float | None = 0.0, **options):
    """The same model twice."""
    model = make(name, dropout, **options)
    return model, copy.deepcopy(model)


def padding(side: str | None, B: int, T: int) -> Tensor | None:
    """attention_mask [B, T], or None without padding; the first row has none."""
    if side is None:
        return None
    mask = torch.ones(B, T, dtype=torch.int64)
    for row in range(1, B):
        mask[row, T - 2 * row - 1 :] = 0
    return mask if side == "right" else mask.flip(1)


def inputs(name: str, side: str | None = None, B: int = 3, T: int = 11) -> dict[str, Tensor]:
    """Tokens [B, T] (choices in the batch for double heads), their padding, and labels as the class takes them."""
    tokens = torch.randint(8, V, (B, T))
    mask = padding(side, B, T)
    if mask is not None:
        tokens = tokens.masked_fill(mask == 0, PAD)
    given = {"input_ids": tokens} | ({} if mask is None else {"attention_mask": mask})
    # Nothing is to be predicted at padding, nor from it.
    labels = tokens if mask is None else tokens.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)
    if "Double" in name:
        given = {key: value[None] for key, value in given.items()}
        if name.startswith("OpenAI") and mask is not None:
            given["attention_mask"] = mask  # transformers takes no choices here
        last = torch.full((B,), T - 1) if mask is None else T - 1 - mask.flip(1).argmax(1)
        return given | {"labels": labels[None], "mc_token_ids": last[None], "mc_labels": torch.tensor([1])}
    if "LMHead" in name:
        return given | {"labels": labels}
    if "Sequence" in name:
        return given | {"labels": torch.arange(B) % 3}
    if "Token" in name:
        return given | {
            "labels": (tokens % 3).masked_fill(torch.zeros_like(tokens).bool() if mask is None else mask == 0, -100)
        }
    if "Question" in name:
        return given | {"start_positions": torch.full((B,), T // 2), "end_positions": torch.full((B,), T // 2 + 1)}
    return given


def at_real_positions(value: Tensor, mask: Tensor | None) -> Tensor:
    """What stands at tokens that are no padding, where `value` has a place for each token; else all of it."""
    if mask is None or value.dim() < mask.dim():
        return value
    value = value.squeeze(0) if value.shape[0] == 1 and value.dim() > mask.dim() else value
    return value[mask.bool()] if value.shape[: mask.dim()] == mask.shape else value
