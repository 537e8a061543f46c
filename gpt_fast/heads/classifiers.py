"""Heads of the labelled tasks: the layer that reads hidden states, and the loss of its training."""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..config import IGNORE, GPTConfig
from ..model import as_key_mask, init_weights, shift_labels
from ..ops import _checks
from .base import Head, HeadOutput


class TaskHead(Head):
    """Linear layer on one token's last hidden state, with the joint loss L_task + λ L_lm (λ is `config.lm_weight`).

    Args:
        config: Sizes and options.
        outputs: Number of outputs of the linear layer.
    """

    tokens_shape = "[B, T]"
    has_classes = True  # do the outputs of the classifier stand for classes?
    class_weights: Tensor | None
    _host_weights: Tensor | None = None

    def __init__(self, config: GPTConfig, outputs: int):
        super().__init__(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_dim, outputs, bias=config.classifier_bias)
        self.register_buffer("class_weights", None, persistent=False)
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
        attention_mask: Tensor | None = None,
        logits: bool | None = None,
        loss_weights: Tensor | None = None,
    ) -> HeadOutput:
        """Return loss and logits of tokens. The logits are always computed.

        Args:
            tokens: Token ids, int64, [B, T]. They are [B, 2, T] for similarity (both orders of two texts), and
                [B, K, T] for multiple choice (K answers).
            labels: Labels, in the shape and dtype that the docstring of the head's class states, such as int64 [B] for
                classes of sequences.
            lengths: Number of real tokens of each sequence, for sequences that are padded on the right, in the shape of
                `tokens` without T: [B], [B, 2] or [B, K].
            key_mask: Bool in the shape of `tokens`, True for a real token.
            attention_mask: `key_mask` as zeros and ones, as transformers' tokenizers return it.
            logits: Not used. It is there because heads for language modelling have this argument.
            loss_weights: Factor of each term of the loss [terms]; None means 1 each. `loss_counts` explains their use.

        Returns:
            (loss, logits). The loss is a float32 scalar, or None without labels. With `config.lm_weight` > 0 it
            includes that times the language model's loss on the tokens. The docstring of the head's class states the
            shape of the logits, such as [B, L] for L labels.

        Raises:
            ValueError: Tokens or labels have other shapes or dtypes or are out of range, or a row lacks the token to be
                read.
        """
        name = type(self).__name__
        key_mask = as_key_mask(name, tokens, key_mask, attention_mask)
        _checks.optional_tensors(name, labels=labels, lengths=lengths, key_mask=key_mask)
        given, (tokens, lengths, key_mask) = tokens, self._rows(tokens, lengths, key_mask)
        shape = given.shape
        hidden = self.trunk(tokens, lengths=lengths, key_mask=key_mask)
        real = real_tokens(tokens, lengths, key_mask)
        scores = self._scores(hidden, tokens, real, shape)
        if labels is None:
            return HeadOutput(None, scores)
        terms = self._task_losses(scores, labels, real)
        if self.config.lm_weight > 0:
            targets = shift_labels(tokens, lengths=lengths, key_mask=key_mask)
            terms.append(self.config.lm_weight * self._language_model_loss(hidden, targets))
        return HeadOutput(self._weighted(terms, loss_weights), scores)

    def weigh_classes(self, weights: Sequence[float] | None) -> None:
        """Set the weight of each class in the task's loss, in training and in evaluation. Weights are not saved.

        With weights w the loss is Σ w[yᵢ] lᵢ / Σ w[yᵢ], where lᵢ is the cross-entropy of row i and yᵢ its class, as in
        `torch.nn.CrossEntropyLoss(weight=w)`. With problem "multi_label" it is the loss of
        `torch.nn.BCEWithLogitsLoss(pos_weight=w)`.

        Args:
            weights: One number of 0 or more for each class. None removes the weights.

        Raises:
            ValueError: There are more or fewer weights than classes, a weight is negative or infinite, or the head has
                no classes (regression, multiple choice, question answering).
        """
        name, L = type(self).__name__, self.classifier.out_features
        if weights is None:
            self.class_weights = self._host_weights = None
            return
        if not self.has_classes or self.config.problem == "regression":
            raise ValueError(f"gpt_fast.{name}: has no classes to weigh; expected a classifier")
        if len(weights) != L or not all(0 <= weight < torch.inf for weight in weights):
            raise ValueError(
                f"gpt_fast.{name}: class_weights is {list(weights)}; expected {L} numbers of 0 or more, one a class"
            )
        # The counts of a batch are made on the host, before the batch is copied to a GPU.
        self._host_weights = torch.tensor(weights, dtype=torch.float32, device="cpu")
        self.class_weights = self._host_weights.to(self.classifier.weight.device)

    def _loss_counts(
        self, tokens: Tensor, labels: Tensor, lengths: Tensor | None, key_mask: Tensor | None
    ) -> list[Tensor]:
        """Return how many predictions each term of the loss is the mean of, as scalar tensors.

        The counts of the task's terms come first, and if `config.lm_weight` > 0 the number of next-token labels comes
        last. With class weights, the count of a classification's term is the sum of the labels' weights. `tokens`,
        `lengths` and `key_mask` have the shapes that the head takes.
        """
        tokens, lengths, key_mask = self._rows(tokens, lengths, key_mask)
        counts = self._task_counts(labels, real_tokens(tokens, lengths, key_mask))
        if self.config.lm_weight > 0:
            counts.append((shift_labels(tokens, lengths=lengths, key_mask=key_mask) != IGNORE).sum())
        return counts

    def _rows(
        self, tokens: Tensor, lengths: Tensor | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return (tokens [N, T], lengths [N], key_mask [N, T]) for tokens [N, T], or [B, S, T] with N = B S.

        Lengths and mask that are None stay None.

        Raises:
            ValueError: The head does not read tokens of this shape.
        """
        if not isinstance(tokens, Tensor) or not self._reads(tokens.shape):
            raise ValueError(
                f"gpt_fast.{type(self).__name__}: tokens is {_checks.described(tokens)}; "
                f"expected int64 {self.tokens_shape}"
            )
        return flat(tokens, lengths, key_mask) if tokens.dim() == 3 else (tokens, lengths, key_mask)

    def _reads(self, shape: torch.Size) -> bool:
        """Return True if the head reads tokens of this shape: by default, if it has two dimensions, [B, T]."""
        return len(shape) == 2

    def _scores(self, hidden: Tensor, tokens: Tensor, real: Tensor, shape: torch.Size) -> Tensor:
        """Return the logits for hidden states [N, T, C] of the tokens [N, T]. Each head overrides this method.

        `real` is bool [N, T], True for a real token and False for padding. `shape` is the shape in which the caller
        gave the tokens, such as [B, K, T] with N = B K. Here it raises `NotImplementedError`.
        """
        raise NotImplementedError

    def _task_losses(self, scores: Tensor, labels: Tensor, real: Tensor) -> list[Tensor]:
        """Return the terms of the task's loss, as scalars, for the logits `scores` and the caller's labels.

        Each head overrides this method; here it raises `NotImplementedError`. Each term is a mean over as many
        predictions as `_task_counts` returns for it. `real` is bool [N, T], False at padding.
        """
        raise NotImplementedError

    def _task_counts(self, labels: Tensor, real: Tensor) -> list[Tensor]:
        """Return how many predictions each term of the task's loss is the mean of, as scalar tensors.

        By default there is one term, and each label counts 1. If classes are weighted and the problem is
        "classification", a label counts as the weight of its class, and -100 as 0. `real` is bool [N, T], False at
        padding.
        """
        if self.class_weights is None or self.config.problem != "classification":
            return [torch.tensor(len(labels), device=labels.device)]
        return [self._weight_of(labels)]

    def _weight_of(self, labels: Tensor) -> Tensor:
        """Return the number of `labels` that are not -100 or, if classes are weighted, the sum of their weights."""
        counted = labels != IGNORE
        if self.class_weights is None or self._host_weights is None:
            return counted.sum()
        weights = self._host_weights if labels.is_cpu else self.class_weights
        return (weights[labels.masked_fill(~counted, 0)] * counted).sum()

    def _pooled(self, hidden: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
        """Return the hidden state [N, C] that the classifier reads of each row of `hidden` [N, T, C].

        It is that of the last real token or, with pooling "extract", of the last extract token. `tokens` is [N, T].
        `real` is bool [N, T], False at padding.
        """
        return hidden[torch.arange(tokens.shape[0], device=tokens.device), self._read_position(tokens, real)]

    def _read_position(self, tokens: Tensor, candidates: Tensor) -> Tensor:
        """Return the position [N] of the token that the classifier reads in each row of `tokens` [N, T].

        It is the last real token. With pooling "extract" it is the last real token that is the extract token.
        `candidates` is bool [N, T], True for a real token. If a row has no such token, raise `ValueError`, or return
        its last position where values are not checked, as on a GPU.
        """
        wanted = "a real token"
        if self.config.pooling == "extract":
            candidates = candidates & (tokens == self.config.extract_token)
            wanted = f"an extract token ({self.config.extract_token})"
        self._check_rows(tokens, candidates, wanted)
        return tokens.shape[1] - 1 - candidates.flip(1).int().argmax(1)  # the last candidate

    def _check_rows(self, tokens: Tensor, there: Tensor, wanted: str) -> None:
        """Raise `ValueError` if a row of `there` [N, T] is False everywhere. `wanted` says what the row lacks.

        This check runs if `tokens` is on the CPU or `gpt_fast.check_values` is enabled, but never while PyTorch records
        a graph. `tokens` has no other use here.

        Raises:
            ValueError: A row is False everywhere.
        """
        if ops.values_checked(tokens) and not bool(there.any(1).all()):
            row = int((~there.any(1)).nonzero()[0])
            raise ValueError(f"{type(self).__name__}: row {row} of tokens has none; expected {wanted} to read")

    def _problem_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the float32 loss of the logits `scores` [B, L] by `config.problem`, a mean.

        It is the cross-entropy for "classification" with labels [B], weighted by class if `class_weights` are set. For
        "regression" it is the mean squared error with labels [B, L], or [B] if L is 1. For "multi_label" it is the
        binary cross-entropy with floating labels [B, L] and `class_weights` as PyTorch's `pos_weight`.

        Raises:
            ValueError: The labels have another shape or dtype.
        """
        B, L = scores.shape
        if self.config.problem == "regression":
            if labels.shape != (B, L) and not (L == 1 and labels.shape == (B,)):
                raise ValueError(
                    f"{type(self).__name__}: labels has shape {list(labels.shape)}; expected {[B, L]} to regress"
                )
            return F.mse_loss(scores.float(), labels.view(B, L).float())
        if self.config.problem == "multi_label":
            if labels.shape != (B, L) or not labels.is_floating_point():
                raise ValueError(
                    f"gpt_fast.{type(self).__name__}: labels is {_checks.described(labels)}; "
                    f"expected floating point {[B, L]}, 1 for each class that a row has and 0 for others"
                )
            return F.binary_cross_entropy_with_logits(scores.float(), labels.float(), pos_weight=self.class_weights)
        return self._class_loss(scores, labels)

    def _class_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of the logits `scores` [B, L] and labels [B].

        The mean is weighted by class if `class_weights` are set.

        Raises:
            ValueError: Labels are not int64 [B] or, where values are checked (on the CPU), not in [0, L).
        """
        B, L = scores.shape
        self._check_labels(labels, (B,))
        self._check_classes(labels, L)
        return F.cross_entropy(scores.float(), labels) if self.class_weights is None else self._mean(scores, labels)

    def _labelled_loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of the logits `scores` over the rows whose label is not -100, or 0 without any.

        Logits are [N, L], and labels are int64 [N]. The mean is weighted if `class_weights` are set.

        Raises:
            ValueError: A label is no class in [0, L), where values are checked (on the CPU).
        """
        counted = labels != IGNORE
        self._check_classes(labels.masked_fill(~counted, 0), scores.shape[1])
        return self._mean(scores, labels)

    def _mean(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of the logits `scores` [N, L] and labels [N], without labels of -100.

        The mean is weighted if `class_weights` are set. It is 0 if no label counts or their weights sum to 0.
        """
        losses = F.cross_entropy(
            scores.float(), labels, weight=self.class_weights, ignore_index=IGNORE, reduction="sum"
        )
        total = self._weight_of(labels)
        return losses / torch.where(total > 0, total, 1)

    def _check_labels(self, labels: Tensor, shape: tuple[int, ...]) -> None:
        """Raise `ValueError` unless `labels` are int64 in this shape."""
        if labels.shape != shape or labels.dtype != torch.int64:
            raise ValueError(
                f"gpt_fast.{type(self).__name__}: labels is {_checks.described(labels)}; expected int64 {list(shape)}"
            )

    def _check_classes(self, classes: Tensor, L: int) -> None:
        """Raise `ValueError` unless all `classes` are in [0, L).

        Off the CPU this check runs only while `gpt_fast.check_values` is enabled. It never runs while PyTorch records a
        graph.

        Raises:
            ValueError: A class is out of range.
        """
        if ops.values_checked(classes) and len(classes) and not (0 <= int(classes.min()) and int(classes.max()) < L):
            raise ValueError(
                f"{type(self).__name__}: labels hold {int(classes.min())} to {int(classes.max())}; "
                f"expected classes in [0, {L})"
            )


class GPTForSequenceClassification(TaskHead):
    """GPT that classifies a sequence, or predicts numbers for it.

    logits = classifier(dropout(h)), h the last hidden state of one token: the last real one, or the extract token
    (`config.pooling`). With `config.lm_weight` λ > 0 the loss is L_cls + λ L_lm, with the language-model loss L_lm on
    the same tokens.

    Args:
        config: Sizes and options.

    Shape:
        tokens [B, T] int64 → loss a scalar, logits [B, L].

        problem "classification": labels [B] int64, and the loss is the cross-entropy.

        problem "regression": labels [B, L], or [B] for one output, and the loss is the mean squared error.

        problem "multi_label": labels [B, L] floating point, 1 for each class that a row has, and the loss is the binary
        cross-entropy.

    Raises:
        ValueError: Labels have other shapes or dtypes or are out of range, or a row has no real token, or no extract
            token where that is read.

    Example:
        ```python
        import torch
        import gpt_fast

        config = gpt_fast.GPTConfig(100, 64, 4, 2, 32, num_labels=3)
        model = gpt_fast.GPTForSequenceClassification(config)
        loss, logits = model(torch.randint(100, (2, 10)), labels=torch.tensor([0, 2]))
        print(logits.shape)  # torch.Size([2, 3])
        ```

    Note:
        The docstrings of the ops state dtypes, precision and determinism. The task's loss is float32.

        Source: Radford et al. (2018), sections 3.2 and 3.3.
    """

    def __init__(self, config: GPTConfig):
        super().__init__(config, config.num_labels)

    def _scores(self, hidden: Tensor, tokens: Tensor, real: Tensor, shape: torch.Size) -> Tensor:
        """Return logits [N, L] from the hidden state that the classifier reads in each row of `hidden` [N, T, C].

        `tokens` is [N, T], and `real` is bool [N, T], False at padding. `shape` is not used.
        """
        return self.classifier(self.dropout(self._pooled(hidden, tokens, real)))

    def _task_losses(self, scores: Tensor, labels: Tensor, real: Tensor) -> list[Tensor]:
        """Return [loss], a mean, for the logits `scores` [N, L], with the loss that `config.problem` names.

        It is cross-entropy (labels [N]), squared error or binary cross-entropy (labels [N, L]). `real` is not used.
        """
        return [self._problem_loss(scores, labels)]


class GPTForSimilarity(TaskHead):
    """GPT that compares two texts, read in both orders.

    logits = classifier(dropout(h₁ + h₂)), h₁ and h₂ the last hidden state of one token of each order. Exchanging the
    two orders changes nothing but rounding.

    Args:
        config: Sizes and options.

    Shape:
        tokens [B, 2, T] int64 → loss a scalar, logits [B, L]. `tokens[:, 0]` holds the two texts in one order,
        `tokens[:, 1]` in the other. `lengths` is [B, 2], and `key_mask` is [B, 2, T].
        `GPTForSequenceClassification` states the labels.

    Raises:
        ValueError: `GPTForSequenceClassification` would raise it, or tokens are not [B, 2, T].

    Example:
        ```python
        import torch
        import gpt_fast

        model = gpt_fast.GPTForSimilarity(gpt_fast.GPTConfig(100, 64, 4, 2, 32, num_labels=2))
        print(model(torch.randint(100, (3, 2, 10))).logits.shape)  # torch.Size([3, 2])
        ```

    Note:
        `GPTForSequenceClassification` states which token is read, the problems (classes or numbers), the joint loss,
        dtypes, precision and determinism.

        Source: Radford et al. (2018), section 3.3.
    """

    tokens_shape = "[B, 2, T]"

    def __init__(self, config: GPTConfig):
        super().__init__(config, config.num_labels)

    def _reads(self, shape: torch.Size) -> bool:
        """Return True for tokens [B, 2, T]."""
        return len(shape) == 3 and shape[1] == 2

    def _scores(self, hidden: Tensor, tokens: Tensor, real: Tensor, shape: torch.Size) -> Tensor:
        """Return logits [B, L] from the sum of the two hidden states that are read, one for each order of the texts.

        `hidden` is [2 B, T, C], `tokens` is [2 B, T], and `real` is bool [2 B, T], False at padding. `shape` is
        [B, 2, T].
        """
        pooled = self._pooled(hidden, tokens, real)
        return self.classifier(self.dropout(pooled.view(shape[0], 2, -1).sum(1)))

    def _task_losses(self, scores: Tensor, labels: Tensor, real: Tensor) -> list[Tensor]:
        """Return [loss], a mean, for the logits `scores` [B, L], with the loss that `config.problem` names.

        It is cross-entropy (labels [B]), squared error or binary cross-entropy (labels [B, L]). `real` is not used.
        """
        return [self._problem_loss(scores, labels)]


class GPTForMultipleChoice(TaskHead):
    """GPT that chooses one of K answers.

    p = softmax over the answers of classifier(dropout(h_k)), h_k the last hidden state of one token of the sequence
    that ends in answer k. The loss is the cross-entropy, plus λ times the language-model loss on all sequences.

    Args:
        config: Sizes and options.

    Shape:
        tokens [B, K, T] int64, labels [B] int64 in [0, K) → loss a scalar, logits [B, K]. `lengths` is [B, K], and
        `key_mask` is [B, K, T].

    Raises:
        ValueError: `GPTForSequenceClassification` would raise it, or tokens are not [B, K, T].

    Example:
        ```python
        import torch
        import gpt_fast

        model = gpt_fast.GPTForMultipleChoice(gpt_fast.GPTConfig(100, 64, 4, 2, 32))
        print(model(torch.randint(100, (2, 4, 10))).logits.shape)  # torch.Size([2, 4])
        ```

    Note:
        `GPTForSequenceClassification` states which token is read, dtypes, precision and determinism.

        Source: Radford et al. (2018), section 3.3.
    """

    tokens_shape = "[B, K, T]"
    has_classes = False

    def __init__(self, config: GPTConfig):
        super().__init__(config, 1)

    def _reads(self, shape: torch.Size) -> bool:
        """Return True for tokens [B, K, T], K answers each."""
        return len(shape) == 3

    def _scores(self, hidden: Tensor, tokens: Tensor, real: Tensor, shape: torch.Size) -> Tensor:
        """Return logits [B, K], one for each answer.

        `hidden` is [B K, T, C], `tokens` is [B K, T], and `real` is bool [B K, T], False at padding. `shape` is
        [B, K, T].
        """
        return self.classifier(self.dropout(self._pooled(hidden, tokens, real))).view(shape[:2])

    def _task_losses(self, scores: Tensor, labels: Tensor, real: Tensor) -> list[Tensor]:
        """Return [mean cross-entropy] of the logits `scores` [B, K] and labels [B], int64, the right answers' numbers.

        `real` is not used. Raise `ValueError` for labels of another shape or dtype, or out of range.
        """
        return [self._class_loss(scores, labels)]


class GPTForTokenClassification(TaskHead):
    """GPT that predicts a class for each token, as in tagging.

    logits_t = classifier(dropout(h_t)), h_t the token's last hidden state. The loss is the mean cross-entropy over the
    tokens that count, or 0 if there are none. With `config.lm_weight` λ > 0, λ times the language-model loss is added.

    Args:
        config: Sizes and options.

    Shape:
        tokens [B, T] int64, labels [B, T] int64 → loss a scalar, logits [B, T, L]. A label of -100 does not count, nor
        does padding.

    Raises:
        ValueError: Labels have other shapes or dtypes or are out of range, or the problem is not "classification".

    Example:
        ```python
        import torch
        import gpt_fast

        model = gpt_fast.GPTForTokenClassification(gpt_fast.GPTConfig(100, 64, 4, 2, 32, num_labels=5))
        print(model(torch.randint(100, (2, 10))).logits.shape)  # torch.Size([2, 10, 5])
        ```

    Note:
        A token sees only tokens before it, so label a word at its last token.

        The docstrings of the ops state dtypes, precision and determinism. The loss is float32.

        Source: transformers' `GPT2ForTokenClassification`.
    """

    def __init__(self, config: GPTConfig):
        if config.problem != "classification":
            raise ValueError(f'GPTForTokenClassification: problem is {config.problem!r}; expected "classification"')
        super().__init__(config, config.num_labels)

    def _scores(self, hidden: Tensor, tokens: Tensor, real: Tensor, shape: torch.Size) -> Tensor:
        """Return logits [B, T, L], one for each class of each token, from hidden states [B, T, C].

        The other arguments are not used.
        """
        return self.classifier(self.dropout(hidden))

    def _task_losses(self, scores: Tensor, labels: Tensor, real: Tensor) -> list[Tensor]:
        """Return [mean cross-entropy] of the logits `scores` over real tokens whose label is not -100, [0] without any.

        Logits are [B, T, L], and labels are [B, T]. The mean is weighted if `class_weights` are set. `real` is bool
        [B, T], False at padding. Raise `ValueError` for labels of another shape or dtype, or out of range.
        """
        self._check_labels(labels, tuple(real.shape))
        labels = labels.masked_fill(~real, IGNORE)
        return [self._labelled_loss(scores.flatten(0, 1), labels.flatten())]

    def _task_counts(self, labels: Tensor, real: Tensor) -> list[Tensor]:
        """Return [number of labels] without -100 and padding or, if classes are weighted, [sum of their weights].

        Labels are [B, T]. `real` is bool [B, T], False at padding.
        """
        return [self._weight_of(labels.masked_fill(~real, IGNORE))]


class GPTForQuestionAnswering(TaskHead):
    """GPT that finds where in a text the answer stands.

    p(start) and p(end) are softmaxes over the tokens of the two scores classifier(dropout(h_t)), h_t the token's last
    hidden state. The loss is the mean of two cross-entropies, each over the rows that have a label, or 0 if there are
    none. With `config.lm_weight` λ > 0, λ times the language-model loss is added.

    Args:
        config: Sizes and options.

    Shape:
        tokens [B, T] int64, labels [B, 2] int64 → loss a scalar, logits [B, 2, T]. Labels are the positions of the
        answer's first and last token, or -100 where it is not among these tokens (windows of a longer text). Logits are
        -inf at padding, where no answer stands.

    Raises:
        ValueError: Labels have other shapes or dtypes, are out of range or at padding, or a row has no real token.

    Example:
        ```python
        import torch
        import gpt_fast

        model = gpt_fast.GPTForQuestionAnswering(gpt_fast.GPTConfig(100, 64, 4, 2, 32))
        loss, logits = model(torch.randint(100, (2, 10)), labels=torch.tensor([[3, 5], [-100, -100]]))
        print(logits.shape)  # torch.Size([2, 2, 10])
        ```

    Note:
        The docstrings of the ops state dtypes, precision and determinism. The loss is float32.

        Source: transformers' `GPT2ForQuestionAnswering`, which lets answers begin in padding.
    """

    has_classes = False

    def __init__(self, config: GPTConfig):
        super().__init__(config, 2)

    def _scores(self, hidden: Tensor, tokens: Tensor, real: Tensor, shape: torch.Size) -> Tensor:
        """Return logits [B, 2, T] of the answer's start and end, -inf at padding, from hidden states [B, T, C].

        `real` is bool [B, T], False at padding. `tokens` is [B, T], and `shape` is not used. Raise `ValueError` if a
        row has no real token, where values are checked.
        """
        self._check_rows(tokens, real, "a real token")
        return self.classifier(self.dropout(hidden)).transpose(1, 2).masked_fill(~real[:, None], -torch.inf)

    def _task_losses(self, scores: Tensor, labels: Tensor, real: Tensor) -> list[Tensor]:
        """Return [half of the starts' cross-entropy, half of the ends'] for the logits `scores` and the labels.

        Logits are [B, 2, T], and labels are [B, 2]. Each cross-entropy is a mean over the rows whose label is not -100,
        or 0 without any. `real` is bool [B, T], False at padding.

        Raises:
            ValueError: Labels have another shape or dtype, are out of range, or one is the position of padding.
        """
        self._check_labels(labels, (len(scores), 2))
        losses = [self._labelled_loss(scores[:, i], labels[:, i]) / 2 for i in (0, 1)]
        if ops.values_checked(labels) and not bool((real.gather(1, labels.clamp(min=0)) | (labels < 0)).all()):
            raise ValueError("GPTForQuestionAnswering: labels point at padding; expected tokens of the answer")
        return losses

    def _task_counts(self, labels: Tensor, real: Tensor) -> list[Tensor]:
        """Return [number of starts, number of ends] in labels [B, 2] that are not -100. `real` is not used."""
        return [(labels[:, i] != IGNORE).sum() for i in (0, 1)]


def real_tokens(tokens: Tensor, lengths: Tensor | None, key_mask: Tensor | None) -> Tensor:
    """Return bool [B, T], True where `tokens` [B, T] are real and False at padding.

    This is `key_mask`, or follows from `lengths` [B]. Without both, all tokens are real.
    """
    if key_mask is not None:
        return key_mask
    if lengths is not None:
        return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    return torch.ones_like(tokens, dtype=torch.bool)


def flat(
    tokens: Tensor, lengths: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return tokens [B, S, T], lengths [B, S] and key_mask [B, S, T] as [B S, T], [B S] and [B S, T].

    Lengths or a mask of None stay None.
    """
    return (
        tokens.flatten(0, 1),
        None if lengths is None else lengths.flatten(),
        None if key_mask is None else key_mask.flatten(0, 1),
    )
