"""The trunk that every head shares, and the drop-in GPT."""

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from . import _plain, ops
from ._activations import ACTIVATIONS
from .config import IGNORE, GPTConfig
from .layers import MLP, Branch, LayerNorm, SelfAttention, TransformerDecoder, add_norm
from .ops import _checks, _library
from .reference import packed_positions

if TYPE_CHECKING:
    from .generation.cache import PromptPass, StepPass


class _Trunk(nn.Module):
    """Common part of `GPTModel` and the drop-in `GPT`: the layers, their initial weights and `hidden_states`."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        check_config(type(self).__name__, config)
        self.config = config
        self.checkpoint_activations = False  # True: backward computes each decoder again and stores its input alone
        C, T = config.hidden_dim, config.seq_len
        self.token_emb = nn.Embedding(config.num_tokens, C)
        self.pos_emb = nn.Parameter(torch.empty(1, T, C))
        self.dropout = nn.Dropout(config.embedding_dropout)
        decoders = [
            TransformerDecoder(
                C, config.num_heads, config.ff_dim, config.residual_dropout, pre_norm=config.pre_norm,
                activation=config.activation, attention_dropout=config.attention_dropout,
                ff_dropout=config.ff_dropout, bias=config.bias, layer_norm_eps=config.layer_norm_eps, site=1 + 4 * i,
            )
            for i in range(config.num_layers)
        ]  # fmt: skip
        self.decoders = nn.ModuleList(decoders)
        self.final_norm = LayerNorm(C, eps=config.layer_norm_eps, bias=config.bias) if config.pre_norm else None
        self.apply(lambda module: init_weights(module, config.init_std))
        nn.init.normal_(self.pos_emb, std=config.init_std)
        if config.scaled_init:
            for decoder in decoders:
                for proj in (decoder.multihead_attn.out_proj.weight, decoder.ff.get_parameter("3.weight")):
                    nn.init.normal_(proj, std=config.init_std / (2 * config.num_layers) ** 0.5)

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        causal: bool = True,
        lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seed: Tensor | None = None,
        cache: "StepPass | PromptPass | None" = None,
        _product: bool = False,
    ) -> Tensor:
        """Return the hidden states of tokens.

        h = norm(decoders(dropout(token_emb[tokens] + pos_emb))), with the last norm if pre-norm.

        This library alone passes `_product`. True means that only a matrix product reads h. Under autocast, the last
        norm may then return h in the dtype of that product.

        Args:
            tokens: Token ids [B, T], int64.
            causal: Let a token attend only to tokens up to its own position. The masks below apply as well.
            lengths: Number of real tokens [B] of each row, for rows that are padded on the right.
            key_mask: Bool [B, T], True for a real token. Positions then count the real tokens, so a left-padded row
                has the same hidden states as without padding.
            cu_seqlens: Bounds [n + 1] of n sequences that are packed into one row [1, T]. A token attends to its own
                sequence only, and positions count within each sequence.
            seed: Seed of the dropout of this call, int64, one element. Without one each call in training draws its own.
            cache: `PromptPass` or `StepPass`, which this library's generation makes to continue a text. It holds the
                key-value cache of the text before the tokens, computes attention, knows positions and padding, and
                writes the tokens' keys and values into the cache. Masks have no effect then, and dropout is off, except
                in a dropout module with hooks or another class.

        Returns:
            h [B, T, C].

        Raises:
            ValueError: Tokens are not [B, T], are longer than seq_len (packed: each sequence), or lie outside the
                vocabulary, or more than one of lengths, key_mask and cu_seqlens is given. Values inside tensors (ids,
                lengths, bounds) are checked on the CPU only, unless `gpt_fast.check_values()` was called before.
        """
        config = self.config
        name = type(self).__name__
        if not isinstance(tokens, Tensor) or tokens.dim() != 2:
            raise ValueError(f"gpt_fast.{name}: tokens is {_checks.described(tokens)}; expected int64 [B, T]")
        _checks.optional_tensors(name, lengths=lengths, key_mask=key_mask, cu_seqlens=cu_seqlens, seed=seed)
        longest = tokens.shape[1]
        if cu_seqlens is not None:
            _checks.dimensions(name, "cu_seqlens", cu_seqlens, "[n + 1]")
            longest = _longest(cu_seqlens) if ops.values_checked(cu_seqlens) else 0
        if longest > config.seq_len:
            raise ValueError(
                f"gpt_fast.{name}: tokens has {longest} in a row; expected at most seq_len = {config.seq_len}"
            )
        if sum(given is not None for given in (lengths, key_mask, cu_seqlens)) > 1:
            raise ValueError(
                f"gpt_fast.{name}: got more than one of lengths, key_mask and cu_seqlens; expected one of them"
            )
        positions = None
        if cu_seqlens is not None:
            positions = packed_positions(cu_seqlens, tokens.shape[1])[1][None]  # [1, T]
        if key_mask is not None:
            if key_mask.shape != tokens.shape or key_mask.dtype != torch.bool:
                raise ValueError(
                    f"gpt_fast.{name}: key_mask is {_checks.described(key_mask)}; expected bool {list(tokens.shape)}"
                )
            positions = (key_mask.long().cumsum(1) - 1).clamp(min=0)
        drops = cache is None  # with a cache a text is continued, whatever the modules' flags are
        if seed is None and drops and self._is_dropping():
            seed = ops.new_seed(tokens.device)
        if cache is not None:
            positions = cache.positions
        x = self._embed(tokens, positions, seed, drops)
        options: dict[str, Any] = {
            "causal": causal, "lengths": lengths, "key_mask": key_mask, "cu_seqlens": cu_seqlens, "seed": seed,
        }  # fmt: skip
        branch: Branch | None = None
        for i, decoder in enumerate(self.decoders):
            options["attend"] = None if cache is None else partial(cache.attend, i)
            options["site"] = 1 + 4 * i  # by position: a copy of a block has masks of its own
            if self.final_norm is None:
                x = self._decode(decoder, x, **options)
            elif _plain.is_plain(decoder, TransformerDecoder):
                x, branch = self._decode(decoder, x, **options, branch=branch, carry=True)
            else:  # its hooks see hidden states, as those of any block would
                x = x if branch is None else _plain.add(branch.hidden, x, branch.p, seed, branch.site)
                x, branch = self._decode(decoder, x, **options), None
        if self.final_norm is None:
            return x
        if branch is None:
            return _plain.norm(self.final_norm, x, LayerNorm, _product)
        return add_norm(branch, x, self.final_norm, seed, _product)[0]

    def _embed(self, tokens: Tensor, positions: Tensor | None, seed: Tensor | None, drops: bool) -> Tensor:
        """Return dropout(token_emb(tokens) + pos_emb) [B, T, C] for tokens [B, T].

        `positions` [B or 1, T] holds the position of each token, or is None to count from 0. `seed` is the dropout seed
        of the pass, or None. With `drops=False` an `nn.Dropout` without hooks drops nothing. A `token_emb` or `dropout`
        with hooks or of another class is called.
        """
        plain_dropout = _plain.is_plain(self.dropout, nn.Dropout) and self.dropout.p < 1
        dropout_p = self.dropout.p if plain_dropout and drops and self.dropout.training else 0.0
        table = self.pos_emb[0]
        if _plain.why_no_table(self.token_emb) is None:
            x = ops.embedding(tokens, self.token_emb.weight, table, positions, dropout_p, seed, site=0)
            return x if plain_dropout else self.dropout(x)
        at = table[: tokens.shape[1]] if positions is None else table[positions]
        return self.dropout(self.token_emb(tokens) + at)

    def _is_dropping(self) -> bool:
        """Return True if a forward pass needs a dropout seed: some dropout with p > 0 is in training mode.

        Blocks that are no `TransformerDecoder` do not count, because they use no seed of this library.
        """
        if self.dropout.training and getattr(self.dropout, "p", 0) > 0:
            return True
        return any(decoder.is_dropping() for decoder in self.decoders if isinstance(decoder, TransformerDecoder))

    def _decode(self, decoder: nn.Module, x: Tensor, **options: Any) -> Any:
        """Return decoder(x, **options): the hidden states, or (hidden states, `Branch`) with carry=True in `options`.

        If `checkpoint_activations` is True and gradients are on, only the decoder's input is stored, and backward runs
        the decoder again.
        """
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return decoder(x, **options)
        # The library's dropout follows from `seed`. What is called may draw from torch's generator, as LoRA's dropout.
        draws = why_not_plain(dict(decoder.named_modules())) is not None
        return checkpoint(decoder, x, use_reentrant=False, preserve_rng_state=draws, **options)

    def num_parameters(self) -> int:
        """Return the number of elements of all parameters. Tied parameters count once.

        Returns:
            The number.
        """
        return sum(parameter.numel() for parameter in self.parameters())


def check_config(kind: str, config: object) -> None:
    """Raise `ValueError` unless `config` is a `GPTConfig`. `kind` is the name of the model's class for the message."""
    if not isinstance(config, GPTConfig):
        raise ValueError(f"gpt_fast.{kind}: config is of type {type(config).__name__}; expected a GPTConfig")


class Convertible:
    """Mixin with `from_hf` and `to_hf`, for the trunk and every head. A call imports the integration."""

    @classmethod
    def from_hf(cls, model: Any, **overrides: Any) -> Self:
        """Return a model with the weights and sizes of a GPT-2 or GPT-1 model of transformers, or of a folder of one.

        The trunk is copied bit for bit, and so are the output layer and the classifier if both models have one. The
        output layer is tied if its weight is the token embedding's parameter, whatever the configuration says.
        The class may have another head than `model`, for fine-tuning. New layers then get random weights, and layers
        without a counterpart are left out, such as the `lm_head` for a classifier. `to_hf` gives the weights back.

        Nothing else is left out. Every module has to be what the configuration says, without hooks, adapters,
        parametrisations or pruning. A folder has to hold every weight of its model and no other. Finally both models
        run on a few tokens in evaluation mode and have to agree, unless an override changes what the model computes.

        Args:
            model: A model of transformers, the path of a folder, or a name on the hub such as "gpt2", which
                transformers loads through its cache. `gpt_fast.accelerate` may have been called on the model. A folder
                holds safetensors, or pytorch_model.bin, which is read with torch.load(weights_only=True).
            **overrides: Fields of `GPTConfig`.

        Returns:
            The new model.

        Raises:
            TypeError: `model` is of another class, such as a subclass with code of its own.
            ValueError: The model has something that this library's class cannot hold. The message names it.
            OSError: The folder has no configuration or no weights, or the hub is out of reach and the cache lacks the
                model.
            RuntimeError: transformers is not installed.

        Example:
            ```python
            import gpt_fast
            from transformers import GPT2Config, GPT2LMHeadModel

            theirs = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=32, n_embd=64, n_layer=2, n_head=4))
            ours = gpt_fast.GPTForCausalLM.from_hf(theirs)
            print(ours.config.hidden_dim)  # 64
            ```
        """
        from .integrations.huggingface import convert

        return convert.from_hf(cls, model, overrides)

    def to_hf(self) -> Any:
        """Return transformers' model with these weights: GPT-2's class for this head if pre-norm, GPT-1's if post-norm.

        An output layer whose weight is not the token embedding's parameter is kept, with tie_word_embeddings=False.
        Finally both models run on a few tokens in evaluation mode and have to agree.

        Returns:
            A model of transformers.

        Raises:
            ValueError: transformers has no such model, as for an output bias, or a module is not what the configuration
                says (replaced, with hooks, a further decoder). The message names it.
            RuntimeError: transformers is not installed.

        Example:
            ```python
            import gpt_fast

            config = gpt_fast.GPTConfig(num_tokens=100, hidden_dim=64, num_heads=4, num_layers=2, seq_len=32)
            print(type(gpt_fast.GPTForCausalLM(config).to_hf()).__name__)  # GPT2LMHeadModel
            ```
        """
        from .integrations.huggingface import convert

        return convert.to_hf(self)


class Generating:
    """Mixin with `generate`, for the models that continue a text."""

    def generate(self, tokens: Tensor, *, max_new_tokens: int, **options: Any) -> Any:
        """Return `gpt_fast.generate(self, tokens, max_new_tokens=..., **options)`.

        Args:
            tokens: Prompts [B, T], int64.
            max_new_tokens: Number of new tokens of each row.
            **options: Further arguments of `gpt_fast.generate`.

        Returns:
            Tokens [B, T + max_new_tokens], the prompts with their new tokens, or a `GenerateOutput` (tokens, scores)
            with `return_scores=True`.
        """
        from .generation import generate

        return generate(self, tokens, max_new_tokens=max_new_tokens, **options)


class GPTModel(Convertible, _Trunk):
    """The trunk of every head: embeddings, decoders and, if pre-norm, a last LayerNorm.

    h = norm(decoders(dropout(token_emb[tokens] + pos_emb))).

    Args:
        config: Sizes and options.

    Shape:
        tokens [B, T] int64 → h [B, T, C].

    Raises:
        ValueError: `config` is no `GPTConfig`.

    Example:
        ```python
        import torch
        import gpt_fast

        config = gpt_fast.GPTConfig(num_tokens=100, hidden_dim=64, num_heads=4, num_layers=2, seq_len=32)
        print(gpt_fast.GPTModel(config)(torch.randint(100, (2, 10))).shape)  # torch.Size([2, 10, 64])
        ```

    Note:
        In training one seed is drawn for a pass. Dropout sites are 0 for the embeddings and 1 + 4 i to 4 + 4 i for
        decoder i.

        The docstrings of the ops state dtypes, precision and determinism.

        Source: Radford et al. (2018, 2019).
    """

    def forward(
        self,
        tokens: Tensor,
        *,
        causal: bool = True,
        lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seed: Tensor | None = None,
        cache: "StepPass | PromptPass | None" = None,
        _product: bool = False,  # the only reader is a product, as in `add_norm`
    ) -> Tensor:
        """Return the hidden states of tokens, as `hidden_states` computes them.

        This library alone passes `_product`. True means that only a matrix product reads h. Under autocast, the last
        norm may then return h in the dtype of that product.

        Args:
            tokens: Token ids [B, T], int64.
            causal: Let a token attend only to tokens up to its own position.
            lengths: Number of real tokens [B] of each row, for rows that are padded on the right.
            key_mask: Bool [B, T], True for a real token. Positions then count the real tokens.
            attention_mask: `key_mask` as zeros and ones, as transformers' tokenizers return it.
            cu_seqlens: Bounds [n + 1] of sequences that are packed into one row [1, T].
            seed: Seed of the dropout of this call, int64, one element. Without one each call in training draws its own.
            cache: `PromptPass` or `StepPass`, which this library's generation makes to continue a text. It holds the
                key-value cache of the text before the tokens, computes attention, and writes the tokens' keys and
                values into the cache. Masks have no effect then, and dropout is off.

        Returns:
            h [B, T, C].

        Raises:
            ValueError: `hidden_states` would raise it, both masks are given, or `attention_mask` holds something other
                than zeros and ones.
        """
        key_mask = as_key_mask(type(self).__name__, tokens, key_mask, attention_mask)
        return self.hidden_states(
            tokens, causal=causal, lengths=lengths, key_mask=key_mask, cu_seqlens=cu_seqlens, seed=seed, cache=cache,
            _product=_product,
        )  # fmt: skip


class GPT(Generating, _Trunk):
    """The lecture notes' GPT, line for line, which returns probabilities.

    p = softmax(output_layer(decoders(dropout(token_emb + pos_emb)))), with causal post-norm decoders, ReLU and ff_dim =
    4 hidden_dim. Constructor and state dict are those of the lecture notes' module. Weights are drawn from N(0, 0.02).

    Args:
        num_tokens: Vocabulary size V.
        hidden_dim: Width C.
        num_heads: Number of heads.
        num_layers: Number of decoders.
        seq_len: Number of positions.
        dropout: Dropout probability of embeddings, residual branches and hidden activations.

    Shape:
        tokens [B, T] int64 → p [B, T, V].

    Raises:
        ValueError: The sizes make no model, or tokens are out of range or longer than seq_len.

    Example:
        ```python
        import torch
        import gpt_fast

        model = gpt_fast.GPT(100, 64, 4, 2, 32, 0.1)
        tokens = torch.randint(100, (2, 10))
        print(model(tokens).shape)  # torch.Size([2, 10, 100])
        model.loss(tokens).backward()
        ```

    Note:
        Train with `loss(tokens)`, which stores neither probabilities nor logits. A cross-entropy of the probabilities
        would apply the softmax twice.

        The docstrings of the ops state dtypes, precision and determinism.

        Source: Radford et al. (2018).
    """

    def __init__(self, num_tokens: int, hidden_dim: int, num_heads: int, num_layers: int, seq_len: int, dropout: float):
        _checks.probability("GPT", "dropout", dropout)
        super().__init__(
            GPTConfig.preset(
                "notes", dropout=dropout, num_tokens=num_tokens, hidden_dim=hidden_dim, num_heads=num_heads,
                num_layers=num_layers, seq_len=seq_len,
            )
        )  # fmt: skip
        self.output_layer = nn.Linear(hidden_dim, num_tokens)
        init_weights(self.output_layer, self.config.init_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the probabilities of the next token at every position.

        Args:
            tokens: Token ids [B, T], int64.

        Returns:
            p [B, T, V]; p[:, t] is for the token after position t, given the tokens up to t.

        Raises:
            ValueError: Tokens are not [B, T], are longer than seq_len, or lie outside the vocabulary.
        """
        return torch.softmax(self.output_layer(self.hidden_states(tokens)), dim=-1)

    def loss(self, tokens: Tensor, labels: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        """Return the mean of -log p(w_t | w_<t) over the tokens but the first of each row.

        Args:
            tokens: Token ids [B, T], int64.
            labels: Labels [B, T], int64, unshifted, as they are shifted inside. The default is the tokens. A label of
                -100 does not count.
            lengths: Number of real tokens [B] of each row. Labels after them do not count.

        Returns:
            The loss, a float32 scalar (float64 for a float64 model). It is 0 if no label counts.

        Raises:
            ValueError: Tokens or labels have other shapes or are out of range.

        Example:
            ```python
            import torch
            import gpt_fast

            loss = gpt_fast.GPT(100, 64, 4, 2, 32, 0.1).loss(torch.randint(100, (2, 10)))
            print(loss.shape)  # torch.Size([])
            ```
        """
        hidden = self.hidden_states(tokens, lengths=lengths)
        _checks.optional_tensors("GPT", labels=labels)
        labels = shift_labels(tokens if labels is None else labels, lengths=lengths)
        return output_loss(self.output_layer, hidden, labels)


# The classes of a plain model's modules, subclasses before their bases.
_KINDS = (
    GPT, GPTModel, nn.ModuleList, TransformerDecoder, SelfAttention, MLP, LayerNorm, nn.Linear, nn.Embedding,
    nn.Dropout, *{row.module for row in ACTIVATIONS.values()},
)  # fmt: skip


def why_not_plain(modules: Mapping[str, nn.Module]) -> str | None:
    """Return why one of these modules, by name, is not plain, such as "decoders.0.ff.0 has hooks", or None if all are.

    A plain module has exactly one of the classes in `_KINDS` and no hooks. Nothing but `_plain.attach` has replaced
    `forward` on the instance, and its weight has no tensor class from outside PyTorch, such as a quantised one.
    `_KINDS` are this library's GPT, GPTModel and layers, ModuleList, Linear, Embedding, Dropout and the activations.
    The first module that is not plain is named; "the model" stands for the empty name.
    """
    for name, module in modules.items():
        kind = _kind_of(module)
        reason = "is of another class" if kind is None else _plain.why_not_plain(module, kind)
        if reason is not None:
            return f"{name or 'the model'} {reason}"
    return None


def why_not_as_configured(trunk: "_Trunk") -> str | None:
    """Return the first difference found between a trunk's modules and its configuration, or None.

    An example is "decoders.0.layer_norm1 has eps 5.0, not layer_norm_eps = 1e-05". The number of blocks, their numbers
    of heads, pre_norm and feed-forward modules, the eps of norms, and the kind of `token_emb` are compared. Dropout
    probabilities and names of parameters are not. The C++ decode step and saved folders take all this from the
    configuration, so a difference would be lost there.
    """
    config = trunk.config
    decoders: list[Any] = list(trunk.decoders)
    if len(decoders) != config.num_layers:
        return f"decoders has {len(decoders)} blocks, not num_layers = {config.num_layers}"
    if len(set(map(id, decoders))) != len(decoders):
        return "decoders has a block twice"
    norms: list[tuple[str, Any]] = [("final_norm", trunk.final_norm)] if config.pre_norm else []
    row = ACTIVATIONS[config.activation]
    for i, decoder in enumerate(decoders):
        norms += [(f"decoders.{i}.{name}", getattr(decoder, name, None)) for name in ("layer_norm1", "layer_norm2")]
        heads = getattr(getattr(decoder, "multihead_attn", None), "num_heads", None)
        if heads != config.num_heads:
            return f"decoders.{i}.multihead_attn has {heads} heads, not num_heads = {config.num_heads}"
        if getattr(decoder, "pre_norm", None) != config.pre_norm:
            return f"decoders.{i} has pre_norm {getattr(decoder, 'pre_norm', None)}, not {config.pre_norm}"
        children: list[Any] = list(decoder.ff.children())
        if len(children) != 4 or not isinstance(children[1], row.module) or not row.is_computed_by(children[1]):
            return f"decoders.{i}.ff is not linear, {config.activation}, dropout, linear"
        if getattr(children[0], "out_features", None) != config.ff_dim:
            return (
                f"decoders.{i}.ff has {getattr(children[0], 'out_features', None)} hidden, not ff_dim = {config.ff_dim}"
            )
    for name, norm in norms:
        if getattr(norm, "eps", None) != config.layer_norm_eps:
            return f"{name} has eps {getattr(norm, 'eps', None)}, not layer_norm_eps = {config.layer_norm_eps}"
    reason = _plain.why_no_table(trunk.token_emb)
    return None if reason is None else f"token_emb {reason}"


def _kind_of(module: nn.Module) -> type[nn.Module] | None:
    """Return the first class in `_KINDS` that `module` is an instance of, or None."""
    return next((kind for kind in _KINDS if isinstance(module, kind)), None)


class StaysPlain:
    """Callable that tells whether the modules of a plain model are still there, plain and as configured.

    A plain model has modules of the classes in `_KINDS`, without hooks; see `why_not_plain`. A call takes a microsecond
    for each module.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        modules = list(modules)
        self._options = [(vars(module), name, vars(module)[name]) for module in modules for name in _OPTIONS
                         if name in vars(module)]  # fmt: skip
        self._kinds = [(module, _kind_of(module)) for module in modules]
        self._children = [(module._modules, dict(module._modules)) for module, _ in self._kinds if module._modules]

    def __call__(self) -> bool:
        """Return True if the modules given to the constructor are plain and as they were then.

        No child of a module with children was replaced, added or removed. No module got hooks, a forward or a weight of
        its own. No attribute in `_OPTIONS` has changed, such as `eps`, `num_heads` or `padding_idx`.
        """
        return (
            all(now == before for now, before in self._children)
            and all(_plain.is_plain(module, kind) for module, kind in self._kinds)
            and all(own.get(name) == before for own, name, before in self._options)
        )


# Attributes of modules that the C++ decode step takes from the configuration.
_OPTIONS = ("eps", "num_heads", "pre_norm", "approximate", "max_norm", "padding_idx", "scale_grad_by_freq", "sparse")


def output_loss(output_layer: Any, hidden: Tensor, labels: Tensor, z_loss: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of output_layer(hidden) [..., V] and labels [...], a float32 scalar.

    `hidden` is [..., C], and labels are not shifted. A label of -100 does not count; the loss is 0 if none counts. With
    `z_loss` the mean of z_loss · (log Z)² over the labels that count is added, Z = Σ exp(logits), which keeps logits
    from drifting. An `nn.Linear` without hooks is fused with the loss, and no logits are stored; any other output layer
    is called. Source of the z-loss: Chowdhery et al. (2022), arXiv:2204.02311, section 5.
    """
    is_plain = _plain.is_plain(output_layer, nn.Linear)
    if is_plain and not z_loss:
        return ops.linear_cross_entropy(hidden, output_layer.weight, labels, output_layer.bias)
    known = labels != IGNORE
    log_z: Tensor | None = None
    if is_plain:
        losses, log_z = _losses_and_log_z(output_layer, hidden, labels, known)
    else:
        logits = output_layer(hidden).float()
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none")
        if z_loss:
            log_z = logits.logsumexp(-1).masked_fill(~known, 0.0)
    total = losses.sum()
    if log_z is not None:
        total = total + z_loss * log_z.square().sum()
    return total / known.sum().clamp(min=1)


def _losses_and_log_z(layer: Any, hidden: Tensor, labels: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return (losses, log_z), both shaped like `labels`: cross-entropy and log Z, Z = Σ exp(logits), at each position.

    `layer` is the output layer, and `hidden` [..., C] holds its inputs for labels [...]. `known` is bool, True where
    the label counts; both results are 0 elsewhere. No logits are stored, because log Z = loss + logit[label].
    """
    losses = ops.linear_cross_entropy(hidden, layer.weight, labels, layer.bias, reduction="none")
    targets = labels.masked_fill(~known, 0)
    x, weight = _library.autocast(hidden, layer.weight)  # the operands of the product that the loss is made of
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.masked_fill(~known[..., None], 0)  # what is not finite there would reach the weight's gradient
    logits = (x.to(wide) * F.embedding(targets, weight).to(wide)).sum(-1)
    if layer.bias is not None:
        logits = logits + F.embedding(targets, layer.bias[:, None])[..., 0].to(wide)
    return losses, (losses + logits).masked_fill(~known, 0.0)


def as_key_mask(function: str, tokens: Tensor, key_mask: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """Return the key mask of a call: `key_mask` as it is, or `attention_mask` (1 real token, 0 padding) as bool.

    `tokens` are [B, T], and `function` is the name of the caller for messages.

    Returns:
        Bool [B, T], True for a real token. None if no mask is given, or for an `attention_mask` on the CPU without
        padding, unless a graph is being recorded.

    Raises:
        ValueError: Both are given, or `attention_mask` is floating, has another shape than `tokens`, or holds values
            besides 0 and 1. Values are checked on the CPU only, unless `gpt_fast.check_values()` was called before.
    """
    if attention_mask is None:
        return key_mask
    if key_mask is not None:
        raise ValueError(f"gpt_fast.{function}: got both key_mask and attention_mask; expected one of them")
    _checks.tensors(function, attention_mask=attention_mask)
    if attention_mask.dtype.is_floating_point or attention_mask.dtype.is_complex:
        raise ValueError(
            f"gpt_fast.{function}: attention_mask has dtype {str(attention_mask.dtype).removeprefix('torch.')}; "
            "expected bool or integers, 1 for a real token and 0 for padding"
        )
    if isinstance(tokens, Tensor) and attention_mask.shape != tokens.shape:
        raise ValueError(
            f"gpt_fast.{function}: attention_mask has shape {list(attention_mask.shape)}; "
            f"expected {list(tokens.shape)} as tokens"
        )
    mask = attention_mask.bool()
    if ops.values_checked(attention_mask) and not torch.equal(mask.to(attention_mask.dtype), attention_mask):
        raise ValueError(
            f"gpt_fast.{function}: attention_mask holds values other than 0 and 1; "
            "expected 1 for a real token and 0 for padding"
        )
    return None if _plain.is_reading_values_cheap(mask) and bool(mask.all()) else mask


def shift_labels(labels: Tensor, *, lengths: Tensor | None = None, key_mask: Tensor | None = None) -> Tensor:
    """Return labels [B, T] shifted to the left: each position gets the label of the next one, and the last one -100.

    A position also gets -100 if it or the next one is padding. `lengths` [B] gives the number of real tokens of each
    row, or `key_mask` [B, T] is True for a real token. `lengths` wins if both are given.
    """
    if lengths is not None:
        key_mask = torch.arange(labels.shape[1], device=labels.device) < lengths[:, None]
    shifted = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]  # padded first: an exported T - 1 columns would exclude T = 2
    if key_mask is None:
        return shifted
    return shifted.masked_fill(~(key_mask & F.pad(key_mask, (0, 1))[:, 1:]), IGNORE)


def _longest(cu_seqlens: Tensor) -> int:
    """Return the length of the longest packed sequence, or 0 if there is none.

    Sequence i has the tokens `cu_seqlens[i]` to `cu_seqlens[i + 1] - 1`, for `cu_seqlens` [n + 1]. Reading the result
    waits for the device.
    """
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` into evaluation mode inside the block, and restore the flag of each after it.

    A second thread waits until the first one has left the block of the same model, because it would otherwise compute
    with flags that the first one restores. The same thread may nest blocks. The lock is kept as an attribute of the
    model.
    """
    with vars(model).setdefault(_FLAGS, _FlagLock()):
        flags = [(module, module.training) for module in model.modules()]
        if any(training for _, training in flags):
            model.eval()
        try:
            yield
        finally:
            for module, training in flags:
                if training and type(module).train is not nn.Module.train:
                    module.train()  # a method of its own may do more than set the flag, such as split merged weights
            for module, training in flags:
                module.training = training


_FLAGS = "_gpt_fast_flags"  # the instance attribute that holds the lock


class _FlagLock:
    """Lock around the train flags of one model. A copied or pickled model gets a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple:
        return _FlagLock, ()


def init_weights(module: nn.Module, std: float) -> None:
    """Draw the weights of a linear, embedding or attention module from N(0, std²), and set a linear layer's bias to 0.

    An attention module is one with `in_proj_weight`, which alone is drawn. The children of the module and modules of
    other classes stay as they are, such as norms, which have gain 1 and bias 0.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if hasattr(module, "in_proj_weight"):
        nn.init.normal_(module.get_parameter("in_proj_weight"), std=std)
