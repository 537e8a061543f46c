"""Conversion keeps changes to a model that its configuration does not name, or refuses the model with a reason."""

import copy
import json
import warnings

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrizations, prune

import gpt_fast
from gpt_fast import (
    GPTConfig,
    GPTForCausalLM,
    GPTForMaskedLM,
    GPTForMultipleChoice,
    GPTForSequenceClassification,
    GPTModel,
)
from gpt_fast.heads import HEADS, HeadOutput
from gpt_fast.integrations.huggingface.convert import our_class
from gpt_fast.layers import SelfAttention, TransformerDecoder
from tests import hf_models
from tests.command_line import succeed

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
modeling_gpt2 = transformers.models.gpt2.modeling_gpt2

TOKENS = torch.tensor([[3, 60, 17, 8, 9], [1, 2, 50, 44, 31]])
KINDS = {"GPTModel": GPTModel} | HEADS
LM_HEADS = hf_models.LM_HEADS
SIZES = {"num_tokens": 61, "hidden_dim": 32, "num_heads": 4, "num_layers": 2, "seq_len": 20}


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def train(model):
    """Train `model` on one batch until it has memorised the batch, and return it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    return model


# ---- the output layer: tied by identity ------------------------------------------------------------------------------


def untied(name):
    """Return a trained language model with an untied output layer, although its configuration says tied."""
    model = hf_models.make(name)
    model.lm_head.weight = nn.Parameter(torch.randn(61, 32) * 0.02)
    assert model.config.tie_word_embeddings
    return train(model)


@pytest.mark.parametrize("name", LM_HEADS)
def test_a_trained_output_layer_is_kept(name, tmp_path, cli):
    """The output layer survives conversion in memory, from a folder, and by `gpt-fast convert` both ways."""
    theirs = untied(name)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    succeed(cli("convert", "--from", tmp_path / "theirs", "--out", tmp_path / "ours"))
    converted = GPTForCausalLM.from_pretrained(tmp_path / "ours")
    for ours in (GPTForCausalLM.from_hf(theirs), GPTForCausalLM.from_hf(tmp_path / "theirs"), converted):
        assert not ours.config.tied
        torch.testing.assert_close(logits(ours), expected)
        assert float(ours(TOKENS, TOKENS).loss.detach()) < 0.1
    succeed(cli("convert", "--from", tmp_path / "ours", "--out", tmp_path / "back"))
    back = getattr(transformers, name).from_pretrained(tmp_path / "back")
    assert not back.config.tie_word_embeddings
    assert torch.equal(logits(back), expected)


def test_the_tie_is_that_of_the_parameters_whatever_the_configuration_says():
    theirs = hf_models.make("GPT2LMHeadModel", tie_word_embeddings=False)
    theirs.lm_head.weight = theirs.transformer.wte.weight
    ours = GPTForCausalLM.from_hf(theirs)
    assert ours.config.tied and ours.is_tied()
    assert not GPTForCausalLM.from_hf(theirs, tied=False).is_tied()
    with pytest.raises(
        ValueError, match=r"tied is True; expected False, as lm_head\.weight is not the token embedding"
    ):
        GPTForCausalLM.from_hf(untied("GPT2LMHeadModel"), tied=True)


@pytest.mark.parametrize("name", LM_HEADS)
def test_a_bias_of_the_output_layer_is_kept(name):
    theirs = hf_models.make(name)
    theirs.lm_head.bias = nn.Parameter(torch.randn(61))
    ours = GPTForCausalLM.from_hf(theirs)
    assert ours.config.output_bias and ours.is_tied()
    torch.testing.assert_close(logits(ours), logits(theirs))
    with pytest.raises(ValueError, match="cannot hold an output bias"):
        ours.to_hf()


@pytest.mark.parametrize("kind", [GPTForCausalLM, GPTForMaskedLM])
def test_our_own_output_layer_is_kept(kind):
    ours = kind(GPTConfig(**SIZES))
    ours.output_layer.weight = nn.Parameter(torch.randn(61, 32))
    theirs = ours.to_hf().eval()
    assert not theirs.config.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS, use_cache=False).logits, logits(ours))


def test_a_joint_loss_output_bias_has_no_place_in_double_heads():
    config = GPTConfig(**SIZES, lm_weight=0.5, tied=False, output_bias=True)
    with pytest.raises(ValueError, match="GPT2DoubleHeadsModel cannot hold an output bias"):
        GPTForMultipleChoice(config).to_hf()


def test_another_head_takes_the_trunk_and_drops_the_rest_on_purpose():
    theirs = untied("GPT2LMHeadModel")
    theirs.lm_head.bias = nn.Parameter(torch.randn(61))
    tuned = GPTForSequenceClassification.from_hf(theirs, num_labels=5, pooling="extract", extract_token=4)
    with torch.no_grad():
        torch.testing.assert_close(tuned.eval().trunk(TOKENS), theirs.eval().transformer(TOKENS).last_hidden_state)
    joint = GPTForSequenceClassification.from_hf(theirs, lm_weight=0.5)
    assert torch.equal(joint.output_layer.weight, theirs.lm_head.weight)
    assert torch.equal(joint.output_layer.bias, theirs.lm_head.bias)


def test_a_bidirectional_model_is_no_causal_one(tmp_path, cli):
    theirs = GPTForMaskedLM(GPTConfig(**SIZES)).to_hf()
    with pytest.raises(ValueError, match="is_causal is False; expected True for GPTForCausalLM: GPTForMaskedLM"):
        GPTForCausalLM.from_hf(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    result = json.loads(
        succeed(cli("convert", "--from", tmp_path / "theirs", "--out", tmp_path / "ours", "--json")).out
    )
    assert result["model"] == "GPTForMaskedLM"


# ---- transformers' models that are not what their configuration says -------------------------------------------------


def block(model):
    return model.transformer.h[0]


def append_a_block(model):
    model.transformer.h.append(copy.deepcopy(block(model)))


def drop_a_block(model):
    del model.transformer.h[1]


def share_a_block(model):
    model.transformer.h[1] = block(model)


def put(path, make):
    """Return a change that replaces the module at `path`."""

    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))

    return change


def attribute(path, name, value):
    def change(model):
        setattr(model.get_submodule(path), name, value)

    return change


def as_linear(conv):
    """Return `conv` as an nn.Linear. Its transposed matrix is square, so a plain copy would raise no error."""
    linear = nn.Linear(32, 32)
    linear.weight = nn.Parameter(conv.weight.detach().t().clone())
    return linear


def doubled(module, args, output):
    return output * 2


def add_lora(model):
    peft = pytest.importorskip("peft", reason="the extra examples is not installed")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))


BLOCK = "transformer.h.0"
CHANGES = [
    pytest.param(append_a_block, r"transformer\.h\.2 is a GPT2Block; expected no such module", id="a third block"),
    pytest.param(drop_a_block, r"transformer\.h\.1 is missing; expected a GPT2Block", id="one block of two"),
    pytest.param(share_a_block, r"h\.1\.ln_1\.weight is the same parameter as .*h\.0", id="one block twice"),
    pytest.param(put("transformer.ln_f", lambda _: nn.Identity()), "ln_f is a .*Identity, not LayerNorm", id="no norm"),
    pytest.param(put(f"{BLOCK}.attn.c_proj", as_linear), "c_proj is a .*Linear, not Conv1D", id="Linear for Conv1D"),
    pytest.param(put(f"{BLOCK}.mlp.act", lambda _: nn.SiLU()), r"mlp\.act is a .*SiLU", id="another activation"),
    pytest.param(
        attribute(f"{BLOCK}.mlp", "act", None), r"mlp\.act is missing; expected a NewGELU", id="no activation"
    ),
    pytest.param(attribute(f"{BLOCK}.ln_2", "eps", 0.1), r"ln_2 has eps 0\.1; expected 1e-05", id="another eps"),
    pytest.param(attribute(f"{BLOCK}.attn", "scaling", 0.5), r"attn has scaling 0\.5; expected 0\.35", id="scaling"),
    pytest.param(attribute(f"{BLOCK}.attn", "num_heads", 2), "attn has num_heads 2; expected 4", id="number of heads"),
    pytest.param(attribute("transformer.drop", "p", 0.3), r"drop has p 0\.3; expected 0\.0", id="dropout rate"),
    pytest.param(attribute("transformer.wte", "max_norm", 1.0), r"wte has max_norm 1\.0", id="renormed embedding"),
    pytest.param(attribute(BLOCK, "forward", lambda x, *args, **kwargs: x), "has a forward of its own", id="forward"),
    pytest.param(lambda model: block(model).register_forward_hook(doubled), r"h\.0 has hooks", id="forward hook"),
    pytest.param(
        lambda model: block(model).mlp.act.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        r"mlp\.act has hooks",
        id="forward pre-hook",
    ),
    pytest.param(lambda model: nn.utils.weight_norm(block(model).mlp.c_fc), "c_fc has hooks", id="weight_norm"),
    pytest.param(
        lambda model: parametrizations.weight_norm(block(model).mlp.c_fc), "ParametrizedConv1D", id="parametrization"
    ),
    pytest.param(
        lambda model: prune.l1_unstructured(block(model).attn.c_attn, "weight", 0.5), "c_attn has hooks", id="pruning"
    ),
    pytest.param(add_lora, r"c_attn is a peft\..*, not Conv1D", id="PEFT base"),
    pytest.param(
        lambda model: model.register_parameter("gain", nn.Parameter(torch.ones(1))),
        r"gain is a parameter \[1\]; expected no such parameter",
        id="a further parameter",
    ),
    pytest.param(
        lambda model: block(model).register_buffer("gate", torch.ones(3)),
        r"h\.0\.gate is a buffer \[3\]; expected no such buffer",
        id="a further buffer",
    ),
    pytest.param(
        lambda model: block(model).ln_1.bfloat16(),
        r"ln_1\.weight has dtype torch\.bfloat16; expected torch\.float32, as transformer\.wte\.weight",
        id="two dtypes",
    ),
    pytest.param(
        lambda model: setattr(model.transformer.wpe, "weight", nn.Parameter(torch.zeros(7, 32))),
        r"wpe\.weight has shape \[7, 32\]; expected \[20, 32\]",
        id="another shape",
    ),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_changed_model_is_refused_by_name(change, message):
    theirs = hf_models.make("GPT2LMHeadModel").eval()
    change(theirs)
    for kind in (GPTForCausalLM, GPTForSequenceClassification):  # every head needs an unchanged trunk
        with pytest.raises(ValueError, match="gpt_fast.from_hf: .*" + message):
            kind.from_hf(theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(attribute(f"{BLOCK}.attn", "scale", False), "scale False; expected True", id="scale"),
        pytest.param(attribute(f"{BLOCK}.attn", "n_head", 2), "n_head 2; expected 4", id="number of heads"),
        pytest.param(
            lambda model: block(model).attn.bias.fill_(1), r"attn\.bias has other values", id="attention to both sides"
        ),
        pytest.param(lambda model: model.transformer.position_ids.zero_(), "position_ids has other", id="positions"),
        pytest.param(lambda model: delattr(block(model).attn, "bias"), r"attn\.bias is missing", id="no mask"),
        pytest.param(append_a_block, r"transformer\.h\.2 is a Block; expected no such module", id="a third block"),
        # All blocks share transformers' one activation module.
        pytest.param(put(f"{BLOCK}.mlp.act", lambda _: nn.GELU()), r"act is a torch.*GELU", id="exact GELU"),
    ],
)
def test_a_changed_gpt1_is_refused_by_name(change, message):
    theirs = hf_models.make("OpenAIGPTLMHeadModel")
    change(theirs)
    with pytest.raises(ValueError, match="gpt_fast.from_hf: .*" + message):
        GPTForCausalLM.from_hf(theirs)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("GPT2ForSequenceClassification", "score"),
        ("GPT2ForTokenClassification", "classifier"),
        ("GPT2ForTokenClassification", "dropout"),
        ("GPT2ForQuestionAnswering", "qa_outputs"),
        ("GPT2DoubleHeadsModel", "multiple_choice_head.activation"),
        ("OpenAIGPTForSequenceClassification", "score"),
        ("OpenAIGPTDoubleHeadsModel", "multiple_choice_head.summary"),
        ("GPT2Model", "ln_f"),
        ("OpenAIGPTModel", "h.1.ln_2"),
    ],
)
def test_every_class_is_guarded(name, path):
    theirs = hf_models.make(name)
    theirs.get_submodule(path).register_forward_hook(doubled)
    with pytest.raises(ValueError, match=f"gpt_fast.from_hf: {path} has hooks"):
        KINDS[our_class(name)].from_hf(theirs)


def test_a_class_of_ones_own_is_refused():
    class Halved(transformers.GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits / 2
            return out

    config = hf_models.make("GPT2LMHeadModel").config
    with pytest.raises(TypeError, match="got Halved; expected one of transformers' GPT-2 or GPT-1 models"):
        GPTForCausalLM.from_hf(Halved(config))


def test_a_dropout_after_the_classifier_is_refused():
    theirs = hf_models.make("GPT2DoubleHeadsModel", summary_last_dropout=0.3)
    with pytest.raises(ValueError, match=r"summary_last_dropout is 0\.3; expected 0"):
        GPTForMultipleChoice.from_hf(theirs)


# ---- changes that leave the function as it is ------------------------------------------------------------------------


def use_with_outputs(model):
    """Call the model for its hidden states, which leaves transformers' hooks on the blocks."""
    model(TOKENS, output_attentions=True, output_hidden_states=True)
    assert model.transformer.h[0]._forward_hooks


def merge_lora(model):
    peft = pytest.importorskip("peft", reason="the extra examples is not installed")
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    assert peft.get_peft_model(model, config).merge_and_unload() is model


def drop_a_block_by_the_configuration_too(model):
    """Remove the first block. The other block keeps layer_idx 1, so transformers can only run it without a cache."""
    del model.transformer.h[0]
    model.config.n_layer = 1
    model.config.use_cache = False


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(use_with_outputs, id="recording hooks"),
        pytest.param(gpt_fast.accelerate, id="accelerated"),
        pytest.param(merge_lora, id="merged adapter"),
        pytest.param(lambda model: model.gradient_checkpointing_enable(), id="gradient checkpointing"),
        pytest.param(lambda model: model.enable_input_require_grads(), id="gradients of the inputs"),
        pytest.param(lambda model: model.resize_token_embeddings(70), id="resized"),
        pytest.param(lambda model: model.requires_grad_(False), id="frozen"),
        pytest.param(lambda model: model.set_attn_implementation("eager"), id="eager attention"),
        pytest.param(drop_a_block_by_the_configuration_too, id="a block less, and the configuration says so"),
        pytest.param(lambda model: block(model).attn.register_buffer("bias", torch.ones(20, 20)), id="an old mask"),
    ],
)
def test_what_does_not_change_the_function_is_no_obstacle(change):
    theirs = hf_models.make("GPT2LMHeadModel")
    change(theirs)
    torch.testing.assert_close(logits(GPTForCausalLM.from_hf(theirs)), logits(theirs))


@pytest.mark.parametrize("is_accelerated", [False, True], ids=["as it is", "accelerated"])
def test_a_model_trained_in_mixed_precision_converts(is_accelerated):
    """Hugging Face Accelerate leaves autocast around the forward. After unwrapping it leaves a bound method there."""
    hf_accelerate = pytest.importorskip("accelerate", reason="the extra examples is not installed")
    theirs = hf_models.make("GPT2LMHeadModel").eval()
    if is_accelerated:
        gpt_fast.accelerate(theirs)
    expected = logits(theirs)
    trainer = hf_accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    wrapped = trainer.prepare_model(theirs)
    assert wrapped is theirs and not torch.equal(logits(theirs), expected)
    torch.testing.assert_close(logits(GPTForCausalLM.from_hf(theirs)), expected)
    unwrapped = trainer.unwrap_model(theirs, keep_fp32_wrapper=False)
    torch.testing.assert_close(logits(GPTForCausalLM.from_hf(unwrapped)), expected)


def test_a_forward_put_on_an_accelerated_model_is_refused():
    theirs = hf_models.make("GPT2ForSequenceClassification")
    gpt_fast.accelerate(theirs)
    theirs.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="the model has a forward of its own; expected a plain GPT2ForSequence"):
        GPTForSequenceClassification.from_hf(theirs)


@pytest.mark.parametrize("name", hf_models.CLASSES)
def test_accelerated_models_convert(name):
    theirs = hf_models.make(name)
    gpt_fast.accelerate(theirs)
    back = KINDS[our_class(name)].from_hf(theirs).to_hf()
    for label, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[label]), label


@pytest.mark.parametrize("name", hf_models.CLASSES)
def test_the_comparison_leaves_no_trace(name):
    """Conversion under autocast leaves the modes of single modules and the random state unchanged."""
    theirs = hf_models.make(name, dropout=0.5)
    trunk = theirs.base_model
    trunk.h[1].eval()
    modes = [module.training for module in theirs.modules()]
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = KINDS[our_class(name)].from_hf(theirs)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # every weight is copied, so none is drawn
    assert [module.training for module in theirs.modules()] == modes
    ours.eval()
    ours.get_submodule("trunk.decoders.0" if hasattr(ours, "trunk") else "decoders.0").train()
    modes = [module.training for module in ours.modules()]
    ours.to_hf()
    assert [module.training for module in ours.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", hf_models.CLASSES)
def test_every_dtype_converts_without_a_warning(name, dtype):
    theirs = hf_models.make(name, pad_token_id=None).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = KINDS[our_class(name)].from_hf(theirs).to_hf()
    for label, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[label]), label


def test_the_meta_device_has_no_values_to_compare():
    config = hf_models.make("GPT2LMHeadModel").config
    with torch.device("meta"):
        theirs = transformers.GPT2LMHeadModel(config)
    ours = GPTForCausalLM.from_hf(theirs)
    assert ours.trunk.pos_emb.is_meta and ours.is_tied()
    assert ours.to_hf().lm_head.weight.is_meta


def test_overrides_may_ask_for_another_function():
    theirs = hf_models.make("GPT2LMHeadModel")
    assert GPTForCausalLM.from_hf(theirs, layer_norm_eps=0.1, activation="relu").config.activation == "relu"
    with pytest.raises(ValueError, match=r"wte\.weight has shape \[61, 32\]; expected .* \[70, 32\]"):
        GPTForCausalLM.from_hf(theirs, num_tokens=70)


# ---- the comparison of both sides' outputs ---------------------------------------------------------------------------


def double(out):
    return out * 2 if torch.is_tensor(out) else HeadOutput(None, out.logits * 2)


@pytest.mark.parametrize(
    ("kind", "name", "part"),
    [
        pytest.param(modeling_gpt2.GPT2MLP, "GPT2LMHeadModel", "hidden states", id="transformers' MLP"),
        pytest.param(transformers.GPT2LMHeadModel, "GPT2LMHeadModel", "outputs", id="transformers' head"),
        pytest.param(SelfAttention, "GPT2LMHeadModel", "hidden states", id="our attention"),
        pytest.param(GPTForCausalLM, "OpenAIGPTLMHeadModel", "outputs", id="our head"),
    ],
)
def test_a_class_that_computes_something_else_is_found(monkeypatch, kind, name, part):
    """A forward that was replaced on the class does not show in the modules, but in their outputs."""
    theirs = hf_models.make(name)
    ours = GPTForCausalLM.from_hf(theirs)
    usual = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: double(usual(*args, **kwargs)))
    for convert in (lambda: GPTForCausalLM.from_hf(theirs), ours.to_hf):
        with pytest.raises(ValueError, match=f"computes something else than its copy: the {part} differ by"):
            convert()


# ---- our models that are not what their configuration says -----------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda model: model.trunk.decoders.append(copy.deepcopy(model.trunk.decoders[0])),
            r"trunk\.decoders\.2 is a TransformerDecoder; expected no such module",
            id="a third decoder",
        ),
        pytest.param(
            lambda model: model.trunk.decoders.pop(1), r"decoders\.1 is missing; expected a Trans", id="one of two"
        ),
        pytest.param(
            lambda model: model.trunk.decoders[0].register_forward_hook(lambda module, args, out: None),
            r"decoders\.0 has hooks",
            id="hook",
        ),
        pytest.param(
            attribute("trunk.decoders.0.layer_norm1", "eps", 0.1), r"eps 0\.1; expected 1e-05", id="another eps"
        ),
        pytest.param(put("trunk.decoders.0.ff.1", lambda _: nn.GELU()), "approximate 'none'", id="another GELU"),
        pytest.param(put("trunk.decoders.0.ff.1", lambda _: nn.SiLU()), "SiLU, not GELU", id="another activation"),
        pytest.param(attribute("trunk.dropout", "p", 0.3), r"trunk\.dropout has p 0\.3; expected 0\.1", id="dropout"),
        pytest.param(
            attribute("trunk.decoders.1.multihead_attn", "dropout", 0.3), r"dropout 0\.3", id="attention's dropout"
        ),
        pytest.param(
            put("trunk.decoders.1", lambda _: TransformerDecoder(32, 4, 128, 0.1)), "has pre_norm", id="block"
        ),
        pytest.param(put("output_layer", lambda _: nn.Identity()), "output_layer is a .*Identity", id="output layer"),
        pytest.param(
            lambda model: parametrizations.weight_norm(model.trunk.decoders[0].ff[0]), "ParametrizedLinear", id="norm"
        ),
        pytest.param(
            lambda model: model.register_parameter("gain", nn.Parameter(torch.ones(1))), "gain is a par", id="parameter"
        ),
    ],
)
def test_our_changed_model_is_refused_by_name(change, message):
    ours = GPTForCausalLM(GPTConfig(**SIZES)).eval()
    change(ours)
    with pytest.raises(ValueError, match="gpt_fast.to_hf: .*" + message):
        ours.to_hf()


# ---- folders ---------------------------------------------------------------------------------------------------------


def folder_of(model, path, tensors=None, config=None):
    """Save `model`, then change its files: `tensors` changes the dict of tensors, `config` is put into config.json."""
    model.save_pretrained(path)
    if tensors is not None:
        stored = load_file(path / "model.safetensors")
        tensors(stored)
        save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(written | (config or {})))
    return path


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        pytest.param(
            lambda stored: stored.pop("transformer.ln_f.bias"), {}, "lacks transformer.ln_f.bias;", id="missing"
        ),
        pytest.param(
            lambda stored: stored.update({"transformer.h.2.ln_1.weight": torch.ones(32)}),
            {},
            "has transformer.h.2.ln_1.weight;",
            id="third block",
        ),
        pytest.param(
            lambda stored: stored.update({"lm_head.bias": torch.ones(61)}), {}, "has lm_head.bias;", id="output bias"
        ),
        pytest.param(
            None, {"n_positions": 10}, "has another shape of transformer.wpe.weight; expected", id="other shape"
        ),
        pytest.param(None, {"tie_word_embeddings": False}, "lacks lm_head.weight;", id="untied without a head"),
        pytest.param(None, {"activation_function": "none"}, "activation is 'none'; expected one of", id="activation"),
        pytest.param(None, {"n_layer": "two"}, "wrong value: Validation error for field 'n_layer'", id="wrong type"),
        pytest.param(
            None,
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "holds quantised weights; expected a model in floating point",
            id="quantised",
        ),
    ],
)
def test_convert_refuses_a_folder_by_name(cli, tmp_path, tensors, config, message):
    folder_of(hf_models.make("GPT2LMHeadModel"), tmp_path / "theirs", tensors, config)
    result = cli("convert", "--from", tmp_path / "theirs", "--out", tmp_path / "ours")
    assert result.code == 2 and message in " ".join(result.err.split()) and "Traceback" not in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_convert_refuses_a_truncated_file(cli, tmp_path):
    path = folder_of(hf_models.make("GPT2LMHeadModel"), tmp_path / "theirs") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    result = cli("convert", "--from", tmp_path / "theirs", "--out", tmp_path / "ours")
    assert result.code == 2 and "has broken safetensors" in result.err and "Traceback" not in result.err


def test_convert_refuses_double_heads_with_a_free_output_layer(cli, tmp_path):
    """Without `--head`, convert keeps every weight or fails. With `--head clm` it keeps the output layer."""
    hf_models.make("GPT2DoubleHeadsModel", tie_word_embeddings=False).save_pretrained(tmp_path / "theirs")
    result = cli("convert", "--from", tmp_path / "theirs", "--out", tmp_path / "ours")
    assert result.code == 2 and "lm_head.weight has no place in GPTForMultipleChoice" in result.err
    succeed(cli("convert", "--from", tmp_path / "theirs", "--out", tmp_path / "ours", "--head", "clm"))


def test_an_old_file_of_gpt2_is_read(tmp_path):
    """Old files, such as OpenAI's gpt2, name tensors without a prefix and hold masks that no forward reads any more."""

    def age(stored):
        for name in list(stored):
            stored[name.removeprefix("transformer.")] = stored.pop(name)
        for i in range(2):
            stored[f"h.{i}.attn.bias"] = torch.ones(1, 1, 20, 20).tril()
            stored[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)

    theirs = hf_models.make("GPT2LMHeadModel")
    folder = folder_of(theirs, tmp_path / "theirs", age)
    assert torch.equal(logits(GPTForCausalLM.from_hf(folder)), logits(GPTForCausalLM.from_hf(theirs)))
