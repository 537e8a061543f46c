"""Test that this library's models behave like PyTorch's modules: changes of any child module take effect.

The models fuse children only if the result is the same. The tests compare with `called`, the model's formula in plain
PyTorch, which calls every child.
"""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize, prune

import gpt_fast
from gpt_fast import GPT, GPTConfig, GPTForCausalLM, GPTForMaskedLM, GPTForSequenceClassification, generate
from gpt_fast.heads import HEADS
from tests import hf_models

SIZES = {"num_tokens": 61, "hidden_dim": 32, "num_heads": 4, "num_layers": 3, "seq_len": 20}


def causal_lm(preset: str, dropout: float = 0.0, **options) -> GPTForCausalLM:
    torch.manual_seed(0)
    return GPTForCausalLM(GPTConfig.preset(preset, **SIZES | options, dropout=dropout, init_std=0.2))


PRESETS = ["gpt2", "gpt1", "notes"]


def tokens(B: int = 2, T: int = 9) -> Tensor:
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(1))


def called(model: GPTForCausalLM, tokens: Tensor) -> Tensor:
    """Compute logits [B, T, V] by calling every child of the model, without dropout of attention's probabilities."""
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
    """Assert that logits, loss, all gradients and the logits of a session agree with `called`."""
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
@pytest.mark.filterwarnings("ignore:gpt_fast.generate. .* has hooks")
def test_a_hook_on_any_child_takes_effect(preset):
    """A hook on one child at a time must take effect, even if its neighbours are fused."""
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
            continue  # PyTorch never calls a ModuleList
        module.register_forward_hook(lambda module, args, output, name=name: fired.append(name))
        module.register_forward_pre_hook(lambda module, args, name=name: fired.append(f"before {name}"))
    model(tokens(), labels=tokens(), logits=True)
    calls = {name: fired.count(name) for name in fired}
    expected = {name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    assert {name for name in calls if not name.startswith("before ")} == expected
    # With hooks, the output layer is called twice: for the loss and for the returned logits.
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
    """Register a global forward hook and yield the list of the class names of the modules that it has seen."""
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
@pytest.mark.filterwarnings("ignore:gpt_fast.generate. .* so the model's modules run each step")
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
    """A dynamically quantised model runs its 8-bit products: it agrees with `called`, not with the float32 model."""
    model = causal_lm(preset).eval()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        got = quantised(tokens()).logits
        torch.testing.assert_close(got, called(quantised, tokens()), rtol=1e-3, atol=1e-3)
        assert not torch.equal(got, model(tokens()).logits)


def test_an_output_layer_of_ones_own():
    """Loss and logits both follow an output layer that the user replaced."""
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
    """Put one kind of `nn.Dropout` module into training mode, in a model in evaluation mode: the logits vary."""
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
    """A dropout probability that is changed after construction takes effect, for one module at a time."""
    model = causal_lm("gpt2").train()
    for name, module in leaves(model).items():
        if isinstance(module, nn.Dropout):
            assert torch.equal(model(tokens()).logits, model(tokens()).logits)
            module.p = 0.5
            assert not torch.equal(model(tokens()).logits, model(tokens()).logits), name
            module.p = 0.0


@pytest.mark.parametrize("preset", PRESETS)
def test_a_fused_pass_drops_what_children_drop(preset):
    """With p = 0.2, the mean and variance of the logits over 400 passes agree for the fused model and for `called`."""
    model = causal_lm(preset, dropout=0.2, attention_dropout=0.0, ff_dropout=0.2, num_layers=1).train()
    with torch.no_grad():
        fused = torch.stack([model(tokens()).logits for _ in range(400)])
        plain = torch.stack([called(model, tokens()) for _ in range(400)])
    error = (fused.var(0) / 400 + plain.var(0) / 400).sqrt()
    assert ((fused.mean(0) - plain.mean(0)).abs() < 6 * error).all()
    assert 0.8 < float(fused.var(0).mean() / plain.var(0).mean()) < 1.25


@pytest.mark.parametrize("preset", ["gpt2", "gpt1"])
def test_copies_of_a_block_have_masks_of_their_own(preset):
    """Copies of one block draw the masks of separately made blocks, because dropout sites follow the position."""
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


class Doubling(Tensor):
    """Weight that computes its own products, as the weights of quantised layers do. Here it doubles them."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {})) * 2
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("name", ["decoders.1.ff.0", "decoders.0.multihead_attn.out_proj"])
def test_a_weight_of_another_class_is_called(name):
    model = causal_lm("gpt2").eval()
    plain = model(tokens()).logits
    module = model.trunk.get_submodule(name)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Doubling), requires_grad=False)
    got = model(tokens()).logits
    torch.testing.assert_close(got, called(model, tokens()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, plain)


@pytest.mark.parametrize("place", ["hook", "identity", "monte_carlo", "quiet"])
def test_attentions_dropout_of_gpt1_is_a_module(place):
    """The dropout module of attention takes effect on accelerated models, because transformers' GPT-1 calls it."""
    plain, fast = hf_models.twins("OpenAIGPTLMHeadModel", 0.0)
    gpt_fast.accelerate(fast)
    for model in (plain, fast):
        for block in model.transformer.h:
            if place == "hook":
                block.attn.attn_dropout.register_forward_hook(lambda module, args, output: output * 2)
            if place == "identity":
                block.attn.attn_dropout = nn.Identity()
            if place in ("monte_carlo", "quiet"):
                block.attn.attn_dropout.p = 0.5
        model.train(place == "quiet")
        for block in model.transformer.h:
            block.attn.attn_dropout.train(place == "monte_carlo")
    if place == "monte_carlo":
        assert not torch.equal(fast(tokens()).logits, fast(tokens()).logits)
    else:
        torch.testing.assert_close(fast(tokens()).logits, plain(tokens()).logits, rtol=1e-4, atol=1e-5)


def test_a_block_of_pytorchs_with_methods_of_its_own_is_left_alone():
    class Quiet(nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return super()._ff_block(x) * 0

    report = gpt_fast.accelerate(nn.Sequential(Quiet(32, 4, 64, batch_first=True)))
    assert [entry.reason for entry in report.left] == ["its class has a _ff_block of its own"]


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
@pytest.mark.filterwarnings("ignore:gpt_fast.generate. .* so the model's modules run each step")
def test_adapters(preset, name):
    """An adapter acts as it does in `called`, both before and after its weights are merged."""
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
    """LoRA's dropout draws from torch's generator, so the recomputed forward of a block must draw the same mask."""
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
    """A hooked model generates the tokens of its own forward passes, and a warning says that its modules run."""
    model = causal_lm("gpt2").eval()
    plain = generate(model, tokens(), max_new_tokens=6, temperature=0)
    # The hook negates the hidden states, which changes the greedy tokens.
    handle = model.trunk.final_norm.register_forward_hook(lambda module, args, output: -output)
    with pytest.warns(
        UserWarning, match=r"gpt_fast.generate: final_norm has hooks, so the model's modules run each step"
    ):
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
    if session.kind == "torch":  # this kind of step calls the modules, and so the hook
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


# ---- every head of this library and of accelerated models, against plain PyTorch -------------------------------------


class PlainTrunk(nn.Module):
    """Trunk that computes in plain PyTorch with the children of another trunk."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk

    def forward(self, tokens, *, causal=True, lengths=None, key_mask=None, cu_seqlens=None):
        trunk = self.trunk
        positions = (key_mask.long().cumsum(1) - 1).clamp(min=0)
        x = trunk.dropout(trunk.token_emb(tokens) + trunk.pos_emb[0][positions])
        T = tokens.shape[1]
        mask = key_mask[:, None, None, :] & (torch.ones(T, T, dtype=torch.bool).tril() if causal else True)

        def attend(attn: nn.Module, x: Tensor) -> Tensor:
            q, k, v = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
            q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
            return attn.out_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))

        for block in trunk.decoders:
            if block.pre_norm:
                x = x + block.dropout1(attend(block.multihead_attn, block.layer_norm1(x)))
                x = x + block.dropout2(nn.Sequential.forward(block.ff, block.layer_norm2(x)))
            else:
                x = block.layer_norm1(x + block.dropout1(attend(block.multihead_attn, x)))
                x = block.layer_norm2(x + block.dropout2(nn.Sequential.forward(block.ff, x)))
        return x if trunk.final_norm is None else trunk.final_norm(x)


def plain_output_loss(output_layer: nn.Module, hidden: Tensor, labels: Tensor, z_loss: float) -> Tensor:
    assert z_loss == 0
    return F.cross_entropy(output_layer(hidden).flatten(0, -2), labels.flatten())


def own_inputs(name: str) -> dict[str, Tensor]:
    """Return tokens padded on the right, their mask, and labels for the head `name`."""
    shape = {"GPTForSimilarity": (2, 2, 9), "GPTForMultipleChoice": (2, 3, 9)}.get(name, (2, 9))
    batch = torch.randint(61, shape, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(shape, dtype=torch.bool)
    mask[1, ..., 6:] = False
    labels = {
        "GPTForTokenClassification": (batch % 3).masked_fill(~mask, -100),
        "GPTForQuestionAnswering": torch.tensor([[1, 4], [0, 5]]),
    }
    classes = torch.tensor([0, 2])
    language = batch.masked_fill(~mask, -100) if name in ("GPTForCausalLM", "GPTForMaskedLM") else classes
    return {"tokens": batch, "key_mask": mask, "labels": labels.get(name, language)}


class Subject:
    """Model under test, with its inputs and its results in plain PyTorch."""

    def __init__(self, name: str):
        self.name = name
        torch.manual_seed(0)
        self.is_own = name in HEADS
        if self.is_own:
            config = GPTConfig.preset("gpt2", **SIZES, dropout=0.0, num_labels=3, lm_weight=0.5, init_std=0.2)
            self.model: nn.Module = HEADS[name](config)
            self.inputs = own_inputs(name)
            self.part = "trunk.decoders.1.ff.0"
            self.linears = LINEARS
        else:
            self.model = hf_models.make(name)
            gpt_fast.accelerate(self.model)
            self.inputs = hf_models.inputs(name, "right")
            trunk = "" if name in ("GPT2Model", "OpenAIGPTModel") else "transformer."
            self.part = f"{trunk}h.1.mlp.c_fc"
            self.linears = ["c_proj", "c_fc"]

    def plain(self, model: nn.Module) -> list[Tensor]:
        """Return the results of `outputs` in plain PyTorch. This replaces the model's trunk, or restores the model."""
        if not self.is_own:
            return self.outputs(gpt_fast.restore(model))
        model.trunk = PlainTrunk(model.trunk)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gpt_fast.heads.base.output_loss", plain_output_loss)
            return self.outputs(model)

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Return the loss, if there is one, the logits or hidden states, and the gradient of every parameter."""
        model.zero_grad(set_to_none=True)
        extra = {"logits": True} if self.name in ("GPTForCausalLM", "GPTForMaskedLM") else {}
        result = model(**self.inputs, **extra)
        values = [value for value in _tensors(result) if value.is_floating_point()]
        loss = values[0] if values[0].dim() == 0 else values[0].square().mean()
        loss.backward()
        mask = self.inputs.get("key_mask", self.inputs.get("attention_mask"))
        values = [hf_models.at_real_positions(value.detach(), mask) for value in values]
        values = [value.nan_to_num(neginf=0.0) for value in values]
        return values + [
            torch.zeros_like(p) if p.grad is None else p.grad
            for _, p in sorted(_named(model), key=lambda item: item[0])
        ]


def _tensors(result: object) -> list[Tensor]:
    values = result.to_tuple() if hasattr(result, "to_tuple") else result
    return [value for value in values if isinstance(value, Tensor)]


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name.replace("trunk.trunk.", "trunk."), parameter) for name, parameter in model.named_parameters()]


def hooked(subject: Subject) -> nn.Module:
    subject.model.get_submodule(subject.part).register_forward_hook(scaled)
    return subject.model


def pre_hooked(subject: Subject) -> nn.Module:
    subject.model.get_submodule(subject.part).register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    return subject.model


def with_lora(subject: Subject) -> nn.Module:
    peft = pytest.importorskip("peft", reason="the extra examples is not installed")
    torch.manual_seed(3)
    adapted = peft.get_peft_model(
        subject.model, peft.LoraConfig(target_modules=subject.linears, r=2, init_lora_weights=False)
    )
    return adapted.get_base_model()


def pruned(subject: Subject) -> nn.Module:
    prune.l1_unstructured(subject.model.get_submodule(subject.part), "weight", amount=0.5)
    return subject.model


def parametrised(subject: Subject) -> nn.Module:
    parametrizations.weight_norm(subject.model.get_submodule(subject.part))
    return subject.model


def evaluated(subject: Subject) -> nn.Module:
    for module in subject.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    return subject.model.eval()


CHANGES = {
    "as_it_is": lambda subject: subject.model,
    "hook": hooked,
    "pre_hook": pre_hooked,
    "lora": with_lora,
    "pruning": pruned,
    "parametrization": parametrised,
    "deepcopy": lambda subject: copy.deepcopy(subject.model),
    "pickle": lambda subject: pickle.loads(pickle.dumps(subject.model)),  # noqa: S301 (our own bytes)
    "evaluation_mode": evaluated,
    "meta_and_back": lambda subject: _through_meta(subject.model),
}


def _through_meta(model: nn.Module) -> nn.Module:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model = model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return model


SUBJECTS = [*HEADS, *hf_models.CLASSES]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for value, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=2e-3, atol=2e-4 * float(wanted.abs().max()) + 1e-7)


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("change", CHANGES)
def test_every_head_is_a_module_of_pytorch(name, change):
    """Loss, logits and all gradients agree with plain PyTorch on the same modules, changed in the same way."""
    subject, twin = Subject(name), Subject(name)
    assert_same(subject.outputs(CHANGES[change](subject)), twin.plain(CHANGES[change](twin)))


@pytest.mark.parametrize("name", SUBJECTS)
def test_global_hooks_reach_every_head(name):
    """A hook on all linear layers changes the result as it does in plain PyTorch."""
    subject = Subject(name)
    before = subject.outputs(subject.model)

    def halve(module: nn.Module, args: tuple, output: object) -> object:
        return output * 0.5 if isinstance(module, nn.Linear | nn.LayerNorm) else None

    with nn.modules.module.register_module_forward_hook(halve):
        got, expected = subject.outputs(subject.model), subject.plain(copy.deepcopy(subject.model))
    assert_same(got, expected)
    assert not torch.allclose(got[0], before[0])


# For these classes of transformers, accelerated models compute the logits of a training pass only when they are read.
DEFERRING = ("GPT2LMHeadModel", "GPT2DoubleHeadsModel", "OpenAIGPTLMHeadModel", "OpenAIGPTDoubleHeadsModel")
WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="aot_eager"),
    "data_parallel": nn.DataParallel,
    "swa": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_every_head_inside_a_wrapper(name, wrap):
    subject = Subject(name)
    expected = subject.plain(copy.deepcopy(subject.model))
    got = subject.outputs(wrap(subject.model))
    if wrap is WRAPPERS["compile"] and name in DEFERRING:
        del expected[2 if "Double" in name else 1]  # a compiled pass with labels returns no logits
    assert_same(got, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_head_is_exported(name):
    """The exported program gives the logits of plain PyTorch."""
    subject = Subject(name)
    model = subject.model.eval()
    given = {key: value for key, value in subject.inputs.items() if key in ("tokens", "key_mask", "input_ids")}
    if "Double" in name:
        given["mc_token_ids"] = subject.inputs["mc_token_ids"]
    if name.startswith("GPT2"):
        model.config.use_cache = False  # an exported program cannot return a cache
    with torch.no_grad():
        program = torch.export.export(model, (), given)
        got = _tensors(program.module()(**given))
        plain = copy.deepcopy(model)
        if subject.is_own:
            plain.trunk = PlainTrunk(plain.trunk)
        else:
            gpt_fast.restore(plain)
        expected = _tensors(plain(**given))
    for value, wanted in zip(got, expected, strict=True):
        mask = given.get("key_mask")
        real, wanted_real = (hf_models.at_real_positions(x, mask) for x in (value, wanted))
        torch.testing.assert_close(real, wanted_real, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_head_on_meta_computes_shapes(name, dtype):
    subject = Subject(name)
    model = subject.model.to(dtype)
    extra = {"logits": True} if name in ("GPTForCausalLM", "GPTForMaskedLM") else {}
    expected = [(value.shape, value.dtype) for value in _tensors(model(**subject.inputs, **extra))]
    model = model.to("meta")
    values = _tensors(model(**{key: value.to("meta") for key, value in subject.inputs.items()}, **extra))
    assert [(value.shape, value.dtype) for value in values] == expected
    assert all(value.is_meta for value in values)
    values[0].float().sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters() if p.grad is not None)
