"""The tolerance policy, all of it: what a kernel's result may differ from the truth by, and why.

Truth is the reference in float64 on the inputs as they were rounded. PyTorch in the tested dtype is no oracle: its own
rounding errors reject correct kernels.

- Results rounded once (norms, activations, losses): eps(dtype) |exact| for the rounding, with a factor of two over the
  half ulp it costs, and 16 eps(float32) max|exact| for the float32 arithmetic before it.
- Results of matrix products with rounded operands (attention, mlp): the yardstick is the reference in the tested dtype,
  which rounds exactly where the contract says. Largest error at most 2 times, root mean square at most 1.25 times the
  yardstick's, plus a float32 floor.
- A norm amplifies the rounding of its statistics where mean ≫ std: `norm_conditioning` is that amplification.
- A softmax turns the rounding of its scores into a relative error of its probabilities: `softmax_terms`.
- Drawn calls (tests/fuzz) have results of one value, for which a yardstick's error is luck. `assert_bounded` judges
  each value by a bound of its own: every rounding that the contract names, carried to the result by absolute values.
"""

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps
MAX_FACTOR, RMS_FACTOR = 2.0, 1.25  # of the yardstick's errors
FLOOR = 16 * EPS32  # of float32 arithmetic, relative to the largest (or root mean square) exact value

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_rounded_once(got: Tensor, exact: Tensor, *, conditioning: Tensor | float = 0.0, label: str = "") -> None:
    """|got - exact| ≤ eps(dtype) |exact| + 16 eps(float32) max|exact| + conditioning, everywhere."""
    assert exact.dtype == torch.float64, "the truth is computed in float64"
    assert got.shape == exact.shape, f"{label}: shape {list(got.shape)}; expected {list(exact.shape)}"
    if exact.numel() == 0:
        return
    bound = torch.finfo(got.dtype).eps * exact.abs() + FLOOR * exact.abs().max() + conditioning
    error = (got.double() - exact).abs()
    _assert_all(error <= bound, error / bound.clamp(min=1e-300), got, exact, label)


def assert_as_accurate(got: Tensor, yardstick: Tensor, exact: Tensor, *, terms: float = 0.0, label: str = "") -> None:
    """Largest error ≤ 2 and root mean square ≤ 1.25 times those of `yardstick`, plus a float32 floor.

    `yardstick` is the reference in the dtype of `got`, `exact` the reference in float64, on the same inputs. Where a
    result is a sum that cancels, `terms` is the size of what is added: the floor is relative to it, because float32
    rounds the terms, however small their sum.
    """
    assert_as_accurate_as_draws(got, yardstick[None], exact, terms=terms, label=label)


def assert_as_accurate_as_draws(
    got: Tensor, yardsticks: Tensor, exact: Tensor, *, terms: float = 0.0, label: str = ""
) -> None:
    """`assert_as_accurate` against the largest errors among several yardsticks [K, ...].

    One yardstick is one draw of the rounding errors. A result of few numbers after many roundings can be close to the
    truth by luck, and a correct kernel that rounds another sum the other way is then outside any factor of its error.
    Draws of the same computation that round up or down at random say how large an error the roundings can make.
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
    """Return the largest and the root mean square error as shares of what `assert_as_accurate` allows each: 1 is all.

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
    """Return eps(dtype) |exact| and the spacing of its smallest numbers, twice what one rounding to `dtype` may change.

    float32 and bfloat16 numbers below the smallest normal one may be flushed to zero.
    """
    info = torch.finfo(dtype)
    return info.eps * exact.abs() + (info.eps * info.tiny if dtype == torch.float16 else info.tiny)


def assert_bounded(got: Tensor, exact: Tensor, bound: Tensor, *, label: str = "") -> None:
    """|got - exact| ≤ bound + the rounding of the result, everywhere. A value without a finite bound is not judged.

    `bound` is the error of the arithmetic before the result is rounded to its dtype. Where |exact| exceeds the largest
    number of the dtype by less than the bound, the result may be infinite, and it has to be beyond that.
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
    """[..., 1]: 4 eps(float32) max|x| / std, by how much float32 statistics may move a normalised value."""
    x = x.double()
    std = (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    return 4 * EPS32 * x.abs().amax(-1, keepdim=True) / std


def sum_conditioning(terms: Tensor, dim: int = 0) -> Tensor:
    """Return 4 eps(float32) Σ|terms|, by how much float32 may move a sum whose terms cancel, in any order of addition.

    n terms added in a random order are off by about sqrt(n) / 2 eps of the partial sums, which stay far below Σ|terms|.
    """
    return 4 * EPS32 * terms.double().abs().sum(dim)


def softmax_terms(scores: Tensor, exact: Tensor) -> float:
    """The `terms` that grant a result made of softmax probabilities 4 eps(float32) max|score| of its largest value.

    A score s held in float32 is off by eps |s| / 2 for each operation that rounds it, and exp(s) by that factor: the
    product, the scale with log2(e), and the difference from the maximum, which a GPU fuses and an interpreter does not.
    With scores up to 4 this is below the float32 floor; with scores in the hundreds two correct implementations differ
    by more than any fixed multiple of the other's luck.
    """
    if not scores.numel() or not exact.numel():
        return 0.0
    return 4 * EPS32 * scores.abs().max().item() * exact.abs().max().item() / FLOOR


def exact(tensor: Tensor | None) -> Tensor | None:
    """The same numbers in float64, as a leaf that records gradients where the original does."""
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
