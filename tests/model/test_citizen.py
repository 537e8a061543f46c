"""This library's models behave like PyTorch's modules: every child is called, or fused only where that is the same.

The yardstick is `called`: the model's formula in plain PyTorch, which calls each child and nothing else.
"""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize, prune

import gpt_fast
from gpt_fast import GPT, GPTConfig, GPTForCausalLM, GPTForMaskedLM, GPTForSequenceClassification, generate

SIZES = {"num_tokens": 61, "hidden_dim": 32, "num_heads": 4, "num_layers": 3, "seq_len": 20}


def causal_lm(preset: str, dropout: float = 0.0, **options) -> GPTForCausalLM:
    torch.manual_seed(0)
    return GPTForCausalLM(GPTConfig.preset(preset, **SIZES | options, dropout=dropout, init_std=0.2))


PRESETS = ["gpt2", "gpt1", "notes"]


def tokens(B: int = 2, T: int = 9) -> Tensor:
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(1))


def called(model: GPTForCausalLM, tokens: Tensor) -> Tensor:
    """Return logits [B, T, V] by calling every child of the model; attention's probabilities have no dropout here."""
    trunk = model.trunk
    x = trunk.dropout(trunk.token_emb(tokens) + trunk.pos_emb[:, : tokens.shape[1]])

    def attend(attn: nn.Module, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        return attn.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def feed(ff: nn.Module, x: Tensor) -> Tensor:
        for module in ff:
            x = module(x)
        return x

    for block in trunk.decoders:
        if block.pre_norm:
            x = x + block.dropout1(attend(block.multihead_attn, block.layer_norm1(x)))
            x = x + block.dropout2(feed(block.ff, block.layer_norm2(x)))
        else:
            x = block.layer_norm1(x + block.dropout1(attend(block.multihead_attn, x)))
            x = block.layer_norm2(x + block.dropout2(feed(block.ff, x)))
    return model.output_layer(x if trunk.final_norm is None else trunk.final_norm(x))


def assert_as_called(model: GPTForCausalLM) -> None:
    """Logits, loss and all gradients are those of `called`; so is a pass over a prompt with a cache."""
    batch = tokens()
    logits = called(model, batch)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(loss, trained, allow_unused=True) if loss.requires_grad else []
    got = model(batch, labels=batch, logits=True)
    torch.testing.assert_close(got.logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.loss, loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(batch, labels=batch).loss, loss, rtol=1e-4, atol=1e-4)
    gradients = torch.autograd.grad(got.loss, trained, allow_unused=True) if loss.requires_grad else []
    for wanted, gradient in zip(expected, gradients, strict=True):
        assert (wanted is None) == (gradient is None)
        if wanted is not None:
            torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)
    session = gpt_fast.DecodeSession(model, batch=2)
    torch.testing.assert_close(session.prefill(batch[:, :-1]), logits[:, -2].detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(session.step(batch[:, -1]), logits[:, -1].detach(), rtol=1e-4, atol=1e-4)


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if not list(module.children())}


def scaled(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output * 1.5


# ---- hooks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_plain_model_is_its_formula(preset):
    assert_as_called(causal_lm(preset))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.filterwarnings("ignore:generate. .* has hooks")
def test_a_hook_on_any_child_takes_effect(preset):
    """One child at a time, so that each is a case of its own: what is fused beside it must not go around it."""
    model = causal_lm(preset)
    names = leaves(model)
    assert len(names) >= 3 + 3 * 9
    for name, module in names.items():
        handle = module.register_forward_hook(scaled)
        try:
            assert_as_called(model)
        except AssertionError as error:
            raise AssertionError(f"a hook on {name} has no effect, or another one") from error
        finally:
            handle.remove()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_hook_fires_once_in_a_pass(preset, mode):
    model = causal_lm(preset, dropout=0.1).train(mode == "train")
    fired: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            continue  # never called, as in any model
        module.register_forward_hook(lambda module, args, output, name=name: fired.append(name))
        module.register_forward_pre_hook(lambda module, args, name=name: fired.append(f"before {name}"))
    model(tokens(), labels=tokens(), logits=True)
    calls = {name: fired.count(name) for name in fired}
    expected = {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    assert {name for name in calls if not name.startswith("before ")} == expected
    # With hooks on it the output layer makes the logits of the loss, and those that are returned.
    assert {name for name, count in calls.items() if count != 1} <= {"output_layer", "before output_layer"}


@pytest.mark.parametrize("preset", PRESETS)
def test_backward_hooks_see_gradients(preset):
    model = causal_lm(preset)
    seen: dict[str, Tensor] = {}
    for name, module in leaves(model).items():
        module.register_full_backward_hook(lambda module, given, grads, name=name: seen.update({name: grads[0]}))
    model(tokens(), labels=tokens()).loss.backward()
    assert set(seen) == set(leaves(model))
    assert all(gradient.abs().sum() > 0 for gradient in seen.values())


@pytest.fixture
def global_hook() -> Iterator[list[str]]:
    """The class of every module whose forward a hook for all modules has seen."""
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    yield seen
    handle.remove()


@pytest.mark.parametrize("preset", PRESETS)
def test_global_hooks_count(preset, global_hook):
    model = causal_lm(preset)
    model(tokens())
    per_block = {"Linear": 3, "LayerNorm": 2, "Dropout": 3, "MLP": 1, "SelfAttention": 1, "TransformerDecoder": 1}
    for kind, count in per_block.items():
        extra = {"Linear": 1, "Dropout": 1, "LayerNorm": preset == "gpt2"}.get(kind, 0)
        assert global_hook.count(kind) == 3 * count + extra, kind
    assert global_hook.count("Embedding") == 1


def test_global_hooks_count_on_accelerated_models(global_hook):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=61, n_positions=20)
    model = transformers.GPT2LMHeadModel(config).eval()
    model(tokens())
    expected = sorted(global_hook)
    gpt_fast.accelerate(model)
    global_hook.clear()
    model(tokens())
    assert sorted(global_hook) == expected


# ---- other modules in a child's place --------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.filterwarnings("ignore:generate. .* so the model's modules run each step")
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda module: prune.random_unstructured(module, "weight", 0.5), id="pruning"),
        pytest.param(parametrizations.weight_norm, id="weight_norm"),
        pytest.param(
            lambda module: parametrize.register_parametrization(module, "weight", nn.Tanh()), id="parametrization"
        ),
    ],
)
def test_changed_weights_act_in_every_pass(preset, change):
    for name in leaves(causal_lm(preset)):
        model = causal_lm(preset, tied=False)
        module = leaves(model)[name]
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        before = model(tokens()).logits
        change(module)
        assert_as_called(model)
        assert not torch.equal(model(tokens()).logits, before), name


@pytest.mark.parametrize("preset", PRESETS)
def test_dynamic_quantisation(preset):
    """Products of 8-bit weights differ from the exact ones by a few percent, but from their own by rounding alone."""
    model = causal_lm(preset).eval()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        got = quantised(tokens()).logits
        torch.testing.assert_close(got, called(quantised, tokens()), rtol=1e-3, atol=1e-3)
        assert not torch.equal(got, model(tokens()).logits)


def test_an_output_layer_of_ones_own():
    """Loss and logits agree, whatever the layer is."""
    model = causal_lm("gpt2", tied=False)
    model.output_layer = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 61))
    assert_as_called(model)
    drop_in = GPT(61, 32, 4, 2, 20, 0.0)
    drop_in.output_layer = nn.Sequential(nn.Linear(32, 61), nn.Tanh())
    logits = drop_in(tokens()).log()
    expected = F.nll_loss(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    torch.testing.assert_close(drop_in.loss(tokens()), expected)


def test_another_activation_in_its_place():
    model = causal_lm("gpt2")
    model.trunk.decoders[0].ff[1] = nn.SiLU()
    model.trunk.decoders[1].ff[1].approximate = "none"
    assert_as_called(model)


def test_losses_over_no_label_are_zero_also_where_the_layer_is_called():
    model = causal_lm("gpt2")
    nothing = torch.full_like(tokens(), -100)
    assert model(tokens(), labels=nothing).loss == 0
    model.output_layer.register_forward_hook(lambda *_: None)
    assert model(tokens(), labels=nothing).loss == 0


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("place", ["dropout", "dropout1", "dropout2", "ff.2"])
def test_monte_carlo_dropout(preset, place):
    """A model in evaluation mode whose `nn.Dropout` modules alone are in training mode, one kind of place at a time."""
    model = causal_lm(preset, dropout=0.3, ff_dropout=0.3).eval()
    picked = [
        module
        for name, module in model.trunk.named_modules()
        if isinstance(module, nn.Dropout) and (name == place or name.endswith(f".{place}"))
    ]
    assert len(picked) == (1 if place == "dropout" else 3)
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, model(tokens()).logits)
        for module in picked:
            module.train()
        passes = torch.stack([model(tokens()).logits for _ in range(8)])
    assert (passes.std(0) > 0).all()


def test_dropout_probabilities_are_those_of_the_modules():
    """Set after the model was made, as schedules of dropout do; one place at a time, all others at 0."""
    model = causal_lm("gpt2").train()
    for name, module in leaves(model).items():
        if isinstance(module, nn.Dropout):
            assert torch.equal(model(tokens()).logits, model(tokens()).logits)
            module.p = 0.5
            assert not torch.equal(model(tokens()).logits, model(tokens()).logits), name
            module.p = 0.0


@pytest.mark.parametrize("preset", PRESETS)
def test_a_fused_pass_drops_what_children_drop(preset):
    """The same p everywhere: the mean over many passes of the fused model and of the called one agree."""
    model = causal_lm(preset, dropout=0.2, attention_dropout=0.0, ff_dropout=0.2, num_layers=1).train()
    with torch.no_grad():
        fused = torch.stack([model(tokens()).logits for _ in range(400)])
        plain = torch.stack([called(model, tokens()) for _ in range(400)])
    error = (fused.var(0) / 400 + plain.var(0) / 400).sqrt()
    assert ((fused.mean(0) - plain.mean(0)).abs() < 6 * error).all()
    assert 0.8 < float(fused.var(0).mean() / plain.var(0).mean()) < 1.25


@pytest.mark.parametrize("preset", ["gpt2", "gpt1"])
def test_copies_of_a_block_have_masks_of_their_own(preset):
    """A model of copies of one block draws as one whose blocks were made apart: sites follow from the position."""
    model = causal_lm(preset, dropout=0.3).train()
    apart = copy.deepcopy(model)
    for i in (1, 2):
        apart.trunk.decoders[i].load_state_dict(model.trunk.decoders[0].state_dict())
    for i in (1, 2):
        model.trunk.decoders[i] = copy.deepcopy(model.trunk.decoders[0])
    seed = torch.tensor([5])
    assert torch.equal(model.trunk(tokens(), seed=seed), apart.trunk(tokens(), seed=seed))


def test_the_state_dict_is_without_the_dropouts():
    assert not [name for name in causal_lm("gpt2", dropout=0.1).state_dict() if "dropout" in name]


# ---- adapters --------------------------------------------------------------------------------------------------------

LINEARS = ["out_proj", "ff.0", "ff.3"]


def adapters(peft) -> dict[str, Callable]:
    return {
        "lora": lambda: peft.LoraConfig(target_modules=LINEARS, r=2, lora_dropout=0.0),
        "dora": lambda: peft.LoraConfig(target_modules=LINEARS, r=2, use_dora=True),
        "ia3": lambda: peft.IA3Config(target_modules=LINEARS, feedforward_modules=["ff.3"]),
        "all_linear": lambda: peft.LoraConfig(target_modules="all-linear", r=2),
        "embedding": lambda: peft.LoraConfig(target_modules=["token_emb"], r=2),
        "output_layer": lambda: peft.LoraConfig(target_modules=["output_layer"], r=2),
    }


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "all_linear", "embedding", "output_layer"])
@pytest.mark.filterwarnings("ignore:generate. .* so the model's modules run each step")
def test_adapters(preset, name):
    """Unmerged and merged, an adapter acts as it does where every child is called; merged weights are fused again."""
    peft = pytest.importorskip("peft", reason="the extra examples is not installed")
    model = causal_lm(preset, tied=False)
    before = model(tokens()).logits
    adapted = peft.get_peft_model(model, adapters(peft)[name]())
    with torch.no_grad():
        for label, parameter in adapted.named_parameters():
            if "lora_B" in label or "lora_embedding_A" in label or "ia3" in label:
                parameter.normal_(std=0.3)
    base = adapted.get_base_model()
    assert not torch.allclose(base(tokens()).logits, before)
    assert_as_called(base)
    unmerged = base(tokens()).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens()).logits, unmerged, rtol=1e-3, atol=1e-3)
    assert_as_called(merged)


def test_activation_checkpointing_repeats_an_adapters_dropout():
    """LoRA's dropout draws from torch's generator: the second pass through a block has to draw the same mask."""
    peft = pytest.importorskip("peft", reason="the extra examples is not installed")
    model = causal_lm("gpt2", dropout=0.1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=LINEARS, r=2, lora_dropout=0.5)).train()
    with torch.no_grad():
        for label, parameter in adapted.named_parameters():
            if "lora_B" in label:
                parameter.normal_(std=0.3)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    gradients = []
    for checkpointed in (False, True):
        model.trunk.checkpoint_activations = checkpointed
        torch.manual_seed(3)
        gradients.append(torch.autograd.grad(model(tokens(), labels=tokens()).loss, trained))
    for plain, repeated in zip(*gradients, strict=True):
        torch.testing.assert_close(repeated, plain)


# ---- generation ------------------------------------------------------------------------------------------------------


def test_generation_calls_what_is_not_plain():
    """The greedy tokens of a hooked model are those of its own forward passes; one warning says what runs the step."""
    model = causal_lm("gpt2").eval()
    plain = generate(model, tokens(), max_new_tokens=6, temperature=0)
    # The hook turns the model's preference around.
    handle = model.trunk.final_norm.register_forward_hook(lambda module, args, output: -output)
    with pytest.warns(UserWarning, match=r"generate: final_norm has hooks, so the model's modules run each step"):
        got = generate(model, tokens(), max_new_tokens=6, temperature=0)
    row = tokens()
    for _ in range(6):
        with torch.no_grad():
            row = torch.cat([row, called(model, row)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(got, row)
    assert not torch.equal(got, plain)
    with pytest.raises(ValueError, match=r"weights 'int8' of a float32 model on cpu whose final_norm has hooks"):
        generate(model, tokens(), max_new_tokens=6, weights="int8")
    handle.remove()
    assert torch.equal(generate(model, tokens(), max_new_tokens=6, temperature=0), plain)


def test_a_session_notices_that_the_model_is_not_plain_any_more():
    model = causal_lm("gpt2").eval()
    session = gpt_fast.DecodeSession(model, batch=2)
    session.prefill(tokens())
    model.trunk.decoders[1].ff[0].register_forward_hook(scaled)
    if session.kind == "torch":  # the modules' own step calls the hook
        session.step(tokens()[:, 0])
        return
    with pytest.raises(ValueError, match=r"the model changed under it: decoders.1.ff.0 has hooks; make a new session"):
        session.step(tokens()[:, 0])


@pytest.mark.parametrize("head", [GPTForMaskedLM, GPTForSequenceClassification])
def test_other_heads_call_their_children_too(head):
    config = GPTConfig.preset("gpt2", **SIZES, dropout=0.0, num_labels=3, lm_weight=0.5, init_std=0.2)
    model = head(config)
    labels = tokens() if head is GPTForMaskedLM else torch.tensor([0, 2])
    before = model(tokens(), labels=labels).loss
    for name, module in leaves(model).items():
        handle = module.register_forward_hook(scaled)
        assert model(tokens(), labels=labels).loss != before, name
        handle.remove()
    assert model(tokens(), labels=labels).loss == before
