"""The language-model losses that `gpt_fast.accelerate` puts on transformers' heads: from hidden states, no logits.

In training with labels the output's `logits` are computed when they are read. Evaluation, `logits=True`, tuples instead
of outputs, a wrapped `lm_head` or another loss function run as transformers has them, on the accelerated trunk. A loss
over no label is 0 in all of them; only another loss function keeps its own answer.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

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

from ... import _plain, _transforms, ops
from ...config import IGNORE
from .blocks import CACHE, named

_LOSS_ARGUMENTS = ("labels", "num_items_in_batch", "ignore_index", "shift_labels", "mc_labels", "mc_token_ids")


class Head(NamedTuple):
    """A class of transformers with a language-model loss, its new forward, and its trunk's and output layer's paths."""

    kind: Any
    forward: Callable
    result: Any  # the class of its outputs
    trunk: str = "transformer"
    output: str = "lm_head"


def gpt2_lm_head_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `self`, a `GPT2LMHeadModel`, with the arguments and the output of the forward of its class.

    The call may have an additional argument `logits`. False computes the loss from hidden states, and the logits when
    code reads them. True runs the forward of the class. The default is False in training and True in evaluation. The
    forward of the class also runs, whatever `logits` is, if the call has no labels or asks for a tuple.
    """
    return lm_head(self, _GPT2, args, kwargs)


def gpt1_lm_head_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `self`, an `OpenAIGPTLMHeadModel`, with the arguments and the output of the forward of its class.

    The call may have an additional argument `logits`. False computes the loss from hidden states, and the logits when
    code reads them. True runs the forward of the class. The default is False in training and True in evaluation. The
    forward of the class also runs, whatever `logits` is, if the call has no labels or asks for a tuple.
    """
    return lm_head(self, _GPT1, args, kwargs)


def gpt2_double_heads_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `self`, a `GPT2DoubleHeadsModel`, with the arguments and the output of the forward of its class.

    It is a language model with a multiple-choice head. The call may have an additional argument `logits`. False
    computes the language model's loss from hidden states, and its logits when code reads them. True runs the forward of
    the class. The default is False in training and True in evaluation. The forward of the class also runs, whatever
    `logits` is, if the call asks for a tuple or has no `labels`, even if it has `mc_labels`.
    """
    return _double_heads(self, _GPT2_DOUBLE, args, kwargs)


def gpt1_double_heads_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `self`, an `OpenAIGPTDoubleHeadsModel`, with the arguments and the output of the forward of its class.

    It is a language model with a multiple-choice head. The call may have an additional argument `logits`. False
    computes the language model's loss from hidden states, and its logits when code reads them. True runs the forward of
    the class. The default is False in training and True in evaluation. The forward of the class also runs, whatever
    `logits` is, if the call asks for a tuple or has no `labels`, even if it has `mc_labels`.
    """
    return _double_heads(self, _GPT1_DOUBLE, args, kwargs)


def with_signatures(heads: tuple[Head, ...]) -> tuple[Head, ...]:
    """Give the forward of each head the signature of its class's forward, in place, and return `heads`.

    Hugging Face's Trainer chooses the columns of a data set by that signature.
    """
    for head in heads:
        vars(head.forward)["__signature__"] = inspect.signature(head.kind.forward)
    return heads


HEADS = (_GPT2, _GPT1, _GPT2_DOUBLE, _GPT1_DOUBLE) = with_signatures((
    Head(GPT2LMHeadModel, gpt2_lm_head_forward, CausalLMOutputWithCrossAttentions),
    Head(OpenAIGPTLMHeadModel, gpt1_lm_head_forward, CausalLMOutput),
    Head(GPT2DoubleHeadsModel, gpt2_double_heads_forward, GPT2DoubleHeadsModelOutput),
    Head(OpenAIGPTDoubleHeadsModel, gpt1_double_heads_forward, OpenAIGPTDoubleHeadsModelOutput),
))  # fmt: skip


def head_of(model: Any, heads: tuple[Head, ...] = HEADS) -> Head | None:
    """Return the first of `heads` of whose class `model` is an instance, or None."""
    return next((head for head in heads if isinstance(model, head.kind)), None)


def lm_head(self: Any, head: Head, args: tuple, kwargs: dict) -> Any:
    """Return the output of a model with a language-model head, with the loss computed from hidden states.

    `self` is the model, `head` the `Head` of its class, and `args` and `kwargs` are the arguments of the call. The loss
    is the mean over labels, or the sum divided by `num_items_in_batch` if that is given, and 0 if no label counts. The
    logits in the output are computed when code reads them; in a compiled graph there are none.

    The forward of the class runs instead if the call has no labels, if the model has another loss function, or if
    `_needs_logits` returns True. It does so, for example, in evaluation, unless the call has `logits=False`.
    """
    call = dict(named(self, args, kwargs))
    logits = call.pop("logits", None)
    if call.get("labels") is None or has_another_loss(self):
        return _plain.original(self, **call)
    if not torch.compiler.is_compiling():
        _ = self.loss_function  # transformers warns here of a configuration without loss_type
    items = call.get("num_items_in_batch")
    if items is not None:  # 0 items: the sum of their losses is 0, and so is its quotient by 1
        items = call["num_items_in_batch"] = items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1)
    output = getattr(self, head.output)
    if _needs_logits(self, output, call, logits):
        return _zero_without_labels(_plain.original(self, **call), call)
    outputs = _trunk(self, head, call)
    hidden = outputs.last_hidden_state
    loss = ops.linear_cross_entropy(
        hidden, output.weight, _targets(call).to(hidden.device), output.bias,
        call.get("ignore_index", IGNORE), reduction="mean" if items is None else "sum",
    )  # fmt: skip
    if items is not None:
        loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
    return _output(head.result, output, hidden, outputs, loss=loss)


def _double_heads(self: Any, head: Head, args: tuple, kwargs: dict) -> Any:
    """Return the output of a model with a language-model head and a multiple-choice head.

    `self` is the model, `head` the `Head` of its class, and `args` and `kwargs` are the arguments of the call. The
    language model's loss is computed from hidden states, and its logits when code reads them. The output also has
    `mc_logits` and, if `mc_labels` are given, `mc_loss`. The forward of the class runs instead if `_needs_logits`
    returns True. It does so, for example, in evaluation, unless the call has `logits=False`.
    """
    call = dict(named(self, args, kwargs))
    logits = call.pop("logits", None)
    output = self.lm_head
    if _needs_logits(self, output, call, logits):
        return _zero_without_labels(_plain.original(self, **call), call)
    outputs = _trunk(self, head, call)
    hidden = outputs.last_hidden_state
    loss = ops.linear_cross_entropy(hidden, output.weight, _targets(call).to(hidden.device), output.bias)
    mc_logits = self.multiple_choice_head(hidden, call.get("mc_token_ids")).squeeze(-1)
    mc_labels, mc_loss = call.get("mc_labels"), None
    if mc_labels is not None:
        mc_loss = F.cross_entropy(mc_logits.view(-1, mc_logits.size(-1)), mc_labels.view(-1))
    return _output(head.result, output, hidden, outputs, loss=loss, mc_loss=mc_loss, mc_logits=mc_logits)


def has_another_loss(model: Any) -> bool:
    """Return True if `model` has a loss function other than transformers' `ForCausalLMLoss`."""
    if "_loss_function" in vars(model):  # set by hand
        return model.loss_function is not ForCausalLMLoss
    return getattr(model, "loss_type", None) not in (None, "ForCausalLM")  # transformers takes None for ForCausalLM


def _needs_logits(model: Any, output: Any, call: dict, logits: bool | None) -> bool:
    """Return True if a call of `model` is left to transformers, which computes the logits and the loss from them.

    `output` is the output layer, and `call` holds the arguments by name. `logits` is the argument `logits` of the call:
    True, False, or None, which means True in evaluation and False in training. The result is True if `logits` is. It is
    also True if the call has no labels, no input, or labels of another shape than the tokens. The same holds if the
    call asks for a tuple or has `logits_to_keep`, and if `output` is no plain `nn.Linear`.
    """
    labels = call.get("labels")
    rows = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
    if labels is None or rows is None or (not model.training if logits is None else logits):
        return True
    return_dict = call.get("return_dict")
    returns_tuple = not (model.config.return_dict if return_dict is None else return_dict)
    shape = rows.shape if call.get("input_ids") is not None else rows.shape[:-1]
    keep = call.get("logits_to_keep", 0)
    keeps_all = not isinstance(keep, Tensor) and keep == 0
    plain = _plain.is_plain(output, nn.Linear)
    return returns_tuple or not keeps_all or not plain or labels.shape != shape


def _trunk(model: Any, head: Head, call: dict) -> Any:
    """Return the output of the model's trunk, the part without the head, for the arguments in `call` that it takes.

    `head` is the `Head` of the model's class. `call` holds the arguments of the model's call by name. Labels and other
    arguments of the loss may be among them; this function does not pass them to the trunk.
    """
    names = {name: value for name, value in call.items() if name not in (*_LOSS_ARGUMENTS, "logits_to_keep")}
    return model.get_submodule(head.trunk)(**names)


def _targets(call: dict) -> Tensor:
    """Return labels [..., T] in which each position has the label of the next one, and the last position is ignored.

    `call` holds the arguments of the call by name. Its `ignore_index` (-100 by default) marks what is ignored. Its
    `shift_labels`, if given, are returned as they are.
    """
    if call.get("shift_labels") is not None:
        return call["shift_labels"]
    # Padded first: T - 1 columns in an exported program would exclude T = 2.
    return F.pad(call["labels"], (0, 1), value=call.get("ignore_index", IGNORE))[..., 1:]


def _zero_without_labels(output: Any, call: dict) -> Any:
    """Return the output of transformers' head with a loss of 0 instead of NaN if all labels are ignored.

    `output` is an output object, whose loss is replaced in place, or a tuple that begins with the loss. `call` holds
    the arguments of the call by name. If they have no labels, the output is returned as it is.
    """
    if call.get("labels") is None:
        return output
    loss = output[0]
    nothing = (_targets(call) == call.get("ignore_index", IGNORE)).all().to(loss.device)
    loss = loss.masked_fill(nothing, 0.0)
    if isinstance(output, tuple):
        return loss, *output[1:]
    output.loss = loss
    return output


def _output(kind: type, lm_head: Any, hidden: Tensor, outputs: Any, **fields: Any) -> Any:
    """Return an output of class `kind` with `fields`, the cache and states of the trunk's `outputs`, and the logits.

    The cache and states are the key-value cache, hidden_states, attentions and cross_attentions, as far as both classes
    have them. The logits are lm_head(hidden), with the output layer `lm_head`, and are computed when they are read. In
    a compiled graph the output has no logits. Under `torch.jit.trace` they are computed at once.
    """
    passed = {
        name: getattr(outputs, name)
        for name in (CACHE, "hidden_states", "attentions", "cross_attentions")
        if hasattr(kind, name) and hasattr(outputs, name)
    }
    if torch.compiler.is_compiling():
        return kind(**fields, **passed)  # without logits: a graph has no way to compute them later
    if torch.jit.is_tracing():
        return kind(**fields, logits=lm_head(hidden), **passed)
    return _deferring(kind)(**fields, logits=Deferred(lm_head, hidden), **passed)


class Deferred:
    """Logits of a pass that have not been read yet.

    A call computes them in the gradient mode and under the autocast of the pass. It raises `RuntimeError` if the
    weights or the hidden states changed after the pass, because those of the pass are gone.
    """

    def __init__(self, lm_head: Any, hidden: Tensor):
        self.lm_head, self.hidden = lm_head, hidden
        self.parameters = _parameters(lm_head)
        self.versions = [_plain.version(tensor) for tensor in (*self.parameters, hidden)]
        self.samples = None if _transforms.is_transformed() or hidden.is_meta else _plain.samples(self.parameters)
        self.inference, self.grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        kind = "cpu" if hidden.is_meta else hidden.device.type  # PyTorch has no autocast for meta
        self.autocast: dict[str, Any] = {"device_type": kind, "enabled": torch.is_autocast_enabled(kind)}
        self.autocast |= {"dtype": torch.get_autocast_dtype(kind)} if self.autocast["enabled"] else {}

    def __call__(self) -> Tensor:
        """Return lm_head(hidden), computed in the gradient mode and under the autocast of the pass.

        Raise `RuntimeError` if weights or hidden states changed after construction.
        """
        if self._is_stale():
            raise RuntimeError(
                "gpt_fast.accelerate: logits has lm_head weights or hidden states that changed after the pass; "
                "expected them as in the pass: read logits before the update, or call the model with logits=True"
            )
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad), torch.autocast(**self.autocast):
            return self.lm_head(self.hidden)

    def _is_stale(self) -> bool:
        """Return True if the hidden states or the output layer's parameters were replaced or written since the pass.

        Writes are found by autograd's counts and, for parameters, by a sample of values.
        """
        now = _parameters(self.lm_head)
        return (
            len(now) != len(self.parameters)
            or any(a is not b for a, b in zip(now, self.parameters, strict=True))
            or [_plain.version(tensor) for tensor in (*now, self.hidden)] != self.versions
            or (self.samples is not None and not torch.equal(_plain.samples(now), self.samples))
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.hidden.shape)})"


def _parameters(lm_head: Any) -> list[Tensor]:
    """Return the weight of the output layer, and its bias if it has one."""
    return [lm_head.weight] if lm_head.bias is None else [lm_head.weight, lm_head.bias]


# These wrappers take the output of every pass apart and rebuild it, though nobody reads its logits: mixed precision in
# Hugging Face Accelerate, DDP and FSDP. The new output holds the same `Deferred`. Every other reader gets logits: a
# wrapper that is missing here costs time, and a reader that were taken for a wrapper would meet no tensor.
_WRAPPERS = ("torch.distributed.fsdp.", "torch.distributed.utils", "torch.nn.parallel.distributed")
_OPERATIONS = "accelerate.utils.operations"
# Modules whose functions read an output on behalf of their caller.
_BETWEEN = {__name__, _OPERATIONS, "dataclasses", "torch.utils._pytree", "transformers.utils.generic"}


def _is_read_by_wrapper() -> bool:
    """Return True if the code that reads the logits belongs to DDP, FSDP or Accelerate, which copy a model's output.

    The nearest frame of the call stack that is not skipped belongs to the reader. Frames of Python modules that read an
    output for their caller, such as `dataclasses`, are skipped. Accelerate's `convert_to_fp32` is not skipped.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module == _OPERATIONS and frame.f_code.co_name == "convert_to_fp32":
            return True
        if module not in _BETWEEN:
            return module.startswith(_WRAPPERS)
        frame = frame.f_back
    return False


@functools.cache
def _deferring(kind: Any) -> Any:
    """Return a subclass of the output class `kind` whose logits are computed when they are first read.

    Its field `logits` takes a `Deferred`. DDP, FSDP and Accelerate, which rebuild outputs, get the `Deferred` itself. A
    pickle or a copy of an instance is an instance of `kind` itself, with computed logits.
    """

    class Output(kind):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.__dict__["gpt_fast_ready"] = True

        @property
        def logits(self) -> Any:
            """Return the logits. The first read computes them, unless a wrapper reads them to rebuild the output.

            A wrapper (DDP, FSDP or Accelerate) gets the `Deferred` itself. Raise `RuntimeError` if weights or hidden
            states changed before the first read.
            """
            value = self.__dict__.get("logits")
            if isinstance(value, Deferred) and "gpt_fast_ready" in self.__dict__ and not _is_read_by_wrapper():
                self["logits"] = value = value()
            return value

        @logits.setter
        def logits(self, value: Any) -> None:
            self.__dict__["logits"] = value

        def __getitem__(self, key: Any) -> Any:
            if not isinstance(key, str):
                names = list(self.keys())[key]
                return self[names] if isinstance(names, str) else tuple(self[name] for name in names)
            if key not in self:
                raise KeyError(key)
            return getattr(self, key)

        def get(self, key: Any, default: Any = None) -> Any:
            return self[key] if key in self else default  # noqa: SIM401  this is `get`

        def items(self) -> Any:
            _ = self.logits
            return super().items()

        def values(self) -> Any:
            _ = self.logits
            return super().values()

        def __reduce__(self) -> Any:
            return kind(**{name: self[name] for name in self}).__reduce__()

    Output.__name__, Output.__qualname__ = kind.__name__, kind.__qualname__
    return Output
