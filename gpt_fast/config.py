"""GPTConfig: one flat description of a model, and the published presets."""

import dataclasses
import math
import numbers
from typing import Any

from . import _activations

MAX_SIZE = 2**28  # of any size in a configuration: PyTorch counts the bytes of the largest product of three in 64 bits
IGNORE = -100  # the label of a position that does not count, as in torch and transformers
# The fields of GPTConfig that hold a special token's id, and the text of that token in this library's tokenizers.
SPECIAL_TOKENS = {
    "pad_token": "<|pad|>",
    "mask_token": "<|mask|>",
    "start_token": "<|start|>",
    "delimiter_token": "<|delimiter|>",
    "extract_token": "<|extract|>",
}
_DROPOUTS = ("embedding_dropout", "attention_dropout", "residual_dropout", "ff_dropout", "classifier_dropout")
PROBLEMS = ("classification", "regression", "multi_label")
POOLINGS = ("last", "extract")


@dataclasses.dataclass
class GPTConfig:
    """Sizes and options of a GPT. The defaults are GPT-2's.

    Args:
        num_tokens: Vocabulary size V.
        hidden_dim: Width C of the residual stream.
        num_heads: Number of heads H. C divides into H heads of at most 256.
        num_layers: Number of decoders.
        seq_len: Number of positions T.
        ff_dim: Hidden width F of the MLP. 0 means 4C.
        activation: "relu", "gelu" or "gelu_tanh".
        pre_norm: True is GPT-2's block, with a norm behind the last block. False is the post-norm block of GPT-1 and of
            the preset "notes".
        tied: Use the weight of the token embedding in the output layer.
        bias: Give linear layers and norms a bias.
        output_bias: Give the output layer a bias.
        layer_norm_eps: Positive number that norms add to the variance.
        embedding_dropout: Dropout probability of the embeddings.
        attention_dropout: Dropout probability of attention's probabilities.
        residual_dropout: Dropout probability of both residual branches.
        ff_dropout: Dropout probability of the MLP's hidden activation.
        init_std: Initial weights are drawn from N(0, init_std²).
        scaled_init: Divide init_std by sqrt(2 num_layers) for the two projections that write into the residual stream.
        num_labels: Number of outputs L of a classifier.
        problem: "classification", "regression" or "multi_label".
        pooling: Token that a classifier reads, the "last" real token or the "extract" token.
        lm_weight: Weight λ of the language model's loss in the joint loss.
        classifier_dropout: Dropout probability before the classifier.
        classifier_bias: Give the classifier a bias.
        pad_token: Id of padding. Special tokens are ids below num_tokens, or None.
        mask_token: Id that stands for a hidden token in masked language modelling.
        start_token: Id before a text.
        delimiter_token: Id between two texts.
        extract_token: Id whose hidden state a classifier reads with pooling "extract".
        end_token: Id that ends a generated text, where that is not `start_token`.
        label_names: One name for each label, or none.

    Raises:
        ValueError: A value is invalid, or two values contradict each other.

    Example:
        ```python
        import gpt_fast

        config = gpt_fast.GPTConfig(num_tokens=100, hidden_dim=64, num_heads=4, num_layers=2, seq_len=32)
        print(config.ff_dim)  # 256
        ```

    Note:
        Source: Radford et al. (2018, 2019).
    """

    num_tokens: int
    hidden_dim: int
    num_heads: int
    num_layers: int
    seq_len: int
    ff_dim: int = 0  # 4 hidden_dim
    activation: str = "gelu_tanh"
    pre_norm: bool = True
    tied: bool = True
    bias: bool = True
    output_bias: bool = False
    layer_norm_eps: float = 1e-5
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    residual_dropout: float = 0.1
    ff_dropout: float = 0.0
    init_std: float = 0.02
    scaled_init: bool = True
    num_labels: int = 2
    problem: str = "classification"
    pooling: str = "last"
    lm_weight: float = 0.0
    classifier_dropout: float = 0.1
    classifier_bias: bool = True
    pad_token: int | None = None
    mask_token: int | None = None
    start_token: int | None = None
    delimiter_token: int | None = None
    extract_token: int | None = None
    end_token: int | None = None
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if _is_integer(self.ff_dim) and self.ff_dim == 0 and _is_integer(self.hidden_dim):
            self.ff_dim = 4 * self.hidden_dim
        for name in ("num_tokens", "hidden_dim", "num_heads", "num_layers", "seq_len", "ff_dim", "num_labels"):
            value = getattr(self, name)
            if not _is_integer(value) or not 1 <= value <= MAX_SIZE:
                raise ValueError(f"GPTConfig: {name} is {value!r}; expected a positive integer, at most {MAX_SIZE:,}")
        check_heads(self.hidden_dim, self.num_heads)
        _activations.find("GPTConfig", self.activation)
        for name, known in (("problem", PROBLEMS), ("pooling", POOLINGS)):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in known:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        for name in _DROPOUTS:
            if not _is_number(getattr(self, name)) or not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)!r}; expected a probability in [0, 1)")
        for name in ("layer_norm_eps", "init_std"):
            if not _is_number(getattr(self, name)) or not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)!r}; expected a positive number")
        if not _is_number(self.lm_weight) or not 0 <= self.lm_weight < math.inf:
            raise ValueError(f"GPTConfig: lm_weight is {self.lm_weight!r}; expected a number of 0 or more")
        for name in ("pre_norm", "tied", "bias", "output_bias", "scaled_init", "classifier_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"GPTConfig: {name} is {getattr(self, name)!r}; expected True or False")
        for name in (*SPECIAL_TOKENS, "end_token"):
            token = getattr(self, name)
            if token is not None and not (_is_integer(token) and 0 <= token < self.num_tokens):
                raise ValueError(f"GPTConfig: {name} is {token!r}; expected None or an id below {self.num_tokens}")
        if not isinstance(self.label_names, list | tuple) or not all(isinstance(n, str) for n in self.label_names):
            raise ValueError(f"GPTConfig: label_names is {self.label_names!r}; expected a list of strings")
        self.label_names = tuple(self.label_names)
        if self.label_names and len(self.label_names) != self.num_labels:
            raise ValueError(
                f"GPTConfig: label_names has {len(self.label_names)} names; expected {self.num_labels}, or none"
            )
        if self.pooling == "extract" and self.extract_token is None:
            raise ValueError('GPTConfig: pooling is "extract" and extract_token is None; expected its id')

    @classmethod
    def preset(cls, name: str, *, dropout: float | None = None, **overrides: Any) -> "GPTConfig":
        """Return the preset configuration with this name, with the fields in `overrides` replaced.

        "notes" is the Transformer that lecture notes build from PyTorch's own modules, at GPT-1's sizes. It has
        post-norm blocks, ReLU, and an output layer that does not share the embedding's weight. Dropout acts on the
        MLP's hidden activation, but not in attention. "gpt1" is Radford et al. (2018). "gpt2", "gpt2-medium",
        "gpt2-large" and "gpt2-xl" are the 124M, 355M, 774M and 1.5B of Radford et al. (2019).

        Args:
            name: Name of the preset.
            dropout: Probability of every dropout that the preset uses, in [0, 1). Dropouts of 0 stay off.
            **overrides: Fields of `GPTConfig`. They win over `dropout`.

        Returns:
            The configuration.

        Raises:
            ValueError: The name or a field is unknown, or a value is invalid.

        Example:
            ```python
            import gpt_fast

            print(gpt_fast.GPTConfig.preset("gpt2-medium", dropout=0.0).num_layers)  # 24
            ```
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"GPTConfig: preset name is {name!r}; expected one of {', '.join(PRESETS)}")
        values = dict(PRESETS[name])
        if dropout is not None:
            if not _is_number(dropout) or not 0.0 <= dropout < 1.0:
                raise ValueError(f"GPTConfig: dropout is {dropout!r}; expected a probability in [0, 1)")
            defaults = {field.name: field.default for field in dataclasses.fields(cls)}
            values |= {key: dropout for key in _DROPOUTS if values.get(key, defaults[key]) > 0}
        return cls.from_dict(values | overrides)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GPTConfig":
        """Return the configuration with these fields.

        Args:
            values: Fields of `GPTConfig` by name, as `to_dict` returns them.

        Returns:
            The configuration.

        Raises:
            ValueError: `values` is no dictionary, has an unknown field, lacks a required one, or holds an invalid
                value. The message names the field.

        Example:
            ```python
            import gpt_fast

            config = gpt_fast.GPTConfig.preset("gpt2")
            print(gpt_fast.GPTConfig.from_dict(config.to_dict()) == config)  # True
            ```
        """
        if not isinstance(values, dict):
            raise ValueError(f"GPTConfig: values is of type {type(values).__name__}; expected a dictionary of fields")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(f"GPTConfig: got {', '.join(unknown)}; expected only {', '.join(fields)}")
        required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"GPTConfig: {', '.join(missing)} missing; expected {', '.join(required)}")
        return cls(**values)

    def trunk_parameters(self) -> int:
        """Return the size of the trunk: both embeddings, all blocks and, with `pre_norm`, the last norm.

        Returns:
            The number of elements of their parameters. An output layer or classifier is not counted.
        """
        C, F = self.hidden_dim, self.ff_dim
        norm = C * (1 + self.bias)
        block = 4 * C * C + 2 * C * F + 2 * norm + self.bias * (5 * C + F)
        return (self.num_tokens + self.seq_len) * C + self.num_layers * block + self.pre_norm * norm

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, which `from_dict` takes back.

        Returns:
            All fields by name; `label_names` is a tuple.
        """
        return dataclasses.asdict(self)

    def replace(self, **overrides: Any) -> "GPTConfig":
        """Return a copy of the configuration with some fields changed.

        Args:
            **overrides: Fields of `GPTConfig`. Another `num_labels` drops the `label_names`, unless new ones are given.
                All other fields stay: with another `hidden_dim`, `ff_dim` remains the old number.

        Returns:
            The new configuration.

        Raises:
            ValueError: A field is unknown, or a value is invalid.

        Example:
            ```python
            import gpt_fast

            print(gpt_fast.GPTConfig.preset("gpt2").replace(seq_len=2048).seq_len)  # 2048
            ```
        """
        if overrides.get("num_labels", self.num_labels) != self.num_labels:
            overrides = {"label_names": ()} | overrides
        return type(self).from_dict(self.to_dict() | overrides)


_GPT1 = {"num_tokens": 40478, "hidden_dim": 768, "num_heads": 12, "num_layers": 12, "seq_len": 512, "pre_norm": False}
_GPT2 = {"num_tokens": 50257, "hidden_dim": 768, "num_heads": 12, "num_layers": 12, "seq_len": 1024}
PRESETS: dict[str, dict[str, Any]] = {
    "notes": {
        **_GPT1, "activation": "relu", "tied": False, "output_bias": True, "attention_dropout": 0.0, "ff_dropout": 0.1,
        "scaled_init": False,
    },
    "gpt1": {**_GPT1, "scaled_init": False},
    "gpt2": _GPT2,
    "gpt2-medium": {**_GPT2, "hidden_dim": 1024, "num_heads": 16, "num_layers": 24},
    "gpt2-large": {**_GPT2, "hidden_dim": 1280, "num_heads": 20, "num_layers": 36},
    "gpt2-xl": {**_GPT2, "hidden_dim": 1600, "num_heads": 25, "num_layers": 48},
}  # fmt: skip


def _is_number(value: object) -> bool:
    """Return True for a real number that is not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    """Return True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_heads(hidden_dim: int, num_heads: int) -> None:
    """Raise an error unless `hidden_dim` is a multiple of `num_heads` and a head is at most 256 wide.

    Raises:
        ValueError: `hidden_dim` is no multiple of `num_heads`, a head is wider, or one of the two is no integer of 1 or
            more.
    """
    if not _is_integer(hidden_dim) or hidden_dim < 1:
        raise ValueError(f"gpt_fast: hidden_dim is {hidden_dim!r}; expected an integer of 1 or more")
    if not _is_integer(num_heads):
        raise ValueError(f"gpt_fast: num_heads is {num_heads!r}; expected an integer of 1 or more")
    if num_heads < 1 or hidden_dim % num_heads:
        raise ValueError(f"gpt_fast: hidden_dim {hidden_dim} is not divisible by num_heads {num_heads}")
    if hidden_dim // num_heads > 256:
        raise ValueError(
            f"gpt_fast: hidden_dim {hidden_dim} over num_heads {num_heads} gives heads of {hidden_dim // num_heads}; "
            "expected at most 256"
        )
