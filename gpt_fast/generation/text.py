"""Text from a causal language model, one token at a time."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import GPT, as_key_mask
from ..ops import _checks
from .sampling import Sampling, penalise
from .session import GREEDY, DecodeSession, check_device, check_prompt
from .steps import parts, step_kind, unwrapped

if TYPE_CHECKING:
    from ..heads import Head

Processor: TypeAlias = Callable[[Tensor, Tensor], Tensor]

_ROOM = 128  # caches are made for multiples of this many tokens, so that the next call finds them long enough


class GenerateOutput(NamedTuple):
    """Result of `generate` with `return_scores=True`.

    Attributes:
        tokens: Tokens [B, T + new] that `generate` returns otherwise.
        scores: Logarithm of the probability that softmax(logits) gave to each new token [B, new], float32, before
            penalty, processors, temperature and cuts. It is 0 where a row was done.
    """

    tokens: Tensor
    scores: Tensor


@overload
def generate(
    model: Any, tokens: Tensor, *, max_new_tokens: int, return_scores: Literal[False] = ..., **options: Any
) -> Tensor: ...
@overload
def generate(
    model: Any, tokens: Tensor, *, max_new_tokens: int, return_scores: Literal[True], **options: Any
) -> GenerateOutput: ...
def generate(  # type: ignore[misc]  # the overloads leave the common options to this signature
    model: GPT | Head,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    logits_processors: Sequence[Processor] = (),
    stop_tokens: Sequence[int] | None = None,
    seed: int | None = None,
    lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    sliding: bool = False,
    weights: str | None = None,
    session: DecodeSession | None = None,
    stream: Callable[[Tensor], None] | None = None,
    return_scores: bool = False,
) -> Tensor | GenerateOutput:
    """Continue each row of `tokens` by `max_new_tokens` tokens drawn from p = softmax(logits / temperature).

    Args:
        model: A `GPTForCausalLM`, a `GPT`, or a task head (such as `GPTForSequenceClassification`) whose
            `config.lm_weight` is above 0. The wrappers of `torch.compile`, DataParallel, DistributedDataParallel and
            PEFT are taken off. Sharded parameters are refused.
        tokens: Prompts [B, T], int64.
        max_new_tokens: Number of tokens that each row gets.
        temperature: 0 takes the most probable token.
        top_k: Keep the k most probable tokens.
        top_p: Then keep the fewest tokens whose probabilities add up to it.
        min_p: Then keep the tokens with at least this share of the probability of the most probable one.
        repetition_penalty: Before all of these, divide the positive logits of the tokens that a row holds by it, and
            multiply the negative ones.
        logits_processors: Callables (tokens so far [B, L], logits [B, V]) → logits [B, V], as transformers'
            `LogitsProcessor`. They run after the penalty and before the temperature. The tokens are padded on the left
            where rows differ in length.
        stop_tokens: A row that has drawn one of these ids keeps it and continues with padding, the model's `pad_token`
            or 0. When all rows have drawn one, generation ends early, and padding fills all rows to the full width.
        seed: The same integer draws the same tokens on a device. If it is None, torch's generator gives a seed. Greedy
            generation needs none and leaves that generator alone.
        lengths: Real tokens [B] of prompts that are padded on the right. A row's new tokens follow its prompt directly,
            and the rest of the row holds the padding token.
        key_mask: Bool [B, T], True for a real token, for prompts that are padded anywhere, such as on the left. New
            tokens of every row begin at T.
        attention_mask: The same mask as zeros and ones, as transformers' tokenizers return it.
        sliding: Beyond `seq_len` tokens there are no positions, which is an error unless `sliding` is True. Then the
            model sees the last `seq_len` tokens of a prompt, and whenever a row is full its later half is read anew
            from position 0.
        weights: Precision of the weights in a step on a CPU, see `DecodeSession`.
        session: A `DecodeSession` of B rows that this call continues, as in chat turns. It holds prompt and new tokens
            afterwards; the model reads the last one when the next call needs it. The penalty then counts the tokens of
            this call alone. If it is None, the model keeps a session for the next call, and makes another one when its
            parameters have changed or moved.
        stream: Called with the new tokens [B] of every step, which are the padding token where a row is done.
        return_scores: Return the log-probabilities of the new tokens too, by softmax(logits) before penalty,
            processors, temperature, top_k, top_p and min_p.

    Returns:
        Tokens [B, T + max_new_tokens], or a `GenerateOutput` of tokens and scores with `return_scores=True`.

    Raises:
        ValueError: An argument has another type, shape or range than stated above, a prompt is empty, prompt and new
            tokens do not fit, or logits are NaN or infinite.
        RuntimeError: Another thread uses `session`.

    Example:
        ```python
        import torch
        import gpt_fast

        config = gpt_fast.GPTConfig(num_tokens=100, hidden_dim=64, num_heads=4, num_layers=2, seq_len=32)
        model, prompts = gpt_fast.GPTForCausalLM(config), torch.randint(100, (2, 10))
        print(gpt_fast.generate(model, prompts, max_new_tokens=5, top_k=20, seed=0).shape)  # torch.Size([2, 15])
        ```

    Note:
        Logits and the draw are float32. Results are deterministic for a given seed, device and number of threads.
        Greedy tokens of a row do not depend on the other rows.

        Source: Holtzman et al. (2019), arXiv:1904.09751, for top_p; Nguyen et al. (2024), arXiv:2407.01082, for min_p;
        Keskar et al. (2019), arXiv:1909.05858, for the penalty.
    """
    options = Sampling(temperature, top_k, top_p, repetition_penalty, min_p)
    model = unwrapped(model)
    config = parts(model)[0].config
    check_device(tokens, parts(model)[0].pos_emb)
    key_mask = as_key_mask("generate", tokens, key_mask, attention_mask)
    counts = check_prompt(tokens, config.num_tokens, lengths, key_mask)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, numbers.Integral) or max_new_tokens < 0:
        raise ValueError(f"gpt_fast.generate: max_new_tokens is {max_new_tokens!r}; expected an integer of 0 or more")
    seed = None if seed is None else as_seed(seed)
    _check_processors(logits_processors)
    _checks.boolean_option("generate", sliding=sliding, return_scores=return_scores)
    stop = _stop_tokens(stop_tokens, tokens.device)
    if session is not None and not isinstance(session, DecodeSession):
        raise ValueError(f"gpt_fast.generate: session is of type {type(session).__name__}; expected a DecodeSession")
    if stream is not None and not callable(stream):
        raise ValueError(f"gpt_fast.generate: stream is of type {type(stream).__name__}; expected a callable")
    if session is not None and (session.model is not model or session.cache.batch != len(tokens) or sliding):
        raise ValueError(
            f"gpt_fast.generate: session has {session.cache.batch} rows for {len(tokens)} rows of tokens; expected one "
            "of this model with as many rows, and sliding=False"
        )
    wanted = int(counts.max()) + max_new_tokens
    if session is None and wanted > config.seq_len and not sliding:
        raise ValueError(
            f"gpt_fast.generate: {int(counts.max())} tokens of prompt and {max_new_tokens} new ones make {wanted}, but "
            f"the model has {config.seq_len} positions; ask for fewer, or let them slide (sliding=True, --sliding)"
        )
    pad = config.pad_token if config.pad_token is not None else 0
    rows = _Rows(tokens, counts, key_mask, max_new_tokens, pad)
    if max_new_tokens == 0 and session is None:
        return rows.result(return_scores)
    own = session is None
    if session is None:
        session = _take_session(model, len(tokens), min(wanted, config.seq_len), weights)
    with session.in_use():
        session.check_layout()
        session.read_unread()
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
            drawing = _Drawing(session, rows, options, logits_processors, return_scores)
            _continue(session, rows, max_new_tokens, drawing, stop, stream, slides and own)
            if not own and max_new_tokens > 0:
                session.leave_unread(rows.last, GREEDY if logits_processors or return_scores else options, drawing.seen)
        except BaseException:
            session.cache.lengths.copy_(before)
            raise
        finally:
            if own:
                _keep_session(model, session)
    return rows.result(return_scores)


class _Rows:
    """Token ids of each row, [B, T + new]: prompt and new tokens without gaps, however the prompt was padded.

    `tokens` [B, T] are the prompts, `counts` [B] the numbers of their real tokens, and `key_mask` [B, T] marks real
    tokens, None if padding is on the right. `new` is the number of tokens to add, `pad` the padding token. A row is
    `done` when it has drawn a stop token; `last` [B] are the latest tokens.
    """

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
        self.scores = torch.zeros(B, new, dtype=torch.float32, device=tokens.device)  # of the new tokens

    def add(self, new: Tensor, scores: Tensor | None) -> Tensor:
        """Append one new token to each row. Rows that are done, by a stop token, get the padding token instead.

        `ends` [B], the length of each row, grows by 1 in all rows, so it counts this padding. `last` [B], the latest
        token of each row, changes only in rows that are not done.

        Args:
            new: Token ids [B], int64.
            scores: Log-probabilities of the tokens [B], to be stored, or None. For rows that are done 0 is stored.

        Returns:
            The tokens [B] that were appended.
        """
        shown = new.masked_fill(self.done, self.pad)
        if scores is not None:
            step = (self.ends - self.counts)[:, None]
            self.scores.scatter_(1, step, scores.masked_fill(self.done, 0)[:, None])
        self.tokens.scatter_(1, self.ends[:, None], shown[:, None])
        self.last = torch.where(self.done, self.last, new)
        self.ends += 1
        return shown

    def window(self, row: int, width: int) -> Tensor:
        """Return the last `width` tokens, of prompt and new tokens, of the row with index `row`: [1, `width`].

        If the row has fewer tokens, return all of them.
        """
        end = int(self.ends[row])
        return self.tokens[row : row + 1, max(0, end - width) : end]

    def so_far(self) -> Tensor:
        """Return the prompt and the new tokens of each row, [B, longest row], padded on the left.

        The prompt's own padding is left out. Rows that are done, by a stop token, end with padding tokens.
        """
        width = int(self.ends.max())
        shift = width - self.ends  # [B]
        index = torch.arange(width, device=self.tokens.device) - shift[:, None]
        return self.tokens.gather(1, index.clamp(min=0)).masked_fill(index < 0, self.pad)

    def result(self, with_scores: bool) -> Tensor | GenerateOutput:
        """Return what `generate` returns: the tokens [B, T + new], or a `GenerateOutput` if `with_scores`.

        If the caller of `generate` gave a key mask, real tokens of the prompt keep their places, and the new tokens
        begin at T. The padding token replaces the caller's ids in the padding. Without a key mask the new tokens
        directly follow the real tokens of the prompt, and the padding token fills the end of the row. A
        `GenerateOutput` has `tokens` and `scores`, the log-probabilities [B, new].
        """
        tokens = self.tokens
        if self.key_mask is not None:
            new = tokens.shape[1] - self.T
            drawn = tokens.gather(1, self.counts[:, None] + torch.arange(new, device=tokens.device))
            tokens = torch.cat([self.prompt.masked_fill(~self.key_mask, self.pad), drawn], dim=1)
        return GenerateOutput(tokens, self.scores) if with_scores else tokens


class _Drawing:
    """How the next tokens are drawn: inside the decode step, or after it if there are processors or scores to return.

    The decode step can draw by itself only with the options in `Sampling`.
    """

    def __init__(
        self, session: DecodeSession, rows: _Rows, options: Sampling, processors: Sequence[Processor], scores: bool
    ):
        self.session, self.rows, self.options, self.processors, self.scores = session, rows, options, processors, scores
        self.seen: Tensor | None = None  # [B, V], the tokens that each row holds
        if options.repetition_penalty != 1:
            B, V, device = len(rows.counts), session.config.num_tokens, rows.tokens.device
            inside = torch.arange(rows.T, device=device) < rows.counts[:, None]
            real = torch.where(inside, rows.tokens[:, : rows.T], rows.last[:, None])  # [B, T], padding replaced
            self.seen = torch.zeros(B, V, dtype=torch.bool, device=device).scatter_(1, real, True)

    def add(self, new: Tensor, scores: Tensor | None) -> Tensor:
        """Append one new token to each row, and mark it as seen for the repetition penalty.

        Args:
            new: Token ids [B], int64.
            scores: Log-probabilities of the tokens [B], to be stored, or None.

        Returns:
            The tokens [B] that were appended. Rows that are done, by a stop token, get the padding token instead.
        """
        shown = self.rows.add(new, scores)
        if self.seen is not None:
            self.seen.scatter_(1, self.rows.last[:, None], True)
        return shown

    def step(self, live: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run one decode step: each live row reads its latest token, and the next token is drawn.

        Args:
            live: Bool [B], True for the rows to run, or None for all of them.

        Returns:
            (next tokens [B], their log-probabilities [B]). The log-probabilities are None unless `generate` returns
            scores. The results of rows that are not live are arbitrary.
        """
        if not self.processors and not self.scores:
            return self.session.advance(self.rows.last, self.options, live, self.seen), None
        logits = self.session.read(self.rows.last, live)
        self.session.check_logits()
        return self.draw(logits, torch.arange(len(logits), device=logits.device))

    def draw(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draw one token from each row of `logits` [n, V], after repetition penalty and processors.

        A processor gets the tokens so far of these rows, padded on the left, and the logits as the processor before
        left them.

        Args:
            logits: Logits [n, V].
            rows: Indices [n] of the session's rows that the logits belong to.

        Returns:
            (tokens [n], their log-probabilities [n]). The log-probabilities are log_softmax(`logits`), before penalty,
            processors and temperature. They are None unless `generate` returns scores.

        Raises:
            ValueError: A processor returns anything but logits [n, V], or leaves no token possible in a row; or logits
                are NaN or infinite.
        """
        if not self.processors:
            new = self.session.draw(logits, self.options, rows, self.seen)
        else:
            processed = logits.clone()  # a processor may write into what it gets
            if self.seen is not None:
                processed = penalise(processed, self.seen[rows], self.options.repetition_penalty)
            for processor in self.processors:
                processed = processor(self.rows.so_far()[rows], processed)
                _check_processed(processor, processed, logits)
            options = dataclasses.replace(self.options, repetition_penalty=1.0)
            new = self.session.draw(processed.float(), options, rows)
        if not self.scores:
            return new, None
        return new, logits.log_softmax(dim=-1).gather(1, new[:, None]).squeeze(1)


def _check_processed(processor: Processor, processed: Any, logits: Tensor) -> None:
    """Validate `processed`, the logits that the user's function `processor` has made of `logits` [n, V].

    The error's message names the processor.

    Raises:
        ValueError: `processed` is no tensor [n, V], or a row has no logit that is more than -inf, for example only NaN.
    """
    name = getattr(processor, "__name__", type(processor).__name__)
    if not isinstance(processed, Tensor) or processed.shape != logits.shape:
        got = list(processed.shape) if isinstance(processed, Tensor) else type(processed).__name__
        raise ValueError(f"gpt_fast.generate: {name} returned {got}; expected logits {list(logits.shape)}")
    if not bool((processed > -math.inf).any(dim=-1).all()):
        raise ValueError(
            f"gpt_fast.generate: {name} left no token possible in a row; expected one finite logit or more"
        )


def _continue(
    session: DecodeSession,
    rows: _Rows,
    max_new_tokens: int,
    drawing: _Drawing,
    stop: Tensor | None,
    stream: Callable[[Tensor], None] | None,
    slides: bool,
) -> None:
    """Read the prompts of `rows` and add up to `max_new_tokens` drawn tokens to each of them.

    The tokens are stored in `rows`, and the prompts and all new tokens but the last are read into the cache. `session`
    runs the model, `drawing` draws. `stop` holds the ids of the stop tokens, or is None if there are none. A row that
    has drawn a stop token is marked in `rows.done` and gets padding from then on. When all rows are marked, generation
    ends early. `stream`, if given, is called with the tokens [B] of every step, padding included. If `slides`, a prompt
    longer than the cache loses its first tokens, and a row whose cache is full reads the later half of its tokens anew
    (see `_slide`). Otherwise the caller makes sure that the rows fit. Raise `ValueError` if logits are NaN or infinite.
    """
    device = rows.tokens.device
    if slides:  # the end of what is longer than the cache
        first = (rows.counts - session.cache.length).clamp(min=0)[:, None]  # [B, 1]
        width = min(rows.T, session.cache.length)
        window = rows.tokens.gather(1, first + torch.arange(width, device=device))
        logits = session.read_prompt(window, rows.counts.clamp(max=session.cache.length))
    else:
        logits = session.read_prompt(rows.tokens[:, : rows.T], rows.counts)
    if max_new_tokens == 0:
        return
    new, scores = drawing.draw(logits, torch.arange(len(rows.counts), device=device))
    for step in range(max_new_tokens):
        shown = drawing.add(new, scores)
        if stream is not None:
            session.check_logits()
            stream(shown)
        live = None
        if stop is not None:
            rows.done |= torch.isin(rows.last, stop)
            if bool(rows.done.all()):
                break
            live = ~rows.done
        if step + 1 == max_new_tokens:
            break
        new, scores = _slide(session, rows, drawing, live) if slides else drawing.step(live)
    session.check_logits()


def _slide(session: DecodeSession, rows: _Rows, drawing: _Drawing, live: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Run one decode step as `drawing.step` does, but free cache for rows whose cache is full.

    Let S be the number of tokens that a row of the cache has room for. A full row's cache is emptied, and the row's
    last S / 2 tokens are read anew from position 0. The other live rows read their latest token.

    Args:
        session: The session that runs the model and has the cache.
        rows: The tokens of all rows.
        drawing: The step, and how tokens are drawn.
        live: Bool [B], True for the rows that are not done, or None for all of them.

    Returns:
        (next tokens [B], their log-probabilities [B]). The log-probabilities are None unless `generate` returns scores.
        The results of rows that are not live are arbitrary.
    """
    S = session.cache.length
    full = session.cache.lengths >= S
    if live is not None:
        full = full & live
    if not bool(full.any()):
        return drawing.step(live)
    again = full.nonzero().squeeze(1)
    logits = []
    for row in again.tolist():
        session.cache.lengths[row] = 0
        window = rows.window(row, max(1, S // 2))
        logits.append(session.read_prompt(window, torch.tensor([window.shape[1]], device=window.device), first=row))
    drawn, drawn_scores = drawing.draw(torch.cat(logits), again)
    others = ~full if live is None else live & ~full
    new, scores = rows.last.clone(), torch.zeros_like(rows.last, dtype=torch.float32)
    if bool(others.any()):
        stepped, stepped_scores = drawing.step(others)
        new = torch.where(others, stepped, new)
        scores = scores if stepped_scores is None else torch.where(others, stepped_scores, scores)
    new[again] = drawn
    if drawn_scores is None:
        return new, None
    scores[again] = drawn_scores
    return new, scores


def _check_processors(processors: Any) -> None:
    """Raise `ValueError` unless `processors` is a list or tuple of callables."""
    if not isinstance(processors, list | tuple) or not all(callable(processor) for processor in processors):
        raise ValueError(f"gpt_fast.generate: logits_processors is {processors!r}; expected a list of callables")


def _stop_tokens(stop_tokens: Any, device: torch.device) -> Tensor | None:
    """Return the argument `stop_tokens` of `generate`, an id or several, as an int64 tensor [n] on `device`.

    Return None if `stop_tokens` is None. It may be an int, a tensor of one dimension, or any iterable of integers. Ids
    are not compared with the vocabulary.

    Raises:
        ValueError: It is none of these, or a string.
    """
    if stop_tokens is None:
        return None
    tokens = [stop_tokens] if isinstance(stop_tokens, int) else stop_tokens
    tokens = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    is_list = isinstance(tokens, Iterable) and not isinstance(tokens, str | bytes)
    if not is_list or not all(isinstance(token, numbers.Integral) for token in tokens):
        raise ValueError(f"gpt_fast.generate: stop_tokens is {stop_tokens!r}; expected a list of token ids")
    return torch.tensor(list(tokens), dtype=torch.int64, device=device)


def as_seed(seed: object) -> int:
    """Return a seed as a signed 64-bit integer. Seeds from 2^63 on wrap around to negative numbers.

    Returns:
        The integer, equal to `seed` modulo 2^64.

    Raises:
        ValueError: `seed` is no integer from -2^63 to 2^64 - 1, which are the seeds that `torch.manual_seed` takes.
    """
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not -(2**63) <= int(seed) < 2**64:
        raise ValueError(f"gpt_fast.generate: seed is {seed!r}; expected an integer from -2^63 to 2^64 - 1, or None")
    return (int(seed) + 2**63) % 2**64 - 2**63


def _seed() -> int:
    """Draw a seed below 2^63 from torch's CPU generator, so that `torch.manual_seed` makes generation reproducible."""
    return int(torch.randint(2**63 - 1, (1,), device="cpu"))


_KEPT = "_kept_session"


class _Kept:
    """Holder of the session that a model keeps. A copied or pickled model has none."""

    def __init__(self, session: DecodeSession):
        self.session = session

    def __reduce__(self) -> tuple:
        """Copy and pickle as None, so that a copied or pickled model keeps no session."""
        return type(None), ()


def _take_session(model: Any, batch: int, length: int, weights: str | None) -> DecodeSession:
    """Return the `DecodeSession` that an earlier call of `generate` kept on the model if it fits, else a new one.

    It fits if it has `batch` rows, room for `length` tokens in each, and the precision `weights` (None is the model's
    own). It also has to compute with the model's current parameters. A new session has room for `length` tokens rounded
    up to a multiple of 128, but not for more than the model's seq_len. The model no longer keeps the session that is
    returned, or one that does not fit. A kept session may still hold tokens, so the caller resets it.
    """
    holder: _Kept | None = model.__dict__.pop(_KEPT, None)
    if holder is not None:
        kept = holder.session
        kept.attach(model)
        fits = kept.cache.batch == batch and kept.cache.length >= length and kept.kind == step_kind(model, weights)
        if fits and kept.reads_current_weights():
            return kept
    seq_len = parts(model)[0].config.seq_len
    return DecodeSession(model, batch=batch, length=min(seq_len, -(-length // _ROOM) * _ROOM), weights=weights)


def _keep_session(model: Any, session: DecodeSession) -> None:
    """Keep the session on the model, in its attribute `_kept_session`, for the next call of `generate`.

    The session drops its reference to the model, so that the two form no reference cycle.
    """
    session.attach(None)
    model.__dict__[_KEPT] = _Kept(session)
