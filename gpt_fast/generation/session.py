"""gpt_fast.DecodeSession: a model, a cache of what it has read, and the step that reads one more token a row."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import _plain
from ..model import StaysPlain, evaluating
from ..ops import _checks
from ..ops._library import has_kernel
from .cache import KVCache, PromptPass
from .sampling import DAMAGED, Sampling, damaged
from .steps import (
    CppStep,
    TorchStep,
    continue_trunk,
    device_has_cpp_step,
    parts,
    step_kind,
    unwrapped,
    why_called,
    why_not_reached,
)

if TYPE_CHECKING:
    from ..heads import Head
    from ..model import GPT

GREEDY = Sampling(temperature=0)
_PROMPT_TOKENS = 4096  # of a pass over a prompt, all rows together


class DecodeSession:
    """A model and a cache of the tokens that it has read, row for row, to be continued token by token.

    logits = model(all tokens read)[-1].

    `prefill` adds a prompt to each row, and `step` adds one token to each row. Both may follow each other in any order
    (chat turns). The cache is allocated once. After an error the session is as it was before.

    Args:
        model: A `GPTForCausalLM`, a `GPT`, or a task head (such as `GPTForSequenceClassification`) whose
            `config.lm_weight` is above 0.
        batch: Number of rows.
        length: Tokens that a row has room for. The default is the model's seq_len.
        weights: Precision of the weights on a CPU, "float32", "bfloat16", "int8" or "int8-a16". The default is the
            model's own.

    Raises:
        ValueError: The model has no causal output layer, it does not have these weights or this length, a call has more
            rows than `batch`, tokens lie outside the vocabulary, the cache is full, logits are NaN or infinite, or the
            model's parameters have other shapes, dtypes or devices than when the session was made.
        RuntimeError: Another thread uses the session.

    Example:
        ```python
        import torch
        import gpt_fast

        config = gpt_fast.GPTConfig(num_tokens=100, hidden_dim=64, num_heads=4, num_layers=2, seq_len=32)
        session = gpt_fast.DecodeSession(gpt_fast.GPTForCausalLM(config), batch=2)
        logits = session.prefill(torch.randint(100, (2, 10)))
        logits = session.step(logits.argmax(-1))
        print(session.lengths)  # tensor([11, 11])
        ```

    Note:
        On a CPU a step or a prompt is one call of `gpt_fast._C.DecodeSession`. Weights are packed once, beside the
        model's parameters. Embeddings, biases and norms stay as they are. On CUDA, without the extension, in float64
        and under `use_reference()` the model's modules read prompts and run the step, with `ops.attention` and
        `ops.decode_attention`.

        Precision: int8 has one scale for each output channel, symmetric. Activations stay float32, but a product may
        round its inputs: to bfloat16 with bfloat16 weights where the CPU multiplies pairs of them, with "int8" to 8-bit
        integers, and with "int8-a16" to 16-bit ones, one scale for each token. Keys and values are float32 for float32
        weights, else bfloat16.

        Results are deterministic. On a CPU neither the number of threads nor the other rows change a bit, and a prompt
        gives the bits of as many steps. The threads are `torch.get_num_threads()`, at most the CPUs that the process
        may use.

        A session serves one thread at a time. Several sessions serve several threads.

        `stale` tells that the model's parameters have changed. Make a new session then, because a step on a CPU still
        uses the packed weights.

        Source: Pope et al. (2022), arXiv:2211.05102, for the cache.
    """

    def __init__(self, model: GPT | Head, *, batch: int = 1, length: int | None = None, weights: str | None = None):
        model = unwrapped(model)
        trunk, output_layer = parts(model)
        config = trunk.config
        length = config.seq_len if length is None else length
        _checks.integer("DecodeSession", batch=batch, length=length)
        if batch < 1:
            raise ValueError(f"gpt_fast.DecodeSession: batch is {batch}; expected 1 or more")
        if not 1 <= length <= config.seq_len:
            raise ValueError(
                f"gpt_fast.DecodeSession: length is {length}; expected 1 to the model's seq_len, {config.seq_len}"
            )
        self.kind = step_kind(model, weights)
        reason = why_called(model)
        if reason is not None and device_has_cpp_step(trunk.pos_emb.device):
            warnings.warn(
                f"gpt_fast.generate: {reason}, so the model's modules run each step; the C++ step would not call them",
                stacklevel=3,
            )
        unreached = why_not_reached(model)
        if unreached is not None:
            warnings.warn(f"gpt_fast.generate: {unreached}", stacklevel=3)
        self._stays_plain = StaysPlain({*trunk.modules(), output_layer}) if reason is None else None
        self._calls_modules = reason is not None
        self._parameters = list(model.parameters())
        self._versions = [_plain.version(parameter) for parameter in self._parameters]
        self._layouts = [_layout(parameter) for parameter in self._parameters]
        self._samples = _plain.samples(self._parameters)
        device, dtype = trunk.pos_emb.device, trunk.pos_emb.dtype
        if self.kind != "torch":
            dtype = torch.float32 if self.kind == "float32" else torch.bfloat16
        self.cache = KVCache(config, batch, length, dtype, device, *_sizes(trunk))
        self._lock = threading.Lock()
        self.model: GPT | Head | None = model
        self._reference_step: TorchStep | None = None
        self._unread: _Unread | None = None
        self._make_step()

    def _make_step(self) -> None:
        """Create `self._step`, which runs the decode steps: a `TorchStep` if `kind` is "torch", else a `CppStep`.

        Record the current addresses of the model's parameters, and a checksum of each parameter that the `CppStep` has
        copied. Later calls compare them to find out whether the parameters have changed.
        """
        assert self.model is not None
        self._step: TorchStep | CppStep
        if self.kind == "torch":
            self._step = TorchStep(self.model, self.cache)
        else:
            self._step = CppStep(self.model, self.cache, self.kind)
        self._places = _Places(self.model)
        self._fingerprint = _fingerprint(self._step.copied)

    def attach(self, model: GPT | Head | None) -> None:
        """Set or drop the session's reference to its model.

        A model may keep its session for later calls of `generate`. It keeps the session without that reference, so that
        the two form no reference cycle.

        Args:
            model: The model that the session was made for, or None to drop the reference.
        """
        self.model = model

    def __reduce__(self) -> tuple:
        """Raise `TypeError`: a session cannot be copied or pickled, because its cache belongs to one model."""
        raise TypeError(
            "gpt_fast.DecodeSession: cannot be copied or pickled: its cache belongs to one model; make a new one"
        )

    @property
    def stale(self) -> bool:
        """True if the model's parameters were changed, replaced or moved after the session was made.

        Returns:
            True if so. A sample of each parameter's values is compared too, because some writes (fused optimisers,
            `.data`) are not counted by autograd.
        """
        assert self.model is not None
        now = list(self.model.parameters())
        return (
            len(now) != len(self._parameters)
            or any(a is not b for a, b in zip(now, self._parameters, strict=True))
            or [_layout(parameter) for parameter in now] != self._layouts
            or [_plain.version(parameter) for parameter in now] != self._versions
            or not torch.equal(_plain.samples(now), self._samples)
        )

    def reads_current_weights(self) -> bool:
        """Return True if a step computes with the parameters as they are now.

        The model has to have the same parameters at the same addresses as when the session was made. A checksum of each
        parameter that the C++ step has copied must be the same, too. It is computed from all values of the parameter,
        because fused optimisers and writes through `.data` leave no other trace. The result is also False if the
        model's modules had no hooks and no replacements when the session was made and have some now, or the reverse.

        Returns:
            True if nothing has changed. A change that keeps the checksum of a parameter, such as exchanging two rows,
            is not noticed.

        Note:
            Cost: the checksums read the copied parameters once, which takes about as long as one step in float32.
        """
        assert self.model is not None
        now = list(self.model.parameters())
        was_plain = self._stays_plain is not None
        return (
            was_plain == (why_called(self.model) is None)
            and (self._stays_plain is None or self._stays_plain())
            and len(now) == len(self._parameters)
            and all(a is b for a, b in zip(now, self._parameters, strict=True))
            and [_layout(parameter) for parameter in now] == self._layouts
            and torch.equal(_fingerprint(self._step.copied), self._fingerprint)
        )

    @property
    def lengths(self) -> Tensor:
        """Number of tokens that each row holds.

        Returns:
            Counts [batch], int64. After `generate` they include its last token, which the cache takes up in the next
            call.
        """
        return self.cache.lengths + (self._unread is not None)

    def reset(self) -> None:
        """Forget all tokens in all rows, also those not read yet, so that the next prompt begins at position 0."""
        self.cache.lengths.zero_()
        self._unread = None

    def prefill(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Add a prompt to each of the first B rows of the cache, behind the tokens that the rows hold.

        Args:
            tokens: Token ids [B, T], int64, padded on the right with anything. B is at most the session's batch.
            lengths: Number of tokens of each row that are no padding [B]. The default is T for all rows.

        Returns:
            Logits [B, V], float32, after the last token of each row.

        Raises:
            ValueError: Tokens have another shape, dtype or device or lie outside the vocabulary, a prompt is empty,
                there are more rows than the session has, the cache is full, or logits are NaN or infinite.
            RuntimeError: Another thread uses the session.
        """
        with self.in_use():
            self.check_layout()
            check_device(tokens, self.cache.keys)
            counts = check_prompt(tokens, self.config.num_tokens, lengths)
            if lengths is not None:  # padding may hold anything, such as -100; the embedding takes token ids alone
                is_padding = torch.arange(tokens.shape[1], device=tokens.device) >= counts[:, None]
                tokens = tokens.masked_fill(is_padding, 0)
            self.read_unread()
            return self.read_prompt(tokens, counts)

    def step(self, tokens: Tensor) -> Tensor:
        """Add one token to every row of the cache.

        Args:
            tokens: Token ids [batch], int64.

        Returns:
            Logits [batch, V], float32, after these tokens.

        Raises:
            ValueError: Tokens have another shape, dtype or device or lie outside the vocabulary, the cache is full, or
                logits are NaN or infinite. The lengths then stay.
            RuntimeError: Another thread uses the session.
        """
        with self.in_use():
            self.check_layout()
            here = self.cache.lengths.shape
            if not isinstance(tokens, Tensor) or tokens.shape != here or tokens.dtype != torch.int64:
                got = _checks.described(tokens)
                raise ValueError(f"gpt_fast.DecodeSession: tokens is {got}; expected int64 [{self.cache.batch}]")
            check_device(tokens, self.cache.keys)
            self.read_unread()
            self.check_room(1)
            check_tokens(tokens, self.config.num_tokens)
            before = self.cache.lengths.clone()
            try:
                self.advance(tokens, GREEDY)
                self.check_logits()
            except ValueError:
                self.cache.lengths.copy_(before)
                raise
            return self._serving.logits()

    # --- what generate is made of; the caller holds in_use() and has checked ---

    def in_use(self) -> _InUse:
        """Return a context manager that reserves the session for this thread while its block runs.

        Returns:
            A context manager. Entering it raises `RuntimeError` if another thread has reserved the session.
        """
        return _InUse(self._lock)

    @property
    def config(self):
        """Configuration of the model.

        Returns:
            Its `GPTConfig`.
        """
        return parts(self.model)[0].config

    def leave_unread(self, tokens: Tensor, options: Sampling, seen: Tensor | None) -> None:
        """Store the last drawn token of each row without running the model on it.

        The next call of the session reads these tokens first (see `read_unread`). Often there is no next call, and a
        decode step is saved.

        Args:
            tokens: The tokens [batch], int64.
            options: Sampling options of the earlier steps.
            seen: Bool [batch, V], True for the tokens to which the repetition penalty applies, or None.
        """
        self._unread = _Unread(tokens, options, seen)

    def read_unread(self) -> None:
        """Run the model on the tokens that `leave_unread` stored, if there are any, so that the cache holds them.

        The step also draws next tokens with the stored options, and drops them. So on CUDA it can replay the graph that
        was captured with these options. If the step fails, the cache's lengths stay as they were and the tokens stay
        stored.
        """
        if self._unread is None:
            return
        before = self.cache.lengths.clone()
        try:
            self.advance(self._unread.tokens, self._unread.options, seen=self._unread.seen)
            self.check_logits()
        except BaseException:
            self.cache.lengths.copy_(before)
            raise
        self._unread = None

    @torch.no_grad()
    def read_prompt(self, tokens: Tensor, lengths: Tensor, first: int = 0) -> Tensor:
        """Add a prompt to each of the cache's rows `first` to `first + B - 1`, behind the tokens that the rows hold.

        The cache's lengths grow by `lengths`. The model's modules read long prompts in passes of a bounded number of
        tokens, to bound memory. The caller has validated the tokens, padding included, and holds `in_use()`.

        Args:
            tokens: Token ids [B, T], int64, padded on the right with any token ids.
            lengths: Number of tokens of each row that are no padding [B], int64, 1 or more.
            first: Index of the first row.

        Returns:
            Logits [B, V], float32, after the last token of each row.

        Raises:
            ValueError: There are more rows than the session has, the cache is full, or logits are NaN or infinite.
        """
        tokens = tokens[:, : int(lengths.max())]  # padding behind the longest prompt takes no room
        B, T = tokens.shape
        if first + B > self.cache.batch:
            raise ValueError(
                f"gpt_fast.DecodeSession: tokens has {first + B} sequences; expected at most the {self.cache.batch} "
                "that the session was made for"
            )
        rows = slice(first, first + B)
        self.check_room(lengths, rows)
        serving = self._serving
        if isinstance(serving, CppStep):
            logits = serving.read_prompt(tokens, lengths, first)
        else:
            logits = self._call_prompt(tokens, lengths, first)
        if bool(damaged(logits).any()):
            raise ValueError(DAMAGED)
        self.cache.lengths[rows] += lengths
        return logits

    def _call_prompt(self, tokens: Tensor, lengths: Tensor, first: int) -> Tensor:
        """Read prompts by calling the model's modules, in passes of at most `_PROMPT_TOKENS` (4,096) tokens.

        With more rows than that, a pass has one token of each row. Of `tokens` [B, T] the first `lengths[b]` are row
        b's prompt, whose keys and values go into the cache's row `first + b`, behind its tokens. The caller has to add
        `lengths` [B] to the cache's `lengths`.

        Returns:
            Logits [B, V], float32, after each prompt's last token.
        """
        trunk, output_layer = parts(self.model)
        B, T = tokens.shape
        starts = self.cache.lengths[first : first + B].tolist()
        last = torch.zeros(B, trunk.config.hidden_dim, device=tokens.device, dtype=trunk.pos_emb.dtype)
        width = max(1, _PROMPT_TOKENS // B)
        assert self.model is not None
        with evaluating(self.model) if self._calls_modules else contextlib.nullcontext():
            for begin in range(0, T, width):
                part = tokens[:, begin : begin + width]
                past = PromptPass(self.cache, [start + begin for start in starts], part.shape[1], first)
                hidden = continue_trunk(trunk, part, past)  # [B, width, C]
                at = (lengths - 1 - begin).clamp(0, part.shape[1] - 1)
                here = (lengths > begin) & (lengths <= begin + part.shape[1])
                ends = hidden[torch.arange(B, device=tokens.device), at]  # [B, C]
                last = torch.where(here[:, None], ends.to(last.dtype), last)
            return output_layer(last).float()

    @torch.no_grad()
    def advance(
        self, tokens: Tensor, options: Sampling, live: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """Add one token to each live row of the cache, and draw the next tokens.

        The cache's lengths grow by 1 in live rows. The caller has made sure that these rows have room.

        Args:
            tokens: Token ids [batch], int64.
            options: Options of the draw: temperature (0 is greedy), penalty and limits such as top_k.
            live: Bool [batch], True for a row that reads its token. The default is all.
            seen: Bool [batch, V], True for the tokens to which the repetition penalty applies, None for no penalty.

        Returns:
            Next tokens [batch], int64. Those of rows that are not live are arbitrary.

        Raises:
            ValueError: Logits are NaN or infinite. After a CUDA graph `check_logits` raises this error instead.
        """
        assert self.model is not None
        return self._serving.advance(self.model, tokens.contiguous(), options, live, seen, self._calls_modules)

    @torch.no_grad()
    def read(self, tokens: Tensor, live: Tensor | None = None) -> Tensor:
        """Add one token to each live row of the cache, and return the logits instead of a drawn token.

        Args:
            tokens: Token ids [batch], int64.
            live: Bool [batch], True for a row that reads its token. The default is all.

        Returns:
            Logits [batch, V], float32, after the tokens. Those of rows that are not live are arbitrary.

        Raises:
            ValueError: Logits are NaN or infinite. After a CUDA graph `check_logits` raises this error instead.
        """
        self.advance(tokens, GREEDY, live)
        return self._serving.logits(live)

    def draw(self, logits: Tensor, options: Sampling, rows: Tensor, seen: Tensor | None = None) -> Tensor:
        """Draw one token from each row of logits.

        Args:
            logits: Logits [n, V], float32.
            options: Options of the draw: temperature (0 is greedy), penalty and limits such as top_k.
            rows: Indices [n] of the session's rows that the logits belong to.
            seen: Bool [batch, V], True for the tokens to which the repetition penalty applies, None for no penalty.

        Returns:
            Tokens [n], int64.

        Raises:
            ValueError: Logits are NaN or +inf.
        """
        return self._serving.draw(logits, options, rows, seen)

    def start_drawing(self, seed: int) -> None:
        """Seed the draws that follow, so that the same seed gives the same tokens.

        Args:
            seed: Signed 64-bit integer.
        """
        self._serving.start_drawing(seed)

    def check_logits(self) -> None:
        """Raise `ValueError` if the logits of a step since the last call were NaN or infinite.

        Steps of the C++ extension, and eager ones, raise this error themselves. A CUDA graph only records it, so as not
        to wait for the GPU. This call waits.
        """
        self._serving.check_logits()

    @property
    def _serving(self) -> TorchStep | CppStep:
        """The object that runs decode steps now: a `CppStep`, or a `TorchStep` that calls the model's modules.

        Under `use_reference()` it is a `TorchStep` on the same cache, made at the first such use and kept.
        """
        if self.kind == "torch" or has_kernel("decode_attention", self.cache.keys):
            return self._step
        if self._reference_step is None:
            self._reference_step = TorchStep(self.model, self.cache)  # type: ignore[arg-type]
        return self._reference_step

    def check_layout(self) -> None:
        """Validate that the model's parameters have the shapes, dtypes and devices for which the session was made.

        If parameters have moved to other addresses, the step is made anew for them. This call also records whether the
        model's modules have to be called from now on, because of a hook for example.

        Raises:
            ValueError: A parameter differs or their number does, or the C++ step no longer serves the model because it
                has a hook or another module. The message names the first difference.
        """
        assert self.model is not None
        is_plain = self._stays_plain is not None and self._stays_plain()
        if is_plain and self._places.unchanged():  # of plain modules there are no others than when the session was made
            self._calls_modules = False
            return
        now = [_layout(parameter) for parameter in self.model.parameters()]
        for got, wanted in zip(now, self._layouts, strict=False):
            if got[1:] != wanted[1:]:
                raise ValueError(
                    f"gpt_fast.DecodeSession: the model changed under it: a parameter is {_words(got)}, "
                    f"was {_words(wanted)}; make a new session"
                )
        if len(now) != len(self._layouts):
            raise ValueError(
                f"gpt_fast.DecodeSession: the model changed under it: {len(now)} parameters, "
                f"were {len(self._layouts)}; make a new session"
            )
        if self.kind != "torch" and not is_plain:
            reason = why_called(self.model) or "a module was replaced"
            raise ValueError(f"gpt_fast.DecodeSession: the model changed under it: {reason}; make a new session")
        self._calls_modules = not is_plain
        if not self._places.unchanged():  # moved there and back, or replaced through `.data`
            self._make_step()

    def check_room(self, more: Tensor | int, rows: slice = slice(None)) -> None:
        """Validate that the cache of each row has room for more tokens.

        Args:
            more: Number of new tokens, one number for all rows or one for each of `rows`.
            rows: Rows that get the new tokens.

        Raises:
            ValueError: A row would hold more tokens than the cache has room for.
        """
        wanted = int((self.cache.lengths[rows] + more).max())
        if wanted > self.cache.length:
            raise ValueError(
                f"gpt_fast.DecodeSession: the cache is full: a row would hold {wanted} tokens, it has room for "
                f"{self.cache.length}; make a longer session, or reset() it"
            )


class _Unread(NamedTuple):
    """Last tokens [batch] that `generate` drew, which the model has not read yet, with the options of their draw.

    They belong to the session, but are not in its cache. `seen` [batch, V] marks the tokens of the repetition penalty.
    """

    tokens: Tensor
    options: Sampling
    seen: Tensor | None


class _InUse:
    """Context manager that reserves a session for one thread. A second thread that enters gets an error at once."""

    def __init__(self, lock: threading.Lock):
        self._lock = lock

    def __enter__(self) -> None:
        """Reserve the session for this thread. Raise `RuntimeError` if it is reserved already, also by this thread."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "gpt_fast.DecodeSession: in use by another thread; a session serves one thread at a time, "
                "make one for each"
            )

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


class _Places:
    """Record of the addresses, shapes, dtypes and devices of a model's parameters, to see if they have changed.

    A comparison takes a third of a microsecond for each parameter.
    """

    def __init__(self, model: torch.nn.Module):
        self._modules = [(module._parameters, len(module._parameters)) for module in model.modules()]
        self._parameters = [
            (own, name, parameter.data_ptr(), parameter.shape, parameter.dtype, parameter.device)
            for own, _ in self._modules
            for name, parameter in own.items()
            if parameter is not None
        ]

    def unchanged(self) -> bool:
        """Return True if every parameter still has the address, shape, dtype and device that were recorded.

        A parameter that a module has gained or lost, or that has another name, makes it False.
        """
        for own, count in self._modules:
            if len(own) != count:
                return False
        for own, name, address, shape, dtype, device in self._parameters:
            now = own.get(name)
            if (
                now is None
                or now.data_ptr() != address
                or now.shape != shape
                or now.dtype is not dtype
                or now.device != device
            ):
                return False
        return True


def _sizes(trunk: Any) -> tuple[int, int]:
    """Return (number of blocks, number of attention heads in each) of a trunk, the sizes of the cache.

    Raises:
        ValueError: The blocks have different numbers of heads, a block has no attention with `num_heads`, or there is
            no block.
    """
    heads = {getattr(getattr(block, "multihead_attn", None), "num_heads", None) for block in trunk.decoders}
    if len(heads) != 1 or None in heads:
        raise ValueError(
            f"gpt_fast.generate: model has blocks with {sorted(map(str, heads))} heads; expected the same number in all"
        )
    return len(trunk.decoders), heads.pop()  # type: ignore[return-value]


def _fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """Return one checksum for each tensor, [n] int64: the sum of its bits, read as integers of 64 or of 8 bits.

    The sum wraps modulo 2^64. Tensors of one call lie on one device; for no tensors the result is empty, on the CPU.
    """
    sums = [_as_integers(tensor).sum(dtype=torch.int64) for tensor in tensors]
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64, device="cpu")


def _as_integers(tensor: Tensor) -> Tensor:
    """Return the tensor's elements as flat integers: int64, or uint8 where size or address is no multiple of 8 bytes.

    The result is a view of the tensor's memory, or of a copy if the tensor is not contiguous.
    """
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.int64) if flat.nbytes % 8 == 0 and flat.data_ptr() % 8 == 0 else flat.view(torch.uint8)


def _layout(parameter: Tensor) -> tuple:
    """Return (address, shape, dtype, device) of a parameter."""
    return parameter.data_ptr(), tuple(parameter.shape), parameter.dtype, parameter.device


def _words(layout: tuple) -> str:
    """Return a layout for a message, such as "float32 [64, 64] on cpu".

    A layout is (address, shape, dtype, device), as `_layout` returns it.
    """
    _, shape, dtype, device = layout
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}"


def check_device(tokens: Any, place: Tensor) -> None:
    """Raise an error if `tokens` is a tensor on another device than `place`, a tensor of the model. Other types pass.

    Raises:
        ValueError: It is on another device.
    """
    if isinstance(tokens, Tensor) and tokens.device != place.device:
        raise ValueError(f"gpt_fast.generate: tokens is on {tokens.device}; expected {place.device}, as the model")


def check_prompt(tokens: Any, V: int, lengths: Any = None, key_mask: Any = None) -> Tensor:
    """Return the number of tokens of each row that are no padding, [B] int64, after validating the prompts.

    `tokens` [B, T] are the prompts and `V` is the vocabulary size. Prompts that are padded on the right have `lengths`
    [B], the number of real tokens in each row. Prompts that are padded elsewhere have `key_mask` [B, T], True for a
    real token. Without both there is no padding. Ids in the padding are not validated.

    Returns:
        The numbers of tokens, on the device of `tokens`.

    Raises:
        ValueError: Tokens are not int64 [B, T], there is no row, a prompt is empty, a length exceeds T, an id lies
            outside the vocabulary, `lengths` or `key_mask` has another type or shape, or both are given.
    """
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"gpt_fast.generate: tokens is {_checks.described(tokens)}; expected int64 [B, T]")
    B, T = tokens.shape
    if lengths is not None and key_mask is not None:
        raise ValueError("gpt_fast.generate: got both lengths and key_mask; expected one of them")
    if key_mask is not None:
        if not isinstance(key_mask, Tensor) or key_mask.shape != tokens.shape or key_mask.dtype != torch.bool:
            raise ValueError(f"gpt_fast.generate: key_mask is {_checks.described(key_mask)}; expected bool {[B, T]}")
        lengths = key_mask.sum(dim=1)
    if lengths is None:
        lengths = torch.full((B,), T, device=tokens.device)
    if not isinstance(lengths, Tensor) or lengths.shape != (B,) or lengths.dtype not in _INTEGERS:
        raise ValueError(f"gpt_fast.generate: lengths is {_checks.described(lengths)}; expected integers [{B}]")
    if B == 0 or T == 0 or bool((lengths < 1).any()):
        raise ValueError("gpt_fast.generate: tokens has an empty prompt; expected at least one token in every row")
    if bool((lengths > T).any()):
        raise ValueError(f"gpt_fast.generate: lengths holds {int(lengths.max())}; expected at most the {T} of a row")
    lengths = lengths.to(device=tokens.device, dtype=torch.int64)
    real = torch.arange(T, device=tokens.device) < lengths[:, None] if key_mask is None else key_mask
    check_tokens(tokens[real], V)
    return lengths


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def check_tokens(tokens: Tensor, V: int) -> None:
    """Raise an error if a token id is negative or not below the vocabulary size `V`. `tokens` has any shape.

    Raises:
        ValueError: An id lies outside [0, V). The message names the first one.
    """
    wrong = tokens[(tokens < 0) | (tokens >= V)]
    if wrong.numel():
        raise ValueError(f"gpt_fast.generate: tokens holds {int(wrong[0])}; expected ids in [0, {V})")
