"""Muon beside AdamW, the schedules by name, the z-loss, and how soon runs reach a loss."""

import json
import math

import pytest
import torch

from gpt_fast import GPTConfig, GPTForCausalLM, GPTForSequenceClassification
from gpt_fast.data.batches import Batch, causal_batch
from gpt_fast.model import output_loss
from gpt_fast.training.compare import compare_runs, first_at
from gpt_fast.training.engine.optimizer import SCHEDULES, hidden_matrices, schedule
from gpt_fast.training.engine.update import Engine, EngineSettings
from gpt_fast_settings.finetune import FinetuneSettings
from gpt_fast_settings.pretrain import PretrainSettings
from tests import numerics
from tests.command_line import succeed

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"num_tokens": 40, "hidden_dim": 16, "num_heads": 2, "num_layers": 2, "seq_len": 16, "dropout": 0.0}
LR = 1e-2


def make(head=GPTForCausalLM, lr: float = LR, preset: str = "gpt1", **settings) -> Engine:
    torch.manual_seed(0)
    config = GPTConfig.preset(preset, **SIZES, tied=False, output_bias=True)
    return Engine(head(config), lr, EngineSettings(**({"optimizer": "muon", "weight_decay": 0.1} | settings)))


def batch(seed: int = 1) -> Batch:
    return causal_batch(torch.randint(40, (4, 16), generator=torch.Generator().manual_seed(seed)))


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine.model.named_parameters()}


# --- Muon ---


@pytest.mark.parametrize("preset", ["gpt1", "gpt2"])
def test_muon_has_the_matrices_inside_the_decoders(preset):
    """Every parameter is in exactly one group of one optimizer."""
    engine = make(preset=preset)
    names = {id(p): name for name, p in engine.model.named_parameters()}
    groups = [*engine.muon.param_groups, *engine.optimizer.param_groups]
    muon, decaying, plain = ([names[id(p)] for p in group["params"]] for group in groups)
    parts = ("multihead_attn.in_proj_weight", "multihead_attn.out_proj.weight", "ff.0.weight", "ff.3.weight")
    assert sorted(muon) == sorted(f"trunk.decoders.{i}.{part}" for i in range(2) for part in parts)
    assert set(decaying) == {"trunk.token_emb.weight", "trunk.pos_emb", "output_layer.weight"}
    assert all("bias" in name or "norm" in name for name in plain)
    assert sorted([*muon, *decaying, *plain]) == sorted(names.values())
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]


def test_a_frozen_trunk_leaves_muon_nothing():
    model = GPTForSequenceClassification(GPTConfig.preset("gpt2", **SIZES, pad_token=0))
    model.trunk.requires_grad_(False)
    assert hidden_matrices(model) == []
    assert Engine(model, LR, EngineSettings(optimizer="muon")).muon is None


def test_a_step_goes_along_the_gradients_singular_vectors():
    """Muon's first step gives W (1 - lr wd) - lr · 0.2 √max(m, n) · U S Vᵀ, with U and V from the gradient's SVD.

    The gradient is read from an engine with AdamW. The singular values S are near 1: Newton and Schulz's iteration
    leaves them between 0.5 and 1.5.
    """
    muon, plain = make(), make(optimizer="adamw")
    before = weights(muon)
    for engine in (muon, plain):
        engine.update([batch()], LR)
    gradients = {name: p.grad for name, p in plain.model.named_parameters()}
    for name, parameter in muon.model.named_parameters():
        if "decoders" not in name or parameter.ndim < 2:
            assert torch.equal(parameter, plain.model.get_parameter(name)), name  # AdamW updates it in both engines
            continue
        step = (before[name] * (1 - LR * 0.1) - parameter.detach()) / (LR * 0.2 * math.sqrt(max(parameter.shape)))
        left, values, right = torch.linalg.svd(gradients[name], full_matrices=False)
        strong = values > 0.05 * values[0]  # the iteration has too few rounds for the smallest
        along = (left.T @ step @ right.T)[strong][:, strong]
        assert 0.5 < along.diag().min() and along.diag().max() < 1.5, name
        assert (along - along.diag().diag()).abs().max() < 0.2, name


def test_momentum_is_kept_and_restored():
    """An engine with the state of three updates makes the fourth bit for bit. One without the momentum does not."""
    whole, resumed, forgetful = make(), make(), make()
    for step in range(3):
        whole.update([batch(step)], LR)
    for engine in (resumed, forgetful):
        for name, tensor in engine.state().items():
            if engine is resumed or "momentum" not in name:
                tensor.copy_(whole.state()[name])
    assert sum("momentum_buffer" in name for name in whole.state()) == 8
    assert sum("exp_avg_sq" in name for name in whole.state()) == len(weights(whole)) - 8
    for engine in (whole, resumed, forgetful):
        engine.update([batch(9)], LR)
    assert all(torch.equal(weights(resumed)[name], p) for name, p in weights(whole).items())
    assert any(not torch.equal(weights(forgetful)[name], p) for name, p in weights(whole).items())


def test_an_update_that_is_not_finite_changes_nothing():
    engine = make()
    engine.update([batch()], LR)
    before = {name: tensor.clone() for name, tensor in engine.state().items()}
    engine.model.output_layer.register_forward_hook(lambda module, args, out: out * math.nan)
    assert bool(engine.update([batch(2)], LR).skipped)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.state().items())


def test_the_loss_scale_does_not_reach_the_momentum():
    """Loss scales of 65,536 and 1 give the same momentum, except where gradients underflow with a scale of 1."""
    scaled, plain = make(precision="float16"), make(precision="float16")
    plain.scale.fill_(1.0)
    for engine in (scaled, plain):
        engine.update([batch()], LR)
    for name in (name for name in plain.state() if "momentum" in name):
        torch.testing.assert_close(scaled.state()[name], plain.state()[name], rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize(("given", "expected"), [(None, LR / 2), (4e-3, 2e-3), (0.0, 0.0)])
def test_muons_rate_follows_the_schedule(given, expected):
    engine = make(muon_lr=given)
    engine.update([batch()], LR / 2)
    assert [group["lr"] for group in engine.muon.param_groups] == [pytest.approx(expected)]
    assert [group["lr"] for group in engine.optimizer.param_groups] == [pytest.approx(LR / 2)] * 2


def test_accumulation_is_the_same_update():
    """The optimizers' state agrees closely. Weights agree less, as Muon's bfloat16 products round by 2^-8."""
    whole, parts = make(), make()
    tokens = torch.randint(40, (8, 16))
    whole.update([causal_batch(tokens)], LR)
    parts.update([causal_batch(tokens[:2]), causal_batch(tokens[2:])], LR)
    for name, tensor in parts.state().items():
        if "optimizer" in name:
            torch.testing.assert_close(tensor, whole.state()[name], rtol=1e-4, atol=1e-7)
    for name, parameter in weights(parts).items():
        torch.testing.assert_close(parameter, weights(whole)[name], rtol=0, atol=LR * 0.2 * 8 * 2**-7)


REFUSED = {
    "a rate without Muon": (["--muon-lr", "0.01"], ["--muon-lr 0.01: --optimizer is adamw; expected muon"]),
    "sharded matrices": (
        ["--optimizer", "muon", "--strategy", "fsdp"],
        ["--optimizer muon: orthogonalises whole matrices", "expected --strategy ddp"],
    ),
    "a rate that follows 0": (["--optimizer", "muon", "--lr", "0"], ["--lr 0: Muon's rate follows"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_data_is_read(cli, tmp_path, case):
    options, messages = REFUSED[case]
    result = cli("pretrain", "--data", tmp_path / "none", "--out", tmp_path / "run", *options)
    assert result.code == 2
    assert all(message in result.err for message in messages), result.err


# --- schedules ---


def test_schedules_by_name():
    options = {"total": 100, "warmup": 10, "final": 0.1, "decay": 0.25}
    made = {name: [schedule(name, **options)(step) for step in range(100)] for name in SCHEDULES}
    for rates in made.values():
        assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert max(rates) == 1
    assert set(made["constant"][9:]) == {1.0}
    assert set(made["wsd"][9:76]) == {1.0}
    assert made["wsd"][76:] == pytest.approx([1 - 0.9 * (i + 1) / 25 for i in range(24)])
    assert made["linear"][55] == pytest.approx(0.55)
    assert made["cosine"][55] == pytest.approx(0.55)
    assert all(schedule(name, **options)(100) == pytest.approx(0.1) for name in ("cosine", "wsd", "linear"))


def test_a_decay_that_reaches_into_the_warm_up_begins_after_it():
    rates = [schedule("wsd", total=10, warmup=6, decay=1.0)(step) for step in range(11)]
    assert rates == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1, 0.75, 0.5, 0.25, 0])


def test_defaults_are_the_papers():
    pretraining, tuning = PretrainSettings(out="a"), FinetuneSettings(source="b", out="a")
    assert (pretraining.schedule, tuning.schedule) == ("cosine", "linear")
    for settings in (pretraining, tuning):
        assert (settings.optimizer, settings.muon_lr, settings.z_loss) == ("adamw", None, 0.0)


# --- z-loss ---


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("plain", [True, False], ids=["fused", "a layer with a hook"])
def test_z_loss_is_the_squared_log_of_the_denominator(plain, bias):
    """Loss and gradients equal those from all logits in float64. A label of -100 does not count."""
    layer = torch.nn.Linear(16, 40, bias=bias, dtype=torch.float64)
    hidden = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(40, (3, 5)).masked_fill(torch.rand(3, 5) < 0.3, -100)
    known = labels != -100
    logits = layer(hidden)[known]
    wanted = torch.nn.functional.cross_entropy(logits, labels[known]) + 0.3 * logits.logsumexp(-1).square().mean()
    inputs = [hidden, *layer.parameters()]
    expected = torch.autograd.grad(wanted, inputs)
    if not plain:
        layer.register_forward_hook(lambda module, args, out: None)
    loss = output_loss(layer, hidden, labels, 0.3)
    numerics.assert_rounded_once(loss.float().detach(), wanted.detach())
    for got, exact in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-7)


def test_what_a_position_without_a_label_holds_reaches_no_gradient():
    layer, hidden = torch.nn.Linear(16, 40), torch.randn(2, 6, 16)
    labels = torch.randint(40, (2, 6))
    labels[1, 3] = -100
    hidden[1, 3] = math.inf
    output_loss(layer, hidden, labels, 1e-2).backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_z_loss_under_autocast(dtype):
    """Under autocast the loss is that of the logits of rounded operands."""
    layer, hidden = torch.nn.Linear(64, 40, bias=False), torch.randn(2, 6, 64)
    labels = torch.randint(40, (2, 6))
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        got = output_loss(layer, hidden, labels, 1.0) - output_loss(layer, hidden, labels)
    logits = hidden.to(dtype).double() @ layer.weight.to(dtype).double().T
    wanted = logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(got.double(), wanted.detach(), rtol=1e-5, atol=0)


def test_z_loss_by_the_kernel():
    layer, hidden = torch.nn.Linear(16, 40), torch.randn(2, 6, 16)
    labels = torch.randint(40, (2, 6))
    logits = (layer(hidden)).double()
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    wanted = wanted + 2.0 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(output_loss(layer, hidden, labels, 2.0).double(), wanted, rtol=1e-5, atol=0)


def test_z_loss_is_of_training_alone():
    """The loss has no z-loss by default, and validation never has it."""
    model = make(z_loss=0.5).model
    tokens = batch().tokens
    with_it = model.train()(tokens, tokens).loss
    held_out = model.eval()(tokens, tokens).loss
    without = make().model
    assert torch.equal(without.train()(tokens, tokens).loss, without.eval()(tokens, tokens).loss)
    assert torch.equal(held_out, without(tokens, tokens).loss)
    assert with_it > held_out + 0.5  # log² of some 40 tokens is above 1


# --- the commands ---


def test_pretrain_with_muon(cli, data, tmp_path):
    """Muon at five times AdamW's rate learns more in a few updates, and its record names it.

    The rates differ because AdamW's first steps are about that much larger.
    """
    out = {}
    sizes = [
        "--layers",
        2,
        "--heads",
        2,
        "--dim",
        32,
        "--seq-len",
        32,
        "--steps",
        60,
        "--lr",
        2e-3,
        "--schedule",
        "wsd",
    ]
    for name in ("adamw", "muon"):
        rate = ["--muon-lr", 1e-2] if name == "muon" else []
        run = ["pretrain", "--data", data.text, "--tokenizer", "byte", *sizes, "--optimizer", name, *rate, "--json"]
        out[name] = json.loads(succeed(cli(*run, "--out", tmp_path / name)).out)
    assert [record["optimizer"] for record in out.values()] == ["adamw", "muon"]
    assert out["muon"]["schedule"] == "wsd"
    assert out["muon"]["valid_loss"] < out["adamw"]["valid_loss"]
    shown = succeed(cli("compare", "--runs", tmp_path / "adamw", tmp_path / "muon"))
    result = json.loads(succeed(cli("compare", "--runs", tmp_path / "adamw", tmp_path / "muon", "--json")).out)
    assert result["loss"] == out["adamw"]["valid_loss"]
    adamw, muon = result["runs"]
    assert muon["step"] < adamw["step"] == 60
    assert 0 < adamw["seconds"]
    assert f"{muon['step']:,.1f} updates, {muon['seconds']:,.0f} s" in shown.out


def test_fine_tuning_with_muon(cli, data, tmp_path):
    run = ["finetune", "--from", data.lm, "--train", data.table, "--epochs", 1, "--optimizer", "muon", "--schedule",
           "cosine", "--json"]  # fmt: skip
    assert json.loads(succeed(cli(*run, "--out", tmp_path / "run")).out)["optimizer"] == "muon"


# --- time to a loss ---


def curve(*pairs):
    return [{"step": 10 * (i + 1), "valid_loss": loss, "seconds": s} for i, (loss, s) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("loss", "step", "seconds"),
    [(5.0, 10, 2.0), (4.5, 15, 3.0), (4.0, 20, 4.0), (3.5, 35, 9.0), (3.0, 40, 10.0), (2.9, None, None)],
)
def test_between_validations_the_loss_is_on_a_line(loss, step, seconds):
    """The loss rises between the second and the third validation. The first crossing counts."""
    lines = curve((5.0, 2.0), (4.0, 4.0), (4.0, 8.0), (3.0, 10.0))
    assert first_at(lines, "valid_loss", loss, "step") == step
    assert first_at(lines, "valid_loss", loss, "seconds") == seconds


def test_runs_without_seconds_have_steps(tmp_path):
    for name, lines in (("old", curve((5.0, 1.0), (3.0, 2.0))), ("new", curve((5.0, 1.0), (4.0, 2.0)))):
        (tmp_path / name).mkdir()
        if name == "old":
            lines = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = compare_runs([tmp_path / "old", tmp_path / "new"], None, "valid_loss")
    assert result["loss"] == 4.0
    assert [(run["step"], run["seconds"]) for run in result["runs"]] == [(15, None), (20, 2.0)]
    result = compare_runs([tmp_path / "old", tmp_path / "new"], 3.5, "valid_loss")
    assert [run["step"] for run in result["runs"]] == [17.5, None]
