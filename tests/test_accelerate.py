"""gpt_fast.accelerate on transformers' models: the same function, in place, and back."""

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn

import gpt_fast
from gpt_fast.integrations import _stock, transformers_models
from tests import numerics
from tests.hf_models import CLASSES, H, LAYERS, LM_HEADS, P, V, at_real_positions, inputs, make, padding, transformers, twins

# Every call that is left to transformers warns; a test that expects one says so.
pytestmark = pytest.mark.filterwarnings("error:gpt_fast")

LOSSES = ("loss", "mc_loss")


def run(model, given: dict, dtype: torch.dtype | None = None, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Outputs of one pass in training mode, at real tokens, and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = model(**given)
    values = {
        name: at_real_positions(out[name], mask).detach().clone()
        for name in ("loss", "mc_loss", "logits", "mc_logits", "start_logits", "end_logits", "last_hidden_state")
        if name in out
    }
    if "LMHead" in type(model).__name__ and out.logits.dtype == torch.float64:
        labels = given["labels"][:, 1:].flatten()  # transformers takes this loss in float32, whatever the logits are
        out["loss"] = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels)
        values["loss"] = out.loss.detach().clone()
    losses = [out[name] for name in LOSSES if name in out]
    total = sum(losses)
    if not losses:  # a trunk: a random upstream gradient at real tokens
        hidden = at_real_positions(out.last_hidden_state, mask)
        total = (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden.dtype)).sum()
    total.backward()
    return values | {f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def in_float64(model):
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if hasattr(module, "reorder_and_upcast_attn"):
            module.reorder_and_upcast_attn = False  # to float32, which would be a step down here
    return model


def assert_same(original, given: dict, accelerated=None, *, dtype: torch.dtype | None = None) -> None:
    """Accelerated and original agree with float64 alike: the original in the tested dtype is the yardstick."""
    if accelerated is None:
        accelerated = copy.deepcopy(original)
        gpt_fast.accelerate(accelerated, strict=True)
    mask = given.get("attention_mask")
    mask = mask if mask is not None and mask.dim() == 2 else None if mask is None else mask.squeeze(0)
    exact = run(in_float64(original), given, None, mask)
    yardstick, got = run(original, given, dtype, mask), run(accelerated, given, dtype, mask)
    assert got.keys() == yardstick.keys() == exact.keys()
    for name, value in got.items():
        assert value.dtype == yardstick[name].dtype or name in LOSSES, name
        assert value.shape == yardstick[name].shape, name
    # Pooled, each at its own scale: the error of one small tensor, or of a loss, is a single draw.
    gradients = {name for name in got if name.startswith("grad ")}
    for names, label in ((gradients, "gradients"), (got.keys() - gradients, "outputs")):
        scales = {name: exact[name].abs().max() for name in sorted(names)}
        floor = 1e-2 * max(scales.values())  # some gradients are 0 but for the rounding of their terms
        scales = {name: max(scale, floor) for name, scale in scales.items()}

        def pooled(values: dict[str, Tensor], scales: dict[str, Tensor] = scales) -> Tensor:
            return torch.cat([(values[name].double() / scale).flatten() for name, scale in scales.items()])

        numerics.assert_as_accurate(pooled(got), pooled(yardstick), pooled(exact), label=label)


# ---- the same function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("name", CLASSES)
def test_outputs_loss_and_gradients(name: str, side: str | None) -> None:
    assert_same(make(name), inputs(name, side))


@pytest.mark.parametrize("name", LM_HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    assert_same(make(name), inputs(name, "right"), dtype=dtype)


OPTIONS = [
    pytest.param("GPT2LMHeadModel", {"attn_implementation": "eager"}, id="eager"),
    pytest.param("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, id="inverse_layer_idx"),
    pytest.param("GPT2LMHeadModel", {"scale_attn_weights": False}, id="unscaled"),
    pytest.param(
        "GPT2LMHeadModel", {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}, id="reorder_and_upcast"
    ),
    pytest.param("GPT2LMHeadModel", {"is_causal": False}, id="bidirectional"),
    pytest.param("GPT2LMHeadModel", {"is_causal": False, "attn_implementation": "eager"}, id="bidirectional_eager"),
    pytest.param("GPT2LMHeadModel", {"activation_function": "gelu", "n_inner": 40}, id="exact_gelu_other_width"),
    pytest.param("GPT2LMHeadModel", {"activation_function": "relu", "tie_word_embeddings": False}, id="relu_untied"),
    pytest.param("GPT2LMHeadModel", {"n_head": 1, "layer_norm_epsilon": 1e-3}, id="one_head"),
    pytest.param("OpenAIGPTLMHeadModel", {"afn": "relu", "layer_norm_epsilon": 1e-3}, id="gpt1_relu"),
    pytest.param("GPT2LMHeadModel", {"use_cache": False}, id="no_cache"),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_options_of_the_configuration(name: str, options: dict) -> None:
    causal = options.get("is_causal", True)
    for side in ("right", "left"):
        given = inputs(name, side)
        if not causal:
            given["use_cache"] = False  # transformers has no bidirectional cache either
        assert_same(make(name, **options), given)


def test_another_activation_is_left_alone_and_right() -> None:
    model = make("GPT2LMHeadModel", activation_function="silu")
    accelerated = copy.deepcopy(model)
    report = gpt_fast.accelerate(accelerated)
    assert [entry.name for entry in report.left] == [f"transformer.h.{i}.mlp" for i in range(LAYERS)]
    assert "activation SiLUActivation" in report.left[0].reason
    assert_same(model, inputs("GPT2LMHeadModel"), accelerated)
    with pytest.raises(ValueError, match=r"strict=True, but 2 modules .*transformer\.h\.0\.mlp"):
        gpt_fast.accelerate(model, strict=True)
    assert not any(_stock.is_accelerated(module) for module in model.modules())


@pytest.mark.parametrize("name", LM_HEADS)
def test_other_ways_to_call(name: str) -> None:
    """Embeddings instead of tokens, token types, positions, tuples, positional arguments, labels in evaluation."""
    model, accelerated = twins(name)
    gpt_fast.accelerate(accelerated)
    tokens = inputs(name)["input_ids"]
    given = {
        "inputs_embeds": {"inputs_embeds": torch.randn(3, 11, 32), "labels": tokens},
        "token_type_ids": {"input_ids": tokens, "token_type_ids": tokens % 5, "labels": tokens},
        "position_ids": {"input_ids": tokens, "position_ids": torch.arange(2, 13)[None], "labels": tokens},
        "positions by row": {"input_ids": tokens, "position_ids": torch.randint(0, P, (3, 11)), "labels": tokens},
        "logits": {"input_ids": tokens, "labels": tokens, "output_hidden_states": True},
    }
    for label, arguments in given.items():
        if label == "positions by row" and name.startswith("GPT2"):
            arguments["use_cache"] = True  # without, transformers takes jumps for the starts of packed sequences
        wanted, got = model(**arguments), accelerated(**arguments)
        torch.testing.assert_close(got.loss, wanted.loss, msg=label)
        torch.testing.assert_close(got.logits, wanted.logits, msg=label)
        if "output_hidden_states" in arguments:
            assert len(got.hidden_states) == len(wanted.hidden_states) == LAYERS + 1
            for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True):
                torch.testing.assert_close(a, b)
    for mode in (True, False):
        model.train(mode), accelerated.train(mode)
        wanted, got = model(tokens, labels=tokens, return_dict=False), accelerated(tokens, labels=tokens, return_dict=False)
        assert isinstance(got, tuple) and len(got) == len(wanted)
        torch.testing.assert_close(got[0], wanted[0])
        torch.testing.assert_close(got[1], wanted[1])
    # The trunk alone, its mask by position.
    mask = padding("right", 3, 11)
    second = (mask,) if name.startswith("OpenAI") else (None, mask)
    a, b = model.transformer(tokens, *second), accelerated.transformer(tokens, *second)
    torch.testing.assert_close(a.last_hidden_state[mask.bool()], b.last_hidden_state[mask.bool()])


def test_loss_arguments_of_the_trainer() -> None:
    """num_items_in_batch divides a sum; shifted labels and another ignored index are taken as transformers does."""
    model, accelerated = twins("GPT2LMHeadModel")
    gpt_fast.accelerate(accelerated)
    tokens = inputs("GPT2LMHeadModel")["input_ids"]
    for arguments in (
        {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(50)}, {"ignore_index": 9},
        {"shift_labels": tokens.roll(3, 1)},
    ):  # fmt: skip
        wanted = model(tokens, labels=tokens, **arguments).loss
        torch.testing.assert_close(accelerated(tokens, labels=tokens, **arguments).loss, wanted)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_sequences_see_themselves_only(implementation: str) -> None:
    """transformers reads packing off positions that start again, where there is neither mask nor cache."""
    model, accelerated = twins("GPT2LMHeadModel", attn_implementation=implementation, use_cache=False)
    gpt_fast.accelerate(accelerated)
    tokens = inputs("GPT2LMHeadModel", B=2)["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    wanted = model(tokens, position_ids=positions).logits
    torch.testing.assert_close(accelerated(tokens, position_ids=positions).logits, wanted)
    alone = accelerated(tokens[:1, 4:6]).logits
    torch.testing.assert_close(alone, wanted[:1, 4:6])


def test_masks_of_four_dimensions() -> None:
    model, accelerated = twins("GPT2LMHeadModel")
    gpt_fast.accelerate(accelerated)
    tokens = inputs("GPT2LMHeadModel")["input_ids"]
    mask = torch.rand(3, 1, 11, 11) < 0.5
    mask |= torch.eye(11, dtype=torch.bool)
    wanted = model(tokens, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(accelerated(tokens, attention_mask=mask, use_cache=False).logits, wanted)
    additive = torch.zeros(3, 1, 11, 11).masked_fill(~mask, -5.0)
    wanted = model(tokens, attention_mask=additive, use_cache=False).logits
    with pytest.warns(UserWarning, match="attention_mask is torch.float32"):
        assert torch.equal(accelerated(tokens, attention_mask=additive, use_cache=False).logits, wanted)


# ---- known traps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LM_HEADS)
def test_padding_is_not_dropped(name: str) -> None:
    """What padding contains changes nothing, and a padded row gives what it gives alone."""
    model = make(name).eval()
    gpt_fast.accelerate(model)
    given = inputs(name, "left")
    tokens, mask = given["input_ids"], given["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(tokens, attention_mask=mask, position_ids=positions).logits
    other = torch.where(mask.bool(), tokens, 9)
    assert torch.equal(model(other, attention_mask=mask, position_ids=positions).logits[mask.bool()], out[mask.bool()])
    assert (model(tokens, position_ids=positions).logits - out)[1, -1].abs().max() > 0.01
    row = tokens[2:, -int(mask[2].sum()) :]
    torch.testing.assert_close(model(row).logits[0], out[2, -row.shape[1] :])


@pytest.mark.parametrize("name", LM_HEADS)
def test_attention_probabilities(name: str) -> None:
    """Asked for, the call runs as transformers has it, bit for bit, and says so; later calls are fused again."""
    model = make(name, attn_implementation="eager").eval()
    given = inputs(name, "right")
    wanted = model(**given, output_attentions=True)
    gpt_fast.accelerate(model)
    with pytest.warns(UserWarning, match="output_attentions=True asks for the probabilities"):
        got = model(**given, output_attentions=True)
    assert len(got.attentions) == LAYERS and got.attentions[0].shape == (3, H, 11, 11)
    assert all(torch.equal(a, b) for a, b in zip(got.attentions, wanted.attentions, strict=True))
    assert torch.equal(got.logits, wanted.logits)
    mask = given["attention_mask"].bool()
    torch.testing.assert_close(model(**given).logits[mask], wanted.logits[mask])  # transformers' hooks stay in place


def test_cross_attention() -> None:
    model = make("GPT2LMHeadModel", add_cross_attention=True).eval()
    tokens, states = inputs("GPT2LMHeadModel")["input_ids"], torch.randn(3, 5, 32)
    wanted = model(tokens, encoder_hidden_states=states, use_cache=False).logits
    plain = model(tokens, use_cache=False).logits
    report = gpt_fast.accelerate(model)
    assert {entry.kind for entry in report.left} == {"GPT2Attention"}
    with pytest.warns(UserWarning, match="encoder_hidden_states given"):
        assert torch.equal(model(tokens, encoder_hidden_states=states, use_cache=False).logits, wanted)
    torch.testing.assert_close(model(tokens, use_cache=False).logits, plain)


def test_arguments_nobody_knows_are_left_to_transformers() -> None:
    model = make("GPT2Model").eval()
    gpt_fast.accelerate(model)
    with pytest.warns(UserWarning, match="head_mask given"):
        model(inputs("GPT2Model")["input_ids"], head_mask=torch.ones(LAYERS, H))


@pytest.mark.parametrize("side", [None, "left"])
def test_generation_with_a_cache(side: str | None) -> None:
    model, accelerated = twins("GPT2LMHeadModel")
    model.eval(), accelerated.eval()
    gpt_fast.accelerate(accelerated)
    given = {k: v for k, v in inputs("GPT2LMHeadModel", side).items() if k != "labels"}
    for options in ({"do_sample": False}, {"num_beams": 3}):
        wanted = model.generate(**given, max_new_tokens=8, **options)
        assert torch.equal(accelerated.generate(**given, max_new_tokens=8, **options), wanted)
    out, again = accelerated(**given), model(**given)
    assert out.cache.get_seq_length() == 11
    step = {"input_ids": torch.tensor([[9, 10], [11, 12], [13, 14]])}
    if side:
        step["attention_mask"] = torch.cat((given["attention_mask"], torch.ones(3, 2, dtype=torch.int64)), 1)
    got, wanted = accelerated(**step, cache=out.cache), model(**step, cache=again.cache)
    torch.testing.assert_close(got.logits, wanted.logits)
    for a, b in zip(out.cache.layers, again.cache.layers, strict=True):
        mask = slice(None) if side is None else torch.ones(3, H, 13, dtype=torch.bool)
        if side is not None:
            mask &= step["attention_mask"][:, None].bool()
        torch.testing.assert_close(a.keys[mask], b.keys[mask])
        torch.testing.assert_close(a.values[mask], b.values[mask])


def test_a_prefix_in_the_cache_gets_gradients() -> None:
    """Prefix tuning: trained keys and values come before the tokens."""
    model, accelerated = twins("GPT2LMHeadModel")
    gpt_fast.accelerate(accelerated)
    tokens = inputs("GPT2LMHeadModel")["input_ids"]
    gradients = []
    for each in (model, accelerated):
        torch.manual_seed(3)
        prefix = [torch.randn(3, H, 4, 8, requires_grad=True) for _ in range(2 * LAYERS)]
        cache = transformers.DynamicCache()
        for i in range(LAYERS):
            cache.update(prefix[2 * i], prefix[2 * i + 1], i)
        mask = torch.ones(3, 15, dtype=torch.int64)
        each(tokens, cache=cache, attention_mask=mask, labels=tokens).loss.backward()
        gradients.append([value.grad for value in prefix])
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


def test_a_static_cache_is_left_to_transformers() -> None:
    model = make("GPT2LMHeadModel").eval()
    tokens = inputs("GPT2LMHeadModel")["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    wanted = model.generate(tokens, **options)
    gpt_fast.accelerate(model)
    with pytest.warns(UserWarning, match="a StaticCache as cache"):
        assert torch.equal(model.generate(tokens, **options), wanted)


@pytest.mark.parametrize("name", LM_HEADS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """With dropout: the same gradients bit for bit, and blocks are really recomputed. GPT-1 gains it."""
    model = make(name, 0.1)
    if name.startswith("OpenAI"):
        assert not model.supports_gradient_checkpointing
    gpt_fast.accelerate(model)
    given = inputs(name, "right")
    calls, forward = [], transformers_models._attend
    gradients = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_models, "_attend", lambda *args: (calls.append(1), forward(*args))[1])
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            torch.manual_seed(5)
            model.zero_grad()
            model(**given).loss.backward()
            gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert len(calls) == 3 * LAYERS
    for label, wanted in gradients[0].items():
        if "w" in label.split(".")[1][:1] or "embed" in label:  # transformers' hook sends these through PyTorch's op
            torch.testing.assert_close(gradients[1][label], wanted)
        else:
            assert torch.equal(gradients[1][label], wanted), label
    model.gradient_checkpointing_disable()
    gpt_fast.restore(model)
    if name.startswith("OpenAI"):
        with pytest.raises(ValueError, match="does not support"):
            model.activation_checkpointing_enable()
