"""Text from a causal language model, one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import GPT
from .sampling import Sampling
from .session import DecodeSession, check_prompt
from .steps import parts, step_kind

if TYPE_CHECKING:
    from ..heads import Head

_ROOM = 128  # caches are made for multiples of this many tokens, so that the next call finds them long enough


def generate(
    model: GPT | Head,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Sequence[int] | None = None,
    seed: int | None = None,
    lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    sliding: bool = False,
    weights: str | None = None,
    session: DecodeSession | None = None,
    stream: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continues each row of `tokens` [B, T] by `max_new_tokens` tokens drawn from p = softmax(logits / temperature).

    Returns [B, T + max_new_tokens]. Prompts of unequal `lengths` [B] are padded on the right; a row's new tokens follow
    its own prompt directly, and what is left of the row holds the padding token. With `key_mask` [B, T] bool (True: a
    real token; padding on the left, say) every row's new tokens begin at T. A row that has drawn one of `stop_tokens`
    keeps it and goes on with padding. A row in a batch gets the greedy tokens that it gets alone.

    Temperature 0 takes the most probable token. `repetition_penalty` divides the positive logits of all tokens that a
    row holds and multiplies the negative ones; then `top_k` keeps the k most probable, then `top_p` the fewest whose
    probabilities add up to it. The same `seed` draws the same tokens on a device; without one, torch's generator gives
    a seed. `stream` is called with the new tokens [B] of every step, the padding token where a row is done.

    Beyond `seq_len` tokens there are no positions: that is a ValueError, or with `sliding` the model sees the latest
    tokens only: the last `seq_len` of a prompt, and whenever a row is full its later half is read anew from position 0.

    `weights` and the precision are those of `DecodeSession`. The model keeps the session for the next call and makes
    another one when its parameters have changed or moved. A `session` given, of B rows, is what the rows go on from and
    holds prompt and new tokens afterwards (chat turns); `seen` by the penalty are then this call's tokens alone.

    Dtypes: tokens int64, logits and the drawing float32.

    Raises `ValueError` for what contradicts this, for an empty prompt, and for logits that are NaN or infinite.

    Source: Holtzman et al. (2019), arXiv:1904.09751, for top_p; Keskar et al. (2019), arXiv:1909.05858, for the
    penalty.
    """
    options = Sampling(temperature, top_k, top_p, repetition_penalty)
    config = parts(model)[0].config
    counts = check_prompt(tokens, config.num_tokens, lengths, key_mask)
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens {max_new_tokens}; wanted 0 or more")
    if session is not None and (session.model is not model or session.cache.batch != len(tokens) or sliding):
        raise ValueError(
            f"generate: a session of {session.cache.batch} rows for {len(tokens)} rows of tokens; wanted one of this "
            "model with as many rows, and no sliding"
        )
    wanted = int(counts.max()) + max_new_tokens
    if session is None and wanted > config.seq_len and not sliding:
        raise ValueError(
            f"generate: {int(counts.max())} tokens of prompt and {max_new_tokens} new ones make {wanted}, but the "
            f"model has {config.seq_len} positions; ask for fewer, or let them slide (sliding=True, --sliding)"
        )
    pad = config.pad_token if config.pad_token is not None else 0
    rows = _Rows(tokens, counts, key_mask, max_new_tokens, pad)
    if max_new_tokens == 0 and session is None:
        return rows.result()
    own = session is None
    if session is None:
        session = _take_session(model, len(tokens), min(wanted, config.seq_len), weights)
    with session.in_use():
        session.check_layout()
        before = session.cache.lengths.clone()
        if own:
            session.reset()
        else:
            session.check_room(counts + max_new_tokens)
        try:
            if seed is None:  # greedy tokens need none, and torch's generator stays where it was
                seed = _seed() if temperature > 0 else 0
            session.start_drawing(seed)
            slides = wanted > session.cache.length
            _continue(session, rows, max_new_tokens, options, stop_tokens, stream, slides and own)
            if not own and max_new_tokens > 0:
                session.advance(rows.last, Sampling(temperature=0))  # what was drawn last has not been read yet
                session.check_logits()
        except BaseException:
            session.cache.lengths.copy_(before)
            raise
        finally:
            if own:
                _keep_session(model, session)
    return rows.result()


class _Rows:
    """Each row's tokens from its first on, [B, T + new], however its prompt was padded."""

    def __init__(self, tokens: Tensor, counts: Tensor, key_mask: Tensor | None, new: int, pad: int):
        B, T = tokens.shape
        self.prompt = tokens
        self.key_mask = key_mask
        self.pad = pad
        self.T = T
        if key_mask is not None:  # real tokens to the front, in their order
            tokens = tokens.gather(1, (~key_mask).long().argsort(dim=1, stable=True))
        inside = torch.arange(T, device=tokens.device) < counts[:, None]
        self.tokens = F.pad(torch.where(inside, tokens, pad), (0, new), value=pad)
        self.counts = counts
        self.ends = counts.clone()  # [B], where each row's next token goes
        self.done = torch.zeros(B, dtype=torch.bool, device=tokens.device)
        self.last = tokens.gather(1, counts[:, None] - 1).squeeze(1)  # [B], of rows not done

    def add(self, new: Tensor) -> Tensor:
        """Appends new [B] to the rows that are not done; what each row shows of it."""
        shown = new.masked_fill(self.done, self.pad)
        self.tokens.scatter_(1, self.ends[:, None], shown[:, None])
        self.last = torch.where(self.done, self.last, new)
        self.ends += 1
        return shown

    def window(self, row: int, width: int) -> Tensor:
        """The last `width` tokens of a row, [1, up to width]."""
        end = int(self.ends[row])
        return self.tokens[row : row + 1, max(0, end - width) : end]

    def result(self) -> Tensor:
        if self.key_mask is None:
            return self.tokens
        new = self.tokens.shape[1] - self.T
        drawn = self.tokens.gather(1, self.counts[:, None] + torch.arange(new, device=self.tokens.device))
        return torch.cat([self.prompt.masked_fill(~self.key_mask, self.pad), drawn], dim=1)


def _continue(
    session: DecodeSession,
    rows: _Rows,
    max_new_tokens: int,
    options: Sampling,
    stop_tokens: Sequence[int] | None,
    stream: Callable[[Tensor], None] | None,
    slides: bool,
) -> None:
    """Reads the prompts and draws the new tokens."""
    B, V, device = len(rows.counts), session.config.num_tokens, rows.tokens.device
    stop = None if stop_tokens is None else torch.tensor(list(stop_tokens), device=device)
    everyone = torch.arange(B, device=device)
    seen: Tensor | None = None
    if options.repetition_penalty != 1:
        inside = torch.arange(rows.T, device=device) < rows.counts[:, None]
        real = torch.where(inside, rows.tokens[:, : rows.T], rows.last[:, None])  # [B, T], padding replaced
        seen = torch.zeros(B, V, dtype=torch.bool, device=device).scatter_(1, real, True)

    if slides:  # the end of what is longer than the cache
        first = (rows.counts - session.cache.length).clamp(min=0)[:, None]  # [B, 1]
        width = min(rows.T, session.cache.length)
        window = rows.tokens.gather(1, first + torch.arange(width, device=device))
        logits = session.read_prompt(window, rows.counts.clamp(max=session.cache.length))
    else:
        logits = session.read_prompt(rows.tokens[:, : rows.T], rows.counts)
    if max_new_tokens == 0:
        return
    new = session.draw(logits, options, everyone, seen)
    for step in range(max_new_tokens):
        shown = rows.add(new)
        if stream is not None:
            session.check_logits()
            stream(shown)
        if seen is not None:
            seen.scatter_(1, rows.last[:, None], True)
        live = None
        if stop is not None:
            rows.done |= torch.isin(rows.last, stop)
            if bool(rows.done.all()):
                break
            live = ~rows.done
        if step + 1 == max_new_tokens:
            break
        advance = _slide if slides else _advance
        new = advance(session, rows, options, live, seen)
    session.check_logits()


def _advance(
    session: DecodeSession, rows: _Rows, options: Sampling, live: Tensor | None, seen: Tensor | None
) -> Tensor:
    """The tokens [B] after each row's latest."""
    return session.advance(rows.last, options, live, seen)


def _slide(session: DecodeSession, rows: _Rows, options: Sampling, live: Tensor | None, seen: Tensor | None) -> Tensor:
    """`_advance`, but a row without room is read anew from its later half."""
    S = session.cache.length
    full = session.cache.lengths >= S
    if live is not None:
        full = full & live
    if not bool(full.any()):
        return session.advance(rows.last, options, live, seen)
    again = full.nonzero().squeeze(1)
    logits = []
    for row in again.tolist():
        session.cache.lengths[row] = 0
        window = rows.window(row, max(1, S // 2))
        logits.append(session.read_prompt(window, torch.tensor([window.shape[1]], device=window.device), first=row))
    new = rows.last.clone()
    new[again] = session.draw(torch.cat(logits), options, again, seen)
    others = ~full if live is None else live & ~full
    if bool(others.any()):
        new = torch.where(others, session.advance(rows.last, options, others, seen), new)
    return new


def _seed() -> int:
    """From torch's own generator, so that `torch.manual_seed` governs."""
    return int(torch.randint(2**63 - 1, (1,)))


_KEPT = "_kept_session"


class _Kept:
    """The session that a model keeps. A copied or pickled model goes without it."""

    def __init__(self, session: DecodeSession):
        self.session = session

    def __reduce__(self) -> tuple:
        return type(None), ()


def _take_session(model: Any, batch: int, length: int, weights: str | None) -> DecodeSession:
    """The session that the model keeps, where it fits, else a new one."""
    holder: _Kept | None = model.__dict__.pop(_KEPT, None)
    if holder is not None:
        kept = holder.session
        kept.attach(model)
        fits = kept.cache.batch == batch and kept.cache.length >= length and kept.kind == step_kind(model, weights)
        if fits and not kept.stale:
            return kept
    seq_len = parts(model)[0].config.seq_len
    return DecodeSession(model, batch=batch, length=min(seq_len, -(-length // _ROOM) * _ROOM), weights=weights)


def _keep_session(model: Any, session: DecodeSession) -> None:
    session.attach(None)
    model.__dict__[_KEPT] = _Kept(session)
