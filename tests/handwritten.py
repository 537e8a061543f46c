"""Small GPT-2s as people write them: four structures with names and code of their own, and changes of each.

A change makes a look-alike: the same parts, another function.
"""

import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

V, P, C, H, LAYERS = 61, 24, 32, 4, 3


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
    def __init__(self, dropout: float, bias: bool):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C, bias=bias), nn.Linear(C, C, bias=bias)
        self.resid_dropout = nn.Dropout(dropout)
        self.n_head, self.dropout = H, dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for one in self.c_attn(x).chunk(3, dim=-1))
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class PackedMLP(nn.Module):
    def __init__(self, dropout: float, bias: bool):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(C, 4 * C, bias=bias), nn.Linear(4 * C, C, bias=bias)
        self.gelu, self.dropout = nn.GELU(), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class PackedBlock(nn.Module):
    def __init__(self, dropout: float, bias: bool):
        super().__init__()
        self.ln_1, self.ln_2 = Gain(C, bias), Gain(C, bias)
        self.attn, self.mlp = PackedAttention(dropout, bias), PackedMLP(dropout, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Packed(nn.Module):
    """Returns (logits, loss); labels of -1 do not count; without labels the logits of the last position alone."""

    def __init__(self, dropout: float = 0.0, bias: bool = True):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(V, C), "wpe": nn.Embedding(P, C), "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(PackedBlock(dropout, bias) for _ in range(LAYERS)), "ln_f": Gain(C, bias),
            }
        )  # fmt: skip
        self.lm_head = nn.Linear(C, V, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        parts = self.transformer
        x = parts["drop"](parts["wte"](idx) + parts["wpe"](torch.arange(idx.shape[1], device=idx.device)))
        for block in parts["h"]:
            x = block(x)
        x = parts["ln_f"](x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, V), targets.view(-1), ignore_index=-1)


# ---- masked softmax written out, an MLP in a lambda ------------------------------------------------------------------


class MaskedAttention(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.register_buffer("bias", torch.ones(P, P).tril().view(1, 1, P, P))
        self.n_head = H

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        q, k, v = (one.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for one in self.c_attn(x).split(C, dim=2))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        p = scores.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf")).softmax(-1)
        return self.resid_dropout(self.c_proj((self.attn_dropout(p) @ v).transpose(1, 2).flatten(2)))


class MaskedBlock(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.ln_1, self.ln_2, self.attn = nn.LayerNorm(C), nn.LayerNorm(C), MaskedAttention(dropout)
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
    """The same trunk around other blocks, its output layer free."""

    def __init__(self, dropout: float = 0.0):
        super().__init__(dropout)
        self.transformer["h"] = nn.ModuleList(MaskedBlock(dropout) for _ in range(LAYERS))
        self.transformer["ln_f"] = nn.LayerNorm(C)
        self.lm_head = nn.Linear(C, V, bias=False)


# ---- separate projections, norms written out, the loss outside -------------------------------------------------------


class SeparateAttention(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.W_query, self.W_key, self.W_value = (nn.Linear(C, C, bias=False) for _ in range(3))
        self.out_proj, self.dropout, self.num_heads = nn.Linear(C, C), nn.Dropout(dropout), H
        self.register_buffer("mask", torch.ones(P, P).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (one(x).view(B, T, H, -1).transpose(1, 2) for one in (self.W_query, self.W_key, self.W_value))
        scores = q @ k.transpose(2, 3)
        scores.masked_fill_(self.mask.bool()[:T, :T], -torch.inf)
        p = self.dropout(torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1))
        return self.out_proj((p @ v).transpose(1, 2).reshape(B, T, C))


class SeparateFeed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(C, 4 * C), TanhGELU(), nn.Linear(4 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class SeparateBlock(nn.Module):
    """One dropout serves both branches."""

    def __init__(self, dropout: float):
        super().__init__()
        self.att, self.ff = SeparateAttention(dropout), SeparateFeed()
        self.norm1, self.norm2, self.drop_shortcut = ScaleShift(C), ScaleShift(C), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_shortcut(self.att(self.norm1(x))) + x
        return self.drop_shortcut(self.ff(self.norm2(x))) + x


class Separate(nn.Module):
    """Returns logits; the loss is the caller's."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.tok_emb, self.pos_emb, self.drop_emb = nn.Embedding(V, C), nn.Embedding(P, C), nn.Dropout(dropout)
        self.trf_blocks = nn.Sequential(*(SeparateBlock(dropout) for _ in range(LAYERS)))
        self.final_norm, self.out_head = ScaleShift(C), nn.Linear(C, V, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tok_emb(idx) + self.pos_emb(torch.arange(idx.shape[1], device=idx.device))
        return self.out_head(self.final_norm(self.trf_blocks(self.drop_emb(x))))


# ---- names that no table has, post-norm, positions as a parameter, dropout on the hidden activation ------------------


class OwnBlock(nn.Module):
    """Post-norm, ReLU by a function; the block holds all its parts itself."""

    def __init__(self, dropout: float):
        super().__init__()
        self.to_qkv, self.mix, self.up, self.down = (nn.Linear(C, n) for n in (3 * C, C, 2 * C, C))
        self.down = nn.Linear(2 * C, C)
        self.n1, self.n2 = nn.LayerNorm(C, eps=1e-6), nn.LayerNorm(C, eps=1e-6)
        self.inner, self.outer, self.heads = nn.Dropout(dropout), nn.Dropout(dropout), H

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one.unflatten(-1, (H, -1)).transpose(1, 2) for one in self.to_qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = self.n1(x + self.mix(y))
        return self.n2(x + self.outer(self.down(self.inner(torch.relu(self.up(x))))))


class Own(nn.Module):
    """Returns a dict, its loss over the labels inside."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.words, self.places = nn.Embedding(V, C), nn.Parameter(torch.randn(1, P, C) * 0.1)
        self.layers = nn.ModuleList(OwnBlock(dropout) for _ in range(LAYERS))
        self.classes = nn.Linear(C, V)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.words(tokens) + self.places[:, : tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = self.classes(x)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


MODELS: dict[str, Callable[..., nn.Module]] = {
    "packed": Packed, "packed_without_bias": lambda dropout=0.0: Packed(dropout, bias=False), "masked": Masked,
    "separate": Separate, "own": Own,
}  # fmt: skip


def loss_of(model: nn.Module, idx: Tensor, targets: Tensor) -> Tensor:
    """Return the loss as each model's users compute it."""
    inner = getattr(model, "_orig_mod", getattr(model, "module", model))
    if isinstance(inner, Separate):
        return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    result = model(idx, targets)
    return result["loss"] if isinstance(result, dict) else result[1]


def make(name: str, dropout: float = 0.0) -> nn.Module:
    """Return a model whose gains and biases are random too, so that none hides a mistake."""
    model = MODELS[name](dropout)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


# ---- look-alikes -----------------------------------------------------------------------------------------------------


class Changeable(nn.Module):
    """A pre-norm block whose forward has a place for each change."""

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
        out = self.attn.c_proj((p @ v).transpose(1, 2).flatten(2))
        if change == "detached":
            out = out.detach() + (out - out.detach()) * 0.5
        if change == "noise" and self.training:
            out = out + torch.randn_like(out) * 0.1
        if change == "skipped_layers" and self.training and torch.rand(()) < 0.3:
            return x
        if change == "parallel":
            return x + self.drop(out) + self.feed(self.ln_2(x))
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
        return self.drop(self.mlp.c_proj(h))


class RootMeanSquare(nn.Module):
    """RMSNorm with LayerNorm's parameters."""

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
    "twice_dropped",
)  # fmt: skip
