"""An engine is checked before it is timed: on a small GPT-2 it must choose the tokens that the plain model chooses."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.plain_gpt import PlainGPT
from gpt_fast import GPTConfig, GPTForCausalLM
from tests.numerics import FLOOR, MAX_FACTOR

# More tokens than bfloat16 can number, heads of 64 as GPT-2's, matrices that int4's groups of 128 fit.
SMALL = GPTConfig.preset("gpt2", num_tokens=600, hidden_dim=128, num_heads=2, num_layers=2, seq_len=64)
ROWS, PROMPT, NEW = 5, 20, 30
EMBEDDING, MATRIX = 0.5, 0.15  # standard deviations
BITS = {"int8": 8, "int4": 4}
GROUP = 128  # weights of an output channel that share a scale in int4


def small_model() -> GPTForCausalLM:
    """Return a GPT-2 of the size SMALL, with random weights and in eval mode, to check engines with.

    SMALL has 2 layers of width 128 and 600 tokens. PyTorch's seed is set to 0, so that the weights are always the same.
    The weights are large, so that the greedily generated tokens depend on positions and on earlier tokens. With a usual
    initialisation the residual stream is nearly the token's embedding, and every token repeats itself.
    """
    torch.manual_seed(0)
    model = GPTForCausalLM(SMALL).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=EMBEDDING if "_emb" in name else MATRIX)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def check(engine: Any, precision: str) -> None:
    """Raise `ValueError` if an engine generates wrong tokens with a small model in this precision.

    `engine` is a module, such as engines/openvino.py, that has `convert(model, precision, folder)` and
    `Generator(folder, precision)`, whose instances generate tokens. `precision` is one of the module's PRECISIONS, such
    as "int8". The model is converted in a temporary folder, and generates from random prompts in batches of ROWS and of
    1.

    Tokens are wrong if their exact logits are further below the largest logits than rounding in this precision
    explains.
    """
    model = small_model()
    with tempfile.TemporaryDirectory() as folder:
        engine.convert(model, precision, Path(folder))
        generate = engine.Generator(Path(folder), precision)
        torch.manual_seed(1)
        for rows in (ROWS, 1):
            judge(model, precision, torch.randint(SMALL.num_tokens, (rows, PROMPT)), generate)


def judge(model: GPTForCausalLM, precision: str, tokens: Tensor, generate: Any) -> None:
    """Check that an engine generates tokens that are the most likely ones or nearly so. Otherwise raise `ValueError`.

    `model` is the model that the engine runs in `precision`, such as "int8". `tokens` [B, T] is the prompt.
    `generate(tokens, NEW)` runs the engine and returns the prompt with NEW more tokens, [B, T + NEW]. Any other shape
    or prompt also raises `ValueError`.

    A `PlainGPT` with the model's weights computes exact logits in float64. The distance of a generated token is the
    largest exact logit at its position minus the exact logit of this token. The errors [B, NEW, V] are the differences
    between the exact logits and the logits of `yardstick`, a copy of this `PlainGPT` in the engine's precision.

    - No distance may exceed 2 · (MAX_FACTOR · e + f). e is the largest magnitude of an error, and f is FLOOR times the
      largest magnitude of an exact logit. The factor 2 is there because a distance is the difference of two logits.
    - No row's mean distance may exceed 2 · (MAX_FACTOR · r + f), where r is the root mean square of all errors.
    - In int4 the limit of a row's mean distance is MAX_FACTOR · d instead. d is the mean distance of all tokens that
      `yardstick` generates from the same prompts.
    """
    text = generate(tokens, NEW)
    B, T = tokens.shape
    if text.shape != (B, T + NEW) or not text[:, :T].equal(tokens):
        raise ValueError(f"check: tokens {list(text.shape)}; expected the prompt and {NEW} more, {[B, T + NEW]}")
    plain = PlainGPT(model.config).copy_weights(model).eval()
    with torch.inference_mode():
        exact = copy.deepcopy(plain).double()(text)[:, T - 1 : -1]  # [B, NEW, V]
        error = yardstick(plain, precision)(text)[:, T - 1 : -1].double() - exact
        behind = distances(plain, text, T)
    floor = FLOOR * exact.abs().max().item()
    mean = 2 * (MAX_FACTOR * error.square().mean().sqrt().item() + floor)
    if precision == "int4":
        with torch.inference_mode():
            mean = MAX_FACTOR * distances(plain, yardstick(plain, precision).generate(tokens, NEW), T).mean().item()
    for name, found, allowed in (
        ("at most", behind.max().item(), 2 * (MAX_FACTOR * error.abs().max().item() + floor)),
        ("in a row's mean", behind.mean(-1).max().item(), mean),
    ):
        if found > allowed:
            raise ValueError(
                f"check: logits of chosen tokens are {name} {found:.3g} below the best; expected {allowed:.3g} or less"
            )


def distances(plain: PlainGPT, text: Tensor, T: int) -> Tensor:
    """Return by how much the logit of each generated token is below the largest at its position, [B, NEW] in float64.

    A copy of the model `plain` computes the logits in float64. `text` is [B, T + NEW]: a prompt of `T` tokens, then
    generated ones. The result is 0 for the most likely token, else positive.
    """
    exact = copy.deepcopy(plain).double()(text)[:, T - 1 : -1]  # [B, NEW, V]
    return exact.amax(-1) - exact.gather(-1, text[:, T:, None]).squeeze(-1)


def yardstick(plain: PlainGPT, precision: str) -> PlainGPT:
    """Return a copy of the plain model that computes in an engine's precision, to compare the engine's errors with.

    `precision` is "float32", "bfloat16", "int8" or "int4". In "float32" the copy is unchanged, and in "bfloat16" all of
    it is in bfloat16. In "int8" and "int4" the weights of linear layers are rounded to 8 or 4 bits, and the inputs of
    these layers to 8 bits. Inputs have one scale for the whole tensor, the coarsest that an engine uses. All else is in
    bfloat16.
    """
    plain = copy.deepcopy(plain)
    if precision == "float32":
        return plain
    if precision in BITS:
        for module in plain.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = rounded_weights(module.weight.data, BITS[precision])
                module.register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0], inputs[0].abs().max(), 8),))
    return plain.bfloat16()


def rounded_weights(weight: Tensor, bits: int) -> Tensor:
    """Return weights [N, K] rounded to integers of `bits` bits times a scale, in the dtype of `weight`.

    There is a scale for each row or, with 4 bits, for each group of GROUP neighbouring weights in a row. Then K must be
    a multiple of GROUP.
    """
    groups = weight.unflatten(1, (-1, GROUP)) if bits == 4 else weight
    return rounded(groups, groups.abs().amax(-1, keepdim=True), bits).reshape(weight.shape)


def rounded(x: Tensor, largest: Tensor, bits: int) -> Tensor:
    """Return x rounded to multiples of a scale, for integers of `bits` bits.

    `largest` is a tensor that broadcasts against x, the magnitude that the largest integer stands for. The scale is
    `largest` / (2^(bits - 1) - 1). Values beyond `largest` are not clipped. A `largest` of 0 gives NaN.
    """
    scale = largest / (2 ** (bits - 1) - 1)
    return (x / scale).round() * scale
