"""Language modelling: the head that predicts the next token and the one that predicts masked tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .. import _plain
from ..config import IGNORE, GPTConfig
from ..model import Generating, GPTModel, as_key_mask, shift_labels
from ..ops import _checks
from .base import Head, HeadOutput


class LanguageModelHead(Head):
    """A projection of every token to the vocabulary, and the loss of those that have a label."""

    causal: bool

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
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        logits: bool | None = None,
        loss_weights: Tensor | None = None,
    ) -> HeadOutput:
        name = type(self).__name__
        key_mask = as_key_mask(name, tokens, key_mask, attention_mask)
        if logits is not None:
            _checks.boolean_option(name, logits=logits)
        wanted = labels is None if logits is None else logits
        options: dict[str, Any] = {"lengths": lengths, "key_mask": key_mask, "cu_seqlens": cu_seqlens}
        if self._reads_once(labels is not None, wanted):
            options["_product"] = True
        hidden = self.trunk(tokens, causal=self.causal, **options)
        loss = None
        if labels is not None:
            _check_labels(type(self).__name__, labels, tokens)
            loss = self._language_model_loss(hidden, self._targets(labels, lengths, key_mask))
            loss = self._weighted([loss], loss_weights)
        return HeadOutput(loss, self.output_layer(hidden) if wanted else None)

    def _reads_once(self, has_loss: bool, has_logits: bool) -> bool:
        """Return True if one product of the output layer is all that reads the hidden states."""
        losses = 2 if self.training and self.z_loss > 0 else 1
        readers = losses * has_loss + has_logits
        plain = _plain.is_plain(self.output_layer, nn.Linear) and _plain.is_plain(self.trunk, GPTModel)
        return readers == 1 and plain

    def _targets(self, labels: Tensor, lengths: Tensor | None, key_mask: Tensor | None) -> Tensor:
        return shift_labels(labels, lengths=lengths, key_mask=key_mask) if self.causal else labels

    def _loss_counts(
        self, tokens: Tensor, labels: Tensor, lengths: Tensor | None, key_mask: Tensor | None
    ) -> list[Tensor]:
        _check_labels(type(self).__name__, labels, tokens)
        return [(self._targets(labels, lengths, key_mask) != IGNORE).sum()]


class GPTForCausalLM(Generating, LanguageModelHead):
    """Next-token prediction: loss = mean of -log p(w_t | w_<t), p = softmax(output_layer(trunk(tokens))).

    `forward(tokens [B, T], labels=None, *, lengths=None, key_mask=None, cu_seqlens=None, logits=None)` → `(loss, logits
    [B, T, V])`. labels [B, T] are given unshifted (usually the tokens) and -100 does not count, nor does padding;
    `cu_seqlens` as in `GPTModel.hidden_states`, for sequences packed into one row. Logits are computed where there are
    no labels or `logits=True`; the loss alone never stores them.

    Dtypes, precision, determinism: those of the ops.

    Raises `ValueError` for tokens or labels of other shapes or out of range.

    Source: Radford et al. (2018, 2019).
    """

    causal = True

    @classmethod
    def from_nanogpt(cls, state_dict: Mapping[str, Tensor], model_args: Mapping[str, Any], **overrides: Any) -> Self:
        """Return a model with the weights of a nanoGPT, or of another model with nanoGPT's names.

        Weights are copied bit for bit, in their dtype and on their device. The output layer is tied if its weight
        equals the token embedding's. Prefixes of torch.compile and DistributedDataParallel are dropped. A model with
        `bias=False` has no biases here either.

        Args:
            state_dict: `model.state_dict()`, or `checkpoint["model"]`.
            model_args: `vars(model.config)`, or `checkpoint["model_args"]`: `n_layer`, `n_head`, `n_embd`,
                `block_size`, `vocab_size`, `bias` and `dropout`.
            overrides: Fields of `GPTConfig`. The default activation is "gelu", nanoGPT's since 2023-05. minGPT,
                build-nanogpt and earlier nanoGPT need `activation="gelu_tanh"`.

        Raises:
            ValueError: A size is missing or wrong, a tensor is missing, unexpected, or has another shape than
                `model_args` say, or a causal mask is not causal; the message names it. Without `bias` or `dropout`
                in `model_args` the activation has to be given.

        Example:
            ```python
            ours = GPTForCausalLM.from_nanogpt(model.state_dict(), vars(model.config))
            ```
        """
        from ..integrations.nanogpt import weights

        return weights.from_nanogpt(cls, state_dict, model_args, overrides)

    def to_nanogpt(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return nanoGPT's state dict and `model_args`: `GPT(GPTConfig(**model_args)).load_state_dict(state_dict)`.

        The tensors share memory with this model's parameters. Special tokens have no place in `model_args`.

        Raises:
            ValueError: nanoGPT has no such model: post-norm, another activation than "gelu", an output layer of its
                own or with bias, `ff_dim` other than 4C, different dropout rates, or a module that is not what the
                configuration says; the message names it.
        """
        from ..integrations.nanogpt import weights

        return weights.to_nanogpt(self)


class GPTForMaskedLM(LanguageModelHead):
    """Masked-token prediction: loss = mean of -log p(w_i | all others) over the positions whose label is not -100.

    `forward(tokens [B, T], labels=None, *, lengths=None, key_mask=None, cu_seqlens=None, logits=None)` →
    `(loss, logits [B, T, V])`.
    Attention sees both sides. labels [B, T] hold the original token where it is to be predicted and -100 elsewhere;
    only those positions are projected onto the vocabulary, so time and memory of the loss follow their number. Logits
    are computed where there are no labels or `logits=True`. Dtypes, precision, determinism and errors are
    those of `GPTForCausalLM`. Source: Devlin et al. (2018), arXiv:1810.04805.
    """

    causal = False


def _check_labels(head: str, labels: Tensor, tokens: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.shape != tokens.shape or labels.dtype != torch.int64:
        raise ValueError(
            f"gpt_fast.{head}: labels is {_checks.described(labels)}; expected int64 {list(tokens.shape)} as tokens, "
            f"unshifted, {IGNORE} where a position does not count"
        )
