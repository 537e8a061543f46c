"""transformers' GPT-2 and GPT-1: the same function, and exact round trips."""

import pytest
import torch

from gpt_fast import GPTConfig, GPTForCausalLM, generate

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

SIZES = {"vocab_size": 61, "n_positions": 20, "n_embd": 32, "n_layer": 2, "n_head": 4}


def gpt2(**options):
    config = transformers.GPT2Config(**SIZES | {"bos_token_id": None, "eos_token_id": None} | options)
    return shaken(transformers.GPT2LMHeadModel(config))


def gpt1(**options):
    return shaken(transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**SIZES | options)))


def shaken(model):
    """Random values everywhere, so that no bias of 0 and no gain of 1 hides a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


MODELS = [
    pytest.param(gpt2, {}, id="gpt2"),
    pytest.param(gpt2, {"activation_function": "gelu", "n_inner": 72}, id="gpt2_exact_gelu_and_other_width"),
    pytest.param(gpt2, {"activation_function": "relu", "tie_word_embeddings": False}, id="gpt2_free_output_layer"),
    pytest.param(gpt1, {}, id="gpt1"),
    pytest.param(gpt1, {"afn": "relu", "layer_norm_epsilon": 1e-3}, id="gpt1_relu_and_other_eps"),
]


@pytest.mark.parametrize(("make", "options"), MODELS)
def test_same_logits_loss_and_gradients(make, options):
    theirs = make(**options)
    ours = GPTForCausalLM.from_hf(theirs)
    assert not ours.training
    tokens = torch.randint(0, 61, (3, 11))
    out, wanted = ours(tokens, tokens, logits=True), theirs(tokens, labels=tokens)
    assert torch.allclose(out.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    assert torch.allclose(out.loss, wanted.loss, rtol=1e-5)
    out.loss.backward(), wanted.loss.backward()
    grads = GPTForCausalLM.to_hf(ours).state_dict().keys() & {name for name, _ in theirs.named_parameters()}
    assert grads == {name for name, _ in theirs.named_parameters()}
    embedding = theirs.get_input_embeddings().weight.grad
    assert torch.allclose(ours.trunk.token_emb.weight.grad, embedding, atol=1e-5, rtol=1e-3)
    first = theirs.transformer.h[0].attn.c_attn.weight.grad.t()
    assert torch.allclose(ours.trunk.decoders[0].multihead_attn.in_proj_weight.grad, first, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("make", "options"), MODELS)
def test_round_trip_is_exact(make, options, tmp_path):
    theirs = make(**options)
    ours = GPTForCausalLM.from_hf(theirs)
    back = ours.to_hf()
    assert type(back) is type(theirs)
    for (name, tensor), other in zip(theirs.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
    changed = {"architectures", "_name_or_path", "dtype"}
    wanted = {k: v for k, v in theirs.config.to_dict().items() if k not in changed}
    got = {k: v for k, v in back.config.to_dict().items() if k not in changed}
    assert got == wanted
    again = GPTForCausalLM.from_hf(back)
    assert again.config == ours.config
    theirs.save_pretrained(tmp_path / "hf")
    from_folder = GPTForCausalLM.from_hf(tmp_path / "hf")
    for (name, tensor), other in zip(ours.state_dict().items(), from_folder.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


def test_left_padding_agrees_given_the_positions():
    theirs = gpt2()
    tokens, real = torch.randint(0, 61, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    real[1, :5] = False
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    wanted = theirs(tokens, attention_mask=real.long(), position_ids=positions).logits
    got = GPTForCausalLM.from_hf(theirs)(tokens, key_mask=real).logits
    assert torch.allclose(got[real], wanted[real], atol=1e-4, rtol=1e-4)


def test_half_precision_weights_stay_what_they_are():
    theirs = gpt2().bfloat16()
    ours = GPTForCausalLM.from_hf(theirs)
    assert ours.trunk.pos_emb.dtype == torch.bfloat16
    assert torch.equal(ours.to_hf().lm_head.weight, theirs.lm_head.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_function": "silu"}, "activation is 'silu', wanted one of relu, gelu"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, wanted False"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False, wanted True"),
        ({"add_cross_attention": True}, "add_cross_attention is True, wanted False"),
    ],
)
def test_options_this_library_does_not_have(options, message):
    with pytest.raises(ValueError, match=message):
        GPTForCausalLM.from_hf(gpt2(**options))


def test_other_models_are_named():
    with pytest.raises(TypeError, match="got Linear, wanted transformers' GPT2LMHeadModel or OpenAIGPTLMHeadModel"):
        GPTForCausalLM.from_hf(torch.nn.Linear(2, 2))


def test_what_transformers_cannot_hold():
    sizes = {"num_tokens": 61, "hidden_dim": 32, "num_heads": 4, "num_layers": 1, "seq_len": 8}
    with pytest.raises(ValueError, match=r"OpenAIGPTLMHeadModel cannot hold an output bias, dropout 0\.1 on the"):
        GPTForCausalLM(GPTConfig.preset("notes", **sizes)).to_hf()
    with pytest.raises(ValueError, match="cannot hold layers without bias"):
        GPTForCausalLM(GPTConfig.preset("gpt2", **sizes, bias=False)).to_hf()


@pytest.mark.parametrize("make", [gpt2, gpt1], ids=["gpt2", "gpt1"])
def test_same_greedy_tokens(make):
    """Through both libraries, alone and as a left-padded batch; transformers' GPT-1 cannot pad: it has no positions."""
    theirs = make(eos_token_id=None) if make is gpt2 else make()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # so that the choice depends on the context
    ours = GPTForCausalLM.from_hf(theirs)
    options = {"do_sample": False, "pad_token_id": 0}
    tokens = torch.randint(1, 61, (3, 6))
    wanted = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=14, **options)
    out = generate(ours, tokens, max_new_tokens=14, temperature=0)
    assert torch.equal(out, wanted)
    assert len(out[:, 6:].unique()) > 3
    if make is gpt2:
        mask = torch.arange(6) >= torch.tensor([0, 4, 2])[:, None]
        tokens = tokens.masked_fill(~mask, 0)
        wanted = theirs.generate(tokens, attention_mask=mask.long(), max_new_tokens=14, **options)
        assert torch.equal(generate(ours, tokens, max_new_tokens=14, temperature=0, key_mask=mask), wanted)
