"""Compute error bounds of the ops' results, one bound for each value, for random calls of any size.

Each function takes the arguments of the op in float64 (after rounding to their dtype), the upstream gradients and the
dtype of the operands. It returns the error before the result itself is rounded, for "out" and for each gradient. The
bounds follow the rounding of every operand and the float32 arithmetic of every sum to the result, by absolute values.
A sum has an error of `numerics.FLOOR` times the sum of its terms' sizes, the float32 floor of the tolerance policy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_fast import reference
from tests import numerics
from tests.numerics import FLOOR, rounding

SLOPE = 1.13  # largest slope of relu, gelu and gelu_tanh; their second derivatives stay below 1
FLUSHED = 2 * 2**-125  # kernels flush 2^x below 2^-125 and e^x below e^-86 to 0; the bound allows twice 2^-125
Bounds = dict[str, Tensor]


def summing(terms: int) -> float:
    """Return the error of a float32 sum divided by the sum of its terms' sizes.

    If n terms are added one after the other, this ratio is at most n eps / 2. Equal terms come near this limit.
    """
    return FLOOR + terms * numerics.EPS32 / 2


def product(a: Tensor, error_a: Tensor | float, b: Tensor, error_b: Tensor | float = 0.0) -> Tensor:
    """Return the error of the matrix product a b, accumulated in float32, if the operands have errors."""
    b, error_b = b.abs(), torch.as_tensor(error_b, dtype=b.dtype).expand_as(b)
    a, error_a = a.abs(), torch.as_tensor(error_a, dtype=a.dtype).expand_as(a)
    return (error_a + summing(a.shape[-1]) * a) @ b + a @ error_b + error_a @ error_b


def zeros_like_or(x: Tensor | None, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64) if x is None else x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, upstream: list[Tensor], dtype: torch.dtype) -> Bounds:
    """Return the bounds of y = x weightᵀ + bias."""
    C, N = weight.shape[1], weight.shape[0]
    M = x.shape[:-1].numel()
    rows, dy = x.reshape(M, C), upstream[0].reshape(M, N)
    out = product(rows, 0.0, weight.t()) + FLOOR * zeros_like_or(bias, N).abs()
    return {
        "out": out.reshape(upstream[0].shape),
        "x": product(dy, 0.0, weight).reshape(x.shape),
        "weight": product(dy.t(), 0.0, rows),
        "bias": summing(M) * dy.abs().sum(0),
    }


def layer_norm(x: Tensor, weight: Tensor | None, eps: float, dy: Tensor) -> Bounds:
    """Return the bounds of tests/ops/test_layer_norm.py, for "out", "x", "weight" and "bias"."""
    if x.numel() == 0:
        return {"out": torch.zeros_like(x), "x": torch.zeros_like(x), "weight": x.new_zeros(x.shape[-1:]),
                "bias": x.new_zeros(x.shape[-1:])}  # fmt: skip
    delta = numerics.norm_conditioning(x, eps)
    gain = torch.ones_like(x) if weight is None else weight.expand_as(x)
    xhat = reference.layer_norm(x, None, None, eps)
    rstd = (x.var(-1, keepdim=True, unbiased=False) + eps).rsqrt()
    g = (dy * gain).abs().amax(-1, keepdim=True)
    error, terms = delta + FLOOR * xhat.abs(), (dy * xhat).abs()
    columns, floor = x.shape[-1], summing(x.numel() // x.shape[-1])
    return {
        "out": error * gain.abs() + FLOOR * (gain * xhat).abs().amax(-1, keepdim=True),
        # dx is a difference of terms that are as large as rstd g.
        "x": delta * rstd * g * (1 + xhat.abs()) + FLOOR * rstd * g * (1 + xhat.abs()),
        "weight": (dy.abs() * delta + floor * terms).reshape(-1, columns).sum(0),
        "bias": floor * dy.abs().reshape(-1, columns).sum(0),
    }


def embedding(
    tokens: Tensor, token_weight: Tensor, position_weight: Tensor, positions: Tensor, factor: Tensor, dout: Tensor,
) -> Bounds:  # fmt: skip
    """Return the bounds of out = factor (token_weight[tokens] + position_weight[positions]); factor is dropout's."""
    C = token_weight.shape[1]
    terms = (dout * factor).abs().reshape(tokens.numel(), C)
    places = positions.expand(tokens.shape)

    def summed(weight: Tensor, index: Tensor) -> Tensor:
        return summing(tokens.numel()) * torch.zeros_like(weight).index_add(0, index.reshape(-1).long(), terms)

    out = factor * (F.embedding(tokens.long(), token_weight.abs()) + F.embedding(places, position_weight.abs()))
    return {
        "out": FLOOR * out,
        "token_weight": summed(token_weight, tokens),
        "position_weight": summed(position_weight, places),
    }


def mlp(
    x: Tensor, fc_weight: Tensor, fc_bias: Tensor | None, proj_weight: Tensor, proj_bias: Tensor | None,
    activation, factor: Tensor, dy: Tensor, dtype: torch.dtype,
) -> Bounds:  # fmt: skip
    """Return the bounds of y = factor act(x fc_weightᵀ + fc_bias) proj_weightᵀ + proj_bias, with factor [rows, F]."""
    hidden, C_out = fc_weight.shape[0], proj_weight.shape[0]
    z = F.linear(x, fc_weight, fc_bias)
    error_z = product(x, 0.0, fc_weight.t()) + FLOOR * zeros_like_or(fc_bias, hidden).abs()
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        activated = activation.function(leaf)
        (slope,) = torch.autograd.grad(activated, leaf, torch.ones_like(leaf))
    activated = activated.detach()

    def error_of_hidden(error: Tensor) -> Tensor:
        # 4 FLOOR |z| allows for the approximation of the error function or of tanh, which is multiplied by z.
        return factor * (SLOPE * error + 4 * FLOOR * z.abs()) + rounding(factor * activated, dtype)

    h = factor * activated
    out = product(h, error_of_hidden(error_z), proj_weight.t()) + FLOOR * zeros_like_or(proj_bias, C_out).abs()
    dh = (dy @ proj_weight) * factor
    # Backward of gelu starts from z rounded to the dtype. Backward of relu starts from h, which has the sign of z.
    error_kept = error_z + rounding(z, dtype)
    if activation.aliases:  # relu: near zero its derivative is 0 or 1
        error_slope = (z.abs() <= error_kept).double()
    else:
        error_slope = error_kept + 4 * FLOOR * (1 + z.abs()) * (z.abs() < 40)
    error_slope = error_slope.where(z.isfinite(), torch.nan)
    error_dh = factor * product(dy, 0.0, proj_weight)
    dz = dh * slope
    # In float16 dz may be rounded before it is multiplied by dropout's scale.
    error_dz = dh.abs() * error_slope + SLOPE * error_dh + rounding(dz, dtype) * factor.clamp(min=1)
    return {
        "out": out,
        "x": product(dz, error_dz, fc_weight),
        "fc_weight": product(dz.t(), error_dz.t(), x),
        "fc_bias": (error_dz + summing(len(x)) * dz.abs()).sum(0),
        "proj_weight": product(dy.t(), 0.0, h, error_of_hidden(error_kept)),
        "proj_bias": summing(len(x)) * dy.abs().sum(0),
    }


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, valid: Tensor, smoothing: float, reduction: str,
    dloss: Tensor, dtype: torch.dtype,
) -> Bounds:  # fmt: skip
    """Return the bounds of the loss. x is [N, C], target and valid are [N]; dloss is a scalar, or [N] for "none"."""
    V, N = weight.shape[0], x.shape[0]
    if V == 0 or N == 0:
        nothing = [torch.zeros_like(t) for t in (x, weight, x.new_zeros(V))]
        out = torch.zeros_like(dloss)
        return {"out": out, "x": nothing[0], "weight": nothing[1], "bias": nothing[2]}
    keep = valid[:, None]
    logits = F.linear(x, weight, bias).masked_fill(~keep, 0.0)
    error = product(x, 0.0, weight.t()) + FLOOR * zeros_like_or(bias, V).abs()
    error = error.masked_fill(~keep, 0.0)
    largest = error.amax(-1)
    lse = logits.logsumexp(-1)
    chosen = F.one_hot(target.where(valid, 0), V).double()
    # The loss has errors of the log of a sum of V terms near 1, and of the differences from the largest logit.
    loss = 2 * largest + FLOOR * (1 + lse.abs() + 2 * logits.abs().amax(-1)) + summing(V)
    loss = loss * valid
    probs = logits.softmax(-1)
    pull = chosen * (1 - smoothing) + smoothing / V
    d = (probs - pull) * keep
    error_d = probs * (2 * largest + FLOOR * (1 + logits.abs().amax(-1)))[:, None] + FLOOR * (probs + pull) + FLUSHED
    error_d = error_d * keep
    count = valid.sum().clamp(min=1)
    if reduction == "none":
        d, error_d, scale = d * dloss[:, None], error_d * dloss.abs()[:, None], torch.ones(())
        out = loss
    else:
        scale = (dloss / count if reduction == "mean" else dloss).abs()
        out = loss.sum() + summing(N) * (lse.abs() + logits.abs().amax(-1)).mul(valid).sum()
        out = out / count if reduction == "mean" else out
    operand = error_d + rounding(d, dtype) * keep
    dx = product(d, operand, weight)
    if reduction != "none":
        dx = dx + rounding(d @ weight, dtype)
    return {
        "out": out,
        "x": (scale * dx) * keep,
        "weight": scale * product(d.t(), operand.t(), x.masked_fill(~keep, 0.0)),
        "bias": scale * (operand + summing(N) * d.abs()).sum(0),
    }


def attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, factor: Tensor, scale: float, dout: Tensor, dtype: torch.dtype
) -> Bounds:
    """Return the bounds of attention. q, k, v and dout are [B, H, T or S, D].

    `allowed` and dropout's `factor` are [B, H, T, S].
    """
    if q.numel() == 0 or k.numel() == 0:
        return {"out": torch.zeros_like(q), "q": torch.zeros_like(q), "k": torch.zeros_like(k),
                "v": torch.zeros_like(v)}  # fmt: skip
    scores = (q @ k.mT * scale).masked_fill(~allowed, -torch.inf)
    probs = scores.softmax(-1).masked_fill(~allowed, 0.0)
    # The relative error of a row's probabilities is twice the error of its scores: 4 eps(float32) and the error of a
    # sum of D terms.
    sizes = (abs(scale) * (q.abs() @ k.abs().mT)).masked_fill(~allowed, 0.0)
    relative = summing(k.shape[2]) + (8 + q.shape[-1]) * numerics.EPS32 * sizes.amax(-1, keepdim=True)  # [B, H, T, 1]
    largest = factor.amax() if factor.numel() else factor.new_zeros(())
    # Weights may be rounded before they are multiplied by dropout's scale, which matters for the smallest numbers of
    # the dtype. Masked keys have no rounding.
    weights = probs * factor
    rounded = rounding(weights, dtype) * allowed * largest.clamp(min=1)
    error_weights = weights * relative + FLUSHED * factor + rounded
    out = product(weights, error_weights, v)
    exact_out = weights @ v
    delta_terms = (dout * exact_out).abs().sum(-1, keepdim=True)
    delta = (dout * exact_out).sum(-1, keepdim=True)
    error_delta = (dout.abs() * (out + rounding(exact_out, dtype))).sum(-1, keepdim=True) + FLOOR * delta_terms
    dp, error_dp = factor * (dout @ v.mT), factor * product(dout, 0.0, v.mT)
    ds = probs * (dp - delta)
    error_ds = probs * (relative * (dp.abs() + delta.abs()) + error_dp + error_delta + FLOOR * (dp.abs() + delta.abs()))
    error_ds = error_ds + FLUSHED * (dp.abs() + delta.abs())
    error_ds = error_ds + rounding(ds, dtype) * allowed * largest.clamp(min=1)
    return {
        "out": out,
        "q": abs(scale) * product(ds, error_ds, k),
        "k": abs(scale) * product(ds.mT, error_ds.mT, q),
        "v": product(weights.mT, error_weights.mT, dout),
    }
