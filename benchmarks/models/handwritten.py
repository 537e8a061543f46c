"""GPT-2s as people write them themselves: five structures, with names and code of their own.

`packed`: a packed projection and PyTorch's attention, a tied output layer, the loss inside, as in nanoGPT. `masked`: a
masked softmax written out and an MLP in a lambda, as in minGPT. `separate`: three projections, norms written out, the
loss outside, as in "LLMs from scratch". `own`: names that no table has, post-norm. `single`: each head a module with
projections of its own, as lectures begin.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Sizes(NamedTuple):
    """Vocabulary, positions, width, heads and blocks."""

    V: int
    P: int
    C: int
    H: int
    L: int


class Gain(nn.Module):
    """LayerNorm by hand, with `weight` and an optional `bias`."""

    def __init__(self, width: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class ScaleShift(nn.Module):
    """LayerNorm written out, with `scale` and `shift`."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.small = eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.scale * centred * (centred.square().mean(-1, keepdim=True) + self.small).rsqrt() + self.shift


class TanhGELU(nn.Module):
    """GELU's approximation by tanh, written out."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# ---- packed projection, PyTorch's attention, tied output, loss inside ------------------------------------------------


class PackedAttention(nn.Module):
    def __init__(self, s: Sizes, dropout: float, bias: bool):
        super().__init__()
        C, H = s.C, s.H
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C, bias=bias), nn.Linear(C, C, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)
        self.n_head, self.dropout = H, dropout

    def forward(self, x: Tensor) -> Tensor:
        """Return causal self-attention of x [B, T, C], after the output projection and dropout, [B, T, C]."""
        q, k, v = (one.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for one in self.c_attn(x).chunk(3, dim=-1))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class PackedMLP(nn.Module):
    def __init__(self, s: Sizes, dropout: float, bias: bool):
        super().__init__()
        C = s.C
        self.c_fc, self.c_proj = nn.Linear(C, 4 * C, bias=bias), nn.Linear(4 * C, C, bias=bias)
        self.gelu, self.dropout = nn.GELU(), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class PackedBlock(nn.Module):
    def __init__(self, s: Sizes, dropout: float, bias: bool):
        super().__init__()
        C = s.C
        self.ln_1, self.ln_2 = Gain(C, bias), Gain(C, bias)
        self.attn, self.mlp = PackedAttention(s, dropout, bias), PackedMLP(s, dropout, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Packed(nn.Module):
    """Model that returns (logits, loss). Labels of -1 do not count.

    Without labels it returns the logits of the last position alone.
    """

    def __init__(self, s: Sizes, dropout: float = 0.0, bias: bool = True):
        super().__init__()
        V, P, C, _, L = s
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(V, C), "wpe": nn.Embedding(P, C), "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(PackedBlock(s, dropout, bias) for _ in range(L)), "ln_f": Gain(C, bias),
            }
        )  # fmt: skip
        self.lm_head = nn.Linear(C, V, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return (logits, loss): logits [B, T, V] and the mean cross-entropy over the labels other than -1.

        `idx` are token ids [B, T], and `targets` the labels of the same positions, [B, T]; they are not shifted here.
        Without labels the result is (logits [B, 1, V] of the last position, None).
        """
        parts = self.transformer
        x = parts["drop"](parts["wte"](idx) + parts["wpe"](torch.arange(idx.shape[1], device=idx.device)))
        for block in list(parts["h"].children()):
            x = block(x)
        x = parts["ln_f"](x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


# ---- masked softmax written out, an MLP in a lambda ------------------------------------------------------------------


class MaskedAttention(nn.Module):
    def __init__(self, s: Sizes, dropout: float):
        super().__init__()
        C, H, P = s.C, s.H, s.P
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.register_buffer("bias", torch.ones(P, P).tril().view(1, 1, P, P))
        self.n_head = H

    def forward(self, x: Tensor) -> Tensor:
        """Return causal self-attention of x [B, T, C], after the output projection and dropout, [B, T, C]."""
        T = x.shape[1]
        q, k, v = (
            one.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for one in self.c_attn(x).split(x.shape[2], dim=2)
        )
        mask: Any = self.bias
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        p = scores.masked_fill(mask[:, :, :T, :T] == 0, float("-inf")).softmax(-1)
        return self.resid_dropout(self.c_proj((self.attn_dropout(p) @ v).transpose(1, 2).flatten(2)))


class MaskedBlock(nn.Module):
    """Pre-norm block whose MLP is a dictionary of layers that a lambda applies."""

    def __init__(self, s: Sizes, dropout: float):
        super().__init__()
        C = s.C
        self.ln_1, self.ln_2, self.attn = nn.LayerNorm(C), nn.LayerNorm(C), MaskedAttention(s, dropout)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(C, 4 * C),
                "c_proj": nn.Linear(4 * C, C),
                "act": TanhGELU(),
                "dropout": nn.Dropout(dropout),
            }
        )
        m = self.mlp
        self.mlpf = lambda x: m["dropout"](m["c_proj"](m["act"](m["c_fc"](x))))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlpf(self.ln_2(x))


class Masked(Packed):
    """`Packed` with blocks that write the masked softmax out, and with an output layer that is not tied."""

    def __init__(self, s: Sizes, dropout: float = 0.0):
        super().__init__(s, dropout)
        self.transformer["h"] = nn.ModuleList(MaskedBlock(s, dropout) for _ in range(s.L))
        self.transformer["ln_f"] = nn.LayerNorm(s.C)
        self.lm_head = nn.Linear(s.C, s.V, bias=False)


# ---- separate projections, norms written out, the loss outside -------------------------------------------------------


class SeparateAttention(nn.Module):
    def __init__(self, s: Sizes, dropout: float, bias: bool):
        super().__init__()
        C, H, P = s.C, s.H, s.P
        self.W_query, self.W_key, self.W_value = (nn.Linear(C, C, bias=bias) for _ in range(3))
        self.out_proj, self.dropout, self.num_heads = nn.Linear(C, C), nn.Dropout(dropout), H
        self.register_buffer("mask", torch.ones(P, P).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return causal self-attention of x [B, T, C], after the output projection, [B, T, C]."""
        B, T, C = x.shape
        q, k, v = (
            one(x).view(B, T, self.num_heads, -1).transpose(1, 2) for one in (self.W_query, self.W_key, self.W_value)
        )
        mask: Any = self.mask
        scores = q @ k.transpose(2, 3)
        scores.masked_fill_(mask.bool()[:T, :T], -torch.inf)
        p = self.dropout(torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1))
        return self.out_proj((p @ v).transpose(1, 2).reshape(B, T, C))


class SeparateFeed(nn.Module):
    def __init__(self, s: Sizes):
        super().__init__()
        C = s.C
        self.layers = nn.Sequential(nn.Linear(C, 4 * C), TanhGELU(), nn.Linear(4 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class SeparateBlock(nn.Module):
    """Pre-norm block in which one dropout module serves both branches."""

    def __init__(self, s: Sizes, dropout: float, bias: bool):
        super().__init__()
        C = s.C
        self.att, self.ff = SeparateAttention(s, dropout, bias), SeparateFeed(s)
        self.norm1, self.norm2, self.drop_shortcut = ScaleShift(C), ScaleShift(C), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_shortcut(self.att(self.norm1(x))) + x
        return self.drop_shortcut(self.ff(self.norm2(x))) + x


class Separate(nn.Module):
    """Model that returns logits. The caller computes the loss."""

    def __init__(self, s: Sizes, dropout: float = 0.0, bias: bool = False):
        super().__init__()
        V, P, C, _, L = s
        self.tok_emb, self.pos_emb, self.drop_emb = nn.Embedding(V, C), nn.Embedding(P, C), nn.Dropout(dropout)
        self.trf_blocks = nn.Sequential(*(SeparateBlock(s, dropout, bias) for _ in range(L)))
        self.final_norm, self.out_head = ScaleShift(C), nn.Linear(C, V, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tok_emb(idx) + self.pos_emb(torch.arange(idx.shape[1], device=idx.device))
        return self.out_head(self.final_norm(self.trf_blocks(self.drop_emb(x))))


# ---- names that no table has, post-norm, positions as a parameter, dropout on the hidden activation ------------------


class OwnBlock(nn.Module):
    """Post-norm block with ReLU as a function, which holds all its layers itself."""

    def __init__(self, s: Sizes, dropout: float):
        super().__init__()
        C, H = s.C, s.H
        self.to_qkv, self.mix, self.up = (nn.Linear(C, n) for n in (3 * C, C, 2 * C))
        self.down = nn.Linear(2 * C, C)
        self.n1, self.n2 = nn.LayerNorm(C, eps=1e-6), nn.LayerNorm(C, eps=1e-6)
        self.inner, self.outer, self.heads = nn.Dropout(dropout), nn.Dropout(dropout), H

    def forward(self, x: Tensor) -> Tensor:
        """Return the post-norm block's output [B, T, C], by causal attention and a ReLU MLP, for x [B, T, C]."""
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in self.to_qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = self.n1(x + self.mix(y))
        return self.n2(x + self.outer(self.down(self.inner(torch.relu(self.up(x))))))


class Own(nn.Module):
    """Model that returns a dict, and computes its loss over the labels inside."""

    def __init__(self, s: Sizes, dropout: float = 0.0):
        super().__init__()
        V, P, C, _, L = s
        self.words, self.places = nn.Embedding(V, C), nn.Parameter(torch.randn(1, P, C) * 0.1)
        self.layers = nn.ModuleList(OwnBlock(s, dropout) for _ in range(L))
        self.classes = nn.Linear(C, V)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return {"logits": [B, T, V], "loss": mean cross-entropy}, given tokens and labels, both [B, T].

        A label belongs to the token at its position; they are not shifted here. Without labels there is no "loss".
        """
        x = self.words(tokens) + self.places[:, : tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = self.classes(x)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


# ---- heads that are modules of their own -----------------------------------------------------------------------------


class SingleHead(nn.Module):
    def __init__(self, s: Sizes, dropout: float):
        super().__init__()
        C, D, P = s.C, s.C // s.H, s.P
        self.key, self.query, self.value = (nn.Linear(C, D, bias=False) for _ in range(3))
        self.register_buffer("lower", torch.ones(P, P).tril())
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return causal self-attention of x [B, T, C] by one head, [B, T, C / H], before the output projection."""
        T, lower = x.shape[1], cast(Tensor, self.lower)
        k = self.key(x)
        scores = self.query(x) @ k.mT * k.shape[-1] ** -0.5
        p = scores.masked_fill(lower[:T, :T] == 0, float("-inf")).softmax(-1)
        return self.drop(p) @ self.value(x)


class SingleHeads(nn.Module):
    def __init__(self, s: Sizes, dropout: float):
        super().__init__()
        self.heads = nn.ModuleList(SingleHead(s, dropout) for _ in range(s.H))
        self.project, self.drop = nn.Linear(s.C, s.C), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return causal self-attention of x [B, T, C] by all heads, with output projection and dropout, [B, T, C]."""
        return self.drop(self.project(torch.cat([head(x) for head in self.heads], dim=-1)))


class SingleBlock(nn.Module):
    def __init__(self, s: Sizes, dropout: float):
        super().__init__()
        C = s.C
        self.talk = SingleHeads(s, dropout)
        self.think = nn.Sequential(nn.Linear(C, 4 * C), nn.ReLU(), nn.Linear(4 * C, C), nn.Dropout(dropout))
        self.before, self.between = nn.LayerNorm(C), nn.LayerNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.talk(self.before(x))
        return x + self.think(self.between(x))


class Single(Packed):
    """`Packed` with blocks in which each attention head is a module."""

    def __init__(self, s: Sizes, dropout: float = 0.0):
        super().__init__(s, dropout)
        self.transformer["h"] = nn.ModuleList(SingleBlock(s, dropout) for _ in range(s.L))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "packed": Packed, "masked": Masked, "separate": Separate, "own": Own, "single": Single,
}  # fmt: skip


def loss_of(model: nn.Module, idx: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of `model`, an instance of a class in MODELS, on tokens and labels, both [B, T].

    `idx` are the token ids. `targets[b, t]` is the label of position t in row b, usually the token after `idx[b, t]`.
    `Separate` returns logits, from which this function computes the loss. All other models compute the loss themselves.
    The model may be wrapped by `torch.compile` or DistributedDataParallel.
    """
    inner = getattr(model, "_orig_mod", getattr(model, "module", model))
    if isinstance(inner, Separate):
        return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    result = model(idx, targets)
    return result["loss"] if isinstance(result, dict) else result[1]
