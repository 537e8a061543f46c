"""Common part of the heads: a trunk, an output layer, saving and loading."""

import dataclasses
import os
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from typing_extensions import Self

from .. import model_folder
from ..config import GPTConfig
from ..model import Convertible, GPTModel, as_key_mask, check_config, init_weights, output_loss, why_not_as_configured
from ..ops import _checks


class HeadOutput(NamedTuple):
    """Result of a head's forward pass.

    Attributes:
        loss: Loss, a float32 scalar, or None without labels.
        logits: Logits, or None if they were not asked for.
    """

    loss: Tensor | None
    logits: Tensor | None


class Head(Convertible, nn.Module):
    """Base of the heads: the trunk, its configuration, saving, loading and a growing vocabulary.

    Args:
        config: Sizes and options.

    Raises:
        ValueError: `config` is no `GPTConfig`.
    """

    z_loss: float = 0.0  # in training the language model's loss has this times the squared log Z of its logits, too

    def __init__(self, config: GPTConfig):
        super().__init__()
        check_config(type(self).__name__, config)
        self.config = config
        self.trunk = GPTModel(config)
        self.register_load_state_dict_post_hook(_tie_again)

    def num_parameters(self) -> int:
        """Return the number of elements of all parameters. Tied parameters count once.

        Returns:
            The number.
        """
        return sum(parameter.numel() for parameter in self.parameters())

    def _build_output_layer(self) -> None:
        """Add `output_layer`, the projection to the vocabulary, with new random weights.

        With `config.tied` its weight is the token embedding's parameter. It has a bias only with `config.output_bias`.
        """
        config = self.config
        self.output_layer = nn.Linear(config.hidden_dim, config.num_tokens, bias=config.output_bias)
        init_weights(self.output_layer, config.init_std)
        if config.tied:
            self.output_layer.weight = self.trunk.token_emb.weight

    def is_tied(self) -> bool:
        """Return True if the output layer's weight is the token embedding's: one parameter, not two equal ones.

        Returns:
            True if they are one parameter. False for a head without an output layer.
        """
        weight = getattr(getattr(self, "output_layer", None), "weight", None)
        return weight is not None and weight is getattr(self.trunk.token_emb, "weight", None)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Return the head with `fn` applied to each tensor, by `nn.Module._apply(fn, recurse)`.

        If the output layer and the token embedding shared one weight, they share one afterwards, too.
        """
        tied = self.is_tied()
        super()._apply(fn, recurse)
        if tied:
            self.output_layer.weight = self.trunk.token_emb.weight
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        """Load the module's own entries as PyTorch does, and remember whether the output layer was tied before.

        PyTorch calls this method with its own arguments; the last of `rest` is its list of error messages. Loading with
        `assign=True` unties the output layer, and the hook `_tie_again` ties it again. This method also runs if a model
        that contains the head is loaded. If `assign=True` brings two different tensors for the one parameter, a message
        is added to the list, and `load_state_dict` raises it.
        """
        self._was_tied = self.is_tied()
        names = (f"{prefix}output_layer.weight", f"{prefix}trunk.token_emb.weight")
        output, table = (state_dict.get(name) for name in names)
        replaces = metadata.get("assign_to_params_buffers", False)
        both = output is not None and table is not None and output is not table
        if self._was_tied and replaces and both and not torch.equal(output, table):
            rest[-1].append(f"{names[0]} differs from {names[1]}, but the model has one parameter for both")
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)

    def loss_counts(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return how many predictions each term of the loss is the mean of.

        A head for language modelling has one term. A head for a labelled task has the task's term (two for question
        answering: starts and ends) and, with `config.lm_weight` > 0, the language model's term after it. The counts
        make gradient accumulation exact. Divide a batch into parts and weight each part's loss by its share of all
        counts (`loss_weights`). The gradients of the parts then sum to the gradient of the whole batch.

        Args:
            tokens: Token ids, in the shape that the head's forward pass takes.
            labels: Labels, in the shape that the head's forward pass takes.
            lengths: Number of real tokens of each row, for rows that are padded on the right.
            key_mask: True for a real token.
            attention_mask: `key_mask` as zeros and ones.
            cu_seqlens: Bounds of packed sequences. They do not change the counts.

        Returns:
            Counts [terms], float32. With weighted classes, a classifier's count is the sum of its labels' weights.

        Raises:
            ValueError: The head's forward pass would raise it for these tokens or labels.

        Example:
            ```python
            import torch
            import gpt_fast

            config = gpt_fast.GPTConfig(num_tokens=100, hidden_dim=64, num_heads=4, num_layers=2, seq_len=32)
            model, tokens = gpt_fast.GPTForCausalLM(config), torch.randint(100, (4, 10))
            parts = [{"tokens": part, "labels": part} for part in tokens.split(3)]
            counts = [model.loss_counts(**part) for part in parts]
            total = torch.stack(counts).sum(0)
            for part, count in zip(parts, counts, strict=True):
                model(**part, loss_weights=count / total).loss.backward()
            ```
        """
        name = type(self).__name__
        _checks.tensors(name, tokens=tokens, labels=labels)
        _checks.optional_tensors(name, lengths=lengths, key_mask=key_mask)
        key_mask = as_key_mask(name, tokens, key_mask, attention_mask)
        return torch.stack(self._loss_counts(tokens, labels, lengths, key_mask)).float()

    def _loss_counts(
        self, tokens: Tensor, labels: Tensor, lengths: Tensor | None, key_mask: Tensor | None
    ) -> list[Tensor]:
        """Return for each term of the loss the number of predictions that it is the mean of, as scalar tensors.

        Each head overrides this method; here it raises `NotImplementedError`. `tokens` and `labels` have the shapes
        that the head's forward pass takes. `lengths` and `key_mask` (True for a real token), each or None, tell
        padding.
        """
        raise NotImplementedError

    def _weighted(self, terms: list[Tensor], loss_weights: Tensor | None) -> Tensor:
        """Return the sum of the scalars `terms`, each times its weight in `loss_weights` [terms], or times 1 for None.

        Raises:
            ValueError: `loss_weights` is no tensor or has another shape.
        """
        if loss_weights is None:
            return torch.stack(terms).sum() if len(terms) > 1 else terms[0]
        _checks.tensors(type(self).__name__, loss_weights=loss_weights)
        if loss_weights.shape != (len(terms),):
            raise ValueError(
                f"gpt_fast.{type(self).__name__}: loss_weights has shape {list(loss_weights.shape)}; "
                f"expected [{len(terms)}], one for each term of the loss"
            )
        return (torch.stack(terms) * loss_weights).sum()

    def _language_model_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of the output layer's logits for hidden states [..., C] and labels [...].

        The result is a float32 scalar, 0 if no label counts. Labels are not shifted here, and a label of -100 does not
        count. In training the loss includes the z-loss, if `z_loss` is above 0.
        """
        return output_loss(self.output_layer, hidden, labels, self.z_loss if self.training else 0.0)

    def resize_embeddings(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens, or drop the last ones. Rows that stay keep their values.

        New rows are drawn from N(0, init_std²), and new output biases are 0.

        Args:
            num_tokens: New vocabulary size.

        Raises:
            ValueError: `num_tokens` is less than one, or less than a special token of the configuration needs.

        Example:
            ```python
            import gpt_fast

            config = gpt_fast.GPTConfig(num_tokens=100, hidden_dim=64, num_heads=4, num_layers=2, seq_len=32)
            model = gpt_fast.GPTForCausalLM(config)
            model.resize_embeddings(128)
            print(model.config.num_tokens)  # 128
            ```

        Note:
            The embedding and the output layer get new parameters. Create the optimiser afterwards.
        """
        config, tied = dataclasses.replace(self.config, num_tokens=num_tokens), self.is_tied()
        embedding = _resized(nn.Embedding, self.trunk.token_emb, (num_tokens, config.hidden_dim), config.init_std)
        self.trunk.token_emb = embedding
        if hasattr(self, "output_layer"):
            old = self.output_layer
            self.output_layer = _resized(
                nn.Linear, old, (config.hidden_dim, num_tokens), config.init_std, bias=old.bias is not None
            )
            if tied:
                self.output_layer.weight = embedding.weight
        self.config = self.trunk.config = config

    def draw_weights(self, names: Collection[str]) -> None:
        """Draw initial weights for each direct child module that owns one of the parameters in `names`.

        All weights of a linear child are drawn from N(0, init_std²), and its bias becomes 0. The trunk stays as it is.

        Args:
            names: Names of parameters in the state dict, such as "classifier.weight".
        """
        for child, module in self.named_children():
            if any(f"{child}.{name}" in names for name, _ in module.named_parameters()):
                init_weights(module, self.config.init_std)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `config.json` and `model.safetensors` into a folder, each whole or not at all.

        An output layer that is not the token embedding's parameter is written too, whatever the configuration says, and
        the folder's configuration then has tied=False.

        Args:
            directory: The folder, which is made if it does not exist.

        Raises:
            OSError: The folder cannot be written.
            TypeError: `directory` is no name of a folder.
            ValueError: `from_pretrained` could not make the model again. Its modules are others than its configuration
                says, it has adapters that are not merged, or its parameters are sharded over ranks.

        Example:
            ```python
            import tempfile
            import gpt_fast

            config = gpt_fast.GPTConfig(num_tokens=100, hidden_dim=64, num_heads=4, num_layers=2, seq_len=32)
            with tempfile.TemporaryDirectory() as folder:
                gpt_fast.GPTForCausalLM(config).save_pretrained(folder)
                model = gpt_fast.GPTForSequenceClassification.from_pretrained(folder, num_labels=3)
            print(model.config.num_labels)  # 3
            ```
        """
        reason = why_not_as_configured(self.trunk)
        if reason is not None:
            raise ValueError(f"gpt_fast.save_pretrained: {reason}; expected the model of its configuration")
        model_folder.save(self, model_folder.as_path("save_pretrained", directory))

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, **overrides: Any) -> Self:
        """Return the model saved in a folder, on the CPU, in PyTorch's default dtype and in training mode.

        From a folder that another head saved, the trunk is loaded, and the output layer if both heads have one. Layers
        that the folder lacks get new random weights, which is how fine-tuning starts.

        Args:
            directory: A folder that `save_pretrained` wrote.
            **overrides: Fields of `GPTConfig` that replace those in the folder.

        Returns:
            The model. Weights are read from safetensors alone.

        Raises:
            FileNotFoundError: A file is missing.
            TypeError: `directory` is no name of a folder.
            ValueError: A file is truncated, is not ours, or holds tensors of other names or shapes.
        """
        return model_folder.load(cls, model_folder.as_path("from_pretrained", directory), overrides)


def _tie_again(head: Any, keys: Any) -> None:
    """Tie the output layer of a `head` to the token embedding again if it was tied before a state dict was loaded.

    PyTorch calls this hook after loading. The incompatible `keys` are not used.
    """
    if vars(head).pop("_was_tied", False) and not head.is_tied():
        head.output_layer.weight = head.trunk.token_emb.weight


def _resized(kind: type, old: Any, sizes: tuple[int, int], std: float, **options: Any) -> Any:
    """Return a new layer of class `kind` for another vocabulary, with the rows of the layer `old` that it has room for.

    `kind` is `nn.Embedding` or `nn.Linear`, and `sizes` and `options` are its arguments. New rows are drawn from N(0,
    `std`²), and new biases are 0. Dtype, device and `requires_grad` are those of `old`.
    """
    new = kind(*sizes, **options, device=old.weight.device, dtype=old.weight.dtype)
    init_weights(new, std)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            before = getattr(old, name)
            rows = min(len(parameter), len(before))
            parameter[:rows] = before[:rows]
            parameter.requires_grad_(before.requires_grad)
    return new
