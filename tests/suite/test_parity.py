"""Test the parity gate: small models pass, GPT-2 124M passes in the slow test, and planted faults fail."""

import math
import sys

import pytest
import torch

from benchmarks import parity
from benchmarks.parity import DTYPES, train
from gpt_fast import GPTConfig

# The model has heads of GPT-2's size, a vocabulary that is no power of two, and more tokens than a block of queries. It
# is wide enough that root mean square errors in bfloat16 do not depend on luck.
SMALL = GPTConfig.preset(
    "gpt2", dropout=0.0, num_tokens=311, hidden_dim=384, num_heads=6, num_layers=2, seq_len=80, init_std=0.1
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_model(dtype, one_thread):
    """Three steps of a model of two blocks pass: every loss, the logits and every gradient. The loss falls."""
    steps = list(train(SMALL, dtype=DTYPES[dtype], steps=3, B=2, T=80))
    assert all(step.passes for step in steps), [step.row() for step in steps]
    assert steps[2].loss < steps[0].loss
    assert len(steps[0].gradient_errors) == 2 + 2 * 12 + 2  # embeddings, blocks and last norm; output weights are tied


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpt2_124m(dtype):
    steps = list(train(GPTConfig.preset("gpt2", dropout=0.0), dtype=DTYPES[dtype], steps=10, B=1, T=64))
    assert all(step.passes for step in steps), [step.row() for step in steps]


def scales_a_gradient(factor):
    def change(model):
        model.trunk.decoders[0].ff[0].weight.register_hook(lambda gradient: gradient * factor)

    return change


def drops_a_gradient(model):
    model.trunk.decoders[1].multihead_attn.in_proj_bias.requires_grad_(False)


def another_eps(model):
    model.trunk.decoders[0].layer_norm1.eps = 1e-4  # of all norms, eps matters most here: embeddings vary least


def damages_a_gradient(model):
    model.trunk.final_norm.weight.register_hook(lambda gradient: gradient * math.nan)


FAULTS = {
    "gradient off by a thousandth": (scales_a_gradient(1.001), "float32", "trunk.decoders.0.ff.0.weight"),
    "gradient off by a tenth": (scales_a_gradient(1.1), "bfloat16", "trunk.decoders.0.ff.0.weight"),
    "no gradient": (drops_a_gradient, "float32", "trunk.decoders.1.multihead_attn.in_proj_bias"),
    "NaN": (damages_a_gradient, "float32", "trunk.final_norm.weight"),
    "eps": (another_eps, "float32", None),
}


@pytest.mark.parametrize(("change", "dtype", "parameter"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_fails(change, dtype, parameter, one_thread):
    """A wrong gradient is reported with its parameter. A wrong eps is seen in the logits."""
    (step,) = train(SMALL, dtype=DTYPES[dtype], steps=1, B=2, T=80, change=change)
    assert not step.passes
    if parameter is None:
        assert step.logits_error > 1
    else:
        assert step.worst_gradient == parameter
        others = {name: share for name, share in step.gradient_errors.items() if name != parameter}
        assert all(share <= 1 for share in others.values())
        assert step.logits_error <= 1 and step.loss_error <= 1


TINY = ["--layers", "1", "--hidden-dim", "32", "--num-heads", "2", "--num-tokens", "50", "--seq", "16", "--steps", "2"]


@pytest.fixture
def command(monkeypatch, capsys):
    """Return `command(*options)`, which runs `python -m benchmarks.parity` in this process.

    It returns the exit code, stdout and stderr.
    """

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["parity", *options])
        with pytest.raises(SystemExit) as stop:
            parity.main()
        return stop.value.code or 0, *capsys.readouterr()

    return run


def test_the_command_prints_each_step(command, one_thread):
    code, out, _ = command(*TINY)
    assert code == 0
    assert "gpt2, 1 layers, float32 on cpu: 1 x 16 tokens" in out
    assert [line.split()[0] for line in out.splitlines() if line.strip()[:1].isdigit()] == ["1", "2"]
    assert "parity: 2 steps within what is allowed, 16 parameters" in out


def test_the_command_fails(command, monkeypatch, one_thread):
    """The exit code is 1 if an error is larger than allowed. For a narrow model a hint follows."""
    monkeypatch.setattr(parity, "RMS_FACTOR", 0.0)
    monkeypatch.setattr(parity, "FLOOR", 0.0)
    code, out, _ = command(*TINY, "--dtype", "bfloat16")
    assert code == 1
    assert "parity: errors beyond what is allowed in steps 1, 2" in out
    assert "parity: with hidden_dim below 384 that may be luck" in out


def test_a_loss_that_does_not_fall_fails(command, monkeypatch, one_thread):
    monkeypatch.setattr(parity, "LEARNING_RATE", 0.0)
    code, out, _ = command(*TINY)
    assert code == 1
    assert "parity: the loss has not fallen in 2 steps" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--dtype", "float8"], "--dtype is float8; expected float32 or bfloat16", id="dtype"),
        pytest.param(["--model", "gpt1"], "--model is gpt1; expected one with pre-norm blocks", id="post-norm"),
        pytest.param(["--model", "gpt5"], "preset name is 'gpt5'; expected one of", id="model"),
        pytest.param(["--seq", "2000"], "--seq is 2000; expected at most the 1024 positions of gpt2", id="seq"),
        pytest.param(["--device", "tpu"], "--device is tpu; expected auto, cpu or cuda", id="device"),
        pytest.param(["--hidden-dim", "65"], "hidden_dim 65 is not divisible by num_heads 12", id="heads"),
    ],
)
def test_bad_input(command, options, message):
    """Bad input gives an error message on stderr and exit code 2."""
    code, _, error = command(*options)
    assert code == 2
    assert message in " ".join(error.split())


def test_errors_are_shares_of_what_is_allowed():
    """The baseline's errors are 1 and 0, so a largest error of 2 and an rms of 1.25 sqrt(1/2) are allowed.

    NaN gives NaN.
    """
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    baseline = torch.tensor([4.0, 4.0])
    largest, rms = parity.shares_of_allowed(torch.tensor([3.0, 5.0]), baseline, exact)
    assert largest == pytest.approx(0.5, rel=1e-5)
    assert rms == pytest.approx(0.8, rel=1e-5)
    assert all(math.isnan(share) for share in parity.shares_of_allowed(torch.tensor([3.0, math.nan]), baseline, exact))
