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
    """Projection of every token to the vocabulary, and the loss of the tokens that have a label.

    Args:
        config: Sizes and options.
    """

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
        """Return loss and logits of tokens.

        Args:
            tokens: Token ids [B, T], int64.
            labels: Labels [B, T], int64. A label of -100 does not count. A causal model shifts them over a whole row,
                so the last token of a packed sequence learns to predict the first token of the next. Where it should
                not, the label of that first token has to be -100.
            lengths: Number of real tokens [B] of each row, for rows that are padded on the right.
            key_mask: Bool [B, T], True for a real token.
            attention_mask: `key_mask` as zeros and ones, as transformers' tokenizers return it.
            cu_seqlens: Bounds [n + 1] of sequences that are packed into one row [1, T].
            logits: True computes logits [B, T, V], False does not. None computes them only without labels.
            loss_weights: Factor of each term of the loss [terms]; None means 1 each. `loss_counts` explains their use.

        Returns:
            (loss, logits), each None where it is not computed. The loss is a float32 scalar.

        Raises:
            ValueError: Tokens or labels have other shapes or dtypes or are out of range, or masks contradict each
                other.
        """
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
        """Return True if exactly one matrix product reads the hidden states: that of the loss or that of the logits.

        The last norm may then round to the dtype of the product. `has_loss` and `has_logits` tell what the call
        computes. A z-loss reads the hidden states once more. The result is False if the trunk or the output layer has
        hooks or another class, because these may read the hidden states, too.
        """
        losses = 2 if self.training and self.z_loss > 0 else 1
        readers = losses * has_loss + has_logits
        plain = _plain.is_plain(self.output_layer, nn.Linear) and _plain.is_plain(self.trunk, GPTModel)
        return readers == 1 and plain

    def _targets(self, labels: Tensor, lengths: Tensor | None, key_mask: Tensor | None) -> Tensor:
        """Return the label of each position's prediction [B, T]: the next token's if causal, else the position's own.

        If causal, the last position and padding, by `lengths` [B] or `key_mask` [B, T], get -100.
        """
        return shift_labels(labels, lengths=lengths, key_mask=key_mask) if self.causal else labels

    def _loss_counts(
        self, tokens: Tensor, labels: Tensor, lengths: Tensor | None, key_mask: Tensor | None
    ) -> list[Tensor]:
        """Return [number of labels that count], a scalar tensor for the one term of the loss.

        Labels of -100 do not count. In a causal model labels of padding (by `lengths` [B] or `key_mask` [B, T]) and of
        the first token do not count either. Raise `ValueError` unless `labels` are int64 in the shape of `tokens`.
        """
        _check_labels(type(self).__name__, labels, tokens)
        return [(self._targets(labels, lengths, key_mask) != IGNORE).sum()]


class GPTForCausalLM(Generating, LanguageModelHead):
    """GPT that predicts the next token.

    loss = mean of -log p(w_t | w_<t), p = softmax(output_layer(trunk(tokens))).

    Args:
        config: Sizes and options.

    Shape:
        tokens [B, T] int64, labels [B, T] int64 → loss a scalar, logits [B, T, V]. Labels are given unshifted (usually
        the tokens). A label of -100 does not count, nor does padding.

    Raises:
        ValueError: Tokens or labels have other shapes or are out of range.

    Example:
        ```python
        import torch
        import gpt_fast

        config = gpt_fast.GPTConfig(num_tokens=100, hidden_dim=64, num_heads=4, num_layers=2, seq_len=32)
        model, tokens = gpt_fast.GPTForCausalLM(config), torch.randint(100, (2, 10))
        model(tokens, labels=tokens).loss.backward()
        print(model(tokens).logits.shape)  # torch.Size([2, 10, 100])
        ```

    Note:
        Logits are computed without labels, or with `logits=True`. The loss alone never stores them.

        The docstrings of the ops state dtypes, precision and determinism.

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
            **overrides: Fields of `GPTConfig`. The default activation is "gelu", nanoGPT's since 2023-05. minGPT,
                build-nanogpt and earlier nanoGPT need `activation="gelu_tanh"`.

        Returns:
            The new model.

        Raises:
            ValueError: A size is missing or wrong, a tensor is missing, unexpected, or has another shape than
                `model_args` say, or a causal mask is not causal. The message names it. Without `bias` or `dropout` in
                `model_args` the activation has to be given.

        Example:
            ```python
            import gpt_fast

            config = gpt_fast.GPTConfig(100, 64, 4, 2, 32, activation="gelu")
            state_dict, model_args = gpt_fast.GPTForCausalLM(config).to_nanogpt()
            ours = gpt_fast.GPTForCausalLM.from_nanogpt(state_dict, model_args)
            ```
        """
        from ..integrations.nanogpt import weights

        return weights.from_nanogpt(cls, state_dict, model_args, overrides)

    def to_nanogpt(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return nanoGPT's state dict and `model_args`.

        `GPT(GPTConfig(**model_args)).load_state_dict(state_dict)` makes nanoGPT's model of them.

        Returns:
            (state_dict, model_args). The tensors share memory with this model's parameters. Special tokens have no
            place in `model_args`.

        Raises:
            ValueError: nanoGPT has no such model (post-norm, another activation than "gelu", an output layer of its own
                or with bias, `ff_dim` other than 4C, another `layer_norm_eps` than 1e-5, dropout on the hidden
                activation, different dropout rates), or a module is not what the configuration says. The message names
                it.
        """
        from ..integrations.nanogpt import weights

        return weights.to_nanogpt(self)


class GPTForMaskedLM(LanguageModelHead):
    """GPT that predicts masked tokens from both sides.

    loss = mean of -log p(w_i | all others) over the positions whose label is not -100.

    Args:
        config: Sizes and options.

    Shape:
        tokens [B, T] int64, labels [B, T] int64 → loss a scalar, logits [B, T, V]. Labels hold the original token where
        it is to be predicted and -100 elsewhere.

    Raises:
        ValueError: Tokens or labels have other shapes or are out of range.

    Example:
        ```python
        import torch
        import gpt_fast

        config = gpt_fast.GPTConfig(100, 64, 4, 2, 32, mask_token=99)
        model, labels = gpt_fast.GPTForMaskedLM(config), torch.full((2, 10), -100)
        tokens = torch.randint(99, (2, 10))
        labels[:, 3], tokens[:, 3] = tokens[:, 3].clone(), 99
        model(tokens, labels=labels).loss.backward()
        ```

    Note:
        Cost: only positions with a label are projected onto the vocabulary, so time and memory of the loss follow their
        number. Logits are computed without labels, or with `logits=True`.

        The docstrings of the ops state dtypes, precision and determinism.

        Source: Devlin et al. (2018), arXiv:1810.04805.
    """

    causal = False


def _check_labels(head: str, labels: Tensor, tokens: Tensor) -> None:
    """Raise `ValueError`, in the name of the class `head`, unless `labels` are int64 in the shape of `tokens`."""
    if not isinstance(labels, Tensor) or labels.shape != tokens.shape or labels.dtype != torch.int64:
        raise ValueError(
            f"gpt_fast.{head}: labels is {_checks.described(labels)}; expected int64 {list(tokens.shape)} as tokens, "
            f"unshifted, {IGNORE} where a position does not count"
        )
