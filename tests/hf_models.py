"""Small random models of transformers' GPT-2 and GPT-1 classes, and inputs for each."""

import copy

import pytest
import torch
from torch import Tensor, nn

import gpt_fast
from tests import numerics

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
    """Return a model of the class `name` with random gains and biases, so that none can be forgotten unseen.

    `dropout` None keeps the default of the class.
    """
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
    """Return a model and a copy of it."""
    model = make(name, dropout, **options)
    return model, copy.deepcopy(model)


def padding(side: str | None, B: int, T: int) -> Tensor | None:
    """Return an attention_mask [B, T], or None if `side` is None. The first row has no padding."""
    if side is None:
        return None
    mask = torch.ones(B, T, dtype=torch.int64)
    for row in range(1, B):
        mask[row, T - 2 * row - 1 :] = 0
    return mask if side == "right" else mask.flip(1)


def inputs(name: str, side: str | None = None, B: int = 3, T: int = 11) -> dict[str, Tensor]:
    """Return the arguments of the class's forward: tokens [B, T], their padding mask and labels.

    For double heads the B rows are the choices of a batch of one: tokens [1, B, T].
    """
    tokens = torch.randint(8, V, (B, T))
    mask = padding(side, B, T)
    if mask is not None:
        tokens = tokens.masked_fill(mask == 0, PAD)
    given = {"input_ids": tokens} | ({} if mask is None else {"attention_mask": mask})
    # No padding token is a label, and no label is predicted from a padding token.
    labels = tokens if mask is None else tokens.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)
    if "Double" in name:
        given = {key: value[None] for key, value in given.items()}
        if name.startswith("OpenAI") and mask is not None:
            given["attention_mask"] = mask  # here transformers takes [B, T], without the dimension of choices
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
    """Return the values at tokens that are not padding. If `value` has no dimension of tokens, return all of it."""
    if mask is None or value.dim() < mask.dim():
        return value
    value = value.squeeze(0) if value.shape[0] == 1 and value.dim() > mask.dim() else value
    return value[mask.bool()] if value.shape[: mask.dim()] == mask.shape else value


LOSSES = ("loss", "mc_loss")


def run(model, given: dict, dtype: torch.dtype | None = None, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Return the outputs of one pass in training mode, without those at padding, and the gradient of each parameter."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = model(**given)
    values = {
        name: at_real_positions(out[name], mask).detach().clone()
        for name in ("loss", "mc_loss", "logits", "mc_logits", "start_logits", "end_logits", "last_hidden_state")
        if name in out
    }
    if ("LMHead" in type(model).__name__ or "CausalLM" in type(model).__name__) and out.logits.dtype == torch.float64:
        labels = given["labels"][:, 1:].flatten()  # transformers computes this loss in float32, even for float64 logits
        out["loss"] = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels)
        values["loss"] = out.loss.detach().clone()
    losses = [out[name] for name in LOSSES if name in out]
    total = sum(losses)
    if not losses:  # a model without a head: a random upstream gradient at the tokens that are not padding
        hidden = at_real_positions(out.last_hidden_state, mask)
        total = (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden.dtype)).sum()
    total.backward()
    return values | {f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def in_float64(model):
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if hasattr(module, "reorder_and_upcast_attn"):
            module.reorder_and_upcast_attn = False  # it casts to float32, which here would lose precision
    return model


def assert_same(original, given: dict, accelerated=None, *, dtype: torch.dtype | None = None) -> None:
    """Assert that the accelerated model is as close to float64 as the original model in the tested dtype."""
    if accelerated is None:
        accelerated = copy.deepcopy(original)
        gpt_fast.accelerate(accelerated, strict=True)
    mask = given.get("attention_mask")
    mask = mask if mask is not None and mask.dim() == 2 else None if mask is None else mask.squeeze(0)
    exact = run(in_float64(original), given, None, mask)
    yardstick, got = run(original, given, dtype, mask), run(accelerated, given, dtype, mask)
    assert got.keys() == yardstick.keys() == exact.keys()
    for name, value in got.items():
        assert value.dtype == yardstick[name].dtype or name in LOSSES, name
        assert value.shape == yardstick[name].shape, name
    # All tensors are judged together, each divided by its own scale. The error of one small tensor, or of a loss, alone
    # could be large or small by luck.
    gradients = {name for name in got if name.startswith("grad ")}
    for names, label in ((gradients, "gradients"), (got.keys() - gradients, "outputs")):
        scales = {name: exact[name].abs().max() for name in sorted(names)}
        # Some gradients are sums that cancel to 0, such as a softmax's gradient summed over its classes. Their terms
        # are as large as other gradients, so rounding errors of the terms exceed the result. The floor allows for this.
        floor = 0.1 * max(scales.values())
        scales = {name: max(scale, floor) for name, scale in scales.items()}

        def pooled(values: dict[str, Tensor], scales: dict[str, Tensor] = scales) -> Tensor:
            return torch.cat([(values[name].double() / scale).flatten() for name, scale in scales.items()])

        numerics.assert_as_accurate(pooled(got), pooled(yardstick), pooled(exact), label=label)
