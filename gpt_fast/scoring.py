"""Log-probabilities that a language model gives to texts, without stored logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from . import _plain, ops
from .config import IGNORE
from .generation.steps import parts, unwrapped
from .heads import GPTForMaskedLM
from .model import GPT, as_key_mask, evaluating
from .ops import _checks

_CHUNK = 1 << 22  # logits held at once, where any are needed


class Scores(NamedTuple):
    """Result of `score`.

    Attributes:
        tokens: Ids that were scored [B, T], for texts behind the model's start token and with padding.
        log_probs: Log-probabilities [B, T], float32, 0 where no token is predicted: at the first token of a row, at
            padding, and where a label is -100.
        predicted: Bool [B, T], True where a token is predicted.
        greedy: With `greedy=True` bool [B, T], True where the token is the most probable one.
    """

    tokens: Tensor
    log_probs: Tensor
    predicted: Tensor
    greedy: Tensor | None = None


class Continuation(NamedTuple):
    """Score of a continuation: the sum of its tokens' log-probabilities, and True if greedy decoding generates it."""

    log_prob: float
    is_greedy: bool


class Window(NamedTuple):
    """Part of a row: the model reads tokens `begin` to `end` - 1, and tokens `first` to `end` - 1 are scored."""

    row: int
    begin: int
    first: int
    end: int


def score(
    model: Any,
    inputs: str | Sequence[str] | Tensor,
    *,
    tokenizer: Any = None,
    labels: Tensor | None = None,
    lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    greedy: bool = False,
) -> Scores:
    """Return log p(w_t | w_<t) of every token, with p = softmax(output_layer(trunk(tokens))).

    The [B, T, V] logits are never stored. Rows longer than the model's seq_len are read in windows, as transformers'
    recipe for perplexity reads them. A window has at most seq_len tokens and begins `stride` tokens after the one
    before. It scores the tokens that no window before it has scored.

    Args:
        model: A `GPTForCausalLM`, a `GPT`, or a task head (such as `GPTForSequenceClassification`) whose
            `config.lm_weight` is above 0. With `labels` it may be a `GPTForMaskedLM`. Wrappers of `torch.compile`,
            DataParallel, DistributedDataParallel and PEFT are taken off. Sharded parameters are refused.
        inputs: Tokens [B, T] int64, a text, or texts. Texts need a `tokenizer`. If the model has a start token, it is
            put before each text, and all tokens of the text are scored. Otherwise the first token is not scored.
        tokenizer: A `tokenizers.Tokenizer`, or one of transformers. It adds no special tokens.
        labels: Int64 [B, T], unshifted: the token to be scored at each position, -100 for none. The default is the
            tokens. For a masked model they hold the original tokens where the row holds masks.
        lengths: Number of real tokens [B] of each row, for rows that are padded on the right.
        key_mask: Bool [B, T], True for a real token, for rows that are padded anywhere.
        attention_mask: `key_mask` as zeros and ones.
        stride: Tokens by which windows advance, 1 to seq_len, half of seq_len unless given. With seq_len the first
            token of every window is not predicted, because no token precedes it there.
        batch_size: Windows in a forward pass.
        greedy: Return `Scores.greedy` too, which is True at tokens that are the most probable ones. This projects the
            scored positions onto the vocabulary once more.

    Returns:
        `Scores`. `scores.log_probs.sum(1)` is the log-likelihood of each row, and `exp(-scores.log_probs.sum() /
        scores.predicted.sum())` the perplexity.

    Raises:
        ValueError: An argument is not as listed above, ids lie outside the vocabulary, or a row of a masked model
            is longer than seq_len.

    Example:
        ```python
        import torch
        import gpt_fast

        config = gpt_fast.GPTConfig(num_tokens=100, hidden_dim=64, num_heads=4, num_layers=2, seq_len=32)
        scores = gpt_fast.score(gpt_fast.GPTForCausalLM(config), torch.randint(100, (2, 50)))
        print(scores.log_probs.sum(1).shape)  # torch.Size([2])
        ```

    Note:
        Modules run in evaluation mode, without gradients.

        Dtypes are those of the ops. Log-probabilities, softmax and sums are float32. The numbers of a padded row may
        differ from those it gets alone in the last bits. Results are deterministic for the same arguments.

        Source: transformers' guide to the perplexity of fixed-length models.
    """
    model = unwrapped(model, "score")
    is_masked = isinstance(model, GPTForMaskedLM)
    seq_len = _trunk(model).config.seq_len
    _checks.integer("score", batch_size=batch_size)
    _checks.boolean_option("score", greedy=greedy)
    if batch_size < 1:
        raise ValueError(f"gpt_fast.score: batch_size is {batch_size}; expected at least 1")
    stride = _stride(stride, seq_len)
    if not isinstance(inputs, Tensor):
        texts = _texts(inputs, tokenizer)
        if any(given is not None for given in (labels, lengths, key_mask, attention_mask)):
            raise ValueError("gpt_fast.score: got labels, lengths or a mask beside texts; expected them beside tokens")
        inputs, lengths = _encoded(model, texts, tokenizer)
    tokens = inputs
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"gpt_fast.score: inputs is {_checks.described(tokens)}; expected int64 [B, T]")
    real = _real(tokens, lengths, as_key_mask("score", tokens, key_mask, attention_mask))
    V = _trunk(model).config.num_tokens
    _check_ids("inputs", tokens[real], V)
    if is_masked and labels is None:
        raise ValueError("gpt_fast.score: labels is None; expected the original tokens beside a GPTForMaskedLM's")
    if labels is None:
        labels = tokens
    elif not isinstance(labels, Tensor) or labels.shape != tokens.shape or labels.dtype != torch.int64:
        raise ValueError(
            f"gpt_fast.score: labels is {_checks.described(labels)}; expected int64 {list(tokens.shape)} as inputs"
        )
    labels = labels.masked_fill(~real, IGNORE)
    _check_ids("labels", labels[labels != IGNORE], V)
    rows = [row[mask] for row, mask in zip(tokens, real, strict=True)]
    targets = [row[mask] for row, mask in zip(labels, real, strict=True)]
    if is_masked and (longest := max(map(len, rows), default=0)) > seq_len:
        raise ValueError(f"gpt_fast.score: inputs has {longest} tokens in a row; expected at most seq_len = {seq_len}")
    windows = [
        Window(index, *window) for index, row in enumerate(rows) for window in sliding(len(row), seq_len, stride)
    ]
    found = score_windows(model, rows, targets, windows, batch_size, greedy)
    spread = [torch.zeros(tokens.shape, dtype=part.dtype, device=tokens.device) for part in found]
    for whole, part in zip(spread, found, strict=True):
        whole[real] = part
    log_probs, predicted, *most_probable = spread
    return Scores(tokens, log_probs, predicted, *most_probable)


def sliding(length: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """Return the windows over a row of `length` tokens, in order, as (begin, first, end).

    A window has tokens begin to end - 1, at most `seq_len` of them, and tokens first to end - 1 are scored. `begin` is
    0, `stride`, 2 `stride` and so on, until a window reaches the end of the row. `first` is the `end` of the window
    before, or 0 in the first window. Each token is in the scored part of exactly one window, if `stride` is at most
    `seq_len`. A row without tokens has no window.
    """
    found: list[tuple[int, int, int]] = []
    for begin in range(0, length, stride):
        end = min(begin + seq_len, length)
        found.append((begin, found[-1][2] if found else 0, end))
        if end == length:
            break
    return found


def score_windows(
    model: Any,
    rows: Sequence[Tensor],
    targets: Sequence[Tensor],
    windows: Sequence[Window],
    batch_size: int,
    greedy: bool,
) -> list[Tensor]:
    """Return [log_probs, predicted] or, if `greedy`, [log_probs, predicted, most_probable].

    Each result has one dimension: the tokens of all `rows`, one row after another, on the device of the rows.
    `log_probs` is float32, 0 where nothing is predicted. `predicted` is True where a token is predicted, and
    `most_probable` where that token is the most probable one. A row holds token ids [T]. The entry of `targets` for a
    row, [T] as well, holds the token to be scored at each position, or -100 for none.

    Each of `windows` is a `Window` (row, begin, first, end). It has tokens begin to end - 1 of `rows[row]`, and tokens
    first to end - 1 are scored. A `GPTForMaskedLM` reads the whole window. A causal model reads all but token end - 1,
    and cannot score token `begin`, which nothing precedes. `batch_size` windows of like lengths share a forward pass.
    The model is in evaluation mode meanwhile.
    """
    device = next(model.parameters()).device
    shift = 0 if isinstance(model, GPTForMaskedLM) else 1
    starts = torch.tensor([0, *map(len, rows)]).cumsum(0)
    total = int(starts[-1])
    place = rows[0].device if rows else device
    log_probs = torch.zeros(total, device=place)
    predicted = torch.zeros(total, dtype=torch.bool, device=place)
    most_probable = torch.zeros(total, dtype=torch.bool, device=place)
    # Windows of like lengths share a batch, so that little of it is padding.
    order = sorted((window for window in windows if window.end - window.begin > shift), key=lambda w: w.begin - w.end)
    with evaluating(model), torch.no_grad():
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            read = [rows[w.row][w.begin : w.end - shift] for w in part]
            asked = []
            for w in part:
                target = targets[w.row][w.begin + shift : w.end].clone()
                target[: max(0, w.first - w.begin - shift)] = IGNORE
                asked.append(target)
            lengths = torch.tensor([len(row) for row in read], device=device)
            tokens = pad_sequence(read, batch_first=True).to(device)
            labels = pad_sequence(asked, batch_first=True, padding_value=IGNORE).to(device)
            hidden = _hidden(model, tokens, lengths if bool((lengths < tokens.shape[1]).any()) else None)
            scored = labels != IGNORE
            kept = hidden[scored], labels[scored]
            values = -_losses(model.output_layer, *kept).float()
            begins = torch.tensor([int(starts[w.row]) + w.begin + shift for w in part], device=device)
            index = (begins[:, None] + torch.arange(tokens.shape[1], device=device))[scored].to(place)
            log_probs[index], predicted[index] = values.to(place), True
            if greedy:
                most_probable[index] = _is_most_probable(model.output_layer, *kept).to(place)
    return [log_probs, predicted, most_probable] if greedy else [log_probs, predicted]


def score_continuations(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 16
) -> list[Continuation]:
    """Return the `Continuation` (log_prob, is_greedy) of each pair (context, continuation) of token ids, in order.

    `log_prob` is the sum of the log-probabilities of the continuation's tokens after the context, and `is_greedy` is
    True if each of them is the most probable one. If both together have more than seq_len + 1 tokens, the context loses
    its first ones. `batch_size` pairs share a forward pass.

    Raises:
        ValueError: A context or continuation is empty, a continuation has more than seq_len tokens, an id lies outside
            the vocabulary, or `model` is no causal language model.
    """
    model = unwrapped(model, "score")
    if isinstance(model, GPTForMaskedLM):
        raise ValueError(
            "gpt_fast.score: model is a GPTForMaskedLM, which reads the tokens that follow; expected a "
            "causal language model to score continuations"
        )
    config = _trunk(model).config
    rows, windows = [], []
    for index, (context, continuation) in enumerate(pairs):
        if not context or not 1 <= len(continuation) <= config.seq_len:
            raise ValueError(
                f"gpt_fast.score: pair {index} has {len(context)} and {len(continuation)} tokens; expected a context "
                f"of at least 1 and a continuation of 1 to {config.seq_len}"
            )
        # The last token is not read, so that seq_len positions score one token more.
        row = torch.tensor([*context, *continuation][-(config.seq_len + 1) :])
        _check_ids("pairs", row, config.num_tokens)
        rows.append(row)
        windows.append(Window(index, 0, len(row) - len(continuation), len(row)))
    log_probs, _, greedy = score_windows(model, rows, rows, windows, batch_size, greedy=True)
    sizes = [len(row) for row in rows]
    return [
        Continuation(float(values[window.first :].double().sum()), bool(most_probable[window.first :].all()))
        for values, most_probable, window in zip(log_probs.split(sizes), greedy.split(sizes), windows, strict=True)
    ]


def _trunk(model: Any) -> Any:
    """Return the trunk of a language model: its part without the output layer, with the configuration as `config`.

    A `GPT` is returned as it is. Raise `ValueError` unless `model` is a `GPT`, a `GPTForMaskedLM` or a head with a
    causal output layer.
    """
    return model.trunk if isinstance(model, GPTForMaskedLM) else parts(model, "score")[0]


def _hidden(model: Any, tokens: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the hidden states [B, T, C] of the trunk of `model`, a `GPT` or a `Head`, for tokens [B, T].

    Rows are padded on the right after `lengths` [B] tokens; `lengths` is None if no row is padded. Attention is causal
    except in a `GPTForMaskedLM`.
    """
    if isinstance(model, GPT):
        return model.hidden_states(tokens, lengths=lengths)
    return model.trunk(tokens, causal=not isinstance(model, GPTForMaskedLM), lengths=lengths)


def _losses(output_layer: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy [N] of output_layer(hidden), a value for each row, for states [N, C] and target ids [N].

    The result is float32. It is float64 if the hidden states are float64 and `output_layer` is exactly an `nn.Linear`,
    without hooks or an adapter.
    """
    if _plain.is_plain(output_layer, nn.Linear):
        return ops.linear_cross_entropy(hidden, output_layer.weight, targets, output_layer.bias, reduction="none")
    chunks = [
        F.cross_entropy(output_layer(x).float(), target, reduction="none")
        for x, target in _chunks(output_layer, hidden, targets)
    ]
    return torch.cat(chunks) if chunks else hidden.new_zeros(0, dtype=torch.float32)


def _is_most_probable(output_layer: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return bool [N], True where the id in `targets` [N] has the largest logit of output_layer(hidden [N, C]).

    Of equal largest logits only the one that `argmax` picks counts.
    """
    chunks = [output_layer(x).argmax(-1) == target for x, target in _chunks(output_layer, hidden, targets)]
    return torch.cat(chunks) if chunks else torch.zeros_like(targets, dtype=torch.bool)


def _chunks(output_layer: Any, hidden: Tensor, targets: Tensor) -> Any:
    """Return an iterable of pairs (hidden, targets) that split hidden states [N, C] and ids [N] into few rows each.

    The logits of a pair, which the caller computes with `output_layer`, are at most `_CHUNK`, 2^22, numbers, but a pair
    has at least one row. A layer without `out_features` gets one row each. There is no pair if N is 0.
    """
    size = max(1, _CHUNK // getattr(output_layer, "out_features", _CHUNK))
    return zip(hidden.split(size), targets.split(size), strict=True) if len(targets) else ()


def _stride(stride: int | None, seq_len: int) -> int:
    """Return `stride` if it is valid, or half of `seq_len`, rounded down but at least 1, for None.

    Raises:
        ValueError: `stride` is neither None nor an integer from 1 to `seq_len`.
    """
    if stride is None:
        return max(1, seq_len // 2)
    _checks.integer("score", stride=stride)
    if not 1 <= stride <= seq_len:
        raise ValueError(f"gpt_fast.score: stride is {stride}; expected 1 to {seq_len}, the model's positions")
    return stride


def _texts(inputs: Any, tokenizer: Any) -> Sequence[str]:
    """Return the texts in `inputs`: a list of one for a string, else `inputs` itself.

    Raises:
        ValueError: `inputs` is neither a string nor a sequence of strings, or `tokenizer` has no `encode`.
    """
    texts = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"gpt_fast.score: inputs is {_checks.described(texts)}; expected tokens, a text or texts")
    if not hasattr(tokenizer, "encode"):
        given = _checks.described(tokenizer)
        raise ValueError(f"gpt_fast.score: inputs is text and tokenizer is {given}; expected a tokenizers.Tokenizer")
    return texts


def _encoded(model: Any, texts: Sequence[str], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return (tokens [B, T], lengths [B]), int64 on the model's device: the ids of B texts, padded on the right with 0.

    If the model has a start token, each row begins with it. `lengths` holds the number of ids of each row. `tokenizer`
    is a `tokenizers.Tokenizer` or one of transformers, and adds no special tokens.
    """
    start = _trunk(model).config.start_token
    rows = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        rows.append(torch.tensor([*([] if start is None else [start]), *getattr(ids, "ids", ids)], dtype=torch.int64))
    device = next(model.parameters()).device
    tokens = pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 0, dtype=torch.int64)
    return tokens.to(device), torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device)


def _real(tokens: Tensor, lengths: Tensor | None, key_mask: Tensor | None) -> Tensor:
    """Return the bool mask [B, T] of `tokens` [B, T], False at padding.

    `lengths` [B], integers, are the numbers of tokens in rows that are padded on the right. `key_mask`, bool [B, T], is
    the mask itself. Without either no token is padding.

    Raises:
        ValueError: Both are given, one has another shape or dtype, or a length lies outside [0, T].
    """
    if lengths is not None and key_mask is not None:
        raise ValueError("gpt_fast.score: got both lengths and a mask; expected one of them")
    B, T = tokens.shape
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.shape != (B,) or lengths.dtype not in _checks.INT_DTYPES:
            raise ValueError(f"gpt_fast.score: lengths is {_checks.described(lengths)}; expected int64 [{B}]")
        wrong = (lengths < 0) | (lengths > T)
        if bool(wrong.any()):
            raise ValueError(f"gpt_fast.score: lengths holds {int(lengths[wrong][0])}; expected 0 to {T}")
        return torch.arange(T, device=tokens.device) < lengths[:, None]
    if key_mask is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    if not isinstance(key_mask, Tensor) or key_mask.shape != tokens.shape or key_mask.dtype != torch.bool:
        raise ValueError(f"gpt_fast.score: key_mask is {_checks.described(key_mask)}; expected bool {[B, T]}")
    return key_mask


def _check_ids(name: str, ids: Tensor, V: int) -> None:
    """Raise `ValueError` for the first of the `ids` that is not in [0, V). The message names the argument, `name`."""
    wrong = ids[(ids < 0) | (ids >= V)]
    if wrong.numel():
        raise ValueError(f"gpt_fast.score: {name} holds {int(wrong[0])}; expected ids in [0, {V})")
