"""The tolerance policy: by how much a kernel's result may differ from the exact result, and why.

The exact result is the reference in float64 on the inputs after they were rounded to the tested dtype. PyTorch in the
tested dtype cannot serve as the exact result: its own rounding errors would reject correct kernels.

- Results rounded once (norms, activations, losses): eps(dtype) |exact| for the rounding, with a factor of two over the
  half ulp it costs, and 16 eps(float32) max|exact| for the float32 arithmetic before it.
- Results of matrix products with rounded operands (attention, mlp): the yardstick is the reference in the tested dtype,
  which rounds exactly where the op's contract says. The largest error may be 2 times the yardstick's, the root mean
  square error 1.25 times the yardstick's, plus a float32 floor.
- A norm amplifies the rounding of its statistics where mean ≫ std. `norm_conditioning` computes that amplification.
- A softmax turns the rounding of its scores into a relative error of its probabilities. `softmax_terms` computes it.
- Random calls (tests/fuzz) may have a result of a single value, for which the yardstick's error is a matter of luck.
  `assert_bounded` judges each value by its own bound. The bound follows every rounding that the contract names to the
  result, by the absolute values of its factors.
"""

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps
MAX_FACTOR, RMS_FACTOR = 2.0, 1.25  # allowed multiples of the yardstick's largest and root mean square error
FLOOR = 16 * EPS32  # allowed for float32 arithmetic, relative to the largest (or root mean square) exact value

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_rounded_once(got: Tensor, exact: Tensor, *, conditioning: Tensor | float = 0.0, label: str = "") -> None:
    """Assert |got - exact| ≤ eps(dtype) |exact| + 16 eps(float32) max|exact| + conditioning for every value."""
    assert exact.dtype == torch.float64, "the truth is computed in float64"
    assert got.shape == exact.shape, f"{label}: shape {list(got.shape)}; expected {list(exact.shape)}"
    if exact.numel() == 0:
        return
    bound = torch.finfo(got.dtype).eps * exact.abs() + FLOOR * exact.abs().max() + conditioning
    error = (got.double() - exact).abs()
    _assert_all(error <= bound, error / bound.clamp(min=1e-300), got, exact, label)


def assert_as_accurate(got: Tensor, yardstick: Tensor, exact: Tensor, *, terms: float = 0.0, label: str = "") -> None:
    """Assert that the largest error is ≤ 2 and the root mean square ≤ 1.25 times those of `yardstick`, plus a floor.

    `yardstick` is the reference in the dtype of `got`, and `exact` the reference in float64, on the same inputs. If the
    result is a sum whose terms cancel, `terms` is the size of the terms. The float32 floor is then relative to `terms`,
    because float32 rounds the terms, however small their sum.
    """
    assert_as_accurate_as_draws(got, yardstick[None], exact, terms=terms, label=label)


def assert_as_accurate_as_draws(
    got: Tensor, yardsticks: Tensor, exact: Tensor, *, terms: float = 0.0, label: str = ""
) -> None:
    """Assert as `assert_as_accurate` does, against the largest errors among several yardsticks [K, ...].

    The errors of one yardstick are one random draw. If a result has few numbers, a yardstick can be exact by luck, and
    then no factor of its error admits a correct kernel that rounds a sum the other way. Several yardsticks that round
    up or down at random show how large an error the roundings can make.
    """
    assert exact.dtype == torch.float64, "the truth is computed in float64"
    assert yardsticks.dtype == got.dtype, f"{label}: yardstick is {yardsticks.dtype}, got {got.dtype}"
    shapes = list(yardsticks.shape[1:]), list(exact.shape)
    assert shapes == (list(got.shape), list(got.shape)), f"{label}: shape {list(got.shape)}; expected {shapes}"
    if exact.numel() == 0:
        return
    error, largest, rms_allowed = (got.double() - exact).abs(), *_allowed(yardsticks, exact, terms)
    _assert_all(error <= largest, error / max(largest, 1e-300), got, exact, f"{label} (largest error)")
    rms = error.square().mean().sqrt().item()
    assert rms <= rms_allowed, f"{label}: root mean square error {rms:.3g}, allowed {rms_allowed:.3g}"


def shares_of_allowed(got: Tensor, yardstick: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the largest and the root mean square error, each divided by what `assert_as_accurate` allows.

    NaN in `got` gives NaN.
    """
    error = (got.double() - exact).abs()
    largest, rms = _allowed(yardstick[None], exact, 0.0)
    return error.max().item() / max(largest, 1e-300), error.square().mean().sqrt().item() / max(rms, 1e-300)


def _allowed(yardsticks: Tensor, exact: Tensor, terms: float) -> tuple[float, float]:
    """Return the allowed largest and root mean square error, given yardsticks [K, ...]."""
    allowed = (yardsticks.double() - exact).abs().flatten(1)
    rms, rms_exact = allowed.square().mean(dim=1).sqrt().max().item(), exact.square().mean().sqrt().item()
    largest = MAX_FACTOR * allowed.max().item() + FLOOR * max(exact.abs().max().item(), terms)
    return largest, RMS_FACTOR * rms + FLOOR * max(rms_exact, terms)


def rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bound for one rounding to `dtype`: eps(dtype) |exact|, twice the half ulp, plus a term near zero.

    That term is the spacing of the subnormal numbers for float16. For float32 and bfloat16 it is the smallest normal
    number, because hardware may flush subnormal numbers to zero.
    """
    info = torch.finfo(dtype)
    return info.eps * exact.abs() + (info.eps * info.tiny if dtype == torch.float16 else info.tiny)


def assert_bounded(got: Tensor, exact: Tensor, bound: Tensor, *, label: str = "") -> None:
    """Assert |got - exact| ≤ bound + the rounding of the result for every value that has a finite bound.

    `bound` is the error of the arithmetic before the result is rounded to its dtype. The result may be infinite where
    |exact| plus the bound reaches the largest number of the dtype.
    """
    assert exact.dtype == torch.float64, "the truth is computed in float64"
    assert got.shape == exact.shape, f"{label}: shape {list(got.shape)}; expected {list(exact.shape)}"
    if exact.numel() == 0:
        return
    bound = bound + rounding(exact, got.dtype)
    error = (got.double() - exact).abs()
    overflows = got.isinf() & (got.sign() == exact.sign()) & (exact.abs() + bound >= torch.finfo(got.dtype).max)
    ok = (error <= bound) | overflows | ~bound.isfinite()
    _assert_all(ok, error / bound.clamp(min=1e-300), got, exact, label)


def norm_conditioning(x: Tensor, eps: float) -> Tensor:
    """Return 4 eps(float32) max|x| / std [..., 1]: by how much float32 statistics may move a normalised value."""
    x = x.double()
    std = (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    return 4 * EPS32 * x.abs().amax(-1, keepdim=True) / std


def sum_conditioning(terms: Tensor, dim: int = 0) -> Tensor:
    """Return 4 eps(float32) Σ|terms|: by how much float32 may move a sum whose terms cancel, in any order of addition.

    The error of n terms added in a random order is about sqrt(n) / 2 eps of the partial sums, which stay far below
    Σ|terms|.
    """
    return 4 * EPS32 * terms.double().abs().sum(dim)


def softmax_terms(scores: Tensor, exact: Tensor) -> float:
    """Return `terms` for `assert_as_accurate` on softmax results: 4 eps(float32) max|score| of the largest value.

    Each operation that rounds a float32 score s adds an error of eps |s| / 2, which becomes a relative error of exp(s).
    Three operations round: the product, the scale with log2(e), and the difference from the maximum. A GPU fuses some
    of them, and an interpreter does not. With scores up to 4 this error is below the float32 floor. With scores in the
    hundreds two correct implementations can differ by more than any fixed multiple of the yardstick's error.
    """
    if not scores.numel() or not exact.numel():
        return 0.0
    return 4 * EPS32 * scores.abs().max().item() * exact.abs().max().item() / FLOOR


def exact(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor in float64, as a leaf that requires gradients if the original does."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def _assert_all(ok: Tensor, excess: Tensor, got: Tensor, wanted: Tensor, label: str) -> None:
    if bool(ok.all()):
        return
    worst = int(torch.where(ok, 0.0, excess.nan_to_num(nan=torch.inf)).argmax())
    raise AssertionError(
        f"{label}: {int((~ok).sum())} of {ok.numel()} values are off; the worst, number {worst}, is "
        f"{got.flatten()[worst].item():.9g}; expected {wanted.flatten()[worst].item():.9g}, "
        f"{excess.flatten()[worst].item():.3g} times the allowed error"
    )
