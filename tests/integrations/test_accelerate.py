"""gpt_fast.accelerate on transformers' models: the same function, in place, and back."""

import copy
import dataclasses
import functools
import io
import logging
import pickle
import types
import warnings

import pytest
import torch
import torch.distributed.utils as torch_distributed_utils
from torch import Tensor, nn
from torch.nn.parallel import distributed as ddp
from torch.utils import _pytree as pytree

import gpt_fast
from gpt_fast import _plain
from gpt_fast.integrations.huggingface import blocks
from tests.hf_models import (
    CLASSES,
    LAYERS,
    LM_HEADS,
    PAD,
    H,
    P,
    V,
    assert_same,
    inputs,
    make,
    padding,
    run,
    transformers,
    twins,
)

# A call that is left to transformers warns. Tests that expect the warning use pytest.warns.
pytestmark = pytest.mark.filterwarnings("error:gpt_fast")

# ---- the same function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("name", CLASSES)
def test_outputs_loss_and_gradients(name: str, side: str | None) -> None:
    assert_same(make(name), inputs(name, side))


@pytest.mark.parametrize("name", LM_HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    assert_same(make(name), inputs(name, "right"), dtype=dtype)


@pytest.mark.parametrize("name", LM_HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_weights_in_half_precision(name: str, dtype: torch.dtype) -> None:
    assert_same(make(name).to(dtype), inputs(name, "left"))


# Options of the configuration. Each is tested on every class of its family.
OPTIONS = {
    "GPT2": {
        "eager": {"attn_implementation": "eager"},
        "inverse_layer_idx": {"scale_attn_by_inverse_layer_idx": True},
        "unscaled": {"scale_attn_weights": False},
        "reorder_and_upcast": {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
        "bidirectional": {"is_causal": False},
        "bidirectional_eager": {"is_causal": False, "attn_implementation": "eager"},
        "exact_gelu_other_width": {"activation_function": "gelu", "n_inner": 40},
        "relu_untied": {"activation_function": "relu", "tie_word_embeddings": False},
        "one_head": {"n_head": 1, "layer_norm_epsilon": 1e-3},
        "no_cache": {"use_cache": False},
    },
    "OpenAIGPT": {
        "relu": {"afn": "relu", "layer_norm_epsilon": 1e-3},
        "untied_one_head": {"tie_word_embeddings": False, "n_head": 1},
    },
}
CLASSES_AND_OPTIONS = [
    pytest.param(name, options, id=f"{name}-{label}")
    for name in CLASSES
    for label, options in OPTIONS["GPT2" if name.startswith("GPT2") else "OpenAIGPT"].items()
]


@pytest.mark.parametrize("rows", ["many", "few"])
@pytest.mark.parametrize("name", LM_HEADS)
def test_transposed_weights_are_read_in_place(name: str, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many rows our ops read the parameters' own memory. Gradients always have the parameters' strides.

    With few rows PyTorch computes the products.
    """
    model = make(name)
    gpt_fast.accelerate(model)
    read: list[Tensor] = []

    def recorded(run_op, *args):
        read.extend(arg for arg in args if isinstance(arg, Tensor))
        return run_op(*args)

    for op in ("linear", "mlp"):
        monkeypatch.setattr(gpt_fast.ops, op, functools.partial(recorded, getattr(gpt_fast.ops, op)))
    model(**inputs(name, B=3 if rows == "many" else 1)).loss.backward()
    matrices = [p for n, p in model.named_parameters() if ".h." in n and p.dim() == 2]
    assert len(matrices) == 4 * LAYERS
    places = {tensor.data_ptr() for tensor in read}
    assert all((matrix.data_ptr() in places) == (rows == "many") for matrix in matrices)
    assert all(matrix.grad.stride() == matrix.stride() for matrix in matrices)


@pytest.mark.parametrize(("name", "options"), CLASSES_AND_OPTIONS)
def test_options_of_the_configuration(name: str, options: dict) -> None:
    for side in ("right", "left"):
        given = inputs(name, side)
        if not options.get("is_causal", True):
            given["use_cache"] = False  # transformers has no bidirectional cache either
        model = make(name, **options)
        accelerated = copy.deepcopy(model)
        gpt_fast.accelerate(accelerated, strict=True)
        if "Question" in name and side == "left":
            # The softmax of the loss includes padding, whose queries see no key. In eager attention they attend to
            # every key, in sdpa and in ours to none.
            model.config._attn_implementation = "sdpa"
        assert_same(model, given, accelerated)


HEAD_OPTIONS = [
    pytest.param("GPT2DoubleHeadsModel", {"summary_type": "mean", "summary_activation": "tanh"}, id="mean_and_tanh"),
    pytest.param("OpenAIGPTDoubleHeadsModel", {"summary_type": "last", "summary_proj_to_labels": False}, id="last"),
    pytest.param("GPT2ForSequenceClassification", {"problem_type": "regression"}, id="regression"),
    pytest.param("OpenAIGPTForSequenceClassification", {"problem_type": "multi_label_classification"}, id="labels"),
    pytest.param("GPT2ForTokenClassification", {"num_labels": 5}, id="five_tags"),
]


@pytest.mark.parametrize(("name", "options"), HEAD_OPTIONS)
def test_options_of_the_heads(name: str, options: dict) -> None:
    # In transformers these summaries reduce the choices and keep every token. With padding on the left that
    # includes queries without keys.
    for side in ("right",) if "summary_type" in options else ("right", "left"):
        given = inputs(name, side)
        if "problem_type" in options:
            given["labels"] = torch.rand(3, 3)
        if "summary_type" in options:
            given.pop("mc_labels")  # there is no score for each choice
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
    assert not any(_plain.is_accelerated(module) for module in model.modules())


@pytest.mark.parametrize("name", LM_HEADS)
def test_other_ways_to_call(name: str) -> None:
    """Results agree for embeddings, token types, positions, tuples, positional arguments and labels in evaluation."""
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
            arguments["use_cache"] = True  # without a cache, transformers reads jumps as packed sequences
        wanted, got = model(**arguments), accelerated(**arguments)
        torch.testing.assert_close(got.loss, wanted.loss, msg=label)
        torch.testing.assert_close(got.logits, wanted.logits, msg=label)
        if "output_hidden_states" in arguments:
            assert len(got.hidden_states) == len(wanted.hidden_states) == LAYERS + 1
            for a, b in zip(got.hidden_states, wanted.hidden_states, strict=True):
                torch.testing.assert_close(a, b)
    for mode in (True, False):
        model.train(mode), accelerated.train(mode)
        wanted, got = (
            model(tokens, labels=tokens, return_dict=False),
            accelerated(tokens, labels=tokens, return_dict=False),
        )
        assert isinstance(got, tuple) and len(got) == len(wanted)
        torch.testing.assert_close(got[0], wanted[0])
        torch.testing.assert_close(got[1], wanted[1])
    # The trunk alone, with its mask as a positional argument.
    mask = padding("right", 3, 11)
    second = (mask,) if name.startswith("OpenAI") else (None, mask)
    a, b = model.transformer(tokens, *second), accelerated.transformer(tokens, *second)
    torch.testing.assert_close(a.last_hidden_state[mask.bool()], b.last_hidden_state[mask.bool()])


def test_loss_arguments_of_the_trainer() -> None:
    """The loss is transformers' for num_items_in_batch, ignore_index and shift_labels."""
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
    """Without mask and cache, transformers reads positions that start again as packed sequences."""
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
    """Tokens at padding do not change the logits of real tokens. A padded row gives the logits of the row alone."""
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
    """With output_attentions=True the call runs transformers' code bit for bit, and warns. Later calls do not warn."""
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


def test_a_cache_by_its_older_name() -> None:
    model, accelerated = twins("GPT2LMHeadModel")
    gpt_fast.accelerate(accelerated)
    tokens = inputs("GPT2LMHeadModel")["input_ids"]
    losses, hidden = [], []
    for each in (model, accelerated):
        cache = each(tokens).cache
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # transformers warns about the older name
            losses.append(each(tokens[:, :4], past_key_values=cache, labels=tokens[:, :4], use_cache=True).loss)
            hidden.append(each.transformer(tokens[:, :2], past_key_values=cache).last_hidden_state)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*hidden)


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
    """With dropout, gradients equal those without checkpointing bit for bit, and backward recomputes the blocks.

    GPT-1 supports checkpointing only while it is accelerated.
    """
    model = make(name, 0.1)
    if name.startswith("OpenAI"):
        assert not model.supports_gradient_checkpointing
    gpt_fast.accelerate(model)
    given = inputs(name, "right")
    calls, forward = [], blocks._attend
    gradients = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_attend", lambda *args: (calls.append(1), forward(*args))[1])
        for checkpointed in (False, True):
            if checkpointed:
                model.activation_checkpointing_enable({"use_reentrant": reentrant})
            torch.manual_seed(5)
            model.zero_grad()
            model(**given).loss.backward()
            gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert len(calls) == 3 * LAYERS
    for label, wanted in gradients[0].items():
        if "w" in label.split(".")[1][:1] or "embed" in label:  # transformers' hook calls PyTorch's embedding
            torch.testing.assert_close(gradients[1][label], wanted)
        else:
            assert torch.equal(gradients[1][label], wanted), label
    model.activation_checkpointing_disable()
    gpt_fast.restore(model)
    if name.startswith("OpenAI"):
        with pytest.raises(ValueError, match="does not support"):
            model.activation_checkpointing_enable()


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LM_HEADS)
def test_every_dropout_is_applied_and_is_ours(name: str) -> None:
    """Each rate alone makes the training loss random. With all, the loss is `GPTForCausalLM`'s for the same seed."""
    tokens = inputs(name)["input_ids"]
    for which in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        model = make(name, 0.0, **{which: 0.5})
        gpt_fast.accelerate(model)
        losses = {float(model(tokens, labels=tokens).loss.detach()) for _ in range(3)}
        assert len(losses) == 3, which
        losses = {float(model.eval()(tokens, labels=tokens).loss.detach()) for _ in range(3)}
        assert len(losses) == 1, which
    model = make(name, None)
    ours = gpt_fast.GPTForCausalLM.from_hf(model)
    assert ours.config.attention_dropout == ours.config.residual_dropout == 0.1
    gpt_fast.accelerate(model)
    for reference in (False, True):
        if reference:  # in float64, other dropped elements would show above rounding
            model, ours = model.double(), ours.double()
        losses = []
        for each in (model, ours):
            torch.manual_seed(11)
            losses.append(each(tokens, labels=tokens).loss)
        torch.testing.assert_close(*losses, rtol=1e-12 if reference else 1e-5, atol=0)


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("GPT2Model", "OpenAIGPTModel")])
def test_dropout_in_distribution(name: str) -> None:
    """The mean loss over 100 passes is that of PyTorch's dropout within four standard errors."""
    model, accelerated = twins(name, 0.3)
    gpt_fast.accelerate(accelerated)
    given = inputs(name)
    with torch.no_grad():
        a, b = (torch.stack([each(**given).loss for _ in range(100)]) for each in (model, accelerated))
    assert (a.mean() - b.mean()).abs() < 4 * (a.var() / 100 + b.var() / 100).sqrt()
    assert 0.6 < a.std() / b.std() < 1.6


# ---- gradients of each sample ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LM_HEADS)
def test_gradients_of_each_padded_row(name: str) -> None:
    model = make(name, use_cache=False)
    gpt_fast.accelerate(model)
    parameters = {label: parameter.detach() for label, parameter in model.named_parameters()}

    def loss(parameters: dict, given: dict) -> Tensor:
        return torch.func.functional_call(model, parameters, (), given).loss

    given = inputs(name, "left")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="gpt_fast")  # the reference serves inside vmap, and warns
        rows = torch.func.vmap(torch.func.grad(loss), (None, 0))(
            parameters, {label: value[:, None] for label, value in given.items()}
        )
    for i in range(3):
        model.zero_grad()
        model(**{label: value[i : i + 1] for label, value in given.items()}).loss.backward()
        for label, parameter in model.named_parameters():
            torch.testing.assert_close(rows[label][i], parameter.grad, rtol=1e-4, atol=1e-6)


# ---- the loss without logits -----------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list:
    """Return a list that grows when deferred logits are computed."""
    from gpt_fast.integrations.huggingface.losses import Deferred

    calls: list = []
    before = Deferred.__call__
    monkeypatch.setattr(Deferred, "__call__", lambda self: (calls.append(1), before(self))[1])
    return calls


@pytest.mark.parametrize("name", [name for name in CLASSES if "LMHead" in name or "Double" in name])
def test_logits_are_computed_when_they_are_read(name: str, computed: list) -> None:
    model, accelerated = twins(name)
    gpt_fast.accelerate(accelerated)
    given = inputs(name)
    wanted = model(**given)
    out = accelerated(**given)
    assert type(out).__name__ == type(wanted).__name__ and isinstance(out, type(wanted))
    assert list(out) == list(wanted) and len(out) == len(wanted)
    assert torch.equal(out["loss"], out.loss) and torch.equal(out[0], out.loss)
    assert not computed
    torch.testing.assert_close(out.logits, wanted.logits)
    assert len(computed) == 1
    torch.testing.assert_close(out["logits"], wanted.logits)
    torch.testing.assert_close(out.to_tuple()[list(wanted).index("logits")], wanted.logits)
    assert len(computed) == 1, "once is enough"
    assert torch.equal(accelerated(**given).get("logits"), out.logits)
    assert len(accelerated(**given)[:2]) == 2
    before = len(computed)
    for arguments, mode in (({"logits": True}, True), ({}, False)):
        accelerated.train(mode)
        torch.testing.assert_close(accelerated(**given, **arguments).logits, wanted.logits)
    assert len(computed) == before, "these calls are transformers' own"
    assert accelerated.eval()(**given, logits=False).loss is not None


def inside(module: str, function):
    """Return `function` as if `module` defined it."""
    return types.FunctionType(function.__code__, globals() | {"__name__": module})


def rebuilt_from_leaves(out):
    return pytree.tree_unflatten(*pytree.tree_flatten(out))


def in_mixed_precision(out):
    return pytest.importorskip("accelerate").utils.convert_to_fp32(out)


WRAPPERS = {
    "accelerate_mixed_precision": in_mixed_precision,
    "ddp_unused_parameters": lambda out: (list(ddp._find_tensors(out)), out)[1],
    "fsdp1": lambda out: torch_distributed_utils._apply_to_tensors(lambda x: x, out),
    "fsdp2": inside("torch.distributed.fsdp._fully_shard._fsdp_state", rebuilt_from_leaves),
}


@pytest.mark.parametrize("walk", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_take_outputs_apart_without_computing_logits(walk, computed: list) -> None:
    """Wrappers walk over the outputs in every pass, even if no logits are read. Rebuilt outputs still have logits."""
    original, model = twins("GPT2LMHeadModel")
    gpt_fast.accelerate(model)
    given = inputs("GPT2LMHeadModel")
    out, wanted = model(**given), original(**given)
    rebuilt = walk(out)
    assert not computed and torch.equal(rebuilt.loss, out.loss)
    torch.testing.assert_close(rebuilt.logits, wanted.logits)


READERS = {
    "items": lambda out: dict(out.items())["logits"],
    "values": lambda out: list(out.values())[list(out).index("logits")],
    "unpacked": lambda out: {**out}["logits"],
    "pytree": lambda out: pytree.tree_leaves(out)[list(out).index("logits")],
    "dataclass": lambda out: dataclasses.replace(out).logits,
    "accelerate_to_device": lambda out: dict.__getitem__(
        pytest.importorskip("accelerate").utils.send_to_device(out, "cpu"), "logits"
    ),
    "data_parallel": inside("torch.nn.parallel.scatter_gather", lambda out: out["logits"]),
    "copy": lambda out: dict.__getitem__(copy.copy(out), "logits"),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_every_other_reader_meets_logits(read, computed: list) -> None:
    original, model = twins("GPT2LMHeadModel")
    gpt_fast.accelerate(model)
    given = inputs("GPT2LMHeadModel")
    torch.testing.assert_close(read(model(**given)), original(**given).logits)
    assert len(computed) == 1


def test_items_are_read_one_by_one_without_logits(computed: list) -> None:
    model = make("GPT2LMHeadModel")
    gpt_fast.accelerate(model)
    out = model(**inputs("GPT2LMHeadModel"))
    assert out["loss"] is out.loss and out.get("nothing", 3) == 3 and "logits" in out
    with pytest.raises(KeyError):
        out["nothing"]
    assert not computed


def saved(out):
    buffer = io.BytesIO()
    torch.save(out, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "GPT2DoubleHeadsModel"])
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda out: pickle.loads(pickle.dumps(out)), saved],  # noqa: S301
    ids=["copy", "deepcopy", "pickle", "save"],
)  # fmt: skip
def test_outputs_are_copied_and_saved_as_transformers_own(name: str, duplicate) -> None:
    original, model = twins(name, use_cache=False)
    gpt_fast.accelerate(model)
    given = inputs(name)
    with torch.no_grad():  # deepcopy refuses tensors with a graph, in transformers' outputs too
        wanted, got = original(**given), duplicate(model(**given))
    assert type(got) is type(wanted) and list(got) == list(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value)


READ_LATER = "read logits before the update, or call the model with logits=True"


def step(model, **options) -> None:
    torch.optim.SGD(model.parameters(), lr=1.0, **options).step()


def load(model, assign: bool) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=assign)


CHANGES = {
    "optimizer": step,
    "fused_optimizer": functools.partial(step, fused=True),  # does not raise the version counter
    "data": lambda model: model.lm_head.weight.data.mul_(2),
    "in_place": lambda model: model.lm_head.weight.detach().mul_(2),
    "state_dict": functools.partial(load, assign=False),
    "other_parameter": lambda model: setattr(model.lm_head, "weight", nn.Parameter(torch.zeros(V, 32))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_logits_read_after_an_update_raise(change) -> None:
    """After the update the weights of the pass are gone, so no logits could be the ones of the pass."""
    original, model = twins("GPT2LMHeadModel")
    gpt_fast.accelerate(model)
    given = inputs("GPT2LMHeadModel")
    early, late = model(**given), model(**given)
    wanted = original(**given).logits
    torch.testing.assert_close(early.logits, wanted)
    late.loss.backward()
    change(model)
    torch.testing.assert_close(early.logits, wanted)  # logits that were read before stay
    for read in (lambda: late.logits, lambda: late["logits"], lambda: dict(late.items()), lambda: pickle.dumps(late)):
        with pytest.raises(RuntimeError, match=f"gpt_fast.accelerate: logits has .*{READ_LATER}"):
            read()
    assert late.loss is late[0]


def test_logits_of_hidden_states_that_were_overwritten_raise() -> None:
    model = make("GPT2LMHeadModel")
    gpt_fast.accelerate(model)
    with torch.no_grad():
        out = model(**inputs("GPT2LMHeadModel"), output_hidden_states=True)
        out.hidden_states[-1].zero_()
    with pytest.raises(RuntimeError, match="hidden states that changed after the pass"):
        _ = out.logits


MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("reader", MODES.values(), ids=[f"read_in_{name}" for name in MODES])
@pytest.mark.parametrize("mode", MODES.values(), ids=[f"passed_in_{name}" for name in MODES])
def test_logits_have_the_gradient_mode_of_their_pass(mode, reader) -> None:
    """The reader's mode changes nothing: under `no_grad` logits keep their pass's graph, and no read starts one."""
    original, model = twins("GPT2LMHeadModel")
    gpt_fast.accelerate(model)
    given = inputs("GPT2LMHeadModel")
    with mode():
        out, wanted = model(**given), original(**given).logits
    with reader():
        logits = out.logits
    assert (logits.requires_grad, logits.is_inference()) == (wanted.requires_grad, wanted.is_inference())
    if wanted.requires_grad:
        logits.square().sum().backward()
        wanted.square().sum().backward()
        for (label, got), expected in zip(model.named_parameters(), original.parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=label)


@pytest.mark.parametrize(("inside", "outside"), [(True, False), (False, True)], ids=["pass", "reader"])
def test_logits_have_the_autocast_of_their_pass(inside: bool, outside: bool) -> None:
    model = make("GPT2LMHeadModel")
    gpt_fast.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        out = model(**inputs("GPT2LMHeadModel"))
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        assert out.logits.dtype == (torch.bfloat16 if inside else torch.float32)


# ---- a loss over no label --------------------------------------------------------------------------------------------

ITEMS = {"no_items": None, "int": 0, "tensor": torch.tensor(0), "some_items": 5}


@pytest.mark.parametrize("items", ITEMS.values(), ids=ITEMS)
@pytest.mark.parametrize(
    ("training", "options"), [(True, {}), (True, {"logits": True}), (False, {}), (False, {"return_dict": False})],
    ids=["training", "training_with_logits", "evaluation", "evaluation_as_tuple"],
)  # fmt: skip
@pytest.mark.parametrize("name", [name for name in CLASSES if "LMHead" in name or "Double" in name])
def test_a_loss_over_no_label_is_zero(name: str, training: bool, options: dict, items) -> None:
    """Without labels the gradients are zero too. With one label in each row the loss is transformers'."""
    if items is not None and "Double" in name:
        pytest.skip("transformers' double heads take no num_items_in_batch")
    original, model = (each.train(training) for each in twins(name))
    gpt_fast.accelerate(model)
    given = inputs(name) | options | ({} if items is None else {"num_items_in_batch": items})
    given.pop("mc_labels", None)
    labels = given.pop("labels")
    loss = model(**given, labels=torch.full_like(labels, -100))[0]
    assert loss == 0
    loss.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
    labels = labels.index_fill(-1, torch.arange(2, labels.shape[-1]), -100)  # one label in each row
    if items not in (None, 5):
        given["num_items_in_batch"] = items + 3
    given.pop("logits", None)
    torch.testing.assert_close(model(**given, labels=labels)[0], original(**given, labels=labels)[0])


# ---- transformers' warnings ------------------------------------------------------------------------------------------


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of the messages that transformers logs by `warning_once`. It has repeated messages too."""
    messages: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, message: messages.append(message))
    return messages


@pytest.mark.parametrize("name", ["GPT2Model", *LM_HEADS])
def test_padding_without_a_mask_is_told(name: str, warned: list[str]) -> None:
    model = make(name)
    gpt_fast.accelerate(model)
    tokens, mask = torch.full((2, 5), PAD), torch.ones(2, 5, dtype=torch.int64)
    model(tokens, attention_mask=mask)
    assert not warned
    model(tokens)
    assert len(warned) == 1 and "passing in an `attention_mask`" in warned[0]


def test_a_cache_under_gradient_checkpointing_is_told(warned: list[str]) -> None:
    model = make("GPT2LMHeadModel")
    gpt_fast.accelerate(model)
    model.activation_checkpointing_enable()
    warned.clear()
    assert model(**inputs("GPT2LMHeadModel"), use_cache=True).cache is None
    assert [message for message in warned if "incompatible with gradient checkpointing" in message]


@pytest.mark.parametrize("both", [False, True], ids=["older_name", "both_names"])
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_an_older_argument_name_is_told_once(mode: bool, both: bool) -> None:
    """The forward that the user calls warns, and the forwards that it calls do not."""
    model = make("GPT2LMHeadModel").train(mode)
    gpt_fast.accelerate(model)
    tokens = inputs("GPT2LMHeadModel")["input_ids"]
    cache = model(tokens).cache
    given = {"past_key_values": cache} | ({"cache": cache} if both else {})
    with pytest.warns(FutureWarning) as record:
        assert model(tokens[:, :4], labels=tokens[:, :4], use_cache=True, **given).cache is cache
    told = [str(warning.message) for warning in record if "past_key_values" in str(warning.message)]
    assert len(told) == 1 and "deprecated for `GPT2LMHeadModel.forward`" in told[0]


# ---- in place, and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_in_place_and_restored_bit_for_bit(name: str) -> None:
    model, original = twins(name)
    kind, parameters, names = type(model), list(model.parameters()), list(model.state_dict())
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    given = inputs(name, "right")
    report = gpt_fast.accelerate(model)
    assert not report.left and len(report.replaced) >= 6 * LAYERS + 2
    assert {entry.op for entry in report.replaced} >= {"attention", "linear", "add_layer_norm", "mlp", "embedding"}
    assert ("linear_cross_entropy" in str(report)) == ("LMHead" in name or "Double" in name)
    assert type(model) is kind and isinstance(model, transformers.PreTrainedModel)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == names
    again = gpt_fast.accelerate(model)
    assert not again.replaced and "accelerated already" in str(again)
    assert gpt_fast.restore(model) is model
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    got, wanted = run(model, given), run(original, given)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    gpt_fast.restore(model)  # nothing left to undo


@pytest.mark.parametrize("name", CLASSES)
def test_saved_copied_and_loaded(name: str, tmp_path) -> None:
    model = make(name).eval()
    given = {key: value for key, value in inputs(name).items() if key == "input_ids"}
    wanted = model(**given)[0]
    gpt_fast.accelerate(model)
    got = model(**given)[0]
    torch.testing.assert_close(got, wanted)
    model.save_pretrained(tmp_path)
    assert '"architectures": [\n    "' + name in (tmp_path / "config.json").read_text()
    loaded = getattr(transformers, name).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**given)[0], wanted)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(**given)[0], got)
        with torch.no_grad():
            next(twin.parameters()).zero_()  # the copy's forward reads the copy's weights
        assert not torch.equal(twin(**given)[0], got)
        gpt_fast.restore(twin)
        assert not any("forward" in vars(module) for module in twin.modules())
    assert torch.equal(model(**given)[0], got)


def test_hooks_on_any_module_are_run() -> None:
    model, original = twins("GPT2LMHeadModel")
    gpt_fast.accelerate(model)
    given = inputs("GPT2LMHeadModel")
    seen: dict[str, list] = {"a": [], "b": []}
    for each, label in ((model, "a"), (original, "b")):
        for path, module in each.named_modules():
            if (path.startswith("transformer.h.1") and "dropout" not in path) or path in ("transformer.wte", "lm_head"):
                module.register_forward_hook(lambda m, i, o, path=path, label=label: seen[label].append(path))
    torch.testing.assert_close(model(**given).loss, original(**given).loss)
    assert sorted(seen["a"]) == sorted(seen["b"]) and "transformer.h.1.mlp.act" in seen["a"]


def test_who_looks_at_a_block_sees_its_sum() -> None:
    """A block leaves its last addition, with dropout, to the next block's norm, unless a hook reads the output."""
    model, original = twins("GPT2LMHeadModel", 0.1, n_layer=4)
    gpt_fast.accelerate(model)
    given, seen = inputs("GPT2LMHeadModel"), []
    model.double()
    losses = []
    for hooked in (None, 1, 3):
        if hooked is not None:
            model.transformer.h[hooked].register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
        torch.manual_seed(3)
        losses.append(model(**given).loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-13, atol=0)
    seen.clear()
    wanted = original.double().eval()(**given, output_hidden_states=True).hidden_states
    got = model.eval()(**given, output_hidden_states=True).hidden_states
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    for i, (x, y) in zip((1, 3), seen, strict=True):
        torch.testing.assert_close(x, wanted[i])
        if i < 3:
            torch.testing.assert_close(y, wanted[i + 1])


def test_a_forward_put_on_a_module_is_respected() -> None:
    """A forward set on an instance, as Accelerate's device maps do, is neither replaced nor bypassed."""
    model = make("GPT2LMHeadModel")
    norm, attn = model.transformer.h[0].ln_1, model.transformer.h[0].attn
    norm.forward = lambda x: x * 0 + 1
    given = inputs("GPT2LMHeadModel")
    wanted = model(**given).loss
    report = gpt_fast.accelerate(model)
    assert [(entry.name, entry.reason) for entry in report.left] == [
        ("transformer.h.0.ln_1", "has a forward of its own")
    ]
    torch.testing.assert_close(model(**given).loss, wanted)
    ours, block = attn.forward, model.transformer.h[1]
    calls: list = []

    def wrapped(module, *args, **kwargs):
        calls.append(module)
        return forwards[module](*args, **kwargs)

    forwards = {each: each.forward for each in (attn, block)}
    for each in forwards:
        each.forward = functools.partial(wrapped, each)
    torch.testing.assert_close(model(**given).loss, wanted)
    assert calls == [attn, block]
    block.forward = forwards[block]
    with pytest.raises(ValueError, match=r"restore: the forward of transformer\.h\.0\.attn .*wrapped after accelerate"):
        gpt_fast.restore(model)
    attn.forward = ours
    gpt_fast.restore(model)
    assert torch.equal(model(**given).loss, wanted)


def test_a_subclass_with_its_own_forward_keeps_it() -> None:
    class Mine(transformers.GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs).loss * 2

    model = Mine(make("GPT2LMHeadModel").config).eval()
    given = inputs("GPT2LMHeadModel")
    wanted = model(**given)
    report = gpt_fast.accelerate(model)
    assert "has a class (Mine) with a forward of its own" in str(report)
    torch.testing.assert_close(model(**given), wanted)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [nn.Linear(2, 2), "gpt2", None], ids=str)
def test_other_models_are_named(bad) -> None:
    kind = type(bad).__name__
    with pytest.raises(TypeError, match=rf"model is a {kind}; expected .*GPT2LMHeadModel.*OpenAIGPTLMHeadModel"):
        gpt_fast.accelerate(bad)
    if isinstance(bad, nn.Module):
        assert not any(name.startswith("_gpt_fast") for name in vars(bad))


def test_heads_too_wide_for_the_kernels() -> None:
    model = make("GPT2Model", n_embd=257, n_head=1)
    report = gpt_fast.accelerate(model)
    assert [(entry.name, entry.reason) for entry in report.left] == [("", "has heads of 257; expected at most 256")]


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_a_failure_half_way_leaves_the_model_as_it_was(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, original = twins("OpenAIGPTLMHeadModel")
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    attach, count = _plain.attach, iter(range(100))

    def failing(*args):
        if next(count) == after:
            raise RuntimeError("half-way")
        attach(*args)

    monkeypatch.setattr(_plain, "attach", failing)
    with pytest.raises(RuntimeError, match="half-way"):
        gpt_fast.accelerate(model)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    given = inputs("OpenAIGPTLMHeadModel")
    assert torch.equal(model(**given).loss, original(**given).loss)


def test_own_models_need_nothing() -> None:
    config = gpt_fast.GPTConfig(num_tokens=V, hidden_dim=32, num_heads=4, num_layers=1, seq_len=8)
    report = gpt_fast.accelerate(gpt_fast.GPTForCausalLM(config), strict=True)
    assert not report.replaced and "this library's own" in str(report)
