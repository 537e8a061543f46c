"""Fuzz of DecodeSession: random models, random operations, and a plain Python model of the session to compare with.

Each operation is judged in three ways. Its logits must satisfy `tests.numerics`: the exact logits come from a float64
pass of `read` over the same tokens with the weights as they are stored, and the yardstick is the same pass with exactly
the roundings that `DecodeSession` documents. Its lengths and `stale` must equal those of the plain model. An invalid
operation must raise an error in the project's form and must leave the session as it was.

`run_one(seed, index)` runs one session and raises `AssertionError` with the number of the operation that differed.
"""

import contextlib
import copy
import dataclasses
import pickle
import random
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import gpt_fast
from gpt_fast import GPT, DecodeSession, GPTConfig, GPTForCausalLM, GPTForSequenceClassification, generate
from gpt_fast._activations import ACTIVATIONS
from gpt_fast.generation.sampling import penalise
from gpt_fast.generation.steps import WEIGHTS, parts, step_kind
from tests.fuzz.draws import INTERPRETED
from tests.numerics import FLOOR, MAX_FACTOR, assert_as_accurate_as_draws

MESSAGE = re.compile(r"gpt_fast\.\w+: .+; (expected|make|ask) ", re.DOTALL)
HEAD_SIZES = (2, 3, 5, 8, 16, 17, 20, 32, 64)
Call = Callable[[], object]


def run_one(seed: int, index: int) -> None:
    """Run one session of random operations. Raise `AssertionError` that names the operation that differs.

    In one of a thousand sessions, the logits' errors exceed those of a few random roundings by luck. The session then
    runs again and is compared with many random roundings.
    """
    try:
        _run(seed, index, DRAWS)
    except AssertionError as error:
        inaccurate = error.__cause__
        if not isinstance(inaccurate, Inaccurate):
            raise
        checked = _run(seed, index, MANY_DRAWS)
        if not any(torch.equal(got, inaccurate.got) for got in checked if got.shape == inaccurate.got.shape):
            raise AssertionError(f"the session does not repeat itself: {error}") from error


def _run(seed: int, index: int, draws: int) -> list[Tensor]:
    """Run one session, judged by `draws` random roundings. Return the logits that were judged."""
    rng = random.Random(f"sessions {seed} {index}")
    torch.manual_seed(rng.getrandbits(62))
    _noise.manual_seed(0)
    with _surroundings():
        fuzz = Fuzz(rng, draws)
        for number in range(rng.randint(6, 14)):
            name = rng.choices(list(OPERATIONS), [weight for weight, _ in OPERATIONS.values()])[0]
            fuzz.trace.append(name)
            try:
                OPERATIONS[name][1](fuzz)
                fuzz.check_state()
            except Exception as error:
                where = f"session {seed}/{index}, operation {number} of {fuzz.trace} on {fuzz}"
                raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        return fuzz.checked


# The interpreter has no C++ step, which most operations test, and which alone has int8 weights.
TARGETS = {} if INTERPRETED else {"sessions": run_one}


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """Let `torch.empty` return NaN, and restore the number of threads afterwards."""
    threads, fill = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="gpt_fast.generate: .* so the model's modules run each step")
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fill


# ---- the plain model of a pass ---------------------------------------------------------------------------------------


DRAWS, MANY_DRAWS = 24, 960  # number of yardsticks: the first rounds to nearest, the others up or down at random
_noise = torch.Generator()  # a separate generator, so that the number of yardsticks changes nothing else in a session
_SIGNIFICANDS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}  # bits
_LEAST_ULP = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}


def same(x: Tensor) -> Tensor:
    return x


def up_or_down(x: Tensor, ulp: Tensor) -> Tensor:
    """Add at most half an ulp at random to x [draws, ...], except to the first draw."""
    noise = (torch.rand(x.shape, dtype=x.dtype, generator=_noise) - 0.5) * ulp
    noise[0] = 0
    return x + noise


def rounds_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return a function that rounds x [draws, ...] to `dtype`: to nearest in the first draw, else up or down."""
    if dtype == torch.float64:
        return same

    def rounded(x: Tensor) -> Tensor:
        ulp = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - _SIGNIFICANDS[dtype])
        return up_or_down(x, ulp.clamp(min=_LEAST_ULP[dtype])).to(dtype).to(x.dtype)

    return rounded


def rounds_to_integers(most: int) -> Callable[[Tensor], Tensor]:
    """Return a function that rounds each row to integers up to `most`, as the step does with int8 weights."""

    def rounded(x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True)
        scaled = times_inverse(x, largest, most)
        return up_or_down(scaled, torch.ones_like(scaled)).round().to(x.dtype) * (largest / most)

    return rounded


LARGEST_INPUT = {"int8": 127, "int8-a16": 32767}  # largest integer to which the inputs of a product are rounded


def times_inverse(x: Tensor, largest: Tensor, most: int) -> Tensor:
    """Return x (most / largest) in float64, because the step rounds this product only once, to an integer.

    The factor most / largest is rounded to float32, which decides ties: half of a row's largest value is a tie. The
    factor is a quotient of two tensors, because `most / largest` would multiply by a rounded reciprocal.
    """
    inverse = torch.full_like(largest, most) / largest
    return x.double() * torch.where(largest > 0, inverse, 0).double()


@dataclasses.dataclass(frozen=True)
class Roundings:
    """Roundings of one pass: of the inputs of products, the results of ops, keys and values, and inside attention.

    `dtype` is the dtype of the arithmetic, to which attention rounds its scores. `draws` is the number of yardsticks.
    """

    dtype: torch.dtype = torch.float32
    draws: int = 1

    product: Callable[[Tensor], Tensor] = same
    result: Callable[[Tensor], Tensor] = same
    kept: Callable[[Tensor], Tensor] = same
    attention: Callable[[Tensor], Tensor] = same

    def score(self, x: Tensor) -> Tensor:
        return x if self.draws == 1 else rounds_to(self.dtype)(x)


def read(
    weights: dict[str, Tensor], config: GPTConfig, tokens: list[int], past: list[tuple[Tensor, Tensor]], by: Roundings
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Read `tokens`, which follow the keys and values in `past`.

    Return the logits [K, V] after the last token and the keys and values of all tokens. K is the number of yardsticks.
    """
    H, n, start = config.num_heads, len(tokens), past[0][0].shape[2] if past else 0
    C = config.hidden_dim

    def linear(x: Tensor, name: str, separator: str = ".") -> Tensor:
        return F.linear(by.product(x), weights[f"{name}{separator}weight"], weights.get(f"{name}{separator}bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        gain, shift = weights.get(f"{name}.weight"), weights.get(f"{name}.bias")
        return by.result(F.layer_norm(x, (C,), gain, shift, config.layer_norm_eps))

    x = weights["token_emb.weight"][tokens] + weights["pos_emb"][0, start : start + n]
    x = by.result(x.expand(by.draws, n, C))  # [K, n, C]
    allowed = torch.ones(n, start + n, dtype=torch.bool).tril(start)
    kept = []
    for i in range(config.num_layers):
        block = f"decoders.{i}."
        h = norm(x, block + "layer_norm1") if config.pre_norm else x
        qkv = by.result(linear(h, block + "multihead_attn.in_proj", "_"))  # [K, n, 3C]
        q, k, v = qkv.view(by.draws, n, 3, H, C // H).permute(2, 0, 3, 1, 4)  # [K, H, n, D]
        k, v = by.kept(k), by.kept(v)
        if past:
            k, v = torch.cat([past[i][0], k], dim=2), torch.cat([past[i][1], v], dim=2)
        kept.append((k, v))
        # A float32 score in the hundreds has few digits after the point, which limits the softmax's accuracy. Three
        # operations round it: the product, the scale, and the difference from the largest score.
        scores = by.score(by.score(by.attention(q) @ k.transpose(2, 3)) * (C // H) ** -0.5)
        scores = scores.masked_fill(~allowed, -torch.inf)
        scores = by.score(scores - scores.amax(-1, keepdim=True)).masked_fill(~allowed, -torch.inf)
        probs = by.attention(scores.softmax(-1))
        attended = by.result(by.attention(probs @ v)).transpose(1, 2).reshape(by.draws, n, C)
        x = by.result(x + by.result(linear(attended, block + "multihead_attn.out_proj")))
        if not config.pre_norm:
            x = norm(x, block + "layer_norm1")
        h = norm(x, block + "layer_norm2") if config.pre_norm else x
        hidden = by.result(ACTIVATIONS[config.activation].function(linear(h, block + "ff.0")))
        x = by.result(x + by.result(linear(hidden, block + "ff.3")))
        if not config.pre_norm:
            x = norm(x, block + "layer_norm2")
    x = norm(x[:, -1], "final_norm") if config.pre_norm else x[:, -1]
    return by.result(linear(x, "output_layer")), kept


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's parameters by their names in the trunk, and those of the output layer as "output_layer.…"."""
    trunk, output_layer = parts(model)
    named = {name: value.detach() for name, value in trunk.named_parameters()}
    return named | {f"output_layer.{name}": value.detach() for name, value in output_layer.named_parameters()}


def is_matrix(name: str, value: Tensor) -> bool:
    """Return True for the weights of matrix products, which a session stores in its own precision."""
    return value.dim() == 2 and name != "token_emb.weight"


def stored(value: Tensor, kind: str) -> Tensor:
    """Return a matrix in float64 with the values that a session with weights of this kind stores."""
    value = value.float()
    if kind == "bfloat16":
        value = value.bfloat16()
    elif kind in LARGEST_INPUT:
        largest = value.abs().amax(1, keepdim=True)
        return times_inverse(value, largest, 127).round() * (largest / 127).double()
    return value.double()


class Row:
    """Row of a session: its tokens, and its keys and values in the exact pass and in the yardsticks."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.exact: list[tuple[Tensor, Tensor]] = []
        self.rounded: list[tuple[Tensor, Tensor]] = []
        self.logits: tuple[Tensor, Tensor] | None = None  # exact [V], and of the yardsticks [draws, V]
        self.penalised: list[int] = []  # tokens to which the current call of generate applies its repetition penalty

    def clear(self) -> None:
        """Forget all tokens, as a row does whose window slides."""
        self.tokens, self.exact, self.rounded = [], [], []

    def read(self, weights: dict[str, Tensor], config: GPTConfig, tokens: list[int], by: Roundings) -> None:
        """Read tokens with these float64 weights and add them to the row."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        exact, self.exact = read(weights, config, tokens, self.exact, Roundings())
        weights = {name: value.to(by.dtype) for name, value in weights.items()}
        rounded, self.rounded = read(weights, config, tokens, self.rounded, by)
        self.logits = exact[0], rounded.float()
        self.tokens = self.tokens + tokens
        torch.set_num_threads(threads)


class Plain:
    """Plain Python model of a session: its rows, the weights that its step stores, and the roundings of each pass."""

    def __init__(self, model: nn.Module, batch: int, kind: str, copied: set[str], draws: int):
        self.model, self.kind, self.draws = model, kind, draws
        self.config = parts(model)[0].config
        self.rows = [Row() for _ in range(batch)]
        self.pack(copied)

    def pack(self, copied: set[str]) -> None:
        """Copy the parameters that the C++ step copies."""
        now = named_parameters(self.model)
        self.copies = {name: stored(now[name], self._kind_of(name, now[name])) for name in copied}

    def _kind_of(self, name: str, value: Tensor) -> str:
        return self.kind if is_matrix(name, value) else "float32"

    def read(self, row: Row, tokens: list[int], referenced: bool = False) -> None:
        """Read tokens as the C++ step does, or as the modules do, which also run under `use_reference()`."""
        now = {name: value.double() for name, value in named_parameters(self.model).items()}
        if self.kind == "torch" or referenced:
            own = rounds_to(self._dtype())
            inside = own if len(tokens) > 1 else rounds_to(self._cache_dtype())
            by = Roundings(self._wide(), self.draws, result=own, kept=self._kept(), attention=inside)
        else:
            single = rounds_to(torch.float32)
            by = Roundings(
                draws=self.draws, product=self._product(), result=single, kept=self._kept(), attention=single
            )
            now |= self.copies
        row.read(now, self.config, tokens, by)

    def _dtype(self) -> torch.dtype:
        return parts(self.model)[0].pos_emb.dtype

    def _wide(self) -> torch.dtype:
        return torch.promote_types(self._dtype(), torch.float32)

    def _cache_dtype(self) -> torch.dtype:
        if self.kind == "torch":
            return self._dtype()
        return torch.float32 if self.kind == "float32" else torch.bfloat16

    def _kept(self) -> Callable[[Tensor], Tensor]:
        return rounds_to(self._cache_dtype())

    def _product(self) -> Callable[[Tensor], Tensor]:
        if self.kind in LARGEST_INPUT:
            return rounds_to_integers(LARGEST_INPUT[self.kind])
        pairs = "avx512_bf16" in (gpt_fast.build_info() or {}).get("cpu_flags", ())
        return rounds_to(torch.bfloat16) if self.kind == "bfloat16" and pairs else same


class Inaccurate(AssertionError):
    """Error of logits that are less accurate than the yardsticks allow."""

    def __init__(self, message: str, got: Tensor):
        super().__init__(message)
        self.got = got


def check_logits(fuzz: "Fuzz", got: Tensor, rows: list[Row], label: str) -> None:
    """Assert that logits [B, V] are as accurate as the yardsticks of their rows."""
    fuzz.checked.append(got)
    pairs = [row.logits for row in rows if row.logits is not None]
    exact, yardsticks = torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs], dim=1)
    assert got.dtype == torch.float32, f"{label}: logits are {got.dtype}"
    try:
        assert_as_accurate_as_draws(got, yardsticks, exact, label=label)
    except AssertionError as error:
        raise Inaccurate(str(error), got) from error


def margin(row: Row) -> float:
    """Return by how much the tolerance policy lets a logit of this row differ from its exact value."""
    assert row.logits is not None
    exact, rounded = row.logits
    return float(MAX_FACTOR * (rounded.double() - exact).abs().max() + FLOOR * exact.abs().max())


# ---- random models ---------------------------------------------------------------------------------------------------


def random_model(rng: random.Random) -> GPT | GPTForCausalLM | GPTForSequenceClassification:
    """Return a small model with random weights, sizes, norm placement, activation, dtype and tying of weights."""
    size, heads = rng.choice(HEAD_SIZES), rng.randint(1, 4)
    sizes: dict[str, Any] = {
        "num_tokens": rng.randint(2, 70), "hidden_dim": max(4, size * heads), "num_layers": rng.randint(1, 3),
        "seq_len": rng.randint(3, 40),
    }  # fmt: skip
    sizes["num_heads"] = heads if sizes["hidden_dim"] == size * heads else 2
    dropout = rng.choice((0.0, 0.3))
    model: GPT | GPTForCausalLM | GPTForSequenceClassification
    if rng.random() < 0.15:
        model = GPT(**sizes, dropout=dropout)
    else:
        V = sizes["num_tokens"]
        config = GPTConfig.preset(
            rng.choice(("gpt1", "gpt2", "notes")), dropout=dropout, **sizes, ff_dim=rng.choice((0, rng.randint(1, 90))),
            activation=rng.choice(list(ACTIVATIONS)), tied=rng.random() < 0.5, bias=rng.random() < 0.7,
            output_bias=rng.random() < 0.4, layer_norm_eps=rng.choice((1e-5, 1e-3, 1e-8)),
            pad_token=rng.choice((None, rng.randrange(V))), lm_weight=0.5,
        )  # fmt: skip
        model = (GPTForSequenceClassification if rng.random() < 0.15 else GPTForCausalLM)(config)
    std = rng.choice((0.1, 0.2, 0.3))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=std)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(rng.choices((torch.float32, torch.bfloat16, torch.float16, torch.float64), (14, 3, 2, 1))[0])
    return model.train(rng.random() < 0.5)


class Fuzz:
    """Model, its session, and the plain model of the session."""

    def __init__(self, rng: random.Random, draws: int):
        self.rng, self.draws = rng, draws
        self.trace: list[str] = []
        self.checked: list[Tensor] = []  # logits that were judged
        self.model = random_model(rng)
        self.trunk, self.output_layer = parts(self.model)
        self.config = self.trunk.config
        self.V = self.config.num_tokens
        self.open()

    def open(self) -> None:
        """Make a new session of random size and precision."""
        rng, own = self.rng, str(self.trunk.pos_emb.dtype).removeprefix("torch.")
        torch.set_num_threads(rng.choice((1, 1, 1, 1, 1, 1, 2, 3)))
        self.batch = rng.randint(1, 4)
        self.length = rng.choice((self.config.seq_len, rng.randint(1, self.config.seq_len)))
        self.weights = rng.choice((None, *WEIGHTS)) if own != "float64" else None
        self.session = DecodeSession(self.model, batch=self.batch, length=self.length, weights=self.weights)
        kind = "torch"
        if own != "float64" and gpt_fast.ops.serving("decode_attention", "cpu") == "cpp":
            kind = self.weights or ("bfloat16" if own == "bfloat16" else "float32")
        assert self.session.kind == kind, f"the session runs {self.session.kind}, expected {kind}"
        self.plain = Plain(self.model, self.batch, kind, self.copied(), self.draws)
        self.step_made = self.session._step
        self.stale = False

    def __repr__(self) -> str:
        dtype = str(self.trunk.pos_emb.dtype).removeprefix("torch.")
        made = f"batch={self.batch}, length={self.length}, weights={self.weights}"
        return f"{type(self.model).__name__}({dtype}, {self.config}), {made}"

    def copied(self) -> set[str]:
        """Return the names of the parameters that the step copied, because it cannot read them in place."""
        if self.session.kind == "torch":
            return set()
        names = set(self.session._step.weights.copied)
        stored_as = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(self.session.kind)
        for name, value in named_parameters(self.model).items():
            if is_matrix(name, value):
                assert value.dtype == stored_as or name in names, f"{name} is read as another dtype"
            elif name not in ("token_emb.weight", "pos_emb"):
                assert (value.dtype == torch.float32) != (name in names), f"{name} is {value.dtype}, copied: {names}"
        return names

    # --- parts of operations ---

    @property
    def lengths(self) -> list[int]:
        return [len(row.tokens) for row in self.plain.rows]

    def room(self) -> int:
        return self.length - max(self.lengths)

    def tokens(self, *shape: int) -> Tensor:
        """Return random token ids, sometimes in a tensor that is not contiguous."""
        tokens = torch.randint(0, self.V, shape)
        return tokens if self.rng.random() < 0.7 else tokens.repeat_interleave(2, dim=-1)[..., ::2]

    def prompt(self, rows: int, longest: int) -> tuple[Tensor, Tensor | None, list[list[int]]]:
        """Return tokens [B, T], lengths or None, and each row's tokens without its padding, which may hold anything."""
        rng = self.rng
        T = rng.randint(1, longest)
        counts = [rng.randint(1, T) for _ in range(rows)] if rng.random() < 0.6 else [T] * rows
        tokens = self.tokens(rows, T + rng.choice((0, 0, 3)))
        real = [tokens[b, :count].tolist() for b, count in enumerate(counts)]
        if rng.random() < 0.5:
            padding = torch.arange(tokens.shape[1]) >= torch.tensor(counts)[:, None]
            tokens = tokens.masked_fill(padding, rng.choice((-100, -1, self.V, 2**40)))
        lengths = torch.tensor(counts, dtype=rng.choice((torch.int64, torch.int32)))
        return tokens, None if counts == [tokens.shape[1]] * rows and rng.random() < 0.5 else lengths, real

    def pack(self) -> None:
        """Let the plain model copy the weights again if the session has made a new step."""
        if self.session._step is not self.step_made:
            self.step_made = self.session._step
            self.plain.pack(self.copied())

    def notice(self) -> None:
        """Call `pack` after a successful call, and assert that the step reads the parameters where they are now."""
        self.pack()
        assert self.session._places.unchanged(), "the step is not that of the parameters where they are now"

    def check_state(self) -> None:
        """Compare the session's public state with the plain model's."""
        assert self.session.lengths.tolist() == self.lengths, f"lengths {self.session.lengths}, expected {self.lengths}"
        assert self.session.stale == self.stale, f"stale is {self.session.stale}, expected {self.stale}"

    def content(self) -> list[Tensor]:
        """Return copies of the rows' keys and values."""
        cache = self.session.cache
        return [half[:, b, :, :n].clone() for half in (cache.keys, cache.values) for b, n in enumerate(self.lengths)]

    def refused(self, call: Call, label: str) -> None:
        """Assert that a call raises an error in the project's form and leaves the session as it was."""
        before, message = self.content(), None
        try:
            call()
        except (ValueError, TypeError, IndexError) as error:
            message = str(error)
        assert message is not None, f"{label}: no error"
        assert MESSAGE.match(message), f"{label}: the message is {message!r}"
        self.pack()
        self.check_state()
        assert all(map(torch.equal, self.content(), before)), f"{label}: the error changed what the cache holds"


# ---- operations ------------------------------------------------------------------------------------------------------


def prefill(fuzz: Fuzz) -> None:
    """Read prompts of unequal lengths into some of the rows, in one pass or in pieces of a few tokens."""
    rows = fuzz.rng.randint(1, fuzz.batch)
    room = fuzz.length - max(fuzz.lengths[:rows])
    if room == 0:
        overfull(fuzz)
        return
    tokens, lengths, real = fuzz.prompt(rows, room)
    referenced = fuzz.rng.random() < 0.15
    with gpt_fast.use_reference() if referenced else contextlib.nullcontext(), _pieces(fuzz):
        got = fuzz.session.prefill(tokens, lengths)
    fuzz.notice()
    for row, new in zip(fuzz.plain.rows, real, strict=False):
        fuzz.plain.read(row, new, referenced)
    check_logits(fuzz, got, fuzz.plain.rows[:rows], "prefill")


@contextlib.contextmanager
def _pieces(fuzz: Fuzz) -> Iterator[None]:
    """Make the session read prompts in passes of a few tokens, as it does for long prompts."""
    from gpt_fast.generation import session

    most = session._PROMPT_TOKENS
    session._PROMPT_TOKENS = fuzz.rng.choice((most, fuzz.rng.randint(1, 20)))
    try:
        yield
    finally:
        session._PROMPT_TOKENS = most


def step(fuzz: Fuzz) -> None:
    """Read a few tokens for each row, one at a time. Another number of threads must give the same bits."""
    for _ in range(fuzz.rng.randint(1, 4)):
        if fuzz.room() == 0:
            overfull(fuzz)
            return
        tokens, referenced = fuzz.tokens(fuzz.batch), fuzz.rng.random() < 0.15
        with gpt_fast.use_reference() if referenced else contextlib.nullcontext():
            got = fuzz.session.step(tokens)
        fuzz.notice()
        if fuzz.rng.random() < 0.2 and not referenced:
            threads = torch.get_num_threads()
            torch.set_num_threads(fuzz.rng.randint(1, 3))
            fuzz.session.cache.lengths.sub_(1)
            assert torch.equal(fuzz.session.step(tokens), got), "a step again, with other threads, gave other bits"
            torch.set_num_threads(threads)
        for row, token in zip(fuzz.plain.rows, tokens.tolist(), strict=True):
            fuzz.plain.read(row, [token], referenced)
        check_logits(fuzz, got, fuzz.plain.rows, "step")


def overfull(fuzz: Fuzz) -> None:
    """Assert that every way to read more tokens than a row has room for is refused."""
    more = fuzz.room() + 1
    fuzz.refused(lambda: fuzz.session.prefill(fuzz.tokens(fuzz.batch, more)), "prefill beyond the cache")
    if more == 1:
        fuzz.refused(lambda: fuzz.session.step(fuzz.tokens(fuzz.batch)), "step beyond the cache")
    call = partial(generate, fuzz.model, fuzz.tokens(fuzz.batch, 1), max_new_tokens=more, session=fuzz.session)
    fuzz.refused(call, "generate beyond the cache")


def reset(fuzz: Fuzz) -> None:
    fuzz.session.reset()
    fuzz.plain.rows = [Row() for _ in range(fuzz.batch)]


def reopen(fuzz: Fuzz) -> None:
    """Make another session for the same model."""
    fuzz.open()


def set_flags(fuzz: Fuzz) -> None:
    """Switch the train flags, which must change nothing, not even with dropout."""
    fuzz.model.train(not fuzz.model.training)


# --- changes of the weights ---


def changed_in_place(fuzz: Fuzz) -> None:
    with torch.no_grad():
        for parameter in fuzz.rng.sample(list(fuzz.model.parameters()), 2):
            parameter.mul_(1.25).add_(0.01)


def loaded(fuzz: Fuzz) -> None:
    """Load a state dict, by copying into the parameters or with `assign=True`."""
    state = {name: value * 0.75 + 0.01 for name, value in copy.deepcopy(fuzz.model.state_dict()).items()}
    if fuzz.config.tied and not isinstance(fuzz.model, GPT):
        state["output_layer.weight"] = state["trunk.token_emb.weight"]
    fuzz.model.load_state_dict(state, assign=fuzz.rng.random() < 0.5)
    fuzz.trunk, fuzz.output_layer = parts(fuzz.model)


def trained(fuzz: Fuzz) -> None:
    """Train for one step, with AdamW, fused or not, or with SGD for a 16-bit model.

    In 16 bits AdamW's second moment of a small gradient is 0, and PyTorch's fused SGD leaves most of a tensor as it is.
    """
    parameters = list(fuzz.model.parameters())
    if parameters[0].dtype in (torch.float32, torch.float64):
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=0.02, fused=fuzz.rng.random() < 0.5)
    else:
        optimizer = torch.optim.SGD(parameters, lr=0.05, fused=False, foreach=fuzz.rng.random() < 0.5)
    for parameter in fuzz.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def replaced(fuzz: Fuzz) -> None:
    """Replace the parameters of a linear layer and of a norm by new ones."""
    block = fuzz.rng.choice(list(fuzz.trunk.decoders))
    for module in (block.ff[0], block.multihead_attn.out_proj, block.layer_norm2):
        for _ in range(fuzz.rng.randint(1, 3)):  # repeated, because a new parameter may get the memory of an old one
            module.weight = nn.Parameter(module.weight.detach() * 1.25 + 0.01)


def moved(fuzz: Fuzz) -> None:
    """Move the parameters to other memory through `.data`, with other values."""
    for _ in range(fuzz.rng.randint(1, 3)):
        for parameter in fuzz.model.parameters():
            parameter.data = parameter.data * 0.875 + 0.01


WEIGHT_CHANGES = (changed_in_place, loaded, trained, replaced, moved)


def change_weights(fuzz: Fuzz) -> None:
    """Change the weights in one of several ways. The session is then stale and still works, with or without a reset."""
    change = fuzz.rng.choice(WEIGHT_CHANGES)
    fuzz.trace[-1] += f":{change.__name__}"
    change(fuzz)
    fuzz.stale = True
    if fuzz.rng.random() < 0.4:
        reset(fuzz)
    if fuzz.rng.random() < 0.3:
        fuzz.open()


def change_dtype_and_back(fuzz: Fuzz) -> None:
    """Cast the model to another dtype, which the session must refuse, and back, after which it must work again."""
    own, was_stale = fuzz.trunk.pos_emb.dtype, fuzz.stale
    before = [parameter.data_ptr() for parameter in fuzz.model.parameters()]
    fuzz.model.to(torch.float16 if own == torch.float64 else torch.float64)
    fuzz.stale = True
    fuzz.refused(lambda: fuzz.session.prefill(fuzz.tokens(fuzz.batch, 1)), "prefill of a model of another dtype")
    fuzz.refused(lambda: fuzz.session.step(fuzz.tokens(fuzz.batch)), "step of a model of another dtype")
    fuzz.model.to(own)
    has_moved = before != [parameter.data_ptr() for parameter in fuzz.model.parameters()]
    fuzz.stale = was_stale or has_moved or own == torch.float64  # the cast to float16 changed float64 values


def hook_and_remove(fuzz: Fuzz) -> None:
    """Register a hook, under which the C++ step must be refused and the modules' step must call it. Then remove it."""
    called: list[int] = []
    module = fuzz.rng.choice([fuzz.trunk.token_emb, fuzz.trunk.decoders[0].ff, fuzz.output_layer])
    handle = module.register_forward_hook(lambda *_: called.append(1))
    if fuzz.session.kind != "torch":
        fuzz.refused(lambda: fuzz.session.step(fuzz.tokens(fuzz.batch)), "step of a hooked model")
        fuzz.refused(lambda: fuzz.session.prefill(fuzz.tokens(fuzz.batch, 1)), "prefill of a hooked model")
    else:
        step(fuzz)
        assert called or fuzz.room() == 0, "the hook was not called"
    handle.remove()


# --- copies ---


def copy_session(fuzz: Fuzz) -> None:
    """Assert that a session cannot be copied or pickled."""
    for copies in (copy.copy, copy.deepcopy, pickle.dumps):
        fuzz.refused(partial(copies, fuzz.session), copies.__name__)


def copy_model(fuzz: Fuzz) -> None:
    """Assert that the session refuses a copy of its model, and that the copy generates the same tokens as the model."""
    twin = copy.deepcopy(fuzz.model) if fuzz.rng.random() < 0.5 else pickle.loads(pickle.dumps(fuzz.model))  # noqa: S301
    tokens = fuzz.tokens(fuzz.batch, 1)
    call = partial(generate, twin, tokens, max_new_tokens=1, session=fuzz.session)
    fuzz.refused(call, "generate with the session of another model")
    options: dict[str, Any] = {"max_new_tokens": min(2, fuzz.config.seq_len - 1), "seed": fuzz.rng.randrange(2**63)}
    assert torch.equal(generate(twin, tokens, **options), generate(fuzz.model, tokens, **options))


# --- generate ---


@dataclasses.dataclass
class Draw:
    """Options of `generate` that decide which tokens may be drawn."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    has_processor: bool = False


def random_draw(rng: random.Random, V: int) -> Draw:
    return Draw(
        temperature=rng.choice((0, 0, 1.0, 0.5, 3.0, 1e-40)),
        top_k=rng.choice((None, None, 1, rng.randint(1, V), V + 3)),
        top_p=rng.choice((None, None, 1e-6, 0.5, 0.9, 1.0)),
        min_p=rng.choice((None, None, 0, 0.05, 0.5, 1)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.5, 0.7)),
        has_processor=rng.random() < 0.2,
    )


def halves_odd_tokens(tokens: Tensor, logits: Tensor) -> Tensor:
    """Subtract 1 from the logits of odd tokens, in place, as a logits processor may."""
    logits[:, 1::2] -= 1
    return logits


def check_drawn(token: int, row: Row, draw: Draw, label: str) -> None:
    """Assert that the options allow the token, given the allowed errors of the logits."""
    assert row.logits is not None
    logits, off = row.logits[0], margin(row) * max(draw.repetition_penalty, 1 / draw.repetition_penalty)
    if draw.repetition_penalty != 1:
        seen = torch.zeros(len(logits), dtype=torch.bool)
        seen[row.penalised] = True
        logits = penalise(logits, seen, draw.repetition_penalty)
    if draw.has_processor:
        logits = halves_odd_tokens(torch.empty(0), logits[None].clone())[0]
    off += FLOOR * float(logits.abs().max())  # the penalty and the processor round in float32
    if draw.temperature < 1e-30:
        assert logits[token] >= logits.max() - 2 * off, f"{label}: token {token} is not the most probable one"
        return
    above = logits > logits[token] + 2 * off  # certainly more probable
    assert draw.top_k is None or int(above.sum()) < draw.top_k, f"{label}: token {token} is not among the top k"
    off = off / draw.temperature + FLOOR * float((logits - logits.max()).abs().max() / draw.temperature)
    weights = ((logits - logits.max()) / draw.temperature).exp()
    if draw.top_p is not None and draw.top_p < 1:
        kept = weights.sort(descending=True).values[: draw.top_k]
        share = float(weights[above].sum() / kept.sum()) * torch.tensor(-4.0 * off).exp().item() - FLOOR
        assert share < draw.top_p, f"{label}: token {token} is not among the top p"
    if draw.min_p:
        least = draw.min_p * torch.tensor(-2.0 * off).exp().item() * (1 - FLOOR)
        assert weights[token] >= least, f"{label}: token {token} is less probable than min_p allows"
    assert weights[token] > 0, f"{label}: token {token} has probability 0"


def call_generate(fuzz: Fuzz, plain: Plain, longest: int, new: int, **options: Any) -> None:
    """Generate, and read the tokens with the plain model. The options must allow each token."""
    rng, V, B = fuzz.rng, fuzz.V, len(plain.rows)
    sliding, own = options.get("sliding", False), "session" not in options
    tokens, lengths, real = fuzz.prompt(B, longest)
    mask = None
    if rng.random() < 0.3:  # a mask with padding in any places
        places = [sorted(rng.sample(range(tokens.shape[1]), len(row))) for row in real]
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        padded = torch.zeros_like(tokens)
        for b, (at, row) in enumerate(zip(places, real, strict=True)):
            mask[b, at], padded[b, at] = True, torch.tensor(row)
        tokens, lengths = padded, None
        name = rng.choice(("key_mask", "attention_mask"))
        options[name] = mask if name == "key_mask" else mask.long()
    draw = random_draw(rng, V)
    stop = rng.choice((None, None, [rng.randrange(V)], list(range(0, V, 2)), [V + 3]))
    shown: list[Tensor] = []
    processors = [halves_odd_tokens] if draw.has_processor else []
    drawing = {name: value for name, value in dataclasses.asdict(draw).items() if name != "has_processor"}
    options |= drawing | {"max_new_tokens": new, "seed": rng.randrange(2**63), "stop_tokens": stop}
    options |= {"lengths": lengths, "logits_processors": processors}
    flags = [module.training for module in fuzz.model.modules()]
    out, scores = generate(fuzz.model, tokens, return_scores=True, stream=shown.append, **options)
    assert flags == [module.training for module in fuzz.model.modules()], "a training flag was changed"
    if not own:
        fuzz.notice()
    elif new > 0 and rng.random() < 0.5:  # without scores the step itself draws, with the same random numbers
        again = generate(fuzz.model, tokens, **options)
        assert draw.temperature > 0 or torch.equal(again, out) or draw.has_processor, "greedy tokens differ"

    pad = plain.config.pad_token or 0
    expected = torch.full_like(out, pad)
    for b, row in enumerate(plain.rows):
        row.penalised = list(real[b])
        begin = tokens.shape[1] if mask is not None else len(real[b])
        at = places[b] if mask is not None else range(len(real[b]))
        expected[b, list(at)] = torch.tensor(real[b])
        row_stops = follow(fuzz, plain, row, real[b], out[b, begin : begin + new].tolist(), scores[b], draw, stop, own)
        expected[b, begin : begin + row_stops] = out[b, begin : begin + row_stops]
        assert (scores[b, row_stops:] == 0).all(), "a row that is done has a score"
        streamed = [int(part[b]) for part in shown]
        assert streamed == out[b, begin : begin + len(streamed)].tolist(), f"row {b}: the stream saw {streamed}"
    assert torch.equal(out, expected), f"generate returned {out.tolist()}, expected {expected.tolist()}"
    assert not sliding or out.shape[1] == tokens.shape[1] + new


def follow(
    fuzz: Fuzz, plain: Plain, row: Row, prompt: list[int], drawn: list[int], scores: Tensor, draw: Draw,
    stop: list[int] | None, own: bool,
) -> int:  # fmt: skip
    """Read the tokens of a row of `generate`, and judge each token and its score. Return how many tokens it drew."""
    S = plain.config.seq_len if own else fuzz.length
    text = list(prompt)
    plain.read(row, prompt[-S:])
    for number, token in enumerate(drawn):
        label = f"generate, token {number}"
        check_drawn(token, row, draw, label)
        assert row.logits is not None
        exact = row.logits[0].log_softmax(-1)
        # The logit and the logarithm of the sum may each be off by the margin.
        allowed = 2 * margin(row) + FLOOR * float(exact.abs().max())
        error = abs(float(scores[number]) - float(exact[token]))
        assert error <= allowed, f"{label}: the score is {float(scores[number])}, expected {float(exact[token])}"
        text.append(token)
        row.penalised.append(token)
        is_last = number + 1 == len(drawn) or (stop is not None and token in stop)
        if own and is_last:
            return number + 1
        if len(row.tokens) == S:  # the window is full: its later half is read again as a prompt
            row.clear()
            plain.read(row, text[-max(1, S // 2) :])
        else:
            plain.read(row, [token])
        if is_last:
            return number + 1
    return len(drawn)


def continue_session(fuzz: Fuzz) -> None:
    """Generate with the session, which must then hold the prompt and the new tokens."""
    room = fuzz.room()
    if room == 0:
        overfull(fuzz)
        return
    longest = fuzz.rng.randint(1, room)
    call_generate(fuzz, fuzz.plain, longest, fuzz.rng.randint(0, room - longest), session=fuzz.session)
    with fuzz.session.in_use():  # reads the last token now, so that `content` can compare its keys and values
        fuzz.session.read_unread()


def generate_alone(fuzz: Fuzz) -> None:
    """Generate without a session, sliding or not, which must use the present weights, whatever has changed before."""
    rng, S = fuzz.rng, fuzz.config.seq_len
    weights = rng.choice((None, *WEIGHTS)) if fuzz.trunk.pos_emb.dtype != torch.float64 else None
    kind, sliding = step_kind(fuzz.model, weights), rng.random() < 0.4
    copied = set()
    if kind != "torch":  # a new step copies the present values of all these parameters
        copied = {name for name in named_parameters(fuzz.model) if name not in ("token_emb.weight", "pos_emb")}
    plain = Plain(fuzz.model, rng.randint(1, 3), kind, copied, fuzz.draws)
    longest = rng.randint(1, S + 3 if sliding else S)
    new = rng.randint(0, 12) if sliding else rng.randint(0, min(12, S - longest))
    call_generate(fuzz, plain, longest, new, weights=weights, sliding=sliding)


class Broken(Exception):
    """Error that a caller's function raises."""


def interrupt(fuzz: Fuzz) -> None:
    """Raise an error in a caller's function in the middle of a text, which must leave the session as it was."""
    new = fuzz.room() - 1
    if new < 1:
        return
    fails_at, before = fuzz.rng.randint(1, new), fuzz.content()
    calls: list[int] = []

    def fail(*arguments: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == fails_at:
            raise Broken
        return arguments[-1]

    function = {"stream": fail} if fuzz.rng.random() < 0.5 else {"logits_processors": [fail]}
    with contextlib.suppress(Broken):
        generate(fuzz.model, fuzz.tokens(fuzz.batch, 1), max_new_tokens=new, session=fuzz.session, **function)
        raise AssertionError("the caller's error was lost")
    fuzz.notice()
    assert all(map(torch.equal, fuzz.content(), before)), "the error changed what the cache holds"


# --- invalid calls ---


def refuse(fuzz: Fuzz) -> None:
    """Make a few invalid calls. Each must raise an error in the project's form and leave the session as it was."""
    for name in fuzz.rng.sample(list(INVALID), 4):
        fuzz.trace[-1] += f":{name}"
        fuzz.refused(partial(INVALID[name], fuzz), name)


def _wrong_id(fuzz: Fuzz, *shape: int) -> Tensor:
    """Return tokens of which one is not in the vocabulary."""
    tokens = torch.randint(0, fuzz.V, shape)
    tokens.view(-1)[fuzz.rng.randrange(tokens.numel())] = fuzz.rng.choice((-1, fuzz.V, -(2**63), 2**62))
    return tokens


def _prefill(fuzz: Fuzz, tokens: Any, lengths: Any = None) -> Tensor:
    return fuzz.session.prefill(tokens, lengths)


def _generate(fuzz: Fuzz, **options: Any) -> object:
    options = {"max_new_tokens": 0, "session": fuzz.session} | options
    return generate(fuzz.model, options.pop("tokens", torch.zeros(fuzz.batch, 1, dtype=torch.int64)), **options)


def _ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


INVALID: dict[str, Callable[[Fuzz], object]] = {
    "prefill_int32": lambda f: _prefill(f, _ids(f.batch, 2).int()),
    "prefill_float": lambda f: _prefill(f, _ids(f.batch, 2).float()),
    "prefill_list": lambda f: _prefill(f, [[0]]),
    "prefill_none": lambda f: _prefill(f, None),
    "prefill_one_dimension": lambda f: _prefill(f, _ids(2)),
    "prefill_three_dimensions": lambda f: _prefill(f, _ids(1, 1, 1)),
    "prefill_no_rows": lambda f: _prefill(f, _ids(0, 2)),
    "prefill_no_tokens": lambda f: _prefill(f, _ids(f.batch, 0)),
    "prefill_too_many_rows": lambda f: _prefill(f, _ids(f.batch + 1, 1)),
    "prefill_wrong_id": lambda f: _prefill(f, _wrong_id(f, f.batch, f.rng.randint(1, 9))),
    "prefill_too_long": lambda f: _prefill(f, _ids(f.batch, f.length + 1)),
    "prefill_float_lengths": lambda f: _prefill(f, _ids(f.batch, 2), torch.ones(f.batch)),
    "prefill_bool_lengths": lambda f: _prefill(f, _ids(f.batch, 2), torch.ones(f.batch, dtype=torch.bool)),
    "prefill_list_lengths": lambda f: _prefill(f, _ids(f.batch, 2), [1] * f.batch),
    "prefill_fewer_lengths": lambda f: _prefill(f, _ids(f.batch, 2), _ids(f.batch + 1) + 1),
    "prefill_length_0": lambda f: _prefill(f, _ids(f.batch, 2), _ids(f.batch)),
    "prefill_negative_length": lambda f: _prefill(f, _ids(f.batch, 2), _ids(f.batch) - 1),
    "prefill_long_length": lambda f: _prefill(f, _ids(f.batch, 2), _ids(f.batch) + 3),
    "step_int32": lambda f: f.session.step(_ids(f.batch).int()),
    "step_float": lambda f: f.session.step(_ids(f.batch).float()),
    "step_list": lambda f: f.session.step([0] * f.batch),  # type: ignore[arg-type]
    "step_none": lambda f: f.session.step(None),  # type: ignore[arg-type]
    "step_more_rows": lambda f: f.session.step(_ids(f.batch + 1)),
    "step_no_rows": lambda f: f.session.step(_ids(0)),
    "step_two_dimensions": lambda f: f.session.step(_ids(f.batch, 1)),
    "step_wrong_id": lambda f: f.session.step(_wrong_id(f, f.batch)),
    "generate_wrong_id": lambda f: _generate(f, tokens=_wrong_id(f, f.batch, 2)),
    "generate_more_rows": lambda f: _generate(f, tokens=_ids(f.batch + 1, 1)),
    "generate_sliding": lambda f: _generate(f, sliding=True),
    "generate_negative": lambda f: _generate(f, max_new_tokens=-1),
    "generate_half_a_token": lambda f: _generate(f, max_new_tokens=1.5),
    "generate_temperature": lambda f: _generate(f, temperature=f.rng.choice((-1, float("nan"), float("inf"), "1"))),
    "generate_top_k": lambda f: _generate(f, top_k=f.rng.choice((0, -1, 1.5, True))),
    "generate_top_p": lambda f: _generate(f, top_p=f.rng.choice((0.0, 1.1, -1, "1"))),
    "generate_min_p": lambda f: _generate(f, min_p=f.rng.choice((-0.1, 1.1, "1"))),
    "generate_penalty": lambda f: _generate(f, repetition_penalty=f.rng.choice((0, -1, float("inf"), None))),
    "generate_seed": lambda f: _generate(f, seed=f.rng.choice((2**64, -(2**63) - 1, 1.0, "1"))),
    "generate_stop_tokens": lambda f: _generate(f, stop_tokens=f.rng.choice(("1", 1.5, [1.5], [None]))),
    "generate_processors": lambda f: _generate(f, logits_processors=f.rng.choice((1, [1], "ab"))),
    "generate_stream": lambda f: _generate(f, stream=1),
    "generate_session": lambda f: _generate(f, session=1),
    "generate_flags": lambda f: _generate(f, return_scores=f.rng.choice((1, None, "yes"))),
    "generate_weights": lambda f: _generate(f, session=None, max_new_tokens=1, weights="int4"),
    "generate_both_masks": lambda f: _generate(
        f, lengths=_ids(f.batch) + 1, key_mask=torch.ones(f.batch, 1, dtype=torch.bool)
    ),
    "generate_empty_mask": lambda f: _generate(f, key_mask=torch.zeros(f.batch, 1, dtype=torch.bool)),
    "generate_too_long": lambda f: _generate(f, session=None, max_new_tokens=f.config.seq_len),
    "session_no_rows": lambda f: DecodeSession(f.model, batch=f.rng.choice((0, -1, 1.5, True))),
    "session_length": lambda f: DecodeSession(f.model, length=f.rng.choice((0, -1, f.config.seq_len + 1, 1.5))),
    "session_weights": lambda f: DecodeSession(f.model, weights=f.rng.choice(("int4", "", 8))),
    "session_of_a_layer": lambda f: DecodeSession(f.output_layer),  # type: ignore[arg-type]
}

# name → (relative frequency, operation)
OPERATIONS: dict[str, tuple[int, Callable[[Fuzz], None]]] = {
    "prefill": (6, prefill),
    "step": (7, step),
    "reset": (2, reset),
    "continue": (5, continue_session),
    "generate": (4, generate_alone),
    "interrupt": (2, interrupt),
    "change_weights": (4, change_weights),
    "change_dtype": (1, change_dtype_and_back),
    "hook": (1, hook_and_remove),
    "flags": (1, set_flags),
    "reopen": (1, reopen),
    "refuse": (3, refuse),
    "overfull": (1, overfull),
    "copy_session": (1, copy_session),
    "copy_model": (1, copy_model),
}
