"""The definition of every op and of the notes' GPT, in plain PyTorch: reading it is reading the maths.

Any floating dtype. bfloat16 and float16 inputs are computed in float32 and rounded where the contract rounds: the
operands of a matrix product (attention's probabilities, the MLP's hidden activation) and each result, once. In
float64 nothing is rounded, which makes this file the truth the kernels are tested against.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import _activations, _transforms

# ---- dropout: a function of seed, site and coordinates alone ---------------------------------------------------------

PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57  # multipliers and Weyl increments of Salmon et al., SC'11
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 7
_U32 = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor], rounds: int = PHILOX_ROUNDS) -> Tensor:
    """Return philox4x32-`rounds` (Salmon et al., 2011): four random words below 2^32 for each counter, int64 [..., 4].

    `counter` has four components and `key` has two, int64 tensors that hold unsigned 32-bit values and broadcast
    against each other. Products wrap modulo 2^64, so the high half is the arithmetic shift with its sign bits masked
    off.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        c0, c1, c2, c3 = (p1 >> 32) & _U32 ^ c1 ^ k0, p1 & _U32, (p0 >> 32) & _U32 ^ c3 ^ k1, p0 & _U32
        k0, k1 = (k0 + PHILOX_W0) & _U32, (k1 + PHILOX_W1) & _U32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def dropout_threshold(p: float) -> int:
    """Return T = floor(65536 p + 1/2). An element is dropped with probability `p` if its 16 random bits are below T."""
    return math.floor(p * 65536 + 0.5)


def dropout_scale(p: float) -> float:
    """Return 65536 / (65536 - T), T = dropout_threshold(p), which is 1 over the exact rate of kept elements.

    The result is 0 if every element is dropped.
    """
    T = dropout_threshold(p)
    return 0.0 if T == 65536 else 65536 / (65536 - T)


def _philox_key(seed: Tensor) -> tuple[Tensor, Tensor]:
    """Return (low, high), the two 32-bit halves of `seed`, one int64 element, as scalar int64 tensors: philox's key."""
    seed = seed.reshape(())
    return seed & _U32, (seed >> 32) & _U32


def _philox_words(counter: tuple[Tensor, ...], seed: Tensor, site: int) -> Tensor:
    """Return four random words below 2^32, int64 [..., 4], for each counter, by philox with `seed` as its key.

    `counter` has three int64 components that broadcast against each other. The fourth is `site`, the number of a
    dropout within a forward pass. `seed` is one int64 element.
    """
    site_word = torch.tensor(site & _U32, dtype=torch.int64, device=seed.device)
    return philox4x32((*counter, site_word), _philox_key(seed))


def _halves(words: Tensor) -> Tensor:
    """Return 32-bit words [..., 4], int64, as 16-bit halves [..., 4, 2], low half first."""
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1)


def dropout_keep_rows(seed: Tensor, site: int, N: int, C: int, p: float) -> Tensor:
    """Return bool [N, C], True where the element in row i and column j is kept, for embedding and add_layer_norm.

    `seed` and `site`, the number of the dropout within a forward pass, choose the mask. `p` is the dropout probability,
    and T = dropout_threshold(p).

    counter = (j // 8, i, 0, site); words = the four random words that philox4x32 gives for the counter; word =
    words[(j // 2) % 4]; u16 = (word >> 16*(j % 2)) & 0xffff; keep = u16 >= T. So one counter decides about eight
    neighbours in a row.
    """
    groups = (C + 7) // 8
    J = torch.arange(groups, device=seed.device)
    i = torch.arange(N, device=seed.device)
    zero = torch.zeros((1, 1), dtype=torch.int64, device=seed.device)
    words = _philox_words((J[None, :], i[:, None], zero), seed, site)  # [N, J, 4]
    return _halves(words).reshape(N, 8 * groups)[:, :C] >= dropout_threshold(p)


def dropout_keep_matrix(seed: Tensor, site: int, b: Tensor, M: int, N: int, p: float) -> Tensor:
    """Return bool [*b.shape, M, N], True where dropout of attention or mlp keeps element (i, j) of a matrix [M, N].

    `b` holds the number of each matrix, int64: row · H + head in attention, 0 in mlp. `seed` and `site`, the number of
    the dropout within a forward pass, choose the mask, and `p` is the dropout probability.

    The mask is `dropout_keep_at`, which states the rule, for all elements. Here philox runs once for every eight
    elements that share a counter, not once for each element.
    """
    I, J = (M + 15) // 16, (N + 15) // 16  # noqa: E741
    c0 = torch.arange(4 * J, device=seed.device)
    c1 = torch.arange(8 * I, device=seed.device)[:, None]
    words = _philox_words((c0, c1, b[..., None, None]), seed, site)  # [*b, 8 I, 4 J, 4]
    u16 = _halves(words).reshape(*b.shape, I, 8, J, 4, 2, 2, 2)  # I, g, J, t, i3, j3, j0
    n = b.dim()
    u16 = u16.permute(*range(n), n, n + 4, n + 1, n + 2, n + 5, n + 3, n + 6)  # I, i3, g, J, j3, t, j0
    return u16.reshape(*b.shape, 16 * I, 16 * J)[..., :M, :N] >= dropout_threshold(p)


def dropout_keep_at(seed: Tensor, site: int, b: Tensor, i: Tensor, j: Tensor, p: float) -> Tensor:
    """Return bool, True where element (i, j) of matrix b is kept; the three coordinates broadcast against each other.

    This is the rule of `dropout_keep_matrix`, written out, with T = dropout_threshold(p). `b`, `i` and `j` are int64.
    `seed` and `site`, the number of the dropout within a forward pass, choose the mask, and `p` is the dropout
    probability.

    counter = ((j // 16)*4 + (j % 8)//2, (i // 16)*8 + i % 8, b, site); words = the four random words that philox4x32
    gives for the counter; word = words[2*((i // 8) % 2) + (j // 8) % 2]; u16 = (word >> 16*(j % 2)) & 0xffff; keep =
    u16 >= T.
    """
    words = _philox_words(((j // 16) * 4 + (j % 8) // 2, (i // 16) * 8 + i % 8, b), seed, site)
    word = 2 * ((i // 8) % 2) + (j // 8) % 2
    picked = words.gather(-1, word.expand(words.shape[:-1])[..., None])[..., 0]
    return ((picked >> 16 * (j % 2)) & 0xFFFF) >= dropout_threshold(p)


def _dropout(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """Return x scaled by `dropout_scale(p)` where the bool tensor `keep` is True, and 0 elsewhere."""
    return torch.where(keep, x * dropout_scale(p), 0.0)


# ---- norms -----------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    """Return x in the dtype of sums: float32 for bfloat16 and float16, else its own."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Return (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension, with the biased variance.

    `weight` and `bias` are [C], or None to leave them out. y has the dtype of x. A constant row gives exactly the bias,
    because a second mean corrects the rounding error of the first one.
    """
    wide = _wide(x)
    rough = wide.mean(-1, keepdim=True)
    centred = wide - (rough + (wide - rough).mean(-1, keepdim=True))
    y = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * _wide(weight)
    if bias is not None:
        y = y + _wide(bias)
    return y.to(x.dtype)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return (normed, summed): summed = residual + dropout(x), normed = layer_norm(summed, weight, bias, eps).

    Both have the shape of `x` and the wider dtype of `x` and `residual`. `weight` and `bias` are [C], or None to leave
    them out. `seed` and `site`, the number of this dropout within a forward pass, choose the mask; `seed` is needed if
    `dropout_p` is above 0.
    """
    dtype = torch.promote_types(x.dtype, residual.dtype)
    branch = _wide(x)
    if dropout_p > 0:
        assert seed is not None
        C = x.shape[-1]
        keep = dropout_keep_rows(seed, site, x.numel() // C if C else 0, C, dropout_p)
        branch = _dropout(branch, keep.view(x.shape), dropout_p)
    summed = (_wide(residual) + branch).to(dtype)
    return layer_norm(summed, weight, bias, eps), summed


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_allowed(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Return bool, broadcastable to [B, H, T, S], True where query i may attend to key j. All conditions hold at once.

    q is [B, H, T, D] and k is [B, H, S, D]. i counts from S - T, so the last query is at the position of the last key.
    With `causal`, j <= i. With `window`, i - window < j and, if not causal, j < i + window. `lengths` [B] is the number
    of keys of each row, and `key_mask` [B, S] and `mask` (broadcastable) are True where attention is allowed.
    `cu_seqlens` [n + 1] bounds packed sequences: a token attends only within the sequence that it is in, and tokens
    after the last sequence attend to nothing.
    """
    T, S = q.shape[-2], k.shape[-2]
    i = torch.arange(S - T, S, device=q.device)[:, None]
    j = torch.arange(S, device=q.device)[None, :]
    allowed = torch.ones(T, S, dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed & (j <= i)
    if window is not None:
        allowed = allowed & (i - window < j)
        if not causal:
            allowed = allowed & (j < i + window)
    if cu_seqlens is not None:
        sequence, _ = packed_positions(cu_seqlens, S)
        inside = sequence < cu_seqlens.numel() - 1
        allowed = allowed & (sequence[:, None] == sequence[None, :]) & inside[:, None]
    if lengths is not None:
        allowed = allowed & (j < lengths[:, None, None, None])
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    if mask is not None:
        allowed = allowed & mask
    return allowed


def packed_positions(cu_seqlens: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Return (sequence, position), int64 [T] each: the number of each packed token's sequence, and its place within it.

    `cu_seqlens` [n + 1] holds the bounds of n sequences: sequence i begins at token `cu_seqlens[i]`. Tokens behind the
    last sequence have the number n, and positions that count from its end.
    """
    tokens = torch.arange(T, device=cu_seqlens.device)
    starts = cu_seqlens.long()
    sequence = torch.searchsorted(starts[1:].contiguous(), tokens, right=True)
    return sequence, tokens - starts[sequence]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    scale: float | None = None,
) -> Tensor:
    """Return dropout(softmax(scale Q Kᵀ where allowed)) V, [B, H, T, D]. A query that may attend to nothing gives 0.

    q is [B, H, T, D], and k and v are [B, H, S, D]. `scale` is 1 / sqrt(D) by default. `causal`, `lengths`, `key_mask`,
    `mask`, `cu_seqlens` (with B = 1) and `window` say which keys a query may attend to: see `attention_allowed`. `seed`
    and `site`, the number of this dropout within a forward pass, choose the dropout mask; `seed` is needed if
    `dropout_p` is above 0. The result has the dtype of q. Its memory is laid out [B, T, H, D].
    """
    B, H, T, D = q.shape
    S = k.shape[2]
    scale = D**-0.5 if scale is None else scale
    allowed = attention_allowed(
        q, k, causal=causal, lengths=lengths, key_mask=key_mask, mask=mask, cu_seqlens=cu_seqlens, window=window
    )
    scores = (_wide(q) @ _wide(k).transpose(-2, -1)) * scale  # [B, H, T, S]
    scores = scores.masked_fill(~allowed, -math.inf)
    # A row without any key stays free of NaN, forward and backward. Scores of -inf are NaN, as in PyTorch.
    scores = scores.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    probs = torch.softmax(scores, dim=-1).masked_fill(~allowed, 0.0)
    if dropout_p > 0:
        assert seed is not None
        heads = torch.arange(B * H, device=q.device).view(B, H)
        if cu_seqlens is None:
            keep = dropout_keep_matrix(seed, site, heads, T, S, dropout_p)
        else:
            sequence, position = packed_positions(cu_seqlens, S)
            b = sequence[:, None] * H + heads[:, :, None, None]  # [B, H, T, 1]; B is 1
            keep = dropout_keep_at(seed, site, b, position[:, None], position[None, :], dropout_p)
        probs = _dropout(probs, keep, dropout_p)
    out = _wide(probs.to(v.dtype)) @ _wide(v)
    # Laid out [B, T, H, D], so that merging the heads is a view.
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def attention_qkv(qkv: Tensor, num_heads: int, **options) -> Tensor:
    """Return `attention` for a projection `qkv` [B, T, 3C] that packs q, k and v, with merged heads: [B, T, C].

    C is a multiple of `num_heads`. `options` are the keyword arguments of `attention`: causal, lengths, key_mask, mask,
    cu_seqlens, window, dropout_p, seed, site and scale.
    """
    out = attention(*split_qkv(qkv, num_heads), **options)
    return out.transpose(1, 2).flatten(2)


def split_qkv(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views q, k and v, each [B, H, T, D], of a packed projection [B, T, 3C] with H = `num_heads`."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.unflatten(2, (3, num_heads, C3 // (3 * num_heads))).permute(2, 0, 3, 1, 4)
    return q, k, v


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """Return the attention [B, H, D] of one query per sequence, q [B, H, D], to the first entries of its cache.

    Sequence b attends to entries 0 to `lengths[b]` - 1 of `k_cache` and `v_cache`, [B, H, S, D] each. A length of 0
    gives 0. The scale is 1 / sqrt(D).
    """
    return attention(q[:, :, None], k_cache, v_cache, causal=False, lengths=lengths)[:, :, 0]


# ---- MLP, loss, embedding --------------------------------------------------------------------------------------------


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    activation: str = "gelu_tanh",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Return dropout(activation(x fc_weightᵀ + fc_bias)) proj_weightᵀ + proj_bias, in the dtype of x.

    x is [..., C], `fc_weight` [F, C], `proj_weight` [C', F], and the result [..., C']. `activation` is "relu", "gelu"
    or "gelu_tanh"; any other raises `ValueError`. `seed` and `site`, the number of this dropout within a forward pass,
    choose the dropout mask; `seed` is needed if `dropout_p` is above 0.
    """
    z = F.linear(_wide(x), _wide(fc_weight), None if fc_bias is None else _wide(fc_bias))
    hidden = _activations.find("gpt_fast.mlp", activation).function(z)
    if dropout_p > 0:
        assert seed is not None
        rows = hidden.numel() // max(hidden.shape[-1], 1)
        head = torch.zeros((), dtype=torch.int64, device=x.device)
        keep = dropout_keep_matrix(seed, site, head, rows, hidden.shape[-1], dropout_p)
        hidden = _dropout(hidden, keep.view(hidden.shape), dropout_p)
    hidden = _wide(hidden.to(x.dtype))
    return F.linear(hidden, _wide(proj_weight), None if proj_bias is None else _wide(proj_bias)).to(x.dtype)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return -(1 - ε) log p[target] - ε/V Σ_v log p[v], p = softmax(x weightᵀ + bias), over rows that are not ignored.

    x is [..., C], weight [V, C] and target [...]. ε is `label_smoothing`, and a row with the target `ignore_index` is
    ignored. `reduction` is "mean" over the other rows (0 if there are none), "sum", or "none" for one loss a row,
    [...], 0 if ignored. The result is float32, or float64 for float64 inputs. Ignored rows are left out of the
    products. The exceptions are reduction "none", a compiled graph, meta tensors and a `vmap`, where the number of rows
    may not depend on data.
    """
    rows, targets = x.reshape(target.numel(), x.shape[-1]), target.reshape(-1)
    valid = targets != ignore_index
    keeps_rows = torch.compiler.is_compiling() or _transforms.is_batched(valid) or valid.is_meta
    if not keeps_rows and reduction != "none":
        rows, targets, valid = rows[valid], targets[valid], valid[valid]
    logits = F.linear(_wide(rows), _wide(weight), None if bias is None else _wide(bias))
    losses = F.cross_entropy(
        logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    if reduction == "none":
        return losses.masked_fill(~valid, 0.0).view(target.shape)  # smoothing over V = 0 gives NaN
    total = losses.sum()
    return total if reduction == "sum" else total / valid.sum().clamp(min=1)


def embedding(
    tokens: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    positions: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Return dropout(token_weight[tokens] + position_weight[positions]), [..., T, C] for tokens [..., T].

    The tables are [V, C] and [P, C]. `positions`, [T] or in the shape of `tokens`, are 0 to T - 1 by default. `seed`
    and `site`, the number of this dropout within a forward pass, choose the dropout mask; `seed` is needed if
    `dropout_p` is above 0. The result has the dtype of `token_weight`.
    """
    if positions is None:
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
    out = _wide(F.embedding(tokens, token_weight)) + _wide(F.embedding(positions, position_weight))
    if dropout_p > 0:
        assert seed is not None
        keep = dropout_keep_rows(seed, site, tokens.numel(), out.shape[-1], dropout_p)
        out = _dropout(out, keep.view(out.shape), dropout_p)
    return out.to(token_weight.dtype)


# ---- the notes' GPT, as it was meant ---------------------------------------------------------------------------------


class TransformerDecoder(nn.Module):
    """Post-norm block of the lecture notes, in PyTorch's modules: x = norm1(x + attn(x)), then x = norm2(x + ff(x))."""

    def __init__(self, hidden_dim: int, num_heads: int, ff_dim: int, dropout: float):
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(hidden_dim, num_heads, batch_first=True)
        self.layer_norm1 = nn.LayerNorm(hidden_dim)
        self.dropout1 = nn.Dropout(dropout)
        self.ff = nn.Sequential(
            nn.Linear(hidden_dim, ff_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(ff_dim, hidden_dim)
        )
        self.layer_norm2 = nn.LayerNorm(hidden_dim)
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        attended, _ = self.multihead_attn(x, x, x, attn_mask=mask, need_weights=False)
        x = self.layer_norm1(x + self.dropout1(attended))
        return self.layer_norm2(x + self.dropout2(self.ff(x)))


class GPT(nn.Module):
    """The lecture notes' GPT with its mistakes mended.

    Attention runs over time, embeddings have dropout, and no op is in place.
    """

    def __init__(self, num_tokens: int, hidden_dim: int, num_heads: int, num_layers: int, seq_len: int, dropout: float):
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, hidden_dim)
        self.pos_emb = nn.Parameter(torch.randn(1, seq_len, hidden_dim) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.decoders = nn.ModuleList(
            TransformerDecoder(hidden_dim, num_heads, 4 * hidden_dim, dropout) for _ in range(num_layers)
        )
        self.output_layer = nn.Linear(hidden_dim, num_tokens)

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, T, V] of tokens [B, T], int64. In training mode PyTorch's dropout is active."""
        T = tokens.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool, device=tokens.device).triu(1)  # True: may not attend
        x = self.dropout(self.token_emb(tokens) + self.pos_emb[:, :T])
        for decoder in self.decoders:
            x = decoder(x, mask)
        return self.output_layer(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the probabilities [B, T, V] of tokens [B, T], int64: the softmax of `logits`."""
        return torch.softmax(self.logits(tokens), dim=-1)
