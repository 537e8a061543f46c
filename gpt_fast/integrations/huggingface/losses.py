"""The language-model losses that `gpt_fast.accelerate` puts on transformers' heads: from hidden states, no logits.

In training with labels the output's `logits` are computed when they are read. Evaluation, `logits=True`, tuples instead
of outputs, a wrapped `lm_head` or another loss function run as transformers has them, on the accelerated trunk.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput, CausalLMOutputWithCrossAttentions
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2DoubleHeadsModel,
    GPT2DoubleHeadsModelOutput,
    GPT2LMHeadModel,
)
from transformers.models.openai.modeling_openai import (
    OpenAIGPTDoubleHeadsModel,
    OpenAIGPTDoubleHeadsModelOutput,
    OpenAIGPTLMHeadModel,
)

from ... import _plain, ops
from .blocks import CACHE, named

_LOSS_ARGUMENTS = ("labels", "num_items_in_batch", "ignore_index", "shift_labels", "mc_labels", "mc_token_ids")


def gpt2_lm_head_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _lm_head(self, args, kwargs)


def gpt1_lm_head_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _lm_head(self, args, kwargs)


def gpt2_double_heads_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _double_heads(self, args, kwargs)


def gpt1_double_heads_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _double_heads(self, args, kwargs)


FORWARDS: dict[type, Callable] = {
    GPT2LMHeadModel: gpt2_lm_head_forward,
    OpenAIGPTLMHeadModel: gpt1_lm_head_forward,
    GPT2DoubleHeadsModel: gpt2_double_heads_forward,
    OpenAIGPTDoubleHeadsModel: gpt1_double_heads_forward,
}
for _kind, _forward in FORWARDS.items():  # which columns of a data set a model takes, Trainer reads off its signature
    vars(_forward)["__signature__"] = inspect.signature(_kind.forward)  # type: ignore[attr-defined]


def _lm_head(self: Any, args: tuple, kwargs: dict) -> Any:
    call = dict(named(self, args, kwargs))
    logits = call.pop("logits", None)
    if _needs_logits(self, call, logits) or has_another_loss(self):
        return _plain.original(self, **call)
    outputs = _trunk(self, call)
    hidden = outputs.last_hidden_state
    ignore_index = call.get("ignore_index", -100)
    targets = call.get("shift_labels")
    if targets is None:
        targets = _shift(call["labels"], ignore_index)
    items = call.get("num_items_in_batch")
    loss = ops.linear_cross_entropy(
        hidden, self.lm_head.weight, targets.to(hidden.device), self.lm_head.bias, ignore_index,
        reduction="mean" if items is None else "sum",
    )  # fmt: skip
    if items is not None:
        loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
    kind = CausalLMOutputWithCrossAttentions if self.config.model_type == "gpt2" else CausalLMOutput
    return _output(kind, self.lm_head, hidden, outputs, loss=loss)


def _double_heads(self: Any, args: tuple, kwargs: dict) -> Any:
    call = dict(named(self, args, kwargs))
    logits = call.pop("logits", None)
    if _needs_logits(self, call, logits):
        return _plain.original(self, **call)
    outputs = _trunk(self, call)
    hidden = outputs.last_hidden_state
    head = self.lm_head
    loss = ops.linear_cross_entropy(hidden, head.weight, _shift(call["labels"], -100).to(hidden.device), head.bias)
    mc_logits = self.multiple_choice_head(hidden, call.get("mc_token_ids")).squeeze(-1)
    mc_labels, mc_loss = call.get("mc_labels"), None
    if mc_labels is not None:
        mc_loss = F.cross_entropy(mc_logits.view(-1, mc_logits.size(-1)), mc_labels.view(-1))
    kind = GPT2DoubleHeadsModelOutput if self.config.model_type == "gpt2" else OpenAIGPTDoubleHeadsModelOutput
    return _output(kind, head, hidden, outputs, loss=loss, mc_loss=mc_loss, mc_logits=mc_logits)


def has_another_loss(model: Any) -> bool:
    """Whether a model with one head computes its loss by another function than its class's usual one."""
    if "_loss_function" in vars(model):  # set by hand
        return model.loss_function is not ForCausalLMLoss
    return getattr(model, "loss_type", None) not in (None, "ForCausalLM")  # transformers takes None for ForCausalLM


def _needs_logits(model: Any, call: dict, logits: bool | None) -> bool:
    """Whether this call is left to transformers, which computes the logits and the loss from them."""
    labels = call.get("labels")
    rows = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
    if labels is None or rows is None or (not model.training if logits is None else logits):
        return True
    return_dict = call.get("return_dict")
    returns_tuple = not (model.config.return_dict if return_dict is None else return_dict)
    shape = rows.shape if call.get("input_ids") is not None else rows.shape[:-1]
    keep = call.get("logits_to_keep", 0)
    keeps_all = not isinstance(keep, Tensor) and keep == 0
    plain = _plain.is_plain(model.lm_head, nn.Linear)
    return returns_tuple or not keeps_all or not plain or labels.shape != shape


def _trunk(model: Any, call: dict) -> Any:
    names = {name: value for name, value in call.items() if name not in (*_LOSS_ARGUMENTS, "logits_to_keep")}
    return model.transformer(**names)


def _shift(labels: Tensor, ignore_index: int) -> Tensor:
    """labels [..., T] → the label of each position's successor."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]  # padded first: an exported T - 1 would exclude T = 2


def _output(kind: type, lm_head: Any, hidden: Tensor, outputs: Any, **fields: Any) -> Any:
    passed = {
        name: getattr(outputs, name)
        for name in (CACHE, "hidden_states", "attentions", "cross_attentions")
        if hasattr(kind, name) and hasattr(outputs, name)
    }
    if torch.compiler.is_compiling():
        return kind(**fields, **passed)  # without logits: a graph has no way to compute them later
    return _deferring(kind)(**fields, logits=Deferred(lm_head, hidden), **passed)


class Deferred:
    """Logits that nobody has asked for yet."""

    def __init__(self, lm_head: Any, hidden: Tensor):
        self.lm_head, self.hidden = lm_head, hidden
        kind = hidden.device.type
        self.autocast: dict[str, Any] = {"device_type": kind, "enabled": torch.is_autocast_enabled(kind)}
        self.autocast |= {"dtype": torch.get_autocast_dtype(kind)} if self.autocast["enabled"] else {}

    def __call__(self) -> Tensor:
        with torch.autocast(**self.autocast):  # as in the pass whose logits these are
            return self.lm_head(self.hidden)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.hidden.shape)})"


@functools.cache
def _deferring(kind: Any) -> Any:
    """The output class `kind` with logits that are computed when they are first read.

    Whoever walks over the output (`items`, `values`, a pytree) meets a `Deferred` in their place and may put it into
    another such output: mixed-precision wrappers and FSDP take outputs apart and build them anew.
    """

    class Output(kind):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.__dict__["gpt_fast_ready"] = True

        @property
        def logits(self) -> Any:
            value = self.__dict__.get("logits")
            if isinstance(value, Deferred) and "gpt_fast_ready" in self.__dict__:
                self["logits"] = value = value()
            return value

        @logits.setter
        def logits(self, value: Any) -> None:
            self.__dict__["logits"] = value

        def __getitem__(self, key: Any) -> Any:
            if key == "logits":
                return self.logits
            if isinstance(key, str):
                return super().__getitem__(key)
            names = list(self.keys())[key]
            return self[names] if isinstance(names, str) else tuple(self[name] for name in names)

        def get(self, key: Any, default: Any = None) -> Any:
            return self[key] if key in self.keys() else default

    Output.__name__, Output.__qualname__ = kind.__name__, kind.__qualname__
    return Output
