"""gpt_fast.accelerate on transformers' OPT, BioGPT, GPT-Neo and ImageGPT: block by block, in place, and back."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import gpt_fast
from gpt_fast.integrations.huggingface import blocks, relatives
from tests.hf_models import PAD, C, H, V, assert_same, at_real_positions, padding, run, transformers

# A call that is left to transformers warns. Tests that expect the warning use pytest.warns.
pytestmark = pytest.mark.filterwarnings("error:gpt_fast")

P, T, LAYERS = 24, 11, 2
_OPT = {
    "hidden_size": C, "ffn_dim": 48, "num_hidden_layers": LAYERS, "num_attention_heads": H, "pad_token_id": PAD,
    "max_position_embeddings": P, "word_embed_proj_dim": C, "dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
# Name → class of transformers, configuration, and the names of the configuration's dropout rates.
MODELS: dict[str, tuple[str, dict, tuple[str, ...]]] = {
    "opt": ("OPTForCausalLM", _OPT, ("attention_dropout", "dropout")),
    # As OPT-350m: post-norm blocks, embeddings narrower than the hidden size, no final norm.
    "opt_post_norm": (
        "OPTForCausalLM", _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
        ("attention_dropout", "dropout"),
    ),
    "opt_gelu_plain": (
        "OPTForCausalLM",
        _OPT | {"activation_function": "gelu", "enable_bias": False, "layer_norm_elementwise_affine": False},
        ("attention_dropout", "dropout"),
    ),
    "biogpt": (
        "BioGptForCausalLM",
        {"hidden_size": C, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": H,
         "max_position_embeddings": P, "pad_token_id": PAD, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0, "activation_dropout": 0.0},
        ("attention_probs_dropout_prob", "hidden_dropout_prob", "activation_dropout"),
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"hidden_size": C, "num_layers": LAYERS, "num_heads": H, "max_position_embeddings": P, "window_size": 4,
         "attention_types": [[["global", "local"], 1]], "bos_token_id": None, "eos_token_id": None},
        ("attention_dropout", "resid_dropout", "embed_dropout"),
    ),
    "imagegpt": (
        "ImageGPTForCausalImageModeling",
        {"n_embd": C, "n_layer": LAYERS, "n_head": H, "n_positions": P, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
         "attn_pdrop": 0.0, "scale_attn_by_inverse_layer_idx": True},
        ("attn_pdrop", "resid_pdrop", "embd_pdrop"),
    ),
    "imagegpt_gelu": (
        "ImageGPTForCausalImageModeling",
        {"n_embd": C, "n_layer": LAYERS, "n_head": H, "n_positions": P, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
         "attn_pdrop": 0.0, "activation_function": "gelu_new"},
        ("attn_pdrop", "resid_pdrop", "embd_pdrop"),
    ),
}  # fmt: skip
LM_HEADS = tuple(name for name, (kind, _, _) in MODELS.items() if "CausalLM" in kind)
HAS_SDPA = ("opt", "opt_post_norm", "biogpt")


def make(name: str, implementation: str | None = None, **options):
    """Return a model whose biases and gains are random too, so that none hides a mistake."""
    kind, sizes, _ = MODELS[name]
    kind = getattr(transformers, kind)
    config = kind.config_class(**{"vocab_size": V} | sizes | options)
    if implementation is not None:
        config._attn_implementation = implementation
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def twins(name: str, implementation: str | None = None, **options):
    """Return a model and an accelerated copy of it."""
    model = make(name, implementation, **options)
    accelerated = copy.deepcopy(model)
    gpt_fast.accelerate(accelerated)
    return model, accelerated


def inputs(side: str | None = None, B: int = 3) -> dict[str, torch.Tensor]:
    tokens = torch.randint(8, V - 1, (B, T))  # ImageGPT has no logit for token V - 1
    mask = padding(side, B, T)
    if mask is None:
        return {"input_ids": tokens, "labels": tokens}
    tokens = tokens.masked_fill(mask == 0, PAD)
    labels = tokens.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_loss_and_gradients(name: str, side: str | None) -> None:
    model, accelerated = twins(name)
    assert_same(model, inputs(side), accelerated)


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", HAS_SDPA)
def test_eager_attention_gives_a_float_mask(name: str, side: str | None) -> None:
    """The float mask of "eager" gives the results of "sdpa".

    The comparison is with "sdpa" because transformers' eager attention gives NaN in float64 for a row without keys.
    """
    model = make(name)
    accelerated = make(name, "eager")
    accelerated.load_state_dict(model.state_dict())
    gpt_fast.accelerate(accelerated)
    assert_same(model, inputs(side), accelerated)


@pytest.mark.parametrize("name", ["opt_gelu_plain", "biogpt", "gpt_neo", "imagegpt_gelu"])
def test_autocast_and_half_precision(name: str) -> None:
    """No model here has a ReLU: a hidden value that rounds across 0 would change a gradient by more than rounding."""
    model, accelerated = twins(name)
    assert_same(model, inputs("right"), accelerated, dtype=torch.bfloat16)
    assert_same(model.bfloat16(), inputs("left"), accelerated.bfloat16())


def test_a_local_layer_of_gpt_neo_sees_its_window_only() -> None:
    """A changed first token changes the output at the last position that the windows reach, and no later one."""
    _, model = twins("gpt_neo", attention_types=[[["local"], LAYERS]])
    tokens = inputs()["input_ids"]
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % V
    with torch.no_grad():
        a, b = (model.eval().transformer(each).last_hidden_state for each in (tokens, changed))
    reach = LAYERS * 3  # a layer with window 4 attends to 3 tokens before its own
    assert torch.equal(a[:, reach + 1 :], b[:, reach + 1 :])
    assert not torch.equal(a[:, reach], b[:, reach])


@pytest.mark.parametrize("name", MODELS)
def test_every_dropout_is_applied(name: str) -> None:
    """Each rate alone makes the training loss random. Its mean is PyTorch's within four standard errors."""
    given = inputs("right")
    for rate in MODELS[name][2]:
        model, accelerated = twins(name, **{rate: 0.4})
        with torch.no_grad():
            a, b = (torch.stack([each(**given).loss for _ in range(60)]) for each in (model, accelerated))
        assert len(set(b.tolist())) > 50, rate
        assert (a.mean() - b.mean()).abs() < 4 * (a.var() / 60 + b.var() / 60).sqrt(), rate
        assert 0.5 < a.std() / b.std() < 2, rate
        assert torch.equal(*(accelerated.eval()(**given).loss for _ in range(2))), rate


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache(name: str) -> None:
    model, accelerated = twins(name)
    given = inputs("left")
    given.pop("labels")
    for each in (model, accelerated):
        each.eval()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    assert torch.equal(accelerated.generate(**given, **options), model.generate(**given, **options))
    with torch.no_grad():  # several tokens behind a cache
        caches = [each(given["input_ids"][:, :6], use_cache=True) for each in (model, accelerated)]
        rest = [
            each(given["input_ids"][:, 6:], use_cache=True, **{blocks.CACHE: one[blocks.CACHE]}).logits
            for each, one in zip((model, accelerated), caches, strict=True)
        ]
    torch.testing.assert_close(rest[1], rest[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["opt", "biogpt", "gpt_neo", "imagegpt"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """With dropout, the gradients equal those without checkpointing, and backward recomputes attention."""
    _, model = twins(name, **dict.fromkeys(MODELS[name][2], 0.1))
    given = inputs("right")
    calls, attend, gradients = [], relatives._attend, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relatives, "_attend", lambda *args: (calls.append(1), attend(*args))[1])
        for checkpointed in (False, True):
            if checkpointed:
                model.activation_checkpointing_enable({"use_reentrant": reentrant})
            torch.manual_seed(5)
            model.zero_grad()
            model(**given, use_cache=False).loss.backward()
            gradients.append({label: parameter.grad.clone() for label, parameter in model.named_parameters()})
    assert len(calls) == 3 * LAYERS
    for label, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][label], expected, msg=label)


@pytest.mark.parametrize("name", MODELS)
def test_in_place_copied_and_restored_bit_for_bit(name: str) -> None:
    original = make(name)
    model = copy.deepcopy(original)
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    names, given = list(model.state_dict()), inputs("right")
    report = gpt_fast.accelerate(model)
    assert sum(entry.op == "attention" for entry in report.replaced) == LAYERS
    assert ("linear_cross_entropy" in {entry.op for entry in report.replaced}) == (name in LM_HEADS)
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(**given).loss, model(**given).loss, rtol=0, atol=0)
    with torch.no_grad():
        next(twin.parameters()).zero_()  # the copy's forward reads the copy's weights
    assert not torch.equal(twin(**given).loss, model(**given).loss)
    assert not gpt_fast.accelerate(model).replaced
    gpt_fast.restore(model)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    got, expected = run(model, given), run(original, given)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", HAS_SDPA)
def test_in_one_graph(name: str) -> None:
    model, accelerated = twins(name)
    given = inputs("right")
    mask = given["attention_mask"]
    torch._dynamo.reset()
    compiled = torch.compile(accelerated, fullgraph=True, backend="aot_eager")
    loss = compiled(**given, use_cache=False).loss
    loss.backward()
    expected = model(**given)
    torch.testing.assert_close(loss, expected.loss)
    expected.loss.backward()
    for (label, a), b in zip(accelerated.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=label)
    with torch.no_grad():
        logits = torch.compile(accelerated.eval(), backend="aot_eager")(
            given["input_ids"], mask, use_cache=False
        ).logits
    torch.testing.assert_close(
        at_real_positions(logits, mask), at_real_positions(model.eval()(**given).logits, mask), rtol=1e-4, atol=1e-5
    )


# ---- calls that transformers computes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "biogpt", "gpt_neo", "imagegpt"])
def test_attention_probabilities_are_transformers_own(name: str) -> None:
    model, accelerated = twins(name, "eager")
    given = inputs("right")
    with pytest.warns(UserWarning, match="runs transformers' own forward for this call"):
        got = accelerated(**given, output_attentions=True)
    expected = model(**given, output_attentions=True)
    assert len(got.attentions) == LAYERS
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(a, b)
    assert_same(model, given, accelerated)  # transformers has left its recording hooks on the blocks


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_of_each_block(name: str) -> None:
    model, accelerated = twins(name)
    given = inputs("right")
    got, expected = (each(**given, output_hidden_states=True).hidden_states for each in (accelerated, model))
    assert len(got) == len(expected) == LAYERS + 1
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(
            *(at_real_positions(x, given["attention_mask"]) for x in (a, b)), rtol=1e-4, atol=1e-5
        )


def test_a_mask_of_ones_own() -> None:
    """A bool mask [B, 1, T, T] may show later positions. A float bias in a mask is left to transformers."""
    given = inputs()
    prefix = torch.ones(T, T, dtype=torch.bool).tril()
    prefix[:, :4] = True
    mask = prefix.expand(3, 1, T, T).contiguous()
    model, accelerated = twins("opt")
    assert_same(model, given | {"attention_mask": mask, "position_ids": torch.arange(T).expand(3, T)}, accelerated)
    model, accelerated = twins("opt", "eager")
    slope = torch.where(prefix, -0.1 * torch.arange(T).flip(0), torch.finfo(torch.float32).min).expand(3, 1, T, T)
    given |= {"attention_mask": slope, "position_ids": torch.arange(T).expand(3, T)}
    with pytest.warns(UserWarning, match="float mask with values other than 0"):
        got = accelerated(**given)
    torch.testing.assert_close(got.logits, model(**given).logits)


@pytest.mark.parametrize("name", ["opt", "biogpt", "gpt_neo", "imagegpt"])
def test_a_static_cache_is_left_to_transformers(name: str) -> None:
    model, accelerated = twins(name)
    given = inputs()
    results = []
    for each in (model.eval(), accelerated.eval()):
        cache = transformers.StaticCache(config=each.config, max_cache_len=T)
        told = pytest.warns(UserWarning, match="StaticCache") if each is accelerated else contextlib.nullcontext()
        with torch.no_grad(), told:
            results.append(each(given["input_ids"], **{blocks.CACHE: cache}).logits)
    torch.testing.assert_close(results[1], results[0])


def test_hooks_are_run() -> None:
    """Hooks on projections, attention, MLPs, norms and dropout layers run, and the results stay the same."""
    for name, paths in {
        "opt": ("layers.0.self_attn", "layers.0.self_attn.q_proj", "layers.1.fc1", "layers.1.final_layer_norm"),
        "gpt_neo": (
            "h.0.attn.attention.q_proj",
            "h.1.mlp",
            "h.1.mlp.c_fc",
            "h.0.ln_2",
            "h.0.attn.attention.resid_dropout",
        ),
        "imagegpt": ("h.0.attn.c_attn", "h.1.mlp", "h.0.ln_1", "h.0.attn.resid_dropout"),
    }.items():
        model, accelerated = twins(name)
        given, seen = inputs("right"), []
        for each in (model, accelerated):
            trunk = each.model.decoder if name == "opt" else each.transformer
            for path in paths:
                trunk.get_submodule(path).register_forward_hook(lambda *_, path=path, seen=seen: seen.append(path))
            seen.clear()
            each(**given)
            assert sorted(seen) == sorted(paths), name
        assert_same(model, given, accelerated)


@pytest.mark.parametrize("name", ["gpt_neo", "imagegpt"])
def test_hooks_on_attention_that_is_gone_around(name: str) -> None:
    _, accelerated = twins(name)
    seen = []
    accelerated.transformer.h[0].attn.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="has hooks"):
        accelerated(**inputs())
    assert seen == [1]


def test_what_cannot_be_served_is_named() -> None:
    class Other(type(make("opt").model.decoder.layers[0])):
        def forward(self, hidden_states, *args, **kwargs):
            return super().forward(hidden_states, *args, **kwargs) * 2

    model = make("opt")
    model.model.decoder.layers[1].__class__ = Other
    original = copy.deepcopy(model)
    report = gpt_fast.accelerate(model)
    assert [entry.reason for entry in report.left if entry.kind == "Other"] == [
        "has a class (Other) with a forward of its own"
    ]
    assert_same(original, inputs("right"), model)
    wide = make("gpt_neo", hidden_size=600, num_heads=2)
    assert "has heads of 300" in str(gpt_fast.accelerate(wide))
    reordered = make("imagegpt", reorder_and_upcast_attn=True)
    assert "reorder_and_upcast_attn" in str(gpt_fast.accelerate(reordered))
    with pytest.raises(ValueError, match="embed_tokens .* is gathered and added"):
        gpt_fast.accelerate(make("biogpt"), strict=True)


def test_another_model_inside_a_module_of_ones_own() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = make("opt").model, nn.Linear(C, 2)

        def forward(self, tokens):
            return self.head(self.backbone(tokens).last_hidden_state[:, -1])

    model = Mine()
    original = copy.deepcopy(model)
    assert any(entry.op == "attention" for entry in gpt_fast.accelerate(model).replaced)
    tokens = inputs()["input_ids"]
    torch.testing.assert_close(model(tokens), original(tokens))
