"""Test the heads: their losses against explicit definitions, saving and loading, and resized vocabularies."""

import copy
import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from gpt_fast import (
    GPTConfig,
    GPTForCausalLM,
    GPTForMaskedLM,
    GPTForQuestionAnswering,
    GPTForSequenceClassification,
    GPTForTokenClassification,
)
from gpt_fast.heads import HEADS

SIZES = {"num_tokens": 61, "hidden_dim": 32, "num_heads": 4, "num_layers": 2, "seq_len": 20}
PRESETS = ["notes", "gpt1", "gpt2"]


def build(head, preset="gpt2", **overrides):
    return head(GPTConfig.preset(preset, **{**SIZES, "dropout": 0.0, **overrides}))


def tokens_of(B=3, T=9):
    return torch.randint(0, 61, (B, T))


# ---- causal language model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_causal_loss_is_the_cross_entropy_of_the_next_token(preset):
    head, tokens = build(GPTForCausalLM, preset), tokens_of()
    labels = tokens.clone()
    labels[0, 4] = -100
    out = head(tokens, labels, logits=True)
    wanted = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(out.loss, wanted, rtol=1e-5)
    assert head(tokens, labels).logits is None
    assert head(tokens).loss is None
    assert torch.allclose(head(tokens).logits, out.logits)


def test_causal_loss_trains_every_parameter():
    head, tokens = build(GPTForCausalLM, "notes"), tokens_of()
    head(tokens, tokens).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in head.parameters())


@pytest.mark.parametrize("kind", ["lengths", "right_mask", "left_mask"])
def test_padding_counts_in_no_loss(kind):
    """The loss of a padded batch is the mean of its sequences' losses, weighted by their numbers of predictions."""
    head, tokens, lengths = build(GPTForCausalLM), tokens_of(), torch.tensor([9, 4, 2])
    real = torch.arange(9) < lengths[:, None]
    if kind == "left_mask":
        real = real.flip(1)
    padding = {"lengths": lengths} if kind == "lengths" else {"key_mask": real}
    total = sum(
        head(row[keep][None], row[keep][None]).loss * (keep.sum() - 1) for row, keep in zip(tokens, real, strict=True)
    )
    assert torch.allclose(head(tokens, tokens, **padding).loss, total / (lengths - 1).sum(), rtol=1e-5)


def one_step(head) -> None:
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    head(tokens_of(), labels=tokens_of()).loss.backward()
    optimizer.step()


def filled_on_meta():
    """Make a model on the device "meta", without memory, and then load its weights, as for large models."""
    with torch.device("meta"):
        head = build(GPTForCausalLM)
    head.to_empty(device="cpu")
    head.load_state_dict(build(GPTForCausalLM).state_dict())
    return head


def assigned():
    head = build(GPTForCausalLM)
    twin = {name: tensor.clone() for name, tensor in build(GPTForCausalLM).state_dict().items()}
    head.load_state_dict(twin, assign=True)
    return head


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(filled_on_meta, id="to_empty"),
        pytest.param(assigned, id="assign"),
        pytest.param(lambda: copy.deepcopy(build(GPTForCausalLM)), id="deepcopy"),
        pytest.param(lambda: build(GPTForCausalLM).double().float(), id="cast"),
    ],
)
def test_a_tie_survives(make, tmp_path):
    """Tied weights stay one parameter through a training step, saving, loading and resizing."""
    head = make()
    assert head.is_tied()
    one_step(head)
    head.save_pretrained(tmp_path)
    again = GPTForCausalLM.from_pretrained(tmp_path)
    assert again.is_tied() and again.config.tied
    assert torch.equal(again(tokens := tokens_of()).logits, head(tokens).logits)
    head.resize_embeddings(70)
    assert head.is_tied()


def test_a_tie_that_was_undone_is_saved_as_it_is(tmp_path):
    """The output layer's own weights are saved, although the configuration says that they are tied."""
    head = build(GPTForCausalLM)
    head.output_layer.weight = torch.nn.Parameter(head.output_layer.weight.detach().clone())
    assert head.config.tied and not head.is_tied()
    one_step(head)
    head.save_pretrained(tmp_path)
    again = GPTForCausalLM.from_pretrained(tmp_path)
    assert not again.config.tied
    assert torch.equal(again(tokens := tokens_of()).logits, head(tokens).logits)
    head.resize_embeddings(70)
    assert not head.is_tied()


def test_a_tie_survives_inside_another_model():
    """`load_state_dict(assign=True)` of a module that contains the head keeps the weights tied."""
    whole = torch.nn.ModuleDict({"model": build(GPTForCausalLM)})
    whole.load_state_dict({name: tensor.clone() for name, tensor in whole.state_dict().items()}, assign=True)
    assert whole["model"].is_tied()
    pickle.loads(pickle.dumps(whole))  # noqa: S301 (our own bytes)


def test_two_weights_for_one_parameter_are_refused():
    model = build(GPTForCausalLM)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["output_layer.weight"] += 1
    with pytest.raises(RuntimeError, match="output_layer.weight differs from trunk.token_emb.weight"):
        model.load_state_dict(state, assign=True)


def test_a_tie_made_by_hand_is_saved(tmp_path):
    model = build(GPTForCausalLM, tied=False)
    model.output_layer.weight = model.trunk.token_emb.weight
    model.save_pretrained(tmp_path)
    loaded = GPTForCausalLM.from_pretrained(tmp_path)
    assert loaded.is_tied() and loaded.config.tied
    tokens = tokens_of()
    assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)


def lora(model) -> None:
    peft = pytest.importorskip("peft", reason="the extra examples is not installed")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["out_proj"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda m: m.trunk.decoders.append(copy.deepcopy(m.trunk.decoders[0])), "has 3 blocks", id="block"),
        pytest.param(lambda m: setattr(m.trunk.final_norm, "eps", 1.0), "final_norm has eps 1.0", id="eps"),
        pytest.param(
            lambda m: m.trunk.decoders[1].ff.__setitem__(1, torch.nn.ReLU()), "decoders.1.ff is not", id="act"
        ),
        pytest.param(
            lambda m: setattr(m, "output_layer", torch.nn.Linear(32, 61)), "output_layer.bias beyond", id="bias"
        ),
        pytest.param(lora, "lora_A.default.weight", id="adapter"),
        pytest.param(
            lambda m: m.trunk.decoders[0].ff.__setitem__(0, torch.nn.Linear(32, 64)), r"ff has 64 hidden", id="mlp"
        ),
    ],
)
def test_a_model_that_could_not_be_loaded_is_not_saved(change, message, tmp_path):
    """`save_pretrained` refuses a model that its configuration does not describe, which loading would change."""
    model = build(GPTForCausalLM)
    change(model)
    with pytest.raises(ValueError, match=rf"gpt_fast.save_pretrained: .*{message}"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tied_and_free_output_layers():
    tied, free = build(GPTForCausalLM, "gpt2"), build(GPTForCausalLM, "notes")
    assert tied.output_layer.weight is tied.trunk.token_emb.weight
    assert tied.output_layer.bias is None
    assert free.output_layer.weight is not free.trunk.token_emb.weight
    assert free.output_layer.bias is not None
    assert tied.num_parameters() == sum(tensor.numel() for tensor in set(tied.parameters()))


# ---- masked language model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_masked_loss_is_the_cross_entropy_at_the_labelled_positions(preset):
    head, tokens = build(GPTForMaskedLM, preset), tokens_of()
    labels = torch.full_like(tokens, -100)
    labels[0, 2], labels[2, 8] = 5, 17
    out = head(tokens, labels, logits=True)
    wanted = -(out.logits[0, 2].log_softmax(0)[5] + out.logits[2, 8].log_softmax(0)[17]) / 2
    assert torch.allclose(out.loss, wanted, rtol=1e-5)


def test_masked_model_sees_both_sides():
    head, tokens = build(GPTForMaskedLM).eval(), tokens_of(1)
    other = tokens.clone()
    other[0, 8] = (other[0, 8] + 1) % 61
    assert not torch.equal(head(tokens).logits[0, 0], head(other).logits[0, 0])


COST = r"""
    import contextlib, pathlib, re, sys, time, torch, gpt_fast
    from gpt_fast import GPTConfig, GPTForMaskedLM
    def peak():  # in KiB; of this process alone, which ru_maxrss is not
        return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])
    torch.set_num_threads(1)
    mode, masked = sys.argv[1], int(sys.argv[2])
    head = GPTForMaskedLM(GPTConfig(20000, 64, 4, 1, 256, embedding_dropout=0, attention_dropout=0, residual_dropout=0))
    tokens = torch.randint(0, 20000, (16, 256))
    labels = torch.full((16 * 256,), -100)
    labels[torch.randperm(16 * 256)[:masked]] = 3
    with gpt_fast.use_reference() if mode == "reference" else contextlib.nullcontext():
        head(tokens[:1, :8], tokens[:1, :8]).loss.backward()
        times, before = [], peak()
        for _ in range(3):
            start = time.perf_counter()
            head(tokens, labels.view(16, 256)).loss.backward()
            times.append(time.perf_counter() - start)
    print(min(times), (peak() - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("mode", ["kernels", "reference"])
def test_masked_model_costs_what_its_masked_positions_cost(mode):
    """With 5 % of the positions masked, a step takes far less time than with all of them, as most of it is the loss.

    The reference, which stores the logits of the masked positions, also takes less memory. The kernels never store
    logits. Each case runs in its own process, so that the peak memory is its own. With these sizes the costs of the
    two cases differ by a factor of ten.
    """
    costs = {}
    for masked in (204, 4096):
        command = [sys.executable, "-c", textwrap.dedent(COST), mode, str(masked)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        costs[masked] = tuple(map(float, output.split()))
    (few_time, few_memory), (all_time, all_memory) = costs[204], costs[4096]
    all_logits = 4096 * 20000 * 4 / 2**20  # MiB
    assert few_time < 0.5 * all_time, costs
    if mode == "reference":
        assert all_memory > all_logits, costs
        assert few_memory < 0.25 * all_memory, costs  # both include the parameters' gradients
    else:
        assert max(few_memory, all_memory) < 0.5 * all_logits, costs


# ---- classification --------------------------------------------------------------------------------------------------


def test_classifier_reads_the_last_real_token():
    head, tokens = build(GPTForSequenceClassification, num_labels=5).eval(), tokens_of()
    lengths = torch.tensor([9, 4, 1])
    real = torch.arange(9) < lengths[:, None]
    alone = torch.cat([head(row[:length][None]).logits for row, length in zip(tokens, lengths, strict=True)])
    assert torch.allclose(head(tokens, lengths=lengths).logits, alone, atol=1e-5)
    assert torch.allclose(head(tokens, key_mask=real).logits, alone, atol=1e-5)
    left = torch.stack([row.roll(9 - int(length)) for row, length in zip(tokens, lengths, strict=True)])
    assert torch.allclose(head(left, key_mask=real.flip(1)).logits, alone, atol=1e-5)


def test_classifier_reads_the_extract_token():
    """The classifier reads the last extract token of each row. Tokens behind it change nothing."""
    head = build(GPTForSequenceClassification, pooling="extract", extract_token=60).eval()
    tokens = torch.randint(0, 60, (2, 9))
    tokens[0, 5] = tokens[1, 2] = tokens[1, 8] = 60
    out = head(tokens).logits
    assert torch.allclose(out[0], head(tokens[:1, :6]).logits[0], atol=1e-5)
    assert torch.allclose(out[1], head(tokens[1:]).logits[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"row 1 of tokens has none; expected an extract token \(60\)"):
        head(torch.tensor([[60, 1], [2, 3]]))


def test_classification_and_regression_losses():
    tokens = tokens_of()
    head = build(GPTForSequenceClassification, num_labels=4)
    labels = torch.tensor([0, 3, 1])
    out = head(tokens, labels)
    assert torch.allclose(out.loss, F.cross_entropy(out.logits, labels))
    head = build(GPTForSequenceClassification, num_labels=1, problem="regression")
    targets = torch.tensor([0.5, -1.0, 2.0])
    out = head(tokens, targets)
    assert torch.allclose(out.loss, (out.logits[:, 0] - targets).square().mean())
    head = build(GPTForSequenceClassification, num_labels=2, problem="regression")
    targets = torch.randn(3, 2)
    assert torch.allclose(head(tokens, targets).loss, F.mse_loss(head(tokens).logits, targets))


@pytest.mark.parametrize("preset", PRESETS)
def test_joint_loss_adds_the_language_model_on_the_same_tokens(preset):
    tokens, labels, lengths = tokens_of(), torch.tensor([0, 1, 1]), torch.tensor([9, 6, 2])
    joint = build(GPTForSequenceClassification, preset, lm_weight=0.5, classifier_dropout=0.0)
    alone = build(GPTForSequenceClassification, preset, classifier_dropout=0.0)
    alone.load_state_dict({k: v for k, v in joint.state_dict().items() if not k.startswith("output_layer")})
    language_model = build(GPTForCausalLM, preset)
    language_model.load_state_dict({k: v for k, v in joint.state_dict().items() if not k.startswith("classifier")})
    wanted = alone(tokens, labels, lengths=lengths).loss
    wanted = wanted + 0.5 * language_model(tokens, tokens, lengths=lengths).loss
    assert torch.allclose(joint(tokens, labels, lengths=lengths).loss, wanted, rtol=1e-5)


# ---- heads that read every token -------------------------------------------------------------------------------------


def padded(kind):
    """Return tokens [3, 9], a mask that is False at padding, and the head's arguments that describe the padding."""
    tokens, lengths = tokens_of(), torch.tensor([9, 4, 6])
    real = torch.arange(9) < lengths[:, None]
    if kind == "lengths":
        return tokens, real, {"lengths": lengths}
    real = real.flip(1) if kind == "left_mask" else real
    return tokens, real, {"key_mask": real}


PADDINGS = pytest.mark.parametrize("kind", ["lengths", "right_mask", "left_mask"])


@PADDINGS
@pytest.mark.parametrize("preset", PRESETS)
def test_token_classification(preset, kind):
    """Each token has the scores that it has without padding. The loss is the mean over labelled tokens."""
    head = build(GPTForTokenClassification, preset, num_labels=4).eval()
    tokens, real, padding = padded(kind)
    labels = torch.randint(4, tokens.shape)
    labels[0, 2:5] = -100
    out = head(tokens, labels, **padding)
    for row, keep, scores in zip(tokens, real, out.logits, strict=True):
        alone = head.classifier(head.trunk(row[keep][None]))[0]
        assert torch.allclose(scores[keep], alone, atol=1e-5)
    counted = real & (labels >= 0)
    assert torch.allclose(out.loss, F.cross_entropy(out.logits[counted], labels[counted]), rtol=1e-5)
    other = torch.where(real, tokens, 5)
    assert torch.equal(head(other, labels.masked_fill(~real, 3), **padding).loss, out.loss)
    assert head(tokens, torch.full_like(labels, -100), **padding).loss == 0
    assert head(tokens).loss is None


@PADDINGS
@pytest.mark.parametrize("preset", PRESETS)
def test_question_answering(preset, kind):
    """Start and end each have a softmax over the row's real tokens, and a mean over the rows with such a label."""
    head = build(GPTForQuestionAnswering, preset).eval()
    tokens, real, padding = padded(kind)
    first = real.int().argmax(1)
    labels = torch.stack((first + 1, first + 3), 1)
    labels[1, 0] = -100
    out = head(tokens, labels, **padding)
    assert out.logits.shape == (3, 2, 9)
    losses = [[], []]
    for i, (row, keep) in enumerate(zip(tokens, real, strict=True)):
        alone = head.classifier(head.trunk(row[keep][None]))[0]
        assert torch.allclose(out.logits[i][:, keep].T, alone, atol=1e-5)
        assert (out.logits[i][:, ~keep] == -torch.inf).all()
        for end in (0, 1):
            if labels[i, end] >= 0:
                losses[end].append(-alone[:, end].log_softmax(0)[labels[i, end] - first[i]])
    wanted = sum(sum(each) / len(each) for each in losses) / 2
    assert torch.allclose(out.loss, wanted, rtol=1e-5)
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())
    assert head(tokens, torch.full_like(labels, -100), **padding).loss == 0


@pytest.mark.parametrize("name", ["GPTForTokenClassification", "GPTForQuestionAnswering"])
def test_they_learn_drop_out_and_join_losses(name):
    head = build(HEADS[name], lm_weight=0.5)
    head.dropout.p = 0.5
    tokens = tokens_of()
    labels = torch.randint(2, tokens.shape) if "Token" in name else torch.tensor([[1, 2], [0, 8], [3, 3]])
    assert len({head(tokens, labels).loss.item() for _ in range(3)}) == 3
    head.dropout.p = 0.0
    alone = build(HEADS[name])
    alone.load_state_dict({k: v for k, v in head.state_dict().items() if "output_layer" not in k})
    language_model = build(GPTForCausalLM)
    language_model.load_state_dict({k: v for k, v in head.state_dict().items() if not k.startswith("classifier")})
    wanted = alone(tokens, labels).loss + 0.5 * language_model(tokens, tokens).loss
    assert torch.allclose(head(tokens, labels).loss, wanted, rtol=1e-5)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        head(tokens, labels).loss.backward()
        optimizer.step()
    out = head(tokens, labels)
    assert torch.equal(out.logits.argmax(-1), labels)
    assert all(parameter.grad.any() for parameter in head.parameters())


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        (
            "GPTForTokenClassification",
            torch.zeros(3, 8, dtype=torch.int64),
            r"is int64 \[3, 8\]; expected int64 \[3, 9\]",
        ),
        ("GPTForTokenClassification", torch.zeros(3, 9), r"is float32 \[3, 9\]; expected int64 \[3, 9\]"),
        ("GPTForTokenClassification", torch.full((3, 9), 2), r"hold 0 to 2; expected classes in \[0, 2\)"),
        ("GPTForQuestionAnswering", torch.zeros(3).long(), r"is int64 \[3\]; expected int64 \[3, 2\]"),
        ("GPTForQuestionAnswering", torch.full((3, 2), 9), r"hold 9 to 9; expected classes in \[0, 9\)"),
        ("GPTForQuestionAnswering", torch.full((3, 2), 6), "point at padding"),
    ],
)
def test_labels_they_refuse(name, labels, message):
    with pytest.raises(ValueError, match=f"{name}: labels {message}"):
        build(HEADS[name])(tokens_of(), labels, key_mask=torch.arange(9).expand(3, 9) < 6)


def test_what_else_they_refuse():
    with pytest.raises(
        ValueError, match=r"GPTForTokenClassification: problem is 'regression'; expected \"classification"
    ):
        build(GPTForTokenClassification, problem="regression")
    with pytest.raises(ValueError, match="GPTForQuestionAnswering: row 1 of tokens has none; expected a real token"):
        build(GPTForQuestionAnswering)(tokens_of(), lengths=torch.tensor([3, 0, 2]))


# ---- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", HEADS)
def test_save_and_load_round_trip(name, preset, tmp_path):
    head, tokens = build(HEADS[name], preset), tokens_of()
    if name in ("GPTForSimilarity", "GPTForMultipleChoice"):
        tokens = torch.stack((tokens, tokens.flip(0)), dim=1)  # two sequences for each example
    head.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1, "who can read the configuration can read the weights"
    loaded = HEADS[name].from_pretrained(tmp_path / "model")
    assert loaded.config == head.config
    for (key, tensor), other in zip(head.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), key
    assert torch.equal(loaded.eval()(tokens).logits, head.eval()(tokens).logits)


def test_fine_tuning_starts_from_the_pre_trained_trunk(tmp_path):
    head = build(GPTForCausalLM, "notes")
    head.save_pretrained(tmp_path)
    tuned = GPTForSequenceClassification.from_pretrained(tmp_path, num_labels=7, lm_weight=0.5)
    for key, tensor in head.state_dict().items():
        assert torch.equal(tensor, tuned.state_dict()[key]), key
    assert tuned.classifier.weight.shape == (7, 32)
    masked = GPTForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(masked.output_layer.weight, head.output_layer.weight)


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(path):
    tensors = load_file(path)
    tensors.pop("trunk.decoders.0.ff.0.weight")
    save_file(tensors, path)


def add_tensor(path):
    save_file(load_file(path) | {"trunk.extra": torch.zeros(2)}, path)


SPOILED = [  # function that damages the folder, error, message
    pytest.param(lambda d: (d / "config.json").unlink(), FileNotFoundError, "no config.json there", id="no_config"),
    pytest.param(lambda d: (d / "model.safetensors").unlink(), FileNotFoundError, "missing", id="no_weights"),
    pytest.param(lambda d: (d / "config.json").write_text("{"), ValueError, "not JSON", id="config_not_json"),
    pytest.param(lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), ValueError, "not JSON", id="config_not_utf8"),
    pytest.param(lambda d: (d / "config.json").write_text("[1]"), ValueError, "holds a list", id="foreign"),
    pytest.param(lambda d: rewrite(d / "config.json", format="hf"), ValueError, "not written by gpt_fast", id="format"),
    pytest.param(lambda d: rewrite(d / "config.json", colour=1), ValueError, "got colour", id="unknown_field"),
    pytest.param(lambda d: rewrite(d / "config.json", hidden_dim="x"), ValueError, "hidden_dim is", id="type"),
    pytest.param(
        lambda d: rewrite(d / "config.json", num_tokens=62), ValueError,
        r"token_emb.weight has shape \[61, 32\]; expected \[62, 32\]", id="other_sizes",
    ),
    pytest.param(lambda d: rewrite(d / "config.json", num_layers=3), ValueError, "lacks trunk.decoders.2", id="layers"),
    pytest.param(lambda d: rewrite(d / "config.json", num_layers=1), ValueError, "holds trunk.decoders.1", id="fewer"),
    pytest.param(lambda d: truncate(d / "model.safetensors"), ValueError, "truncated", id="truncated"),
    pytest.param(
        lambda d: (d / "model.safetensors").write_bytes(b"PK pickle"), ValueError, "no safetensors file", id="pickle"
    ),
    pytest.param(lambda d: drop_tensor(d / "model.safetensors"), ValueError, "lacks trunk.decoders.0.ff.0", id="lacks"),
    pytest.param(lambda d: add_tensor(d / "model.safetensors"), ValueError, "holds trunk.extra", id="extra"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "error", "message"), SPOILED)
def test_spoiled_checkpoints(spoil, error, message, tmp_path):
    build(GPTForCausalLM).save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=message):
        GPTForCausalLM.from_pretrained(tmp_path)


def test_nothing_is_left_behind_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        build(GPTForCausalLM).save_pretrained(tmp_path / "file" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- vocabulary ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [61, 70, 40])
@pytest.mark.parametrize("preset", ["gpt2", "notes"])
def test_resize_embeddings(preset, size, tmp_path):
    head, tokens = build(GPTForCausalLM, preset).eval(), torch.randint(0, 40, (2, 5))
    before, kept = head(tokens).logits, min(size, 61)
    head.resize_embeddings(size)
    after = head(tokens).logits
    assert after.shape == (2, 5, size)
    assert torch.allclose(after[..., :kept], before[..., :kept], atol=1e-6)
    assert head.config.num_tokens == head.trunk.config.num_tokens == size
    assert (head.output_layer.weight is head.trunk.token_emb.weight) == head.config.tied
    head.save_pretrained(tmp_path)
    assert torch.equal(GPTForCausalLM.from_pretrained(tmp_path).eval()(tokens).logits, after)


def test_resize_embeddings_errors():
    head = build(GPTForCausalLM, pad_token=60)
    with pytest.raises(ValueError, match="pad_token is 60"):
        head.resize_embeddings(50)
    with pytest.raises(ValueError, match="num_tokens is 0"):
        head.resize_embeddings(0)
    assert head.config.num_tokens == 61


BAD_LABELS = [
    pytest.param(GPTForCausalLM, lambda t: t[:, :-1], r"labels is int64 \[3, 8\]; expected int64 \[3, 9\]", id="lm"),
    pytest.param(GPTForCausalLM, lambda t: t.float(), "labels is float32", id="lm_dtype"),
    pytest.param(
        GPTForMaskedLM, lambda t: t + 61, r"target holds \d+; expected values in \[0, 61\) or -100", id="range"
    ),
    pytest.param(GPTForSequenceClassification, lambda t: t[:, 0] * 0 + 2, r"labels hold 2 to 2.*\[0, 2\)", id="class"),
    pytest.param(GPTForSequenceClassification, lambda t: t, r"labels is int64 \[3, 9\]; expected int64 \[3\]", id="s"),
]


@pytest.mark.parametrize(("head", "labels", "message"), BAD_LABELS)
def test_bad_labels(head, labels, message):
    tokens = tokens_of()
    with pytest.raises(ValueError, match=message):
        build(head)(tokens, labels(tokens))
