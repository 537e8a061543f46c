"""attention: softmax attention with every mask GPT-class models use, and dropout."""

import math

import torch
from torch import Tensor

from .. import reference
from . import _checks, _flops, _library

# `lse` [B, H, T] is the float32 natural logarithm of each row's sum of exponentials, +inf for a row without any key.
# Gradients are laid out [B, T, H, D] as the output is; the packed form writes all three into one [B, T, 3C].
_OPTIONS = (
    "Tensor? lengths, Tensor? key_mask, Tensor? mask, Tensor? cu_seqlens, bool causal, int? window,"
    " float dropout_p, Tensor? seed, int site, float scale"
)
_library.define_forward("attention", f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)")
_library.define_backward(
    "attention",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
)
_library.define_backward(
    "attention_qkv", f"(Tensor dout, Tensor qkv, int num_heads, Tensor out, Tensor lse, {_OPTIONS}) -> Tensor dqkv"
)
MAX_HEAD_DIM = 256


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
    """Attend to the keys that each query may see, with any of GPT's masks and dropout.

    out = dropout(softmax(scale Q Kᵀ, over the keys a query may attend to)) V.

    A key serves a query if it fulfils every condition given: `causal`, `lengths`, `key_mask`, `mask`, `cu_seqlens` and
    `window`. A query that is left without keys gives 0.

    Args:
        q: Queries [B, H, T, D], D from 1 to 256, in float32, bfloat16, float16 or float64. Any strides are read in
            place.
        k: Keys [B, H, S, D], in the dtype of q.
        v: Values [B, H, S, D], in the dtype of q.
        causal: Let a query attend only to keys up to its own position. The last query sits at the last key, so T ≤ S.
        lengths: How many keys of each sequence are real [B], int64 or int32. A query attends to keys before that
            length.
        key_mask: Bool [B, S], True for a key that queries may attend to.
        mask: Bool, broadcastable to [B, H, T, S], True where a query may attend to a key.
        cu_seqlens: Bounds [n + 1] of n sequences that are packed into one row, int64 or int32. It needs B = 1 and T =
            S. Each sequence sees itself alone.
        window: Let query i attend to key j only if i - window < j and, unless `causal`, j < i + window.
        dropout_p: Dropout probability of the attention probabilities, in [0, 1).
        seed: Seed of dropout, int64, one element, on the device of q. Without a seed a new one is drawn.
        site: Number of this dropout within a forward pass. Calls with the same seed and another site get another mask.
        scale: Factor of the scores. The default is D^-1/2.

    Returns:
        out [B, H, T, D] in the dtype of q, laid out so that merging the heads is a view.

    Raises:
        ValueError: A dtype, shape or device differs from the list above, D exceeds 256, `window` is below 1, `scale` is
            not finite, or `dropout_p` lies outside [0, 1). On CPU (elsewhere after `check_values`) also if `lengths`
            lie outside [0, S], or if `cu_seqlens` do not rise from 0 to at most T.
        NotImplementedError: A gradient is differentiated again.

    Example:
        ```python
        import torch
        from gpt_fast import ops

        q, k, v = (torch.randn(2, 4, 100, 64) for _ in range(3))
        print(ops.attention(q, k, v, window=32).shape)  # torch.Size([2, 4, 100, 64])
        ```

    Note:
        Precision: scores, softmax and sums are float32. Probabilities are rounded once to the dtype of v before the
        product. Backward rounds the scores' gradients likewise, and takes Σ dout·out from the rounded output. Where
        autocast is on, q, k and v are cast to its dtype. The reference serves float64.

        Keys that `lengths`, `key_mask` or `cu_seqlens` exclude change nothing, whatever they contain (NaN too).

        Dropout: whether a probability is kept depends on `seed`, `site`, query i, key j and b = batch·H + head. In
        packed rows i and j count within their sequence, and b = sequence·H + head. `dropout_keep_at` in
        `gpt_fast/reference.py` has the rule.

        Results are deterministic.

        Source: Vaswani et al. (2017), arXiv:1706.03762; Dao (2023), arXiv:2307.08691.
    """
    _checks.tensors("attention", q=q, k=k, v=v)
    q, k, v = _library.autocast(q, k, v)
    plain = _library.is_plain_call("attention", q, k, v) and _has_plain_shapes(q, k, v)
    if not plain:
        _check_heads(q, k, v)
    T, S = q.shape[2], k.shape[2]
    options = _options(q, T, S, causal, lengths, key_mask, mask, cu_seqlens, window, dropout_p, seed, site, scale)
    if not plain and _library.runs_reference("attention", q):
        return _library.by_reference(reference.attention, q.device.type, q, k, v, **options)
    return _library.apply(_Attention, q, k, v, *_in_order(options))


def attention_qkv(
    qkv: Tensor,
    num_heads: int,
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
    """Attend as `attention` does, on a packed projection, with the heads merged.

    out = merge(attention(Q, K, V)), where qkv = [Q K V] along its last axis.

    The gradient is one [B, T, 3C] tensor. Separate gradients would have to be concatenated.

    Args:
        qkv: Projection [B, T, 3C], C = num_heads · D, in float32, bfloat16, float16 or float64. The last axis holds all
            of Q, then K, then V, in the order of `nn.MultiheadAttention.in_proj_weight`.
        num_heads: Number of heads H.
        causal: Let a query attend only to keys up to its own position. The keyword arguments mean what they mean in
            `attention`, with S = T.
        lengths: How many tokens of each sequence are real [B], int64 or int32. A query attends to keys before that
            length.
        key_mask: Bool [B, T], True for a key that queries may attend to.
        mask: Bool, broadcastable to [B, H, T, T], True where a query may attend to a key.
        cu_seqlens: Bounds [n + 1] of n sequences that are packed into one row, int64 or int32. It needs B = 1. Each
            sequence sees itself alone.
        window: Let query i attend to key j only if i - window < j and, unless `causal`, j < i + window.
        dropout_p: Dropout probability of the attention probabilities, in [0, 1).
        seed: Seed of dropout, int64, one element, on the device of qkv. Without a seed a new one is drawn.
        site: Number of this dropout within a forward pass. Calls with the same seed and another site get another mask.
        scale: Factor of the scores. The default is D^-1/2.

    Returns:
        out [B, T, C] in the dtype of qkv.

    Raises:
        ValueError: A dtype, shape or device differs from the list above, `num_heads` is below 1, the last axis is no
            multiple of 3 · num_heads, D exceeds 256, or an option has a value that `attention` refuses.
        NotImplementedError: A gradient is differentiated again.

    Example:
        ```python
        import torch
        from gpt_fast import ops

        qkv = torch.randn(2, 100, 3 * 256)
        print(ops.attention_qkv(qkv, 4).shape)  # torch.Size([2, 100, 256])
        ```

    Note:
        Precision, dropout, determinism and source are those of `attention`.
    """
    _checks.tensors("attention_qkv", qkv=qkv)
    _checks.integer("attention_qkv", num_heads=num_heads)
    (qkv,) = _library.autocast(qkv)
    _checks.dimensions("attention_qkv", "qkv", qkv, "[B, T, 3C]")
    _checks.floating("attention_qkv", qkv=qkv)
    if num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"gpt_fast.attention_qkv: qkv has shape {list(qkv.shape)}; expected [B, T, 3C] with C a multiple of "
            f"num_heads = {num_heads}"
        )
    q, k, v = reference.split_qkv(qkv, num_heads)
    T = qkv.shape[1]
    options = _options(q, T, T, causal, lengths, key_mask, mask, cu_seqlens, window, dropout_p, seed, site, scale)
    if not _library.is_plain_call("attention", qkv) and _library.runs_reference("attention", qkv):
        return _library.by_reference(reference.attention_qkv, qkv.device.type, qkv, num_heads, **options)
    return _library.apply(_AttentionQKV, qkv, num_heads, *_in_order(options))


def _has_plain_shapes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return True if q is [B, H, T, D], and k and v are [B, H, S, D], the shapes that `_check_heads` accepts."""
    queries, keys = q.shape, k.shape
    return len(queries) == len(keys) == 4 and keys == v.shape and queries[:2] == keys[:2] and queries[3] == keys[3]


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise `ValueError` unless q is [B, H, T, D] and k, v are [B, H, S, D], floating, of one dtype and device."""
    _checks.dimensions("attention", "q", q, "[B, H, T, D]")
    _checks.dimensions("attention", "k", k, "[B, H, S, D]")
    B, H, _, D = q.shape
    _checks.shape("attention", "k", k, (B, H, k.shape[2], D), "batch, heads and head size of q")
    _checks.shape("attention", "v", v, (B, H, k.shape[2], D), "the shape of k")
    _checks.floating_alike("attention", q=q, k=k, v=v)


def _options(
    q: Tensor, T: int, S: int, causal: bool, lengths: Tensor | None, key_mask: Tensor | None, mask: Tensor | None,
    cu_seqlens: Tensor | None, window: int | None, dropout_p: float, seed: Tensor | None, site: int,
    scale: float | None,
) -> dict:  # fmt: skip
    """Return the validated options of attention, with `seed` and `scale` set, in the order of the operator's schema.

    q is [B, H, T, D], and there are S keys. The keys of the result are lengths, key_mask, mask, cu_seqlens, causal,
    window, dropout_p, seed, site and scale. Without dropout, `seed` becomes None; with dropout, a new one is drawn if
    it is None. `scale` becomes D^-1/2 if it is None.

    Raises:
        ValueError: An option is not valid for these shapes.
    """
    if causal is not True and causal is not False:
        _checks.boolean_option("attention", causal=causal)
    if type(site) is not int:
        _checks.integer("attention", site=site)
    D = q.shape[3]
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"gpt_fast.attention: head size is {D}; expected 1 to {MAX_HEAD_DIM}")
    if causal and T > S:
        raise ValueError(f"gpt_fast.attention: {T} queries and {S} keys; expected no more queries than keys if causal")
    if lengths is not None or key_mask is not None or mask is not None or cu_seqlens is not None:
        _check_masks(q, T, S, lengths, key_mask, mask, cu_seqlens)
    if window is not None:
        _checks.integer("attention", window=window)
        if window < 1:
            raise ValueError(f"gpt_fast.attention: window is {window}; expected 1 or more, or None")
    # isfinite takes no symbol
    if scale is not None and not (_checks.is_number(scale) and -math.inf < scale < math.inf):
        raise ValueError(f"gpt_fast.attention: scale is {scale!r}; expected a finite number or None")
    _checks.probability("attention", "dropout_p", dropout_p)
    if seed is not None or dropout_p:
        _checks.seed("attention", seed, q.device)
        seed = _library.seed_for(dropout_p, seed, q.device)
    return {
        "lengths": lengths, "key_mask": key_mask, "mask": mask, "cu_seqlens": cu_seqlens, "causal": causal,
        "window": window, "dropout_p": dropout_p, "seed": seed, "site": site,
        "scale": D**-0.5 if scale is None else float(scale),
    }  # fmt: skip


def _check_masks(
    q: Tensor, T: int, S: int, lengths: Tensor | None, key_mask: Tensor | None, mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    """Validate the masks of `attention` for q [B, H, T, D] and S keys. A mask that is None is not checked.

    Valid are `lengths` [B] in [0, S], `key_mask` [B, S], `mask` broadcastable to [B, H, T, S], and `cu_seqlens` [n + 1]
    that begins at 0 and never falls or exceeds T. `cu_seqlens` needs B = 1 and T = S. Values inside `lengths` and
    `cu_seqlens` are checked only where `_library.values_checked` is True: on the CPU, and everywhere after
    `check_values`. Values inside `lengths` are not checked here if the C++ kernel serves, because that kernel checks
    them.

    Raises:
        ValueError: A mask has a wrong type, dtype, device or shape, or a value out of range.
    """
    _checks.optional_tensors("attention", lengths=lengths, key_mask=key_mask, mask=mask, cu_seqlens=cu_seqlens)
    B, H = q.shape[:2]
    _checks.integral("attention", lengths=lengths, cu_seqlens=cu_seqlens)
    _checks.boolean("attention", key_mask=key_mask, mask=mask)
    _checks.same_device("attention", q=q, lengths=lengths, key_mask=key_mask, mask=mask, cu_seqlens=cu_seqlens)
    _checks.shape("attention", "lengths", lengths, (B,), "one length for each sequence of the batch")
    _checks.shape("attention", "key_mask", key_mask, (B, S), "one flag for each key of the batch")
    if mask is not None and (
        mask.dim() > 4
        or any(got not in (1, wanted) for got, wanted in zip(mask.shape[::-1], (S, T, H, B), strict=False))
    ):
        raise ValueError(
            f"gpt_fast.attention: mask has shape {list(mask.shape)}; expected one broadcastable to {[B, H, T, S]}"
        )
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or B != 1 or T != S):
        raise ValueError(
            f"gpt_fast.attention: cu_seqlens of shape {list(cu_seqlens.shape)} with batch {B}, {T} queries and {S} "
            "keys; expected [n + 1], a batch of 1 and as many queries as keys"
        )
    if lengths is not None and _library.values_checked(lengths) and not _library.kernel_checks("attention", q):
        _checks.values_below("attention", "lengths", lengths, S + 1)
    if cu_seqlens is not None and _library.values_checked(cu_seqlens):
        _checks.values_below("attention", "cu_seqlens", cu_seqlens, T + 1)
        if int(cu_seqlens[0]) != 0 or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"gpt_fast.attention: cu_seqlens is {cu_seqlens.tolist()}; expected to start at 0 and never fall"
            )


_NAMES = ("lengths", "key_mask", "mask", "cu_seqlens", "causal", "window", "dropout_p", "seed", "site", "scale")


def _in_order(options: dict) -> tuple:
    """Return the values of `options`, the dict from `_options`, in its order: that of the operators' schemas."""
    return tuple(options.values())


def _save(ctx, tensors: tuple, options: tuple) -> None:
    """Save `tensors` and the op's options in the autograd context `ctx`, for backward; `_saved` returns them.

    `options` are lengths, key_mask, mask, cu_seqlens, causal, window, dropout_p, seed, site and scale, in this order.
    """
    *masks, causal, window, dropout_p, seed, site, scale = options
    ctx.save_for_backward(*tensors, *masks, seed)
    ctx.scalars = causal, window, dropout_p, site, scale


def _saved(ctx) -> tuple[tuple, tuple]:
    """Return (tensors, options), as `_save` stored them in the autograd context `ctx`.

    `options` are lengths, key_mask, mask, cu_seqlens, causal, window, dropout_p, seed, site and scale, in this order.
    """
    *tensors, lengths, key_mask, mask, cu_seqlens, seed = ctx.saved_tensors
    causal, window, dropout_p, site, scale = ctx.scalars
    return tensors, (lengths, key_mask, mask, cu_seqlens, causal, window, dropout_p, seed, site, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *options):
        out, lse = torch.ops.gpt_fast.attention_forward(q, k, v, *options)
        _save(ctx, (q, k, v, out, lse), options)
        return out

    @staticmethod
    def backward(ctx, dout):
        tensors, options = _saved(ctx)
        dq, dk, dv = _library.backward("attention", dout, *tensors, *options)
        return dq, dk, dv, *(None,) * len(_NAMES)


class _AttentionQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, num_heads, *options):
        out, lse = torch.ops.gpt_fast.attention_forward(*reference.split_qkv(qkv, num_heads), *options)
        _save(ctx, (qkv, out, lse), options)
        ctx.num_heads = num_heads
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx, dout):
        (qkv, out, lse), options = _saved(ctx)
        dout = dout.unflatten(2, (ctx.num_heads, -1)).transpose(1, 2)
        dqkv = _library.backward("attention_qkv", dout, qkv, ctx.num_heads, out, lse, *options)
        return dqkv, None, *(None,) * len(_NAMES)


def _empty_bthd(q: Tensor, T: int) -> Tensor:
    """Return an uninitialised tensor [B, H, T, D] like q [B, H, _, D], with its memory laid out as [B, T, H, D]."""
    B, H, _, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2)


@torch.library.register_fake("gpt_fast::attention_forward", lib=_library.LIBRARY)
def _forward_fake(q, k, v, *options):
    return _empty_bthd(q, q.shape[2]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("gpt_fast::attention_backward", lib=_library.LIBRARY)
def _backward_fake(dout, q, k, v, *options):
    return _empty_bthd(q, q.shape[2]), _empty_bthd(k, k.shape[2]), _empty_bthd(k, k.shape[2])


@torch.library.register_fake("gpt_fast::attention_qkv_backward", lib=_library.LIBRARY)
def _backward_qkv_fake(dout, qkv, *options):
    return qkv.new_empty(qkv.shape)


def _decomposition(q, k, v, *options):
    return reference.attention(q, k, v, **dict(zip(_NAMES, options, strict=True))), q.new_empty(0)


_library.register_decomposition("attention", _decomposition)


def _triton_forward(q, k, v, *options):
    kernel, options, rule = _for_triton(options)
    return kernel.forward(q, k, v, options, *rule)


def _triton_backward(dout, q, k, v, out, lse, *options):
    kernel, options, rule = _for_triton(options)
    return kernel.backward(dout, q, k, v, out, lse, options, *rule)


def _triton_backward_qkv(dout, qkv, num_heads, out, lse, *options):
    kernel, options, rule = _for_triton(options)
    return kernel.backward_qkv(dout, qkv, num_heads, out, lse, options, *rule)


def _for_triton(options):
    """Return (kernel, options, rule) for the launch of a Triton kernel.

    The argument is the tuple (lengths, key_mask, mask, cu_seqlens, causal, window, dropout_p, seed, site, scale). The
    result has it as an instance of the class `Options` of `kernel`, the module kernels/attention.py. `rule` is the
    (threshold, scale) that `_library.dropout_rule` returns for `dropout_p`.
    """
    kernel = _library.triton_kernel("attention")
    options = kernel.Options(*options)
    return kernel, options, _library.dropout_rule(options.dropout_p)


_library.register_triton("attention_forward", _triton_forward)
_library.register_triton("attention_backward", _triton_backward)
_library.register_triton("attention_qkv_backward", _triton_backward_qkv)


def _forward_flops(q, k, v, *options, **_):
    """Return 4 B H T S D, the FLOPs of a forward pass, whatever the masks hide. All tensors are given as shapes."""
    return 2 * _scores_flops(q, k)


def _backward_flops(dout, q, k, v, *options, **_):
    """Return 10 B H T S D, the FLOPs of a backward pass, whatever the masks hide. All tensors are given as shapes."""
    return 5 * _scores_flops(q, k)  # the scores once more, their gradient, dq, dk and dv


def _backward_qkv_flops(dout, qkv, *options, **_):
    """Return 10 B H T² D, the FLOPs of a backward pass of the packed form, given the shape [B, H, T, D] of `dout`."""
    return 5 * _scores_flops(dout, dout)


def _scores_flops(q, k):
    """Return 2 B H T S D, the FLOPs of q kᵀ, for shapes q [B, H, T, D] and k [B, H, S, D]."""
    return 2 * math.prod(q) * k[2]


_flops.register("attention_forward", _forward_flops)
_flops.register("attention_backward", _backward_flops)
_flops.register("attention_qkv_backward", _backward_qkv_flops)
