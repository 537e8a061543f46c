"""embedding: token and position embeddings, added and dropped out in one pass."""

import torch
from torch import Tensor

from .. import reference
from . import _checks, _library

_library.define_forward(
    "embedding",
    "(Tensor tokens, Tensor token_weight, Tensor position_weight, Tensor positions, float dropout_p, Tensor? seed,"
    " int site) -> Tensor",
)
_library.define_backward(
    "embedding",
    "(Tensor dout, Tensor tokens, Tensor token_weight, Tensor position_weight, Tensor positions, float dropout_p,"
    " Tensor? seed, int site, bool needs_token, bool needs_position) -> (Tensor dtoken, Tensor dposition)",
)


def embedding(
    tokens: Tensor,
    token_weight: Tensor,
    position_weight: Tensor,
    positions: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Add token and position embeddings, and drop out, in one pass.

    out = dropout(token_weight[tokens] + position_weight[positions]).

    Args:
        tokens: Token ids [..., T], int64 or int32.
        token_weight: Table [V, C] in float32, bfloat16, float16 or float64.
        position_weight: Table [P, C] in the dtype of `token_weight`.
        positions: Positions [T] or in the shape of `tokens`, int64 or int32. By default they count from 0.
        dropout_p: Dropout probability in [0, 1).
        seed: Seed of dropout, int64, one element, on the device of the tables. Without a seed a new one is drawn.
        site: Number of this dropout within a forward pass. Calls with the same seed and another site get another mask.

    Returns:
        out [..., T, C] in the dtype of `token_weight`.

    Raises:
        ValueError: A dtype or shape differs from the list above, the devices differ, T exceeds P without `positions`,
            or `dropout_p` lies outside [0, 1). On CPU (elsewhere after `check_values`) also if ids lie outside the
            tables.
        NotImplementedError: A gradient is differentiated again.

    Example:
        ```python
        import torch
        from gpt_fast import ops

        tokens, token_weight, position_weight = torch.randint(100, (2, 16)), torch.randn(100, 64), torch.randn(32, 64)
        print(ops.embedding(tokens, token_weight, position_weight).shape)  # torch.Size([2, 16, 64])
        ```

    Note:
        Precision: the sum is float32, and each result is rounded once. The reference serves float64.

        Dropout: whether an element is kept depends on `seed`, `site`, its row in out viewed as [M, C], and its column.
        `dropout_keep_rows` in `gpt_fast/reference.py` has the rule.

        Results are deterministic. Backward adds the rows of one token in their order.

        Source: Radford et al. (2018), "Improving Language Understanding by Generative Pre-Training".
    """
    _checks.tensors("embedding", tokens=tokens, token_weight=token_weight, position_weight=position_weight)
    _checks.optional_tensors("embedding", positions=positions)
    _checks.integer("embedding", site=site)
    _checks.integral("embedding", tokens=tokens, positions=positions)
    _checks.floating("embedding", token_weight=token_weight, position_weight=position_weight)
    _checks.same_dtype("embedding", token_weight=token_weight, position_weight=position_weight)
    _checks.same_device(
        "embedding", tokens=tokens, token_weight=token_weight, position_weight=position_weight, positions=positions
    )
    _checks.dimensions("embedding", "token_weight", token_weight, "[V, C]")
    _checks.dimensions("embedding", "position_weight", position_weight, "[P, C]")
    if tokens.dim() == 0:
        raise ValueError("gpt_fast.embedding: tokens has no dimension; expected [..., T]")
    if token_weight.shape[1] != position_weight.shape[1]:
        raise ValueError(
            f"gpt_fast.embedding: token_weight {list(token_weight.shape)} and position_weight "
            f"{list(position_weight.shape)} differ in width; expected [V, C] and [P, C]"
        )
    _checks.probability("embedding", "dropout_p", dropout_p)
    _checks.seed("embedding", seed, token_weight.device)
    T, P = tokens.shape[-1], position_weight.shape[0]
    if positions is None:
        if T > P:
            raise ValueError(f"gpt_fast.embedding: {T} tokens in a row; expected at most {P}, the positions there are")
        positions = torch.arange(T, device=tokens.device)
    elif positions.shape not in (tokens.shape, tokens.shape[-1:]):
        raise ValueError(
            f"gpt_fast.embedding: positions has shape {list(positions.shape)}; expected {list(tokens.shape)} or [{T}]"
        )
    elif _library.values_checked(positions) and not _library.kernel_checks("embedding", token_weight):
        _checks.values_below("embedding", "positions", positions, P)
    if _library.values_checked(tokens) and not _library.kernel_checks("embedding", token_weight):
        _checks.values_below("embedding", "tokens", tokens, token_weight.shape[0])
    seed = _library.seed_for(dropout_p, seed, token_weight.device)
    args = tokens, token_weight, position_weight, positions, dropout_p, seed, site
    if _library.runs_reference("embedding", token_weight):
        return _library.by_reference(reference.embedding, token_weight.device.type, *args)
    return _library.apply(_Embedding, *args)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, token_weight, position_weight, positions, dropout_p, seed, site):
        ctx.save_for_backward(tokens, token_weight, position_weight, positions, seed)
        ctx.dropout = dropout_p, site
        return torch.ops.gpt_fast.embedding_forward(
            tokens, token_weight, position_weight, positions, dropout_p, seed, site
        )

    @staticmethod
    def backward(ctx, dout):
        tokens, token_weight, position_weight, positions, seed = ctx.saved_tensors
        dropout_p, site = ctx.dropout
        _, needs_token, needs_position, *_ = ctx.needs_input_grad
        dtoken, dposition = _library.backward(
            "embedding", dout, tokens, token_weight, position_weight, positions, dropout_p, seed, site, needs_token,
            needs_position,
        )  # fmt: skip
        return None, dtoken if needs_token else None, dposition if needs_position else None, None, None, None, None


@torch.library.register_fake("gpt_fast::embedding_forward", lib=_library.LIBRARY)
def _forward_fake(tokens, token_weight, position_weight, positions, dropout_p, seed, site):
    return token_weight.new_empty(*tokens.shape, token_weight.shape[1])


@torch.library.register_fake("gpt_fast::embedding_backward", lib=_library.LIBRARY)
def _backward_fake(
    dout, tokens, token_weight, position_weight, positions, dropout_p, seed, site, needs_token, needs_position
):
    return (
        torch.empty_like(token_weight) if needs_token else token_weight.new_empty(0),
        torch.empty_like(position_weight) if needs_position else position_weight.new_empty(0),
    )


_library.register_decomposition("embedding", reference.embedding)


def _triton_forward(tokens, token_weight, position_weight, positions, dropout_p, seed, site):
    rule = _library.dropout_rule(dropout_p)
    return _library.triton_kernel("embedding").forward(
        tokens, token_weight, position_weight, positions, *rule, seed, site
    )


def _triton_backward(
    dout, tokens, token_weight, position_weight, positions, dropout_p, seed, site, needs_token, needs_position
):
    rule = _library.dropout_rule(dropout_p)
    return _library.triton_kernel("embedding").backward(
        dout, tokens, token_weight, position_weight, positions, *rule, seed, site, needs_token, needs_position
    )


_library.register_triton("embedding_forward", _triton_forward)
_library.register_triton("embedding_backward", _triton_backward)
