"""Test that each part of the library serves every activation of the table and refuses an unknown name.

The kernels under test are those of C++, of Triton in the interpreter (TRITON_INTERPRET=1), or of CUDA.
"""

import copy

import pytest
import torch
import torch.nn as nn

import gpt_fast
from gpt_fast import GPTConfig, GPTForCausalLM, _activations, ops, reference
from gpt_fast._activations import ACTIVATIONS
from gpt_fast.integrations import torch_modules
from gpt_fast.layers import MLP
from tests import numerics
from tests.conftest import INTERPRETED
from tests.ops.test_mlp import SEED, SITE, check, sample_inputs

UNKNOWN = "activation is 'swish'; expected one of " + ", ".join(ACTIVATIONS)
Z = torch.linspace(-4, 4, 81, dtype=torch.float64)


def make_config(activation: str, **options) -> GPTConfig:
    sizes = {"num_tokens": 61, "hidden_dim": 32, "num_heads": 2, "num_layers": 1, "seq_len": 16}
    return GPTConfig(**sizes, activation=activation, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_definition_is_pytorchs_module(activation):
    """The module that layers use computes the same function as `reference.mlp`."""
    row = ACTIVATIONS[activation]
    mlp = MLP(4, 8, activation)
    assert type(mlp[1]) is row.module
    assert torch.equal(mlp[1](Z), row.function(Z))
    assert all(torch.equal(alias(Z), row.function(Z)) for alias in row.aliases)
    eye = torch.eye(1, dtype=torch.float64)
    assert torch.equal(reference.mlp(Z[:, None], eye, None, eye, None, activation)[:, 0], row.function(Z))


def test_no_two_activations_are_the_same():
    values = [row.function(Z) for row in ACTIVATIONS.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_kernels_serve_it(activation, device, check_implementation):
    """Forward and backward run on the implementation under test, with dropout, hidden values kept or recomputed."""
    inputs = sample_inputs((17, 20, 33, 12), torch.float32, device)
    for recompute in (False, True):
        check(inputs, activation, 0.1, recompute=recompute)
    check_implementation("mlp", lambda: ops.mlp(*inputs, activation).sum().backward())


@pytest.mark.skipif(gpt_fast.build_info() is None or INTERPRETED, reason="the C++ step needs the extension's kernels")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_decode_step_serves_it(activation):
    """A token's logits from the C++ step agree with those of the model that reads all tokens at once."""
    model = GPTForCausalLM(make_config(activation, init_std=0.3)).eval()
    tokens = torch.randint(0, 61, (2, 9))
    session = gpt_fast.DecodeSession(model, batch=2)
    assert session.kind == "float32"
    session.prefill(tokens[:, :8])
    with torch.no_grad():
        wanted = model(tokens).logits[:, -1]
        exact = copy.deepcopy(model).double()(tokens).logits[:, -1]
    numerics.assert_as_accurate(session.step(tokens[:, 8]), wanted, exact, label=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pre_norm", [True, False], ids=["gpt2", "gpt1"])
def test_transformers_serves_it(activation, pre_norm):
    """A model converted to transformers and back keeps its activation and computes the same."""
    pytest.importorskip("transformers")
    theirs = ACTIVATIONS[activation].gpt2 if pre_norm else ACTIVATIONS[activation].gpt1
    model = GPTForCausalLM(make_config(activation, pre_norm=pre_norm, init_std=0.3)).eval()
    if not theirs:
        with pytest.raises(ValueError, match=f"cannot hold activation {activation}"):
            model.to_hf()
        return
    converted = model.to_hf().eval()
    assert (converted.config.activation_function if pre_norm else converted.config.afn) == theirs[0]
    assert GPTForCausalLM.from_hf(converted).config.activation == activation
    tokens = torch.randint(0, 61, (2, 9))
    with torch.no_grad(), gpt_fast.use_reference():
        assert torch.allclose(model(tokens).logits, converted(tokens).logits, atol=1e-4, rtol=1e-4)
    for name in theirs:
        config = copy.deepcopy(converted.config)
        setattr(config, "activation_function" if pre_norm else "afn", name)
        assert GPTForCausalLM.from_hf(type(converted)(config)).config.activation == activation


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_accelerate_recognises_it(activation):
    """`accelerate` recognises PyTorch's functions and modules, and the modules that transformers makes of each name."""
    row = ACTIVATIONS[activation]
    for function in (row.function, *row.aliases, row.make_module()):
        assert torch_modules._activation(function) == activation
    pytest.importorskip("transformers")
    from transformers.activations import ACT2FN

    from gpt_fast.integrations.huggingface import blocks

    assert {blocks._ACTIVATIONS[type(ACT2FN[name])] for name in row.gpt2} <= {activation}


def test_the_kernels_refuse_an_unknown_name(device, implementation):
    """The operators refuse an unknown name themselves, without the check of the public function."""
    x, fc_weight, fc_bias, proj_weight, proj_bias = sample_inputs((4, 8, 12, 8), torch.float32, device)
    tensors = x.detach(), fc_weight.detach(), fc_bias.detach(), proj_weight.detach()
    if implementation == "triton":  # a tl.static_assert fails, in the interpreter with AssertionError
        error, message = Exception, "ACTIVATION is unknown; expected relu, gelu or gelu_tanh"
    else:
        error, message = ValueError, f"gpt_fast.mlp: {UNKNOWN}"
    seed = torch.tensor([SEED], device=device)
    with pytest.raises(error, match=message):
        torch.ops.gpt_fast.mlp_forward(*tensors, proj_bias.detach(), "swish", 0.1, seed, SITE, True)
    dy, hidden = torch.randn(4, 8, device=device), torch.randn(4, 12, device=device)
    with pytest.raises(error, match=message):
        torch.ops.gpt_fast.mlp_backward(dy, *tensors, hidden, "swish", 0.1, seed, SITE, [True] * 5)


def test_python_refuses_an_unknown_name():
    x, *parameters = (tensor.detach() for tensor in sample_inputs((4, 8, 12, 8), torch.float32, "cpu"))
    for user, call in {
        "gpt_fast.mlp": lambda: ops.mlp(x, *parameters, "swish"),
        "gpt_fast.mlp$": lambda: reference.mlp(x, *parameters, "swish"),
        "gpt_fast.MLP": lambda: MLP(4, 8, "swish"),
        "GPTConfig": lambda: make_config("swish"),
        "somewhere": lambda: _activations.find("somewhere", "swish"),
    }.items():
        with pytest.raises(ValueError, match=f"^{user.rstrip('$')}: {UNKNOWN}$"):
            call()
    assert torch_modules._activation(nn.SiLU()) is None
    assert torch_modules._activation(torch.nn.functional.silu) is None


@pytest.mark.skipif(gpt_fast.build_info() is None or INTERPRETED, reason="the C++ step needs the extension's kernels")
def test_the_decode_step_refuses_an_unknown_name():
    from gpt_fast import _C

    with pytest.raises(ValueError, match=f"^gpt_fast.DecodeWeights: {UNKNOWN}$"):
        _C.DecodeWeights(
            {"token_emb.weight": torch.zeros(5, 4), "pos_emb": torch.zeros(1, 3, 4)}, num_heads=1, activation="swish",
            pre_norm=True, eps=1e-5, weights="float32",
        )  # fmt: skip


@pytest.mark.parametrize(("model_type", "option"), [("gpt2", "activation_function"), ("openai-gpt", "afn")])
def test_conversion_refuses_an_unknown_name(model_type, option):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=61, n_positions=16, n_embd=32, n_layer=1, n_head=2, **{option: "silu"}
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="from_hf: activation is 'silu'; expected one of relu, "):
        GPTForCausalLM.from_hf(theirs)
