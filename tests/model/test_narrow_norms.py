"""Test norms whose result only a matrix product reads: under autocast they round to the product's dtype themselves.

The results have the same bits as a norm followed by a cast.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gpt_fast
from gpt_fast import GPTConfig, GPTForCausalLM, GPTForMaskedLM, GPTForSequenceClassification, use_reference
from gpt_fast.layers import TransformerDecoder
from gpt_fast.ops import _library
from tests.conftest import PRODUCT_DTYPES

SIZES: dict[str, Any] = {"num_tokens": 40, "hidden_dim": 32, "num_heads": 2, "num_layers": 2, "seq_len": 16}
NORMS = 2 * SIZES["num_layers"] + 1


class Casts(TorchDispatchMode):
    """Dispatch mode that counts casts of three-dimensional tensors from float32 (narrowed) and to float32 (widened)."""

    def __init__(self) -> None:
        super().__init__()
        self.narrowed, self.widened = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].dim() == 3:
            self.narrowed += args[0].dtype == torch.float32
            self.widened += result.dtype == torch.float32
        return result


def make(head: type = GPTForCausalLM, device: str = "cpu", **config: Any) -> Any:
    torch.manual_seed(0)
    return head(GPTConfig.preset("gpt2", **{**SIZES, "dropout": 0.1, **config})).to(device)


def pass_through(model: Any, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Return the loss and the gradients of a step under autocast, with the same dropout each time."""
    device = next(model.parameters()).device
    torch.manual_seed(1)
    tokens = torch.randint(40, (2, 16)).to(device)
    labels = tokens[:, 0] % 2 if isinstance(model, GPTForSequenceClassification) else tokens
    model.zero_grad()
    with torch.autocast(device.type, dtype):
        output = model(tokens, labels, **options)
        loss = output.loss + (0 if output.logits is None else output.logits.float().square().mean())
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head", "options"),
    [
        (GPTForCausalLM, {}),
        (GPTForCausalLM, {"logits": True}),
        (GPTForMaskedLM, {}),
        (GPTForSequenceClassification, {}),
    ],
    ids=["clm", "clm with logits", "mlm", "classifier"],
)
def test_bits_stay(head: type, options: dict, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(head, device)
    narrow = pass_through(model, dtype, **options)
    monkeypatch.setattr(_library, "product_dtype", lambda x, dtype: None)
    assert all(map(torch.equal, narrow, pass_through(model, dtype, **options)))


def test_bits_stay_with_activation_checkpointing_and_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    model.trunk.checkpoint_activations = True
    narrow = pass_through(model, torch.float16)
    with use_reference():
        by_definition = pass_through(model, torch.float16)
    monkeypatch.setattr(_library, "product_dtype", lambda x, dtype: None)
    assert all(map(torch.equal, narrow, pass_through(model, torch.float16)))
    with use_reference():
        assert all(map(torch.equal, by_definition, pass_through(model, torch.float16)))


def casts(model: Any, **options: Any) -> tuple[int, int]:
    with Casts() as seen:
        pass_through(model, torch.bfloat16, **options)
    return seen.narrowed, seen.widened


def test_each_norm_spares_a_cast_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    narrowed, widened = casts(model)
    monkeypatch.setattr(_library, "product_dtype", lambda x, dtype: None)
    assert casts(model) == (narrowed + NORMS, widened + NORMS)


def hook(model: Any) -> None:
    model.trunk.decoders[0].multihead_attn.register_forward_pre_hook(lambda module, args: None)


def wrap(model: Any) -> None:
    """Replace a linear layer by a module of another class, as an adapter does."""
    model.trunk.decoders[0].ff[0] = nn.Sequential(model.trunk.decoders[0].ff[0])


def hook_trunk(model: Any) -> None:
    model.trunk.register_forward_hook(lambda module, args, out: None)


@pytest.mark.parametrize(
    ("change", "options"),
    [(hook, {}), (wrap, {}), (hook_trunk, {}), (lambda model: None, {"logits": True})],
    ids=["hook", "adapter", "hook on the trunk", "two readers"],
)
def test_other_readers_get_float32(change: Callable, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one norm whose result is not read by a product alone stays float32."""
    model = make()
    change(model)
    narrowed, _ = casts(model, **options)
    monkeypatch.setattr(_library, "product_dtype", lambda x, dtype: None)
    assert casts(model, **options)[0] == narrowed + NORMS - 1


def test_hidden_states_keep_their_dtype() -> None:
    model = make()
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.trunk(tokens).dtype == torch.float32
        assert model.trunk.hidden_states(tokens).dtype == torch.float32
        assert TransformerDecoder(32, 2, 64, 0.0, pre_norm=True)(torch.zeros(1, 4, 32)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_norm_that_rounds_before_stays_as_it_is(dtype: torch.dtype) -> None:
    """A result that is already rounded to bfloat16 is not rounded to float16, which would differ from one rounding."""
    with torch.autocast("cpu", torch.float16):
        assert _library.product_dtype(torch.zeros(1), dtype) is None
        assert _library.product_dtype(torch.zeros(1), torch.float32) is torch.float16
    assert _library.product_dtype(torch.zeros(1), torch.float32) is None


def test_one_graph(device: str) -> None:
    """`torch.compile` traces the choice of the dtype and the narrow norms, and gives the same bits."""
    model = make(device=device, dropout=0.0)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    expected = pass_through(model, torch.bfloat16)
    assert all(map(torch.equal, expected, pass_through(compiled, torch.bfloat16)))


# --- transformers' GPT-2, accelerated


def accelerated() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))
    gpt_fast.accelerate(model)
    return model


def accelerated_pass(model: Any) -> list[Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(40, (3, 16))
    model.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def wrap_projection(model: Any) -> None:
    model.transformer.h[0].attn.c_attn = nn.Sequential(model.transformer.h[0].attn.c_attn)


@pytest.mark.parametrize(
    ("change", "spared"), [(lambda model: None, NORMS - 1), (wrap_projection, NORMS - 2)], ids=["plain", "adapter"]
)
def test_an_accelerated_gpt2(change: Callable, spared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last norm stays float32, because transformers returns its result."""
    model = accelerated()
    change(model)
    with Casts() as narrow:
        results = accelerated_pass(model)
    monkeypatch.setattr(_library, "product_dtype", lambda x, dtype: None)
    with Casts() as wide:
        assert all(map(torch.equal, results, accelerated_pass(model)))
    assert (wide.narrowed - narrow.narrowed, wide.widened - narrow.widened) == (spared, spared)
