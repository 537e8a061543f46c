"""Test that generation uses the model as it is at the call: its weights, train flags, wrappers and device."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
import torch.nn as nn
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

import gpt_fast
from gpt_fast import GPT, DecodeSession, GPTConfig, GPTForCausalLM, GPTForSequenceClassification, generate
from gpt_fast.generation.steps import WEIGHTS
from gpt_fast.model import evaluating

SIZES = {"num_tokens": 41, "hidden_dim": 32, "num_heads": 2, "num_layers": 2, "seq_len": 32}


def make(preset: str = "gpt2", dropout: float = 0.0, **options) -> GPTForCausalLM:
    torch.manual_seed(0)
    return GPTForCausalLM(GPTConfig.preset(preset, **SIZES, dropout=dropout, init_std=0.4, **options)).eval()


def tokens(B: int = 2, T: int = 5) -> torch.Tensor:
    return torch.randint(1, 41, (B, T), generator=torch.Generator().manual_seed(1))


def greedy(model, **options) -> torch.Tensor:
    return generate(model, tokens(), max_new_tokens=8, temperature=0, **options)


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    "name", ["decoders.1.ff.0.weight", "decoders.0.multihead_attn.out_proj.bias", "final_norm.weight"]
)
def test_a_write_through_data_is_noticed(weights, name):
    """A write to one number through `.data` is noticed, although autograd's version counter does not count it."""
    model = make()
    before = greedy(model, weights=weights)
    parameter = model.trunk.get_parameter(name)
    parameter.data.view(-1)[5] += 300.0
    expected = greedy(copy.deepcopy(model), weights=weights)
    assert not torch.equal(expected, before)
    assert torch.equal(greedy(model, weights=weights), expected)


def test_the_session_is_kept_while_nothing_changes():
    model = make()
    greedy(model)
    kept = model.__dict__["_kept_session"].session
    greedy(model)
    assert model.__dict__["_kept_session"].session is kept


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_session_follows_parameters_to_another_address(weights):
    """`p.data = …` moves a parameter to other memory, from which the step must then read."""
    model, row = make(), tokens(1)
    session = DecodeSession(model, weights=weights)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone() * 1.5
    fresh = DecodeSession(copy.deepcopy(model), weights=weights)
    session.prefill(row)
    fresh.prefill(row)
    assert torch.equal(session.step(row[:, 0]), fresh.step(row[:, 0]))


def test_use_reference_reaches_a_session_made_before(monkeypatch):
    """Inside `use_reference()` no kernel runs: neither the C++ step nor an op of the library."""
    model, row = make(), tokens(1)
    session = DecodeSession(model)
    session.prefill(row)
    expected = session.step(row[:, 0])
    session.reset()
    if session.kind != "torch":
        monkeypatch.setattr(session._step, "advance", lambda *_: pytest.fail("the C++ step ran"))
    with gpt_fast.use_reference():
        session.prefill(row)
        got = session.step(row[:, 0])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def appended(model) -> None:
    model.trunk.decoders.append(copy.deepcopy(model.trunk.decoders[0]))


def narrower(model) -> None:
    ff = model.trunk.decoders[0].ff
    ff[0], ff[3] = nn.Linear(32, 64), nn.Linear(64, 32)


CONFIGURED = {
    "eps": lambda m: setattr(m.trunk.decoders[0].layer_norm1, "eps", 5.0),
    "activation": lambda m: m.trunk.decoders[0].ff.__setitem__(1, nn.ReLU()),
    "max_norm": lambda m: setattr(m.trunk.token_emb, "max_norm", 0.5),
    "num_heads": lambda m: [setattr(block.multihead_attn, "num_heads", 4) for block in m.trunk.decoders],
    "appended_block": appended,
    "deleted_block": lambda m: m.trunk.decoders.__delitem__(0),
    "shared_block": lambda m: m.trunk.decoders.__setitem__(1, m.trunk.decoders[0]),
    "narrower_mlp": narrower,
    "trunk_hook": lambda m: m.trunk.register_forward_hook(lambda module, args, output: output.flip(-1)),
    "block_in_the_place_of_the_mlp": lambda m: setattr(m.trunk.decoders[0], "ff", nn.Linear(32, 32)),
}  # fmt: skip


@pytest.mark.parametrize("change", CONFIGURED.values(), ids=CONFIGURED)
@pytest.mark.filterwarnings("ignore:gpt_fast.generate. .* so the model's modules run each step")
def test_a_changed_model_steps_as_it_is(change):
    """Generation follows the model's own forward if the model was changed, with and without a session kept before."""
    for keeps_session in (False, True):
        model = make()
        if keeps_session:
            greedy(model)
        with torch.no_grad():
            change(model)
        for _ in range(2):
            row, twin = tokens(), copy.deepcopy(model).eval()  # max_norm writes into the table
            for _ in range(8):
                with torch.no_grad():
                    row = torch.cat([row, twin(row).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            assert torch.equal(greedy(model), row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.register_forward_hook(lambda *_: None), "hooks of the GPTForCausalLM itself do not run"),
        (lambda m: setattr(m, "forward", lambda *a, **k: None), "the forward of GPTForCausalLM does not run"),
    ],
)
def test_what_generation_does_not_run_is_told(change, message):
    model = make()
    change(model)
    with pytest.warns(UserWarning, match=message):
        greedy(model)


def test_another_number_of_heads_in_one_block_is_refused():
    model = make()
    model.trunk.decoders[0].multihead_attn.num_heads = 4
    with pytest.raises(ValueError, match=r"model has blocks with \['2', '4'\] heads; expected the same number in all"):
        greedy(model)


@pytest.mark.skipif(gpt_fast.build_info() is None, reason="the extension is not built")
def test_the_extension_refuses_blocks_of_other_sizes():
    """Blocks of other sizes than the first one would make the extension write past the ends of its buffers."""
    model = make()
    parameters = {name: value.detach() for name, value in model.trunk.named_parameters()}
    parameters["output_layer.weight"] = model.output_layer.weight.detach()
    parameters["decoders.1.ff.0.weight"] = torch.randn(256, 32)
    parameters["decoders.1.ff.0.bias"] = torch.randn(256)
    parameters["decoders.1.ff.3.weight"] = torch.randn(32, 256)
    from gpt_fast import _C

    with pytest.raises(ValueError, match="a block has other sizes than width 32 and MLP width 128 of the first one"):
        _C.DecodeWeights(parameters, num_heads=2, activation="gelu_tanh", pre_norm=True, eps=1e-5, weights="float32")


# ---- train flags -----------------------------------------------------------------------------------------------------


class Watched(nn.Dropout):
    """Dropout that remembers in which mode it ran. It is not `nn.Dropout` itself, so the session calls the modules."""

    def forward(self, x):
        self.modes = [*getattr(self, "modes", []), self.training]
        return super().forward(x)


def test_a_plain_model_keeps_its_flags_and_drops_nothing():
    """Generation does not touch the train flags, because another thread may be training the model meanwhile."""
    model = make(dropout=0.5)
    expected = greedy(model)
    model.train()
    model.trunk.decoders[0].eval()
    before = {name: module.training for name, module in model.named_modules()}

    def fail(self, mode=True):
        raise AssertionError("a train flag was touched")

    for module in model.modules():
        module.train = fail.__get__(module)
    got = greedy(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(got, expected)


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_flags_of_a_model_that_is_called_are_restored_one_by_one(fails):
    model = make(dropout=0.5).train()
    model.trunk.dropout = Watched(0.5)
    model.trunk.decoders[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    with pytest.warns(UserWarning, match="dropout is a .*Watched, not Dropout"):
        session = DecodeSession(model, batch=2)
    if fails:
        model.trunk.final_norm.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stopped")))
        with pytest.raises(RuntimeError, match="stopped"):
            session.prefill(tokens())
    else:
        session.prefill(tokens())
        session.step(tokens()[:, 0])
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not any(model.trunk.dropout.modes)


def test_two_threads_do_not_restore_each_others_flags():
    """A second thread waits while the first one evaluates. Both run in evaluation mode, then training is restored."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    inside, seen = threading.Event(), []

    def second() -> None:
        inside.wait()
        with evaluating(model):
            seen.append([module.training for module in model.modules()])

    thread = threading.Thread(target=second)
    thread.start()
    with evaluating(model):
        inside.set()
        thread.join(timeout=0.2)
        assert thread.is_alive()  # the second thread waits
        assert not any(module.training for module in model.modules())
    thread.join()
    assert seen == [[False] * 4]
    assert all(module.training for module in model.modules())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))  # noqa: S301 (our own bytes)
    with evaluating(copied):
        assert not copied.training


def test_evaluating_calls_a_train_method_of_a_modules_own():
    """`evaluating` calls a module's own `train` method, in which adapters merge their weights."""

    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(2, 2))
    with evaluating(model):
        assert model[0].merged
    assert not model[0].merged and model[0].training


# ---- inference mode, wrappers, devices -------------------------------------------------------------------------------


@pytest.mark.parametrize("made_inside", [True, False])
def test_inference_mode(made_inside):
    """A session made in inference mode works outside it, and the reverse. So does the session that a model keeps."""
    model = make()
    expected = greedy(make())
    row = tokens(1)
    with torch.inference_mode(made_inside):
        greedy(model)
        session = DecodeSession(model)
        session.prefill(row)
    with torch.inference_mode(not made_inside):
        assert torch.equal(greedy(model), expected)
        logits = session.step(row[:, 0])
        session.reset()
        session.prefill(row)
    fresh = DecodeSession(make())
    fresh.prefill(row)
    assert torch.equal(logits, fresh.step(row[:, 0]))


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = make()
    assert torch.equal(greedy(model), greedy(make()))
    assert torch.equal(greedy(model), greedy(make()))  # this call uses the session that the model keeps


WRAPPERS = {
    "compile": torch.compile,
    "data_parallel": nn.DataParallel,
    "compile_of_data_parallel": lambda model: torch.compile(nn.DataParallel(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_taken_off(wrap):
    model = make()
    assert torch.equal(greedy(wrap(model)), greedy(model))
    DecodeSession(wrap(model), batch=2).prefill(tokens())


def test_a_peft_model_generates_with_its_adapter():
    model = make()
    before = greedy(model)
    peft = get_peft_model(model, LoraConfig(target_modules=["out_proj"], init_lora_weights=False)).eval()
    with pytest.warns(UserWarning, match="so the model's modules run each step"):
        adapted = greedy(peft)
    assert not torch.equal(adapted, before)
    row = tokens()
    for _ in range(8):
        with torch.no_grad():
            row = torch.cat([row, peft.base_model.model(row).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(adapted, row)
    with peft.disable_adapter(), pytest.warns(UserWarning, match="so the model's modules run each step"):
        assert torch.equal(greedy(copy.deepcopy(peft)), before)


def test_an_adapter_that_is_no_module_is_refused():
    model = make()
    model.config.to_dict = lambda: {"model_type": "own"}
    peft = nn.Module()
    peft.peft_config, peft.active_peft_config = {}, PrefixTuningConfig(num_virtual_tokens=3)
    peft.get_base_model = lambda: model
    with pytest.raises(ValueError, match=r"model has the adapter .*PREFIX_TUNING, which puts trained vectors before"):
        greedy(peft)


def test_a_sharded_model_is_refused():
    class FSDPGPTForCausalLM(GPTForCausalLM):
        """Class with the name that FSDP2 gives to the subclass of a sharded module."""

    with pytest.raises(ValueError, match="model is a FSDPGPTForCausalLM whose parameters are sharded over ranks"):
        greedy(FSDPGPTForCausalLM(make().config))


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(greedy, id="greedy"),
        pytest.param(lambda m: generate(m, tokens(), max_new_tokens=6, seed=3, top_p=0.9), id="sampled"),
        pytest.param(lambda m: generate(m, tokens(), max_new_tokens=6, seed=3, stop_tokens=[7, 9]), id="stop_tokens"),
        pytest.param(lambda m: generate(m, tokens(), max_new_tokens=40, seed=3, sliding=True), id="sliding"),
        pytest.param(
            lambda m: generate(m, tokens(), max_new_tokens=4, seed=3, repetition_penalty=2.0, top_k=5), id="penalty"
        ),
        pytest.param(
            lambda m: generate(
                m, tokens(), max_new_tokens=4, temperature=0, lengths=torch.tensor([2, 5], device="cpu")
            ),
            id="lengths",
        ),
        pytest.param(
            lambda m: generate(m, tokens(), max_new_tokens=4, temperature=0, return_scores=True)[1], id="scores"
        ),
        pytest.param(lambda m: DecodeSession(m, batch=2).prefill(tokens()), id="prefill"),
        pytest.param(lambda m: m(tokens(), labels=tokens()).loss, id="loss"),
    ],
)
@pytest.mark.parametrize("preset", ["gpt2", "notes"])
def test_the_default_device_changes_nothing(preset, call):
    """Every tensor is made on the model's device. The device "meta" stands for a GPU: reading from it fails."""
    model = make(preset)
    expected = call(model)
    fresh = make(preset)
    cpu_tokens, original = tokens(), tokens
    globals()["tokens"] = lambda B=2, T=5: cpu_tokens
    try:
        torch.set_default_device("meta")
        got = call(fresh)
    finally:
        torch.set_default_device(None)
        globals()["tokens"] = original
    assert torch.equal(got, expected)


@pytest.mark.parametrize("head", [GPTForCausalLM, GPTForSequenceClassification])
def test_from_pretrained_is_on_the_cpu_and_draws_nothing(head, tmp_path):
    """Weights that would be overwritten are not drawn, so torch's generator does not advance."""
    config = GPTConfig.preset("gpt2", **SIZES, dropout=0.0, num_labels=3)
    saved = head(config)
    saved.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    torch.set_default_device("meta")
    try:
        loaded = head.from_pretrained(tmp_path)
    finally:
        torch.set_default_device(None)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.training and all(parameter.device.type == "cpu" for parameter in loaded.parameters())
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in saved.parameters()]


def test_from_pretrained_draws_the_layers_that_a_folder_lacks(tmp_path):
    config = GPTConfig.preset("gpt2", **SIZES, dropout=0.0, num_labels=3)
    GPTForCausalLM(config).save_pretrained(tmp_path)
    torch.manual_seed(5)
    tuned = GPTForSequenceClassification.from_pretrained(tmp_path)
    assert 0.01 < tuned.classifier.weight.std() < 0.04  # init_std is 0.02
    assert not tuned.classifier.bias.any()
    torch.manual_seed(5)
    assert torch.equal(
        GPTForSequenceClassification.from_pretrained(tmp_path).classifier.weight, tuned.classifier.weight
    )


# ---- options ---------------------------------------------------------------------------------------------------------


def test_generate_is_a_method():
    model = make()
    assert torch.equal(model.generate(tokens(), max_new_tokens=8, temperature=0), greedy(model))
    notes = GPT(41, 32, 2, 2, 32, 0.0)
    out = notes.generate(tokens(), max_new_tokens=3, temperature=0)
    assert torch.equal(out, generate(notes, tokens(), max_new_tokens=3, temperature=0))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int32])
@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_mask_is_a_key_mask(side, dtype):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    mask = mask if side == "left" else mask.flip(1)
    model = make()
    out = generate(model, tokens(), max_new_tokens=6, temperature=0, attention_mask=mask.to(dtype))
    assert torch.equal(out, generate(model, tokens(), max_new_tokens=6, temperature=0, key_mask=mask.bool()))
    loss = model(tokens(), labels=tokens(), attention_mask=mask.to(dtype)).loss
    assert torch.equal(loss, model(tokens(), labels=tokens(), key_mask=mask.bool()).loss)
    classifier = GPTForSequenceClassification(model.config)
    classifier.eval()
    logits = classifier(tokens(), attention_mask=mask.to(dtype)).logits
    assert torch.equal(logits, classifier(tokens(), key_mask=mask.bool()).logits)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((2, 5), 2), "attention_mask holds values other than 0 and 1; expected 1 for a real token"),
        (torch.zeros(2, 5), "attention_mask has dtype float32; expected bool or integers"),
        (torch.ones(2, 4, dtype=torch.int64), r"attention_mask has shape \[2, 4\]; expected \[2, 5\] as tokens"),
        (torch.ones(2, 5, 7, dtype=torch.bool), r"attention_mask has shape \[2, 5, 7\]; expected \[2, 5\] as tokens"),
    ],
)
def test_attention_masks_that_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        generate(make(), tokens(), max_new_tokens=1, attention_mask=mask)
    with pytest.raises(ValueError, match=message):
        make()(tokens(), attention_mask=mask)


def test_both_masks_are_refused():
    mask = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="gpt_fast.GPTForCausalLM: got both key_mask and attention_mask"):
        make()(tokens(), key_mask=mask, attention_mask=mask)


@pytest.mark.parametrize("kind", ["step", "modules"])
@pytest.mark.parametrize("min_p", [0.2, 1.0])
def test_min_p_keeps_what_is_probable_enough(kind, min_p):
    """3,000 draws give only tokens with at least min_p times the largest probability, each at its expected rate."""
    model = make().to(torch.float32 if kind == "step" else torch.float64)
    row = tokens(1).expand(3000, -1)
    with torch.no_grad():
        p = model(row[:1]).logits[0, -1].double().mul(0.5).softmax(-1)
    p = p.where(p >= min_p * p.max(), 0)
    drawn = generate(model, row, max_new_tokens=1, temperature=2.0, min_p=min_p, seed=0)[:, -1]
    counts = torch.bincount(drawn, minlength=41).double()
    assert set(drawn.tolist()) <= set(p.nonzero().flatten().tolist())
    expected = 3000 * p / p.sum()
    kept = p > 0
    chi2 = ((counts - expected)[kept].square() / expected[kept]).sum()
    assert chi2 <= kept.sum() - 1 + 5 * (2 * kept.sum()) ** 0.5  # chi-squared's mean plus five standard deviations


def forbid_seven(so_far, logits):
    logits = logits.clone()
    logits[:, 7:] = logits[:, :1] = -torch.inf  # 0 is the padding
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["step", "modules"])
def test_logits_processors(dtype):
    """Processors get the tokens so far, padded on the left, and the model's logits. Tokens follow what they return."""
    model = make(pad_token=0).to(dtype)
    seen = []

    def watch(so_far, logits):
        seen.append(so_far.clone())
        with torch.no_grad():
            for row, given in zip(so_far, logits, strict=True):
                expected = model(row[row > 0][None]).logits[0, -1]
                torch.testing.assert_close(given, expected.float(), rtol=1e-3, atol=1e-3)
        return logits

    lengths = torch.tensor([3, 5])
    out = generate(
        model, tokens(), max_new_tokens=6, seed=0, lengths=lengths, logits_processors=[watch, forbid_seven], top_k=3
    )
    assert [rows.shape[1] for rows in seen] == [5, 6, 7, 8, 9, 10]
    assert torch.equal(seen[-1][1], out[1, :10]) and torch.equal(seen[-1][0, 2:], out[0, :8])
    new = torch.cat([out[0, 3:9], out[1, 5:]])
    assert (new < 7).all()


def test_scores_are_those_of_the_model_whatever_a_processor_writes():
    def forbid_even(so_far, logits):
        logits[:, ::2] = -torch.inf
        return logits

    model = make()
    out, scores = generate(
        model, tokens(), max_new_tokens=3, temperature=0, logits_processors=[forbid_even], return_scores=True
    )
    with torch.no_grad():
        logp = model(out).logits.log_softmax(-1)[:, 4:-1].gather(2, out[:, 5:, None]).squeeze(2)
    torch.testing.assert_close(scores, logp, rtol=1e-3, atol=1e-3)


def test_processors_that_do_nothing_change_nothing():
    model = make()
    options = {"max_new_tokens": 12, "seed": 4, "repetition_penalty": 1.5, "stop_tokens": [3]}
    expected = generate(model, tokens(), **options)
    assert torch.equal(generate(model, tokens(), logits_processors=[lambda _, logits: logits], **options), expected)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda so_far, logits: logits[:, :3], r"<lambda> returned \[2, 3\]; expected logits \[2, 41\]"),
        (lambda so_far, logits: None, r"<lambda> returned NoneType; expected logits \[2, 41\]"),
        (lambda so_far, logits: logits - torch.inf, "left no token possible in a row"),
    ],
)
def test_processors_that_are_refused(processor, message):
    with pytest.raises(ValueError, match=message):
        generate(make(), tokens(), max_new_tokens=2, logits_processors=[processor])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["step", "modules"])
@pytest.mark.parametrize("sliding", [False, True])
def test_scores_are_the_models_log_probabilities(dtype, sliding):
    model = make(pad_token=0).to(dtype)
    options = {"max_new_tokens": 30 if sliding else 12, "seed": 4, "top_p": 0.9, "stop_tokens": [3], "sliding": sliding}
    lengths = torch.tensor([4, 5])
    plain = generate(model, tokens(), lengths=lengths, **options)
    out, scores = generate(model, tokens(), lengths=lengths, return_scores=True, **options)
    assert torch.equal(out, plain)  # asking for scores changes no token
    assert scores.shape == (2, options["max_new_tokens"]) and scores.dtype == torch.float32
    for b, length in enumerate(lengths.tolist()):
        row = out[b, : length + int((scores[b] != 0).sum())][:32]
        with torch.no_grad():
            logp = model(row[None]).logits[0].log_softmax(-1)
        expected = logp[length - 1 : -1].gather(1, row[length:, None]).squeeze(1).float()
        torch.testing.assert_close(scores[b, : len(expected)], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, -(2**63), np.int64(5)])
def test_seeds_that_torch_takes(seed):
    model = make()
    torch.manual_seed(int(seed))
    first = generate(model, tokens(), max_new_tokens=6, seed=seed, temperature=3.0)
    assert torch.equal(first, generate(model, tokens(), max_new_tokens=6, seed=seed, temperature=3.0))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, "1", [1], torch.tensor([1, 2])])
def test_seeds_that_are_refused(seed):
    with pytest.raises(
        ValueError, match=r"gpt_fast.generate: seed is .*; expected an integer from -2\^63 to 2\^64 - 1"
    ):
        generate(make(), tokens(), max_new_tokens=1, seed=seed)
