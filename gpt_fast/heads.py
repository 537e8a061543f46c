"""The heads: a trunk, an output layer, and the loss each is trained with."""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from . import checkpoint, ops
from .config import GPTConfig
from .model import IGNORE, GPTModel, init_weights, shift_labels


class HeadOutput(NamedTuple):
    """What a head returns: `loss` (None without labels) and `logits` (None where they were not asked for)."""

    loss: Tensor | None
    logits: Tensor | None


class Head(nn.Module):
    """What the heads share: the trunk, its configuration, saving, loading and a growing vocabulary."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.trunk = GPTModel(config)

    def num_parameters(self) -> int:
        """How many numbers are trained, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _build_output_layer(self) -> None:
        """Adds `output_layer`, the projection to the vocabulary: tied to the embedding where the config says so."""
        config = self.config
        self.output_layer = nn.Linear(config.hidden_dim, config.num_tokens, bias=config.output_bias)
        init_weights(self.output_layer, config.init_std)
        if config.tied:
            self.output_layer.weight = self.trunk.token_emb.weight

    def _language_model_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return ops.linear_cross_entropy(hidden, self.output_layer.weight, labels, self.output_layer.bias)

    def resize_embeddings(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens, or drop the last ones; rows that stay keep their values.

        New rows are drawn from N(0, init_std²), new output biases are 0. The embedding and a free output layer become
        new parameters: make the optimiser afterwards. Raises `ValueError` for less than one token, or for fewer than a
        special token of the configuration needs.
        """
        config = dataclasses.replace(self.config, num_tokens=num_tokens)
        embedding = _resized(nn.Embedding, self.trunk.token_emb, (num_tokens, config.hidden_dim), config.init_std)
        self.trunk.token_emb = embedding
        if hasattr(self, "output_layer"):
            old = self.output_layer
            self.output_layer = _resized(
                nn.Linear, old, (config.hidden_dim, num_tokens), config.init_std, bias=old.bias is not None
            )
            if config.tied:
                self.output_layer.weight = embedding.weight
        self.config = self.trunk.config = config

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `config.json` and `model.safetensors` into `directory`, each whole or not at all.

        Raises `OSError` where the folder cannot be written.
        """
        checkpoint.save(self, Path(directory))

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, **overrides: Any) -> Self:
        """The model saved in `directory`, on the CPU, in training mode as PyTorch's constructors have it.

        A folder saved by another head gives its trunk (and the output layer, where both have one); what is new starts
        afresh, which is how fine-tuning starts. `overrides` change fields of the configuration. Weights are read from
        safetensors alone. Raises `FileNotFoundError` for a missing file, `ValueError` for one that is truncated, not
        ours, or holds tensors of other names or shapes.
        """
        return checkpoint.load(cls, Path(directory), overrides)


class GPTForCausalLM(Head):
    """Next-token prediction: loss = mean of -log p(w_t | w_<t), p = softmax(output_layer(trunk(tokens))).

    `forward(tokens [B, T], labels=None, *, lengths=None, key_mask=None, cu_seqlens=None, logits=None)` →
    `(loss, logits [B, T, V])`.
    labels [B, T] are given unshifted (usually the tokens) and -100 does not count, nor does padding; `cu_seqlens` as in
    `GPTModel.hidden_states`, for sequences packed into one row. Logits are
    computed where there are no labels or `logits=True`; the loss alone never stores them. Dtypes, precision,
    determinism: those of the ops. Raises `ValueError` for tokens or labels of other shapes or out of range.
    Source: Radford et al. (2018, 2019).
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self._build_output_layer()

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        logits: bool | None = None,
    ) -> HeadOutput:
        hidden = self.trunk(tokens, lengths=lengths, key_mask=key_mask, cu_seqlens=cu_seqlens)
        loss = None
        if labels is not None:
            _check_labels(labels, tokens)
            loss = self._language_model_loss(hidden, shift_labels(labels, lengths=lengths, key_mask=key_mask))
        wanted = labels is None if logits is None else logits
        return HeadOutput(loss, self.output_layer(hidden) if wanted else None)

    @classmethod
    def from_hf(cls, model: Any) -> Self:
        """The weights and sizes of transformers' GPT-2 or GPT-1 with a language-model head, or of a folder of one.

        Copies every weight bit for bit; `to_hf` gives them back. Raises `TypeError` for another model, `ValueError` for
        an option of its configuration that changes the function in a way this model does not have.
        """
        from .integrations.huggingface import from_hf

        return from_hf(cls, model)

    def to_hf(self) -> Any:
        """transformers' `GPT2LMHeadModel` (pre-norm) or `OpenAIGPTLMHeadModel` (post-norm) with these weights.

        Raises `ValueError` where those classes have no such model, as for an output bias.
        """
        from .integrations.huggingface import to_hf

        return to_hf(self)


class GPTForMaskedLM(Head):
    """Masked-token prediction: loss = mean of -log p(w_i | all others) over the positions whose label is not -100.

    `forward(tokens [B, T], labels=None, *, lengths=None, key_mask=None, cu_seqlens=None, logits=None)` →
    `(loss, logits [B, T, V])`.
    Attention sees both sides. labels [B, T] hold the original token where it is to be predicted and -100 elsewhere;
    only those positions are projected onto the vocabulary, so time and memory of the loss follow their number. Logits
    are computed where there are no labels or `logits=True`. Errors and dtypes as in `GPTForCausalLM`.
    Source: Devlin et al. (2018), arXiv:1810.04805.
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self._build_output_layer()

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        logits: bool | None = None,
    ) -> HeadOutput:
        hidden = self.trunk(tokens, causal=False, lengths=lengths, key_mask=key_mask, cu_seqlens=cu_seqlens)
        loss = None
        if labels is not None:
            _check_labels(labels, tokens)
            loss = self._language_model_loss(hidden, labels)
        wanted = labels is None if logits is None else logits
        return HeadOutput(loss, self.output_layer(hidden) if wanted else None)


class GPTForSequenceClassification(Head):
    """Classification or regression of a sequence: logits = classifier(dropout(h)), h one token's last hidden state.

    `forward(tokens [B, T], labels=None, *, lengths=None, key_mask=None, logits=None)` → `(loss, logits [B, L])`, the
    logits always. h is that of the last real token, or of the extract token (`config.pooling`). With
    problem "classification" labels are [B] int64 and the loss is the cross-entropy; with "regression" they are [B, L],
    or [B] for one output, and it is the mean squared error. With `config.lm_weight` λ > 0 the loss is L_cls + λ L_lm,
    L_lm the language-model loss on the same tokens. Raises `ValueError` for labels of other shapes or dtypes or out of
    range, a row without real token, or without extract token where that is read. Source: Radford et al. (2018),
    sections 3.2 and 3.3.
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_dim, config.num_labels)
        init_weights(self.classifier, config.init_std)
        if config.lm_weight > 0:
            self._build_output_layer()

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        logits: bool | None = None,
    ) -> HeadOutput:
        hidden = self.trunk(tokens, lengths=lengths, key_mask=key_mask)  # [B, T, C]
        read = self._read_position(tokens, lengths, key_mask)
        pooled = hidden[torch.arange(tokens.shape[0], device=tokens.device), read]  # [B, C]
        scores = self.classifier(self.dropout(pooled))
        if labels is None:
            return HeadOutput(None, scores)
        loss = self._task_loss(scores, labels)
        if self.config.lm_weight > 0:
            shifted = shift_labels(tokens, lengths=lengths, key_mask=key_mask)
            loss = loss + self.config.lm_weight * self._language_model_loss(hidden, shifted)
        return HeadOutput(loss, scores)

    def _read_position(self, tokens: Tensor, lengths: Tensor | None, key_mask: Tensor | None) -> Tensor:
        """The position [B] whose hidden state is read."""
        B, T = tokens.shape
        candidates = torch.ones_like(tokens, dtype=torch.bool)
        if lengths is not None:
            candidates = torch.arange(T, device=tokens.device) < lengths[:, None]
        if key_mask is not None:
            candidates = key_mask
        wanted = "a real token"
        if self.config.pooling == "extract":
            candidates = candidates & (tokens == self.config.extract_token)
            wanted = f"an extract token ({self.config.extract_token})"
        if ops.values_checked(tokens) and not bool(candidates.any(1).all()):
            row = int((~candidates.any(1)).nonzero()[0])
            raise ValueError(f"GPTForSequenceClassification: row {row} of tokens has none, wanted {wanted} to read")
        return T - 1 - candidates.flip(1).int().argmax(1)  # the last candidate

    def _task_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        B, L = scores.shape
        if self.config.problem == "regression":
            if labels.shape != (B, L) and not (L == 1 and labels.shape == (B,)):
                raise ValueError(
                    f"GPTForSequenceClassification: labels has shape {list(labels.shape)}, wanted {[B, L]} to regress"
                )
            return F.mse_loss(scores.float(), labels.view(B, L).float())
        if labels.shape != (B,) or labels.dtype != torch.int64:
            raise ValueError(
                f"GPTForSequenceClassification: labels is {labels.dtype} {list(labels.shape)}, wanted int64 [{B}]"
            )
        if ops.values_checked(labels) and B and not (0 <= int(labels.min()) and int(labels.max()) < L):
            raise ValueError(
                f"GPTForSequenceClassification: labels hold {int(labels.min())} to {int(labels.max())}, "
                f"wanted classes in [0, {L})"
            )
        return F.cross_entropy(scores.float(), labels)


def _check_labels(labels: Tensor, tokens: Tensor) -> None:
    if labels.shape != tokens.shape or labels.dtype != torch.int64:
        raise ValueError(
            f"gpt_fast: labels is {labels.dtype} {list(labels.shape)}, wanted int64 {list(tokens.shape)} as tokens, "
            f"unshifted, {IGNORE} where a position does not count"
        )


def _resized(kind: type, old: Any, sizes: tuple[int, int], std: float, **options: Any) -> Any:
    """A layer of the same kind, dtype, device and trainability with another vocabulary."""
    new = kind(*sizes, **options, device=old.weight.device, dtype=old.weight.dtype)
    init_weights(new, std)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            before = getattr(old, name)
            rows = min(len(parameter), len(before))
            parameter[:rows] = before[:rows]
            parameter.requires_grad_(before.requires_grad)
    return new


HEADS: dict[str, type[Head]] = {
    head.__name__: head for head in (GPTForCausalLM, GPTForMaskedLM, GPTForSequenceClassification)
}
