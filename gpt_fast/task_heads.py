"""The heads of the labelled tasks: which layer reads which hidden states, and the loss it is trained with."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .config import GPTConfig
from .head import Head, HeadOutput
from .model import init_weights, shift_labels


class TaskHead(Head):
    """A linear layer on one token's last hidden state, and the joint loss L_task + λ L_lm (λ is `config.lm_weight`)."""

    def __init__(self, config: GPTConfig, outputs: int):
        super().__init__(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_dim, outputs, bias=config.classifier_bias)
        init_weights(self.classifier, config.init_std)
        if config.lm_weight > 0:
            self._build_output_layer()

    def _pooled(self, tokens: Tensor, lengths: Tensor | None, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """tokens [N, T] → all hidden states [N, T, C] and the one that is read of each row [N, C]."""
        hidden = self.trunk(tokens, lengths=lengths, key_mask=key_mask)
        read = self._read_position(tokens, lengths, key_mask)
        return hidden, hidden[torch.arange(tokens.shape[0], device=tokens.device), read]

    def _joint_loss(
        self, loss: Tensor, hidden: Tensor, tokens: Tensor, lengths: Tensor | None, key_mask: Tensor | None
    ) -> Tensor:
        if self.config.lm_weight == 0:
            return loss
        shifted = shift_labels(tokens, lengths=lengths, key_mask=key_mask)
        return loss + self.config.lm_weight * self._language_model_loss(hidden, shifted)

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
            raise ValueError(f"{type(self).__name__}: row {row} of tokens has none, wanted {wanted} to read")
        return T - 1 - candidates.flip(1).int().argmax(1)  # the last candidate

    def _task_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        B, L = scores.shape
        if self.config.problem == "regression":
            if labels.shape != (B, L) and not (L == 1 and labels.shape == (B,)):
                raise ValueError(
                    f"{type(self).__name__}: labels has shape {list(labels.shape)}, wanted {[B, L]} to regress"
                )
            return F.mse_loss(scores.float(), labels.view(B, L).float())
        return self._class_loss(scores, labels)

    def _class_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        B, L = scores.shape
        if labels.shape != (B,) or labels.dtype != torch.int64:
            raise ValueError(
                f"{type(self).__name__}: labels is {labels.dtype} {list(labels.shape)}, wanted int64 [{B}]"
            )
        if ops.values_checked(labels) and B and not (0 <= int(labels.min()) and int(labels.max()) < L):
            raise ValueError(
                f"{type(self).__name__}: labels hold {int(labels.min())} to {int(labels.max())}, "
                f"wanted classes in [0, {L})"
            )
        return F.cross_entropy(scores.float(), labels)

    def _rows(self, tokens: Tensor, wanted: str) -> tuple[int, int, int]:
        """The sizes [B, S, T] of tokens with several sequences for each example."""
        if tokens.dim() != 3:
            raise ValueError(f"{type(self).__name__}: tokens has shape {list(tokens.shape)}, wanted {wanted}")
        B, S, T = tokens.shape
        return B, S, T


class GPTForSequenceClassification(TaskHead):
    """Classification or regression of a sequence: logits = classifier(dropout(h)), h one token's last hidden state.

    `forward(tokens [B, T], labels=None, *, lengths=None, key_mask=None, logits=None)` → `(loss, logits [B, L])`, the
    logits always. h is that of the last real token, or of the extract token (`config.pooling`). With
    problem "classification" labels are [B] int64 and the loss is the cross-entropy; with "regression" they are [B, L],
    or [B] for one output, and it is the mean squared error. With `config.lm_weight` λ > 0 the loss is L_cls + λ L_lm,
    L_lm the language-model loss on the same tokens. Dtypes, precision, determinism: those of the ops; the task's loss
    is float32. Raises `ValueError` for labels of other shapes or dtypes or out of range, a row without real token, or
    without extract token where that is read. Source: Radford et al. (2018), sections 3.2 and 3.3.
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config, config.num_labels)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        logits: bool | None = None,
    ) -> HeadOutput:
        hidden, pooled = self._pooled(tokens, lengths, key_mask)
        scores = self.classifier(self.dropout(pooled))
        if labels is None:
            return HeadOutput(None, scores)
        loss = self._joint_loss(self._task_loss(scores, labels), hidden, tokens, lengths, key_mask)
        return HeadOutput(loss, scores)


class GPTForSimilarity(TaskHead):
    """How two texts compare: logits = classifier(dropout(h₁ + h₂)), h₁ and h₂ one token's last hidden state of each
    order.

    `forward(tokens [B, 2, T], labels=None, *, lengths=None, key_mask=None, logits=None)` → `(loss, logits [B, L])`:
    `tokens[:, 0]` holds the two texts in one order, `tokens[:, 1]` in the other, `lengths` is [B, 2], `key_mask`
    [B, 2, T]. Which token is read, the problems (classes or numbers), the joint loss, dtypes, precision,
    determinism and errors are those of `GPTForSequenceClassification`; exchanging the two
    orders changes nothing but rounding. Source: Radford et al. (2018), section 3.3.
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config, config.num_labels)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        logits: bool | None = None,
    ) -> HeadOutput:
        B, S, T = self._rows(tokens, "[B, 2, T]")
        if S != 2:
            raise ValueError(f"GPTForSimilarity: tokens has shape {list(tokens.shape)}, wanted [B, 2, T]")
        tokens, lengths, key_mask = flat(tokens, lengths, key_mask)
        hidden, pooled = self._pooled(tokens, lengths, key_mask)
        scores = self.classifier(self.dropout(pooled.view(B, 2, -1).sum(1)))
        if labels is None:
            return HeadOutput(None, scores)
        loss = self._joint_loss(self._task_loss(scores, labels), hidden, tokens, lengths, key_mask)
        return HeadOutput(loss, scores)


class GPTForMultipleChoice(TaskHead):
    """Which of K answers is right: p = softmax over the answers of classifier(dropout(h_k)), h_k one token's last
    hidden state of the sequence that ends in answer k.

    `forward(tokens [B, K, T], labels=None, *, lengths=None, key_mask=None, logits=None)` → `(loss, logits [B, K])`, one
    score for each answer; labels [B] int64 in [0, K), the loss is the cross-entropy, plus λ times the language-model
    loss on all sequences. `lengths` is [B, K], `key_mask` [B, K, T]. Which token is read, dtypes, precision,
    determinism and errors are those of `GPTForSequenceClassification`. Source: Radford et al. (2018), section 3.3.
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config, 1)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        logits: bool | None = None,
    ) -> HeadOutput:
        B, K, T = self._rows(tokens, "[B, K, T]")
        tokens, lengths, key_mask = flat(tokens, lengths, key_mask)
        hidden, pooled = self._pooled(tokens, lengths, key_mask)
        scores = self.classifier(self.dropout(pooled)).view(B, K)
        if labels is None:
            return HeadOutput(None, scores)
        loss = self._joint_loss(self._class_loss(scores, labels), hidden, tokens, lengths, key_mask)
        return HeadOutput(loss, scores)


def flat(
    tokens: Tensor, lengths: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[B, S, T] → [B·S, T], with what says where each sequence ends."""
    return (
        tokens.flatten(0, 1),
        None if lengths is None else lengths.flatten(),
        None if key_mask is None else key_mask.flatten(0, 1),
    )
