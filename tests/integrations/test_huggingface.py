"""transformers' GPT-2 and GPT-1: the same function, and exact round trips."""

import json

import pytest
import tokenizers
import torch

from gpt_fast import (
    GPTConfig,
    GPTForCausalLM,
    GPTForMaskedLM,
    GPTForMultipleChoice,
    GPTForQuestionAnswering,
    GPTForSequenceClassification,
    GPTForSimilarity,
    GPTForTokenClassification,
    GPTModel,
    generate,
)
from gpt_fast.data import tokenizer as tok
from tests import hf_models
from tests.command_line import succeed

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

SIZES = {"vocab_size": 61, "n_positions": 20, "n_embd": 32, "n_layer": 2, "n_head": 4}


def gpt2(**options):
    config = transformers.GPT2Config(**SIZES | {"bos_token_id": None, "eos_token_id": None} | options)
    return shaken(transformers.GPT2LMHeadModel(config))


def gpt1(**options):
    return shaken(transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**SIZES | options)))


def shaken(model):
    """Add noise to every parameter of `model`, so that no bias of 0 and no gain of 1 hides a mistake."""
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
        ({"activation_function": "silu"}, "activation is 'silu'; expected one of relu, gelu"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; expected False"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False; expected True"),
        ({"add_cross_attention": True}, "add_cross_attention is True; expected False"),
    ],
)
def test_options_this_library_does_not_have(options, message):
    with pytest.raises(ValueError, match=message):
        GPTForCausalLM.from_hf(gpt2(**options))


def test_other_models_are_named():
    with pytest.raises(TypeError, match="got Linear; expected one of transformers' GPT-2 or GPT-1 models"):
        GPTForCausalLM.from_hf(torch.nn.Linear(2, 2))


def test_what_transformers_cannot_hold():
    sizes = {"num_tokens": 61, "hidden_dim": 32, "num_heads": 4, "num_layers": 1, "seq_len": 8}
    with pytest.raises(ValueError, match=r"OpenAIGPTLMHeadModel cannot hold an output bias, dropout 0\.1 on the"):
        GPTForCausalLM(GPTConfig.preset("notes", **sizes)).to_hf()
    with pytest.raises(ValueError, match="cannot hold layers without bias"):
        GPTForCausalLM(GPTConfig.preset("gpt2", **sizes, bias=False)).to_hf()


@pytest.mark.parametrize("make", [gpt2, gpt1], ids=["gpt2", "gpt1"])
def test_same_greedy_tokens(make):
    """Both libraries generate the same tokens, for GPT-2 from left-padded prompts too.

    transformers' GPT-1 gives no positions to its model when it generates, so it cannot pad prompts.
    """
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


# ---- the other heads -------------------------------------------------------------------------------------------------

HEADS = [
    pytest.param(GPTModel, "GPT2Model", id="trunk"),
    pytest.param(GPTModel, "OpenAIGPTModel", id="gpt1_trunk"),
    pytest.param(GPTForSequenceClassification, "GPT2ForSequenceClassification", id="classifier"),
    pytest.param(GPTForSequenceClassification, "OpenAIGPTForSequenceClassification", id="gpt1_classifier"),
]


@pytest.mark.parametrize(("head", "name"), HEADS)
def test_every_head_both_ways(head, name, tmp_path):
    theirs = hf_models.make(name).eval()
    ours = head.from_hf(theirs)
    given = hf_models.inputs(name, "right")
    tokens, real = given["input_ids"], given["attention_mask"].bool()
    wanted = theirs(**given)
    if head is GPTModel:
        torch.testing.assert_close(ours(tokens, key_mask=real)[real], wanted.last_hidden_state[real])
    else:
        out = ours(tokens, given["labels"], key_mask=real)
        torch.testing.assert_close(out.logits, wanted.logits)
        torch.testing.assert_close(out.loss, wanted.loss)
        assert (ours.config.num_labels, ours.config.classifier_dropout) == (3, 0.0)
    back = ours.to_hf()
    assert type(back) is type(theirs)
    assert theirs.state_dict().keys() == back.state_dict().keys()
    for label, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[label]), label
    back.save_pretrained(tmp_path)
    again = head.from_hf(tmp_path)
    assert again.config == ours.config
    for label, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[label]), label


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["GPT2DoubleHeadsModel", "OpenAIGPTDoubleHeadsModel"])
def test_multiple_choice_is_double_heads(name, tied):
    theirs = hf_models.make(name, tie_word_embeddings=tied).eval()
    ours = GPTForMultipleChoice.from_hf(theirs, lm_weight=0.5)
    given = hf_models.inputs(name)
    wanted = theirs(**given)
    out = ours(given["input_ids"], given["mc_labels"])
    torch.testing.assert_close(out.logits, wanted.mc_logits)
    torch.testing.assert_close(out.loss, wanted.mc_loss + 0.5 * wanted.loss)
    back = ours.to_hf()
    assert type(back) is type(theirs)
    for label, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[label]), label
    if not tied:
        with pytest.raises(ValueError, match=r"cannot hold a free output layer that is not there \(lm_weight 0\)"):
            GPTForMultipleChoice.from_hf(theirs, lm_weight=0.0).to_hf()
        with pytest.raises(
            ValueError, match=r"lm_head\.weight has no place in GPTForMultipleChoice; expected lm_weight=0\.5"
        ):
            GPTForMultipleChoice.from_hf(theirs)
    theirs.config.summary_type = "mean"
    with pytest.raises(ValueError, match="summary_type is 'mean'; expected 'cls_index'"):
        GPTForMultipleChoice.from_hf(theirs)


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize(
    ("head", "name"),
    [
        (GPTForTokenClassification, "GPT2ForTokenClassification"),
        (GPTForQuestionAnswering, "GPT2ForQuestionAnswering"),
    ],
)
def test_heads_that_read_every_token(head, name, side, tmp_path):
    theirs = hf_models.make(name, classifier_dropout=0.25).eval()
    ours = head.from_hf(theirs)
    assert ours.config.classifier_dropout == 0.25
    given = hf_models.inputs(name, side)
    tokens = given["input_ids"]
    real = None if side is None else given["attention_mask"].bool()
    if real is not None:
        given["position_ids"] = (real.long().cumsum(1) - 1).clamp(min=0)
    wanted = theirs(**given)
    if head is GPTForTokenClassification:
        out = ours(tokens, given["labels"], key_mask=real)
        everywhere = torch.ones_like(tokens, dtype=torch.bool) if real is None else real
        torch.testing.assert_close(out.logits[everywhere], wanted.logits[everywhere])
        torch.testing.assert_close(out.loss, wanted.loss)
    else:
        at = torch.stack((given["start_positions"], given["end_positions"]), 1)
        if real is not None:
            at[1:] = -100  # the positions in `given` are padding in some of these rows
        out = ours(tokens, at, key_mask=real)
        for got, scores in zip(out.logits.unbind(1), (wanted.start_logits, wanted.end_logits), strict=True):
            torch.testing.assert_close(got[got.isfinite()], scores[got.isfinite()])
            assert real is None or torch.equal(got.isfinite(), real)
        if real is None:
            torch.testing.assert_close(out.loss, wanted.loss)
            missing = at.masked_fill(torch.tensor([[False, False], [True, False], [True, True]]), -100)
            starts, ends = missing.masked_fill(missing < 0, 11).unbind(1)  # transformers ignores position T
            loss = theirs(tokens, start_positions=starts, end_positions=ends).loss
            torch.testing.assert_close(ours(tokens, missing).loss, loss)
    back = ours.to_hf()
    assert type(back) is type(theirs)
    for label, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[label]), label
    back.save_pretrained(tmp_path)
    again = head.from_hf(tmp_path)
    assert again.config == ours.config
    for label, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[label]), label
    with pytest.raises(ValueError, match="cannot hold a classifier without bias, a joint loss"):
        head(ours.config.replace(classifier_bias=False, lm_weight=0.5)).to_hf()
    with pytest.raises(ValueError, match=f"no post-norm {head.__name__}"):
        head(ours.config.replace(pre_norm=False)).to_hf()


@pytest.mark.parametrize("name", ["GPT2ForSequenceClassification", "OpenAIGPTModel"])
def test_similarity_takes_what_there_is_and_has_no_counterpart(name):
    theirs = hf_models.make(name).eval()
    ours = GPTForSimilarity.from_hf(theirs)
    if "Sequence" in name:
        assert torch.equal(ours.classifier.weight, theirs.score.weight)
    given = hf_models.inputs("GPT2Model")["input_ids"]
    trunk = theirs.transformer if "Sequence" in name else theirs
    states = trunk(given).last_hidden_state[:, -1] + trunk(given.flip(1)).last_hidden_state[:, -1]
    torch.testing.assert_close(ours(torch.stack((given, given.flip(1)), 1)).logits, ours.classifier(states))
    with pytest.raises(
        ValueError, match="transformers has no .* GPTForSimilarity; expected one of GPTModel, GPTForCaus"
    ):
        ours.to_hf()


@pytest.mark.parametrize("labels", [1, 2])
def test_regression_converts_too(labels):
    theirs = hf_models.make("GPT2ForSequenceClassification", num_labels=labels, problem_type="regression").eval()
    ours = GPTForSequenceClassification.from_hf(theirs)
    tokens = hf_models.inputs("GPT2Model")["input_ids"]
    values = torch.randn(3, labels)
    torch.testing.assert_close(ours(tokens, values).loss, theirs(tokens, labels=values).loss)
    assert ours.to_hf().config.problem_type == "regression"
    theirs.config.problem_type = "ranking"
    with pytest.raises(ValueError, match="problem_type is 'ranking'; expected one of regression, single_label"):
        GPTForSequenceClassification.from_hf(theirs)


def test_masked_language_model_is_a_bidirectional_gpt2(tmp_path):
    config = GPTConfig(num_tokens=61, hidden_dim=32, num_heads=4, num_layers=2, seq_len=20)
    ours = GPTForMaskedLM(config).eval()
    tokens = torch.randint(61, (2, 9))
    theirs = ours.to_hf()
    torch.testing.assert_close(theirs(tokens, use_cache=False).logits, ours(tokens).logits)
    theirs.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(tokens, use_cache=False).logits, ours(tokens).logits)
    torch.testing.assert_close(GPTForMaskedLM.from_hf(tmp_path)(tokens).logits, ours(tokens).logits)
    with pytest.raises(ValueError, match="no post-norm GPTForMaskedLM"):
        GPTForMaskedLM(config.replace(pre_norm=False)).to_hf()


@pytest.mark.parametrize("name", hf_models.CLASSES)
def test_any_class_gives_its_trunk_to_any_head(name):
    theirs = hf_models.make(name)
    trunk = GPTModel.from_hf(theirs)
    for head in (GPTForCausalLM, GPTForMaskedLM):
        ours = head.from_hf(theirs)
        for label, tensor in trunk.state_dict().items():
            assert torch.equal(ours.trunk.state_dict()[label], tensor), label
    classifier = GPTForSequenceClassification.from_hf(theirs, num_labels=5) if "Sequence" not in name else None
    if classifier is not None:
        assert classifier.classifier.weight.shape == (5, 32) and classifier.classifier.bias is not None


def test_a_classifier_that_transformers_cannot_hold():
    sizes = {"num_tokens": 61, "hidden_dim": 32, "num_heads": 4, "num_layers": 1, "seq_len": 8, "extract_token": 3}
    with pytest.raises(ValueError, match=r"a classifier with bias \(train with classifier_bias=False; gpt-fast"):
        GPTForSequenceClassification(GPTConfig(**sizes)).to_hf()
    with pytest.raises(ValueError, match=r'pooling "extract", a joint loss \(lm_weight 0.5\)'):
        GPTForSequenceClassification(
            GPTConfig(**sizes, classifier_bias=False, pooling="extract", lm_weight=0.5)
        ).to_hf()


# ---- gpt-fast convert ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "GPT2ForSequenceClassification", "OpenAIGPTDoubleHeadsModel",
        "GPT2ForTokenClassification", "GPT2ForQuestionAnswering",
    ],
)  # fmt: skip
def test_convert_both_ways(cli, tmp_path, name):
    theirs = hf_models.make(name).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    result = json.loads(
        succeed(cli("convert", "--from", tmp_path / "theirs", "--out", tmp_path / "ours", "--json")).out
    )
    assert result["from"] == name and result["numbers"] == theirs.num_parameters()
    extras = ["transformers"] if (tmp_path / "theirs" / "generation_config.json").exists() else []
    listed = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert listed == ["config.json", "model.safetensors", *extras]
    shown = succeed(cli("convert", "--from", tmp_path / "ours", "--out", tmp_path / "back")).out
    assert name in shown
    back = getattr(transformers, name).from_pretrained(tmp_path / "back")
    assert theirs.state_dict().keys() == back.state_dict().keys()
    for label, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[label]), label


def test_convert_takes_the_tokenizer_along(cli, tmp_path):
    from gpt_fast.data.tokenizer import load_tokenizer, save_tokenizer, special_ids, train_bpe

    tokenizer = train_bpe(["the cat sat on the mat"] * 3, 270)
    config = GPTConfig(num_tokens=270, hidden_dim=32, num_heads=4, num_layers=1, seq_len=8, **special_ids(tokenizer))
    GPTForCausalLM(config).save_pretrained(tmp_path / "ours")
    save_tokenizer(tokenizer, tmp_path / "ours" / "tokenizer.json")
    succeed(cli("convert", "--from", tmp_path / "ours", "--out", tmp_path / "theirs"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    text = "the mat on the cat"
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    assert (theirs.pad_token_id, theirs.bos_token_id) == (config.pad_token, config.start_token)
    succeed(cli("convert", "--from", tmp_path / "theirs", "--out", tmp_path / "again", "--head", "classifier"))
    assert load_tokenizer(tmp_path / "again").encode(text).ids == tokenizer.encode(text).ids
    assert GPTForSequenceClassification.from_pretrained(tmp_path / "again").config.num_labels == 2


def test_a_converted_model_is_used_and_fine_tuned(cli, data, tmp_path):
    """The tokenizer lacks our special tokens. Text needs none of them, and fine-tuning appends them."""
    letters = tok.byte_tokenizer().get_vocab(with_added_tokens=False)
    bytes_alone = {letter: i for letter, i in letters.items() if i < 256}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=bytes_alone, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    theirs = hf_models.make("GPT2LMHeadModel", vocab_size=257, n_positions=32, bos_token_id=256)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save(str(tmp_path / "theirs" / "tokenizer.json"))
    refused = cli("finetune", "--from", tmp_path / "theirs", "--train", data.table, "--out", tmp_path / "none")
    assert refused.code == 2 and "gpt-fast convert --from" in refused.err + refused.out
    succeed(cli("convert", "--from", tmp_path / "theirs", "--out", tmp_path / "ours"))

    ours = GPTForCausalLM.from_pretrained(tmp_path / "ours")
    assert (ours.config.num_tokens, ours.config.start_token, ours.config.extract_token) == (257, 256, None)
    succeed(cli("generate", "--from", tmp_path / "ours", "--prompt", "", "--max-new-tokens", 4, "--seed", 0))
    measured = json.loads(
        succeed(cli("evaluate", "--from", tmp_path / "ours", "--data", data.text, "--device", "cpu", "--json")).out
    )
    assert measured["task"] == "clm" and measured["loss"] > 0

    run = tmp_path / "run"
    succeed(cli("finetune", "--from", tmp_path / "ours", "--train", data.table, "--out", run, "--lr", 0))
    tuned = GPTForSequenceClassification.from_pretrained(run)
    assert (tuned.config.num_tokens, tuned.config.start_token, tuned.config.pooling) == (262, 256, "extract")
    assert tuned.config.extract_token == tok.load_tokenizer(run).token_to_id("<|extract|>") >= 257
    table = tuned.trunk.token_emb.weight
    assert torch.equal(table[:257], ours.trunk.token_emb.weight)
    assert ((table[257:] - table[:257].mean(0)).abs() < 0.2).all()
    shown = succeed(cli("predict", "--from", run, "--text", "the red fox", "--json")).out
    assert json.loads(shown)["predictions"][0]["prediction"] in ("cold", "warm")
    pretrain = ["pretrain", "--from", tmp_path / "ours", "--data", data.text, "--steps", 1, "--batch-size", 4]
    succeed(cli(*pretrain, "--objective", "mlm", "--out", tmp_path / "mlm"))


def test_convert_says_what_is_wrong(cli, tmp_path):
    hf_models.make("OpenAIGPTModel").save_pretrained(tmp_path / "trunk")
    hf_models.make("GPT2LMHeadModel", activation_function="silu").save_pretrained(tmp_path / "silu")
    GPTForCausalLM(
        GPTConfig(num_tokens=61, hidden_dim=32, num_heads=4, num_layers=1, seq_len=8, output_bias=True)
    ).save_pretrained(tmp_path / "biased")
    (tmp_path / "full").mkdir()
    out = tmp_path / "out"
    for source, options, message in (
        ("nothing", (), "no config.json there"),
        (
            "trunk",
            (),
            "a OpenAIGPTModel, which has none of this library's heads; --head clm, mlm, classifier",
        ),
        ("trunk", ("--head", "lm"), "--head lm: expected one of clm, mlm, classifier"),
        ("silu", (), "activation is 'silu'"),
        ("biased", (), "GPT2LMHeadModel cannot hold an output bias"),
        ("biased", ("--head", "clm"), "is no transformers folder"),
    ):
        result = cli("convert", "--from", tmp_path / source, "--out", out, *options)
        assert result.code == 2 and message in result.err and "Traceback" not in result.err
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    result = cli("convert", "--from", tmp_path / "biased", "--out", tmp_path / "full")
    assert result.code == 2 and "exists already" in result.err
    succeed(cli("convert", "--from", tmp_path / "trunk", "--out", out, "--head", "clm"))
