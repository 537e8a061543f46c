"""The parity gate, in a checkout: `python -m benchmarks.parity`.

Train a GPT-2 for a few AdamW steps and compare each step's logits, loss and gradients with a plain PyTorch model.

Every step starts from equal weights: those that gpt_fast has trained so far are copied into the two plain models. If
each trained on its own, AdamW would turn the rounding of a gradient near zero into a whole step of the learning rate,
and after a few steps the comparison would measure that chaos instead of the arithmetic of a step.

- Truth: the plain model in float64, on the same weights, which are float32 and so exact in float64.
- Baseline: the plain model in the tested dtype; bfloat16 is autocast on float32 weights, as the benchmarks train.
- gpt_fast's errors may be as large as `tests.numerics` allows: the largest 2 times, the root mean square 1.25 times the
  baseline's, plus the float32 floor. A figure is a share of what is allowed, so above 1 it fails.
- The loss is a mean of the tokens' losses. The error of a mean is at most the root mean square of the tokens' errors,
  so that is the baseline's figure for it: the error of its mean could be zero by luck.
- The root mean square of n independent errors is known to 1 / sqrt(2n) of itself, so the ratio of two such figures to
  1 / sqrt(n). With 384 numbers in a bias's gradient, 1.25 is five standard deviations above 1, and with 128 it is less
  than three: narrower models may fail in bfloat16 by luck, and the command says so.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from benchmarks.console import print_table, resolve_device
from benchmarks.models.plain_gpt import PlainGPT, name_of_ours
from gpt_fast import GPTConfig, GPTForCausalLM
from gpt_fast.training.engine.optimizer import make_optimizer
from tests.numerics import FLOOR, RMS_FACTOR, shares_of_allowed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEARNING_RATE = 1e-4
NARROW = 384  # numbers in a gradient, below which bfloat16 may fail by luck
HEADER = ["step", "loss", "plain", "truth", "loss error", "logits error", "gradient error", "worst gradient"]


@dataclasses.dataclass(frozen=True)
class Step:
    """Losses of one training step, and the errors of gpt_fast as shares of what is allowed."""

    number: int
    loss: float
    plain_loss: float
    true_loss: float
    loss_error: float
    logits_error: float
    gradient_errors: dict[str, float]  # of each parameter

    @property
    def worst_gradient(self) -> str:
        """Return the name of the parameter in `gradient_errors` with the largest error. NaN counts as the largest."""
        return max(self.gradient_errors, key=lambda name: (_rank(self.gradient_errors[name]), name))

    @property
    def passes(self) -> bool:
        """Return True if the errors of the loss, the logits and all gradients are at most 1, which is what is allowed.

        NaN does not pass.
        """
        shares = (self.loss_error, self.logits_error, *self.gradient_errors.values())
        return all(share <= 1 for share in shares)  # NaN is not

    def row(self) -> list[str]:
        """Return the step as eight cells of text, for a table with the columns in HEADER.

        The first four are the step's number and the losses of gpt_fast, of plain PyTorch and in float64. The next three
        are shares of what is allowed: the errors of the loss, of the logits and of the worst gradient. The last cell is
        the name of the parameter with the worst gradient.
        """
        worst = self.worst_gradient
        losses = [f"{loss:.6f}" for loss in (self.loss, self.plain_loss, self.true_loss)]
        shares = [f"{share:.2f}" for share in (self.loss_error, self.logits_error, self.gradient_errors[worst])]
        return [str(self.number), *losses, *shares, worst]


def _rank(share: float) -> float:
    """Return `share` as a key for `max`: infinity for NaN, so that no number is above NaN, else `share` itself."""
    return share if share == share else float("inf")


def train(
    config: GPTConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    steps: int = 10,
    B: int = 1,
    T: int = 64,
    seed: int = 0,
    change: Callable[[GPTForCausalLM], object] | None = None,
) -> Iterator[Step]:
    """Train a GPT-2 by AdamW on one batch [B, T] of random tokens. Yield a comparison with plain PyTorch for each step.

    A `Step` has the losses, and gpt_fast's errors as shares of what is allowed. It is yielded before the weights are
    updated. Two plain models get gpt_fast's weights before each step. One computes in `dtype`, as gpt_fast does, and
    one in float64 as the truth. bfloat16 is autocast on float32 weights. `device` is "cpu" or "cuda".

    `config` must have pre-norm blocks and no dropout. `seed` sets the weights and the tokens. `change` is called once
    with gpt_fast's model, before the first step; tests use it to plant a fault.
    """
    torch.manual_seed(seed)
    ours = GPTForCausalLM(config).to(device)
    plain, truth = PlainGPT(config).to(device), PlainGPT(config).to(device, torch.float64)
    tokens = torch.randint(0, config.num_tokens, (B, T), device=device)
    optimizer = make_optimizer(ours, lr=LEARNING_RATE)
    if change is not None:
        change(ours)
    for number in range(1, steps + 1):
        plain.copy_weights(ours)
        truth.copy_weights(ours)
        loss = _backward(ours, lambda: ours(tokens, tokens).loss, tokens, dtype)
        plain_loss = _backward(plain, lambda: plain.loss(tokens), tokens, dtype)
        true_loss = _backward(truth, lambda: truth.loss(tokens), tokens, torch.float64)
        logits = _logits(lambda: ours(tokens).logits, tokens, dtype)
        plain_logits = _logits(lambda: plain(tokens), tokens, dtype)
        true_logits = _logits(lambda: truth(tokens), tokens, torch.float64)
        yield Step(
            number,
            loss,
            plain_loss,
            true_loss,
            loss_error=abs(loss - true_loss) / _allowed_of_loss(plain_logits, true_logits, tokens),
            logits_error=max(shares_of_allowed(logits, plain_logits, true_logits), key=_rank),
            gradient_errors=_gradient_errors(ours, plain, truth),
        )
        optimizer.step()


def _context(dtype: torch.dtype, device: str) -> Any:
    """Return a context manager: autocast on `device` for bfloat16, one that does nothing for any other dtype."""
    return torch.autocast(device, dtype) if dtype == torch.bfloat16 else nullcontext()


def _backward(model: nn.Module, loss: Callable[[], Tensor], tokens: Tensor, dtype: torch.dtype) -> float:
    """Compute `loss()` and its gradients, which are put into `grad` of the parameters of `model`. Return the loss.

    The forward pass is under autocast if `dtype` is bfloat16. Earlier gradients are dropped. Of `tokens` only the
    device is used.
    """
    model.zero_grad(set_to_none=True)
    with _context(dtype, tokens.device.type):
        value = loss()
    value.backward()
    return value.item()


@torch.no_grad()
def _logits(call: Callable[[], Tensor], tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the logits that `call` computes, without gradients, under autocast if `dtype` is bfloat16.

    Of `tokens` only the device is used.
    """
    with _context(dtype, tokens.device.type):
        return call()


def _token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the cross-entropy of predicting each token of a row but the first, in float64.

    Shapes: logits [B, T, V], tokens [B, T], result [B (T - 1)], one row after another.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten(), reduction="none")


def _allowed_of_loss(plain: Tensor, true: Tensor, tokens: Tensor) -> float:
    """Return by how much gpt_fast's mean loss may differ from the true one, at least 1e-300.

    It is the root mean square error of the plain model's token losses times RMS_FACTOR, plus FLOOR times the true mean
    loss. `plain` and `true` are the logits [B, T, V] of the plain model in the tested dtype and in float64. `tokens` is
    [B, T].
    """
    exact = _token_losses(true, tokens)
    rms = (_token_losses(plain, tokens) - exact).square().mean().sqrt()
    return max(float(RMS_FACTOR * rms + FLOOR * exact.mean().abs()), 1e-300)


def _gradient_errors(ours: nn.Module, plain: nn.Module, truth: nn.Module) -> dict[str, float]:
    """Return the error of each parameter's gradient as a share of the allowed error, by the parameter's name in `ours`.

    The three models hold their gradients in `grad`. `truth` is a plain model in float64. `plain` is the same model in
    the tested dtype, whose errors set what is allowed. A share is the larger of two: the largest error and the root
    mean square error, each divided by what is allowed. NaN counts as larger.

    A gradient that is missing in `ours` gives NaN. Raise `AssertionError` if one is missing in `plain` or `truth`, and
    `ValueError` if `truth` lacks a parameter of `ours`.
    """
    parameters, baseline = dict(ours.named_parameters()), dict(plain.named_parameters())
    errors = {}
    for name, parameter in truth.named_parameters():
        mine = name_of_ours(name)
        exact, yardstick = parameter.grad, baseline[name].grad
        assert exact is not None and yardstick is not None
        got = parameters[mine].grad
        if got is None:
            errors[mine] = float("nan")
            continue
        errors[mine] = max(shares_of_allowed(got.view(exact.shape), yardstick, exact), key=_rank)
    missing = parameters.keys() - errors.keys()
    if missing:
        raise ValueError(f"benchmarks.parity: the plain model has no {', '.join(sorted(missing))}")
    return errors


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def parity(
    model: Annotated[str, typer.Option(help="A preset with pre-norm blocks: gpt2, gpt2-medium, ...")] = "gpt2",
    dtype: Annotated[str, typer.Option(metavar="float32|bfloat16", help="bfloat16 is autocast.")] = "float32",
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where all three models run.")] = "cpu",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    seq: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 64,
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer or more layers than the model has.")] = None,
    hidden_dim: Annotated[int | None, typer.Option(min=1, help="Another width, with --num-heads to match.")] = None,
    num_heads: Annotated[int | None, typer.Option(min=1, help="Another number of heads.")] = None,
    num_tokens: Annotated[int | None, typer.Option(min=2, help="Another vocabulary size.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and the tokens.")] = 0,
) -> None:
    """Train a GPT-2 and compare each step with plain PyTorch: logits, loss and the gradient of every parameter.

    The plain model in float64 gives the true values. The yardstick is the plain model in the same dtype as gpt_fast.
    For the logits and each gradient, gpt_fast's largest error may be 2 times the yardstick's largest error, and its
    root mean square error 1.25 times the yardstick's. The error of the mean loss may be 1.25 times the root mean square
    error of the yardstick's losses for single tokens. Each limit is raised a little for rounding in float32.

    The command prints a table with a row for each step, with errors as shares of their limits. It fails with exit code
    1 if a share is above 1 or NaN, or if the last loss of several is not below the first.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype}; expected {' or '.join(DTYPES)}")
    config = _config(model, seq, num_layers=layers, hidden_dim=hidden_dim, num_heads=num_heads, num_tokens=num_tokens)
    device = resolve_device(device)
    found = list(train(config, dtype=DTYPES[dtype], device=device, steps=steps, B=batch, T=seq, seed=seed))
    title = f"{model}, {config.num_layers} layers, {dtype} on {device}: {batch} x {seq} tokens"
    print_table(HEADER, [step.row() for step in found], [None if step.passes else "red" for step in found], title)
    failed = [step.number for step in found if not step.passes]
    if failed:
        typer.echo(f"parity: errors beyond what is allowed in steps {', '.join(map(str, failed))}")
        if dtype == "bfloat16" and config.hidden_dim < NARROW:
            typer.echo(f"parity: with hidden_dim below {NARROW} that may be luck: a gradient has too few numbers")
    falls = steps == 1 or found[-1].loss < found[0].loss
    if not falls:
        typer.echo(f"parity: the loss has not fallen in {steps} steps")
    if failed or not falls:
        raise typer.Exit(1)
    typer.echo(f"parity: {steps} steps within what is allowed, {len(found[0].gradient_errors)} parameters")


def _config(model: str, seq: int, **overrides: int | None) -> GPTConfig:
    """Return the configuration of the preset `model` without dropout, with the fields in `overrides` changed.

    `overrides` are other fields of `GPTConfig`, such as `num_layers`; None changes nothing. Raise `ValueError` if the
    model's blocks are post-norm, or if `seq`, the number of tokens in a sequence, exceeds its positions.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    config = GPTConfig.preset(model, dropout=0.0, **given)
    if not config.pre_norm:
        raise ValueError(f"--model is {model}; expected one with pre-norm blocks, as the plain model has")
    if seq > config.seq_len:
        raise ValueError(f"--seq is {seq}; expected at most the {config.seq_len} positions of {model}")
    return config


def main() -> None:
    """Run the command `python -m benchmarks.parity`. A `ValueError` becomes one line on stderr and exit code 2."""
    try:
        app(prog_name="python -m benchmarks.parity")
    except ValueError as error:
        Console(stderr=True, highlight=False).print(Text(f"parity: {error}", style="red"), soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
