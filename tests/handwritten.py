"""Small GPT models as people write them by hand, and look-alikes that have the same parts but compute something else.

`gpt_fast.accelerate` must recognise the models, and must leave the look-alikes alone.
"""

import random

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models.handwritten import MODELS as STRUCTURES
from benchmarks.models.handwritten import Packed, ScaleShift, Separate, Sizes, loss_of

V, P, C, H, LAYERS = SIZES = Sizes(61, 24, 32, 4, 3)
MODELS = {
    **{name: lambda dropout=0.0, kind=kind: kind(SIZES, dropout) for name, kind in STRUCTURES.items()},
    "packed_without_bias": lambda dropout=0.0: Packed(SIZES, dropout, bias=False),
    "separate_with_bias": lambda dropout=0.0: Separate(SIZES, dropout, bias=True),
}


def make(name: str, dropout: float = 0.0) -> nn.Module:
    """Return a model with random gains and biases: with ones and zeros, a gain or bias could be forgotten unseen."""
    model = MODELS[name](dropout)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


# ---- look-alikes -----------------------------------------------------------------------------------------------------


class Changeable(nn.Module):
    """Pre-norm block whose forward applies the one change of `CHANGES` that it is given."""

    def __init__(self, change: str, dropout: float = 0.1):
        super().__init__()
        self.change = change
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.Module()
        self.attn.c_attn, self.attn.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.gelu, self.mlp.c_proj = nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C)
        self.drop, self.second, self.n_head = nn.Dropout(dropout), nn.Dropout(dropout), H
        self.register_buffer("calls", torch.zeros(()))
        self.lengths: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        change, T, D = self.change, x.shape[1], C // H
        y = self.ln_1(x)
        if change == "token_shift":
            y = torch.cat([y[:, :1], y[:, :-1]], dim=1)
        q, k, v = (one.unflatten(-1, (H, -1)).transpose(1, 2) for one in self.attn.c_attn(y).chunk(3, dim=-1))
        if change == "rotary":
            angle = torch.arange(T, dtype=x.dtype, device=x.device)[:, None] * 0.3
            q = torch.cat([q[..., :1] * angle.cos() - q[..., 1:2] * angle.sin(), q[..., 1:]], dim=-1)
        if change == "normalised_queries":
            q = F.normalize(q, dim=-1)
        scores = q @ k.transpose(-2, -1) / (D if change == "scale" else D**0.5)
        i, j = torch.arange(T, device=x.device)[:, None], torch.arange(T, device=x.device)
        if change == "alibi":
            scores = scores - 0.1 * (i - j)
        if change == "softcap":
            scores = 5 * torch.tanh(scores / 5)
        hidden = j > i
        if change == "no_mask":
            hidden = hidden & False
        if change == "one_token_ahead":
            hidden = j > i + 1
        if change == "window":
            hidden = hidden | (j < i - 15)
        if change == "dropout_of_scores":
            scores = self.second(scores)
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        if change == "attention_sink":
            p = p * 0.9
        if change == "keeps_probabilities":
            self.probabilities = p.detach()
        if change == "counts_in_a_list":
            self.lengths.append(T)
        if change == "pythons_random_skip" and self.training and random.random() < 0.3:
            return x
        if change == "detached_in_training" and self.training:
            p = p.detach()
        if change == "shift_of_long_rows_in_training" and self.training and T > 16:
            p = p.roll(1, 1)
        out = self.attn.c_proj((p @ v).transpose(1, 2).flatten(2))
        if change == "detached":
            out = out.detach() + (out - out.detach()) * 0.5
        if change == "noise" and self.training:
            out = out + torch.randn_like(out) * 0.1
        if change == "skipped_layers" and self.training and torch.rand(()) < 0.3:
            return x
        if change == "parallel":
            return x + self.drop(out) + self.feed(self.ln_2(x))
        if change == "clamped_stream":
            x = x.clamp(-50, 50)
        if change == "clamped_scores":
            x = x + 0 * scores.clamp(-30, 30).sum() + (scores.clamp(-30, 30) - scores).mean()
        if change == "fixed_dropout":
            out = F.dropout(out, 0.11, self.training)
        x = (0.5 * x if change == "factor" else x) + self.drop(out)
        if change == "dropout_of_the_sum":
            x = self.second(x)
        if change == "counter":
            self.calls += 1
            x = x * (1 + 0.01 * self.calls)
        x = x + self.feed(self.ln_2(x))
        return x.clamp(-3, 3) if change == "clamped" else x

    def feed(self, y: Tensor) -> Tensor:
        h = self.mlp.c_fc(y)
        if self.change == "gate":
            h = h * torch.sigmoid(h)
        h = self.mlp.gelu(h)
        if self.change == "squared":
            h = h.square()
        if self.change == "twice_dropped":
            h = self.second(self.drop(h))
        if self.change == "dropped_before_the_projection":
            return self.mlp.c_proj(self.drop(h))
        return self.drop(self.mlp.c_proj(h))


class RootMeanSquare(nn.Module):
    """RMSNorm with the parameters of LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() + self.bias


def look_alike(change: str) -> nn.Module:
    block = Changeable(change)
    if change == "rms_norm":
        block.ln_2 = RootMeanSquare()
    if change == "another_eps":
        block.ln_1 = ScaleShift(C, eps=3e-3)
    if change == "another_activation":
        block.mlp.gelu = nn.SiLU()
    model = nn.Sequential(nn.Embedding(V, C), block, nn.Linear(C, V))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


CHANGES = (
    "scale", "no_mask", "one_token_ahead", "window", "alibi", "rotary", "normalised_queries", "softcap",
    "attention_sink", "token_shift", "gate", "squared", "another_activation", "rms_norm", "another_eps", "factor",
    "clamped", "parallel", "detached", "counter", "noise", "skipped_layers", "dropout_of_scores", "dropout_of_the_sum",
    "twice_dropped", "keeps_probabilities", "counts_in_a_list", "pythons_random_skip", "detached_in_training",
    "shift_of_long_rows_in_training", "clamped_stream", "clamped_scores", "fixed_dropout",
)  # fmt: skip


# ---- blocks that are fused in part -----------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal attention, with rotary embeddings of queries and keys if `is_rotary`."""

    def __init__(self, dropout: float, is_rotary: bool):
        super().__init__()
        self.qkv, self.out, self.drop = nn.Linear(C, 3 * C), nn.Linear(C, C), nn.Dropout(dropout)
        self.p, self.heads, self.is_rotary = nn.Dropout(dropout), H, is_rotary

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (one.unflatten(-1, (H, -1)).transpose(1, 2) for one in self.qkv(x).chunk(3, dim=-1))
        if self.is_rotary:
            angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 0.3
            q, k = (torch.cat([y[..., :1] * angle.cos() - y[..., 1:2] * angle.sin(), y[..., 1:]], -1) for y in (q, k))
        scores = q @ k.transpose(-2, -1) / (C // H) ** 0.5
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if mask is not None:
            hidden = hidden | mask
        p = self.p(scores.masked_fill(hidden, -torch.inf).softmax(-1))
        return self.drop(self.out((p @ v).transpose(1, 2).flatten(2)))


class ByParameters(nn.Module):
    """Attention that multiplies by its own parameters, without `nn.Linear`.

    The gradient of its key bias is 0 in exact arithmetic, so only rounding errors remain.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, C, C) * 0.1), nn.Parameter(torch.randn(3, C))
        self.key_bias = nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x @ self.weight[i] + self.bias[i] for i in range(3))
        q, k, v = (one.unflatten(-1, (H, -1)).transpose(1, 2) for one in (q, k + self.key_bias, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Partly(nn.Module):
    """Block that differs from GPT-2's in one way, by `kind`, so that only parts of it can be fused."""

    def __init__(self, kind: str, dropout: float):
        super().__init__()
        self.kind, self.gamma = kind, nn.Parameter(torch.full((), 0.5))
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(4))
        self.attention = ByParameters() if kind == "parameters" else Attention(dropout, kind == "rotary")
        self.feed = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C), nn.Dropout(dropout))
        if kind == "gated":
            self.feed.append(nn.GLU())
            self.feed[2] = nn.Linear(4 * C, 2 * C)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        a, b, c, d = self.norms
        if self.kind == "parallel":
            return x + self.attention(a(x)) + self.feed(b(x)), None
        if self.kind == "sandwich":
            x = x + b(self.attention(a(x)))
            return x + d(self.feed(c(x))), None
        if self.kind == "masked":
            x = x + self.attention(a(x), mask)
            return x + self.feed(b(x)), None
        x = x + self.gamma * self.attention(a(x))
        return x + self.gamma * self.feed(b(x)), None


class PartlyFused(nn.Module):
    """Model of `Partly` blocks. Each block returns a tuple."""

    def __init__(self, kind: str, dropout: float = 0.0):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, C), nn.Embedding(P, C)
        self.blocks = nn.ModuleList(Partly(kind, dropout) for _ in range(LAYERS))
        self.last, self.output = nn.LayerNorm(C), nn.Linear(C, V, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x, _ = block(x, mask)
        return self.output(self.last(x))


# Kind of block → the fused ops that each block runs after `accelerate`, besides its four norms.
PARTLY = {
    "parallel": ("attention", "linear", "linear", "mlp"),
    "sandwich": ("attention", "linear", "linear", "mlp"),
    "scaled": ("attention", "linear", "linear", "mlp"),
    "masked": ("attention", "linear", "linear", "mlp"),
    "rotary": ("mlp",),
    "parameters": ("mlp",),
    "gated": ("attention", "linear", "linear"),
}


__all__ = ["CHANGES", "MODELS", "PARTLY", "PartlyFused", "V", "look_alike", "loss_of", "make"]
