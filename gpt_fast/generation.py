"""Text from a causal language model, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .heads import GPTForCausalLM


def generate(
    model: GPTForCausalLM,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] | None = None,
    seed: int | None = None,
    lengths: Tensor | None = None,
    sliding: bool = False,
    stream: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continues each row of `tokens` `[B, T]` by `max_new_tokens` tokens drawn from `softmax(logits / temperature)`.

    Returns `[B, T + max_new_tokens]`. Prompts of unequal `lengths` `[B]` are padded on the right; a row's new tokens
    follow its own prompt directly, and what is left of the row holds the padding token. So does a row after it has
    drawn one of `stop_tokens`, which it keeps. A row in a batch gets the greedy tokens that it gets alone.

    Temperature 0 takes the most probable token; `top_k` keeps the k most probable, `top_p` the fewest whose
    probabilities add up to it, after `top_k`. The same `seed` draws the same tokens; without one, torch's own generator
    is used. `stream` is called with the new tokens `[B]` of every step, the padding token where a row is done.

    Beyond `seq_len` tokens there are no positions: that is a ValueError, or with `sliding` the model sees the last
    `seq_len` tokens only. The sampling is in float32, and logits that are NaN or +inf are a ValueError.
    """
    lengths = _check(model, tokens, max_new_tokens, temperature, top_k, top_p, lengths, sliding)
    B, T = tokens.shape
    pad = model.config.pad_token if model.config.pad_token is not None else 0
    inside = torch.arange(T, device=tokens.device) < lengths[:, None]
    out = torch.full((B, T + max_new_tokens), pad, device=tokens.device, dtype=tokens.dtype)
    out[:, :T] = torch.where(inside, tokens, pad)
    generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
    stop = None if stop_tokens is None else torch.tensor(list(stop_tokens), device=tokens.device)
    done = torch.zeros(B, dtype=torch.bool, device=tokens.device)

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ends = lengths.clone()  # [B], where each row's next token goes
            for _ in range(max_new_tokens):
                logits = next_logits(model, out, ends)  # [B, V]
                new = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
                new = new.masked_fill(done, pad)
                out.scatter_(1, ends[:, None], new[:, None])
                ends += 1
                if stream is not None:
                    stream(new)
                if stop is not None:
                    done |= torch.isin(new, stop)
                    if bool(done.all()):
                        break
    finally:
        model.train(was_training)
    return out


def next_logits(model: GPTForCausalLM, tokens: Tensor, ends: Tensor) -> Tensor:
    """The logits `[B, V]` of the token after the first `ends[b]` of each row, from its last `seq_len` of them."""
    width = min(int(ends.max()), model.config.seq_len)
    first = (ends - width).clamp_(min=0)  # [B], where each row's window begins
    window = tokens.gather(1, first[:, None] + torch.arange(width, device=tokens.device))
    # Causal attention: what pads a row on the right changes nothing at its last token.
    hidden = model.trunk(window)  # [B, width, C]
    last = hidden[torch.arange(len(ends), device=tokens.device), ends - first - 1]  # [B, C]
    return model.output_layer(last)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token `[B]` for each row of `logits` `[B, V]`."""
    logits = logits.float()
    largest, best = logits.max(dim=-1)
    if not bool((largest < math.inf).all()):  # NaN compares false as well, and max passes it on
        raise ValueError(
            "generate: the model's logits hold NaN or infinity; its weights are damaged or its training diverged"
        )
    if temperature == 0:
        return best
    scaled = (logits - largest[:, None]) / temperature  # ≤ 0, so a small temperature cannot overflow upwards
    if top_k is not None:
        scaled = keep_top_k(scaled, top_k)
    if top_p is not None and top_p < 1:
        scaled = keep_top_p(scaled, top_p)
    return torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator).squeeze(1)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """`logits` `[B, V]` with all but each row's k largest at -inf."""
    values, ids = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -math.inf).scatter_(-1, ids, values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """`logits` `[B, V]` with all at -inf but the fewest whose probabilities reach `p`; the most probable always
    stays."""
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # what the more probable ones have reached already
    values = values.masked_fill(before >= p, -math.inf)
    values[:, 0] = logits.amax(dim=-1)
    return torch.empty_like(logits).scatter_(-1, ids, values)


def _check(
    model: GPTForCausalLM,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    lengths: Tensor | None,
    sliding: bool,
) -> Tensor:
    """Raises ValueError for what `generate` cannot do, else returns the lengths `[B]`."""
    if not isinstance(model, GPTForCausalLM):
        raise ValueError(f"generate: wanted a GPTForCausalLM, got {type(model).__name__}")
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"generate: wanted int64 tokens [B, T], got {tokens.dtype} {list(tokens.shape)}")
    B, T = tokens.shape
    if lengths is None:
        lengths = torch.full((B,), T, device=tokens.device)
    if lengths.shape != (B,) or lengths.dtype.is_floating_point:
        raise ValueError(f"generate: wanted {B} integer lengths, got {lengths.dtype} {list(lengths.shape)}")
    if B == 0 or T == 0 or bool((lengths < 1).any()):
        raise ValueError("generate: empty prompt; wanted at least one token in every row")
    if bool((lengths > T).any()):
        raise ValueError(f"generate: a length of {int(lengths.max())} in rows of {T} tokens")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens {max_new_tokens}; wanted 0 or more")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"generate: temperature {temperature}; wanted 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k {top_k}; wanted 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p {top_p}; wanted more than 0 and at most 1")
    longest, seq_len = int(lengths.max()) + max_new_tokens, model.config.seq_len
    if longest > seq_len and not sliding:
        raise ValueError(
            f"generate: {int(lengths.max())} tokens of prompt and {max_new_tokens} new ones make {longest}, but the "
            f"model has {seq_len} positions; ask for fewer, or let them slide (sliding=True, --sliding)"
        )
    return lengths.to(device=tokens.device, dtype=torch.int64)
