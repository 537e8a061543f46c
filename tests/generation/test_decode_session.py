"""Test DecodeSession: the C++ decode step in every precision, its sampling, its limits and its threads."""

import math
import threading

import pytest
import torch
from torch import Tensor

from gpt_fast import DecodeSession, GPTConfig, GPTForCausalLM, build_info, generate, use_reference
from gpt_fast.generation.sampling import Sampling, keep_min_p, keep_top_k, keep_top_p, penalise
from gpt_fast.generation.steps import WEIGHTS
from tests.conftest import INTERPRETED
from tests.fuzz.sessions import Roundings, named_parameters, read, rounds_to, rounds_to_integers
from tests.numerics import assert_as_accurate

pytestmark = pytest.mark.skipif(
    build_info() is None or INTERPRETED, reason="the C++ step is what these tests are about: it needs the extension"
)
V, T = 83, 40
# The shapes cover widths that are no multiple of the vector width, odd head sizes, one head, and an MLP narrower than
# the model.
SHAPES = {
    "notes": {"preset": "notes", "hidden_dim": 36, "num_heads": 4},
    "gpt1": {"preset": "gpt1", "hidden_dim": 40, "num_heads": 8, "ff_dim": 24},
    "gpt2": {"preset": "gpt2", "hidden_dim": 64, "num_heads": 1},
    "exact_gelu_free_biased_output": {
        "preset": "gpt2", "hidden_dim": 48, "num_heads": 2, "activation": "gelu", "tied": False, "output_bias": True,
    },
    "no_biases": {"preset": "gpt2", "hidden_dim": 34, "num_heads": 2, "bias": False},
    "wider_than_a_chain": {"preset": "gpt2", "hidden_dim": 32, "num_heads": 2, "ff_dim": 9000, "num_layers": 1},
}  # fmt: skip


def make_model(preset: str, std: float = 0.15, **options) -> GPTForCausalLM:
    """Return a model with random weights, norms and biases, so that none of them can be forgotten unseen."""
    config = GPTConfig.preset(preset, **{"num_tokens": V, "num_layers": 2, "seq_len": T, "dropout": 0.0} | options)
    model = GPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=std)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def stepped(model: GPTForCausalLM, tokens: Tensor, first: int, **options) -> Tensor:
    """Read a prompt of `first` tokens, then one token at a time. Return the single tokens' logits [B, T - first, V]."""
    session = DecodeSession(model, batch=len(tokens), **options)
    session.prefill(tokens[:, :first])
    return torch.stack([session.step(tokens[:, t]) for t in range(first, tokens.shape[1])], dim=1)


def wide(model: GPTForCausalLM) -> GPTForCausalLM:
    twin = GPTForCausalLM(model.config).double().eval()
    twin.load_state_dict(model.state_dict())
    return twin


def rounded(model: GPTForCausalLM, weights: str) -> GPTForCausalLM:
    """Return the model with its matrices rounded as `weights` stores them. Token embeddings are not rounded."""
    twin = GPTForCausalLM(model.config.replace(tied=False)).eval()
    twin.load_state_dict(model.state_dict())
    for name, parameter in twin.named_parameters():
        if parameter.dim() == 2 and "token_emb" not in name:
            with torch.no_grad():
                if weights == "bfloat16":
                    parameter.copy_(parameter.bfloat16())
                elif weights != "float32":
                    scale = parameter.abs().amax(dim=1, keepdim=True) / 127
                    parameter.copy_((parameter / scale).round() * scale)
    return twin


def read_with_byte_inputs(model: GPTForCausalLM, tokens: Tensor, first: int) -> Tensor:
    """Compute the logits of `stepped` in plain PyTorch, with the inputs of products rounded to 8 bits.

    Each token has one scale.
    """
    weights = {name: value.float() for name, value in named_parameters(model).items()}
    by = Roundings(product=rounds_to_integers(127), kept=rounds_to(torch.bfloat16))
    found = []
    for row in tokens.tolist():
        _, past = read(weights, model.config, row[:first], [], by)
        for token in row[first:]:
            logits, past = read(weights, model.config, [token], past, by)
            found.append(logits[0])
    return torch.stack(found).view(len(tokens), -1, V)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_step_by_step(shape, weights):
    """Compare with the float64 model whose weights are rounded in the same way.

    The yardstick for float32 is the float32 model. For bfloat16 and int8-a16 it is the bfloat16 model, which rounds all
    activations to bfloat16. The session rounds at most the inputs of its products, to bfloat16 or to 16-bit integers,
    so its mean square error must not be larger. For int8 the yardstick rounds the inputs of products to 8 bits, as the
    session does, and the session's mean square error may be 1.5 times as large. Both keep keys and values in bfloat16.
    """
    model = make_model(**SHAPES[shape])
    tokens = torch.randint(0, V, (3, 30))
    got = stepped(model, tokens, 7, weights=weights)
    twin = rounded(model, weights)
    with torch.no_grad(), use_reference():
        exact = wide(twin)(tokens).logits[:, 7:]
        yardstick = twin if weights == "float32" else GPTForCausalLM(twin.config).eval().bfloat16()
        if weights != "float32":
            yardstick.load_state_dict(twin.state_dict())
        allowed = yardstick(tokens).logits[:, 7:]
        if weights == "int8":
            allowed = read_with_byte_inputs(twin, tokens, 7)
    if weights == "float32":
        assert_as_accurate(got, allowed, exact, label=shape)
    else:
        error, bound = (got - exact).abs(), (allowed.double() - exact).abs()
        assert error.max() <= 2 * bound.max()
        assert error.square().mean() <= (1.5 if weights == "int8" else 1) * bound.square().mean()


def test_a_bfloat16_model_has_weights_of_its_own_dtype():
    """The session of a bfloat16 model stores bfloat16 weights by default, and is as accurate as the model."""
    model = make_model("gpt2", hidden_dim=64, num_heads=2).bfloat16()
    tokens = torch.randint(0, V, (2, 25))
    got = stepped(model, tokens, 5)
    with torch.no_grad(), use_reference():
        exact, yardstick = wide(model)(tokens).logits[:, 5:], model(tokens).logits[:, 5:]
    assert_as_accurate(got.bfloat16(), yardstick, exact)
    assert DecodeSession(model).kind == "bfloat16"


@pytest.mark.parametrize("weights", WEIGHTS)
def test_neither_threads_nor_neighbours_change_a_bit(weights, threads):
    """Batches of 1 to 7 rows use the products of 4, 2 and 1 rows. The model is wide enough for two threads."""
    model = make_model("gpt2", hidden_dim=256, num_heads=4, num_layers=1)
    tokens = torch.randint(0, V, (7, 9))
    prompt = DecodeSession(model, batch=7, weights=weights)
    prompt.prefill(tokens[:, :3])

    def steps(rows: list[int]) -> Tensor:
        """Return the logits of `rows`, starting from a copy of their cache after the prompt."""
        session = DecodeSession(model, batch=len(rows), weights=weights)
        session.cache.keys.copy_(prompt.cache.keys[:, rows])
        session.cache.values.copy_(prompt.cache.values[:, rows])
        session.cache.lengths.fill_(3)
        return torch.stack([session.step(tokens[rows, t]) for t in range(3, 9)], dim=1)

    together = steps(list(range(7)))
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(steps(list(range(7))), together)
        for row in (0, 4, 6):
            assert torch.equal(steps([row]), together[row : row + 1])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_generate_takes_weights(weights):
    """Greedy tokens are the argmax of the session's own logits, also for a batch of prompts of unequal length."""
    model = make_model("gpt2", std=0.3, hidden_dim=32, num_heads=2)
    tokens, lengths = torch.randint(0, V, (3, 8)), torch.tensor([8, 2, 5])
    out = generate(model, tokens, max_new_tokens=12, temperature=0, weights=weights, lengths=lengths)
    session = DecodeSession(model, batch=3, weights=weights)
    logits = session.prefill(tokens, lengths)
    for step in range(12):
        new = logits.argmax(-1)
        assert torch.equal(new, out.gather(1, lengths[:, None] + step).squeeze(1))
        logits = session.step(new)


# --- sampling ---


def draw(logits: Tensor, options: Sampling, draws: int = 1, seen: Tensor | None = None, seed: int = 0) -> Tensor:
    """Draw tokens [draws] from one row of logits [V] in the C++ extension."""
    model = make_model("gpt2", num_tokens=len(logits), hidden_dim=8, num_heads=1, num_layers=1)
    session = DecodeSession(model)
    session.start_drawing(seed)
    row = torch.tensor([0])
    return torch.cat([session.draw(logits[None].float(), options, row, seen) for _ in range(draws)])


def plain_probabilities(logits: Tensor, options: Sampling, seen: Tensor | None = None) -> Tensor:
    """Return float64 probabilities after penalty, temperature, top-k, top-p and min-p, by the Python functions."""
    logits = logits.double()[None]
    if seen is not None:
        logits = penalise(logits, seen, options.repetition_penalty)
    logits = logits / options.temperature
    if options.top_k is not None:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p is not None:
        logits = keep_top_p(logits, options.top_p)
    if options.min_p is not None:
        logits = keep_min_p(logits, options.min_p)
    return logits.softmax(-1)[0]


OPTIONS = {
    "temperature": Sampling(0.7),
    "hot": Sampling(3.0),
    "top_k": Sampling(1.0, top_k=5),
    "top_p": Sampling(1.3, top_p=0.8),
    "both": Sampling(1.0, top_k=9, top_p=0.9),
    "penalty": Sampling(1.0, top_k=12, repetition_penalty=1.5),
    "penalty_of_all": Sampling(2.0, repetition_penalty=1.5),  # applies to negative logits too
    "min_p": Sampling(1.0, min_p=0.1),
    "min_p_after_top_k": Sampling(1.0, top_k=40, min_p=0.1),
    "all_kept": Sampling(1.0, top_k=500, top_p=1.0),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_sampled_frequencies(name):
    """Chi-squared of 20,000 draws against the exact softmax is below its 99.9 % point, for a fixed seed.

    Tokens of probability 0 are never drawn.
    """
    options, N = OPTIONS[name], 20_000
    logits = torch.randn(60, generator=torch.Generator().manual_seed(3)) * 1.5
    seen = torch.arange(60)[None] % 3 == 0 if options.repetition_penalty != 1 else None
    p = plain_probabilities(logits, options, seen)
    counts = torch.bincount(draw(logits, options, N, seen), minlength=60).double()
    assert (counts[p == 0] == 0).all()
    expected = N * p
    common = expected >= 5
    rest_counts, rest = counts[~common].sum(), expected[~common].sum()
    chi = ((counts - expected)[common].square() / expected[common]).sum()
    chi += (rest_counts - rest).square() / rest if rest > 0 else 0.0
    cells = int(common.sum()) + int(rest > 0) - 1
    # Wilson and Hilferty: the cube root of chi-squared over its degrees of freedom is nearly normal. The 99.9 % point
    # of the normal distribution is 3.09.
    limit = cells * (1 - 2 / (9 * cells) + 3.09 * math.sqrt(2 / (9 * cells))) ** 3
    assert chi < limit, (float(chi), limit)


@pytest.mark.parametrize("top_k", [1, 2, 17, 40, 1000, 5000], ids=lambda k: f"k{k}")
def test_top_k_keeps_the_k_largest(top_k):
    """Among 3,000 logits, many of them equal, every drawn token is one of the k largest.

    400 draws find all k tokens for k = 17.
    """
    logits = (torch.randn(3000, generator=torch.Generator().manual_seed(1)) * 4).round() / 4
    drawn = draw(logits, Sampling(5.0, top_k=top_k), 400)
    least = logits.sort(descending=True).values[min(top_k, 3000) - 1]
    assert (logits[drawn] >= least).all()
    assert len(drawn.unique()) <= top_k
    if top_k == 17:
        assert len(drawn.unique()) == 17


def test_of_equal_logits_the_first_are_kept():
    assert set(draw(torch.zeros(50), Sampling(1.0, top_k=3), 200).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("damage", [math.nan, math.inf])
def test_damaged_logits_are_not_drawn_from(damage):
    for options in (Sampling(0), Sampling(1.0), Sampling(1.0, top_k=2)):
        with pytest.raises(ValueError, match="logits hold NaN or infinity"):
            draw(torch.tensor([0.0, damage, 1.0]), options, 1)


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 20.0])
def test_top_p_keeps_the_fewest(temperature, top_p):
    """Every drawn token is one that the Python top-p keeps: thousands in flat distributions, a few in peaked ones."""
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(2))
    options = Sampling(temperature, top_p=top_p)
    p = plain_probabilities(logits, options)
    drawn = draw(logits, options, 300)
    assert (p[drawn] > 0).all()
    assert len(drawn.unique()) > 1 or int((p > 0).sum()) == 1 or float(p.max()) > 0.95


def test_draws_depend_on_seed_row_and_count():
    logits = torch.zeros(50)
    drawn = draw(logits, Sampling(1.0), 100, seed=7)
    assert torch.equal(drawn, draw(logits, Sampling(1.0), 100, seed=7))
    assert not torch.equal(drawn, draw(logits, Sampling(1.0), 100, seed=8))
    assert len(drawn.unique()) > 30
    model = make_model("gpt2", hidden_dim=32, num_heads=2)
    out = generate(model, torch.ones(6, 3, dtype=torch.int64), max_new_tokens=6, temperature=5.0, seed=1)
    assert len({tuple(row) for row in out.tolist()}) == 6


@pytest.mark.parametrize("temperature", [1e-300, 1e-31, 1e-20, 1e-6, 1e6])
def test_extreme_temperatures(temperature):
    drawn = set(draw(torch.tensor([3e4, 2e4, -3e4]), Sampling(temperature), 50).tolist())
    assert drawn == {0} if temperature < 1 else len(drawn) > 1


# --- limits ---


def test_the_cache_to_its_last_slot():
    """A cache with one slot left takes one token, a full cache none. The error leaves the session unchanged."""
    model = make_model("gpt2", hidden_dim=32, num_heads=2)
    tokens = torch.randint(0, V, (2, T))
    session = DecodeSession(model, batch=2, length=12)
    session.prefill(tokens[:, :11])
    with torch.no_grad():
        wanted = model(tokens[:, :12]).logits[:, -1]
    with pytest.raises(ValueError, match="the cache is full: a row would hold 13 tokens, it has room for 12"):
        session.prefill(tokens[:, 11:13])
    assert torch.allclose(session.step(tokens[:, 11]), wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="the cache is full: a row would hold 13 tokens, it has room for 12"):
        session.step(tokens[:, 12])
    assert session.lengths.tolist() == [12, 12]
    session.reset()
    session.prefill(tokens[:, :11])
    assert torch.allclose(session.step(tokens[:, 11]), wanted, atol=1e-5, rtol=1e-4)
    out = generate(model, tokens[:, :1], max_new_tokens=T - 1, temperature=0)  # up to the last position
    with torch.no_grad():
        assert torch.equal(out[:, -1], model(out[:, :-1]).logits[:, -1].argmax(-1))


def test_memory_is_the_weights_once_and_the_cache():
    model = make_model("gpt2", hidden_dim=64, num_heads=2)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2)
    for weights, size in (("float32", 4), ("bfloat16", 2), ("int8", 1), ("int8-a16", 1)):
        session = DecodeSession(model, batch=3, length=20, weights=weights)
        padded = (-V % 16) * 64  # rows of the output layer fill whole panels, of 16 rows at most
        assert matrices * size <= session._step.weights.bytes <= (matrices + padded) * size
        assert session.cache.keys.shape == (2, 3, 2, 20, 32)
        assert session.cache.keys.dtype == (torch.float32 if size == 4 else torch.bfloat16)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_packed_copy_is_read_and_known_to_be_stale(weights):
    """A change of the model's weights does not change a session's results, but sets its `stale`."""
    model = make_model("gpt2", hidden_dim=64, num_heads=2)
    session = DecodeSession(model, weights=weights)
    session.prefill(torch.tensor([[1, 2]]))
    first = session.step(torch.tensor([3]))
    assert not session.stale
    with torch.no_grad():
        model.trunk.decoders[0].ff[0].weight.mul_(2)
    session.reset()
    session.prefill(torch.tensor([[1, 2]]))
    assert torch.equal(session.step(torch.tensor([3])), first)
    assert session.stale
    assert not torch.equal(DecodeSession(model, weights=weights).prefill(torch.tensor([[1, 2, 3]])), first)


@pytest.mark.parametrize("padding", [-100, -1, V, 2**40])
def test_padding_of_a_prompt_may_hold_anything(padding):
    """Padding behind the shorter prompt may hold any integer, such as the -100 of labels: no step reads it."""
    model = make_model("gpt2", hidden_dim=32, num_heads=2)
    tokens, lengths = torch.randint(0, V, (2, 6)), torch.tensor([6, 4])
    expected = DecodeSession(model, batch=2).prefill(tokens, lengths)
    tokens[1, 4:] = padding
    assert torch.equal(DecodeSession(model, batch=2).prefill(tokens, lengths), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: DecodeSession(m, batch=0), "batch is 0; expected 1 or more"),
        (lambda m: DecodeSession(m, length=T + 1), f"length is {T + 1}; expected 1 to the model's seq_len, {T}"),
        (lambda m: DecodeSession(m, weights="fp4"), "weights is 'fp4'; expected one of float32, bfloat16, int8, "),
        (lambda m: DecodeSession(m.trunk), "model is a GPTModel; expected a GPTForCausalLM or a GPT"),
        (
            lambda m: DecodeSession(m).prefill(torch.ones(2, 3, dtype=torch.int64)),
            "tokens has 2 sequences; expected at most the 1",
        ),
        (lambda m: DecodeSession(m).prefill(torch.ones(1, 0, dtype=torch.int64)), "empty prompt"),
        (lambda m: DecodeSession(m).prefill(torch.tensor([[V]])), rf"tokens holds {V}; expected ids in \[0, {V}\)"),
        (lambda m: DecodeSession(m).step(torch.tensor([-1])), rf"tokens holds -1; expected ids in \[0, {V}\)"),
        (lambda m: DecodeSession(m).step(torch.tensor([1, 2])), r"tokens is int64 \[2\]; expected int64 \[1\]"),
        (lambda m: DecodeSession(m).step(torch.tensor([1.0])), r"tokens is float32 \[1\]; expected int64 \[1\]"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_model("gpt2", hidden_dim=16, num_heads=2))


def test_a_model_that_changed_under_its_session():
    """After a change of sizes the session raises an error. After a change of address it works and is `stale`."""
    model = make_model("gpt2", hidden_dim=16, num_heads=2)
    tokens = torch.tensor([[1, 2, 3]])
    session = DecodeSession(model)
    session.prefill(tokens)
    model.resize_embeddings(V + 1)
    assert session.stale
    message = rf"the model changed under it: a parameter is float32 \[{V + 1}, 16\] on cpu, was float32 \[{V}, 16\]"
    with pytest.raises(ValueError, match=message):
        session.step(torch.tensor([4]))
    with pytest.raises(ValueError, match="the model changed under it"):
        generate(model, tokens, max_new_tokens=2, session=session)

    model = make_model("gpt2", hidden_dim=16, num_heads=2)
    session = DecodeSession(model)
    session.prefill(tokens)
    assert not session.stale
    model.to(torch.float64).to(torch.float32)
    assert session.stale
    assert session.step(torch.tensor([4])).isfinite().all()


# --- threads ---


def test_a_session_serves_one_thread_at_a_time():
    """While one thread uses the session, a call from a second thread raises RuntimeError."""
    model = make_model("gpt2", hidden_dim=16, num_heads=2)
    session = DecodeSession(model)
    refused: list[str] = []

    def intrude(shown: Tensor) -> None:
        def other() -> None:
            try:
                session.step(torch.tensor([1]))
            except RuntimeError as error:
                refused.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    generate(model, torch.tensor([[1, 2]]), max_new_tokens=3, session=session, stream=intrude)
    assert len(refused) == 3
    assert all("in use by another thread" in message for message in refused)
    session.step(torch.tensor([1]))


def test_the_gil_is_released_and_the_extension_guards_itself():
    """Two threads call the C++ session at once. The only error is its own "in use by another thread".

    At least one such error must occur. If none occurs, the C++ step has held the GIL.
    """
    model = make_model("gpt2", hidden_dim=256, num_heads=4, num_layers=4)
    session = DecodeSession(model)
    inner = session._step._session
    sampling = session._step._sampling(Sampling(0))
    zero = torch.tensor([0])
    errors: list[BaseException] = []

    def hammer() -> None:
        for _ in range(300):
            try:
                inner.step(zero, zero, zero, sampling)
            except RuntimeError as error:
                errors.append(error)

    workers = [threading.Thread(target=hammer) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors, "a step of 3 million weights never met another: the GIL was held"
    assert all("in use by another thread" in str(error) for error in errors)


def test_the_extension_refuses_places_that_it_does_not_have():
    """The C++ session validates tokens, positions and rows itself: an id past the table would read foreign memory."""
    inner = (session := DecodeSession(make_model("gpt2"), batch=2, length=8))._step._session
    sampling, zero = session._step._sampling(Sampling(0)), torch.tensor([0])
    for token, position, row, message in (
        (V, 0, 0, f"token is {V}; expected one in"),
        (-1, 0, 0, "token is -1; expected one in"),
        (0, 8, 0, "position 8 in a cache of 8"),
        (0, -1, 0, "position -1 in a cache of 8"),
        (0, 0, 2, "row 2; expected different ones in"),
    ):
        with pytest.raises(ValueError, match=message):
            inner.step(torch.tensor([token]), torch.tensor([position]), torch.tensor([row]), sampling)
    with pytest.raises(ValueError, match="row is 2; expected one in"):
        inner.prefill(zero, zero, torch.tensor([2]), zero)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_prompts_of_many_tokens_are_read_in_pieces(weights):
    """Three prompts of 300 tokens are read 512 tokens at a time. Each gives the bits that it gives alone."""
    model = make_model("gpt2", hidden_dim=32, num_heads=2, seq_len=300, num_layers=1)
    tokens = torch.randint(0, V, (3, 300))
    together = DecodeSession(model, batch=3, weights=weights).prefill(tokens)
    for row in range(3):
        assert torch.equal(
            DecodeSession(model, weights=weights).prefill(tokens[row : row + 1]), together[row : row + 1]
        )


@pytest.mark.parametrize(("preset", "hidden_dim"), [("gpt1", 32), ("gpt2", 32), ("gpt2", 36)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_logits_after_chosen_tokens_of_a_prompt(weights, preset, hidden_dim):
    """The last layer computes only the tokens whose logits are returned. They have the bits that steps give them.

    Two prompts of 30 tokens, with logits after no token, after one, after 13 tokens in a row and after tokens apart.
    The cache is the same each time. At width 36 queries, keys and values share vectors of weights.
    """
    model = make_model(preset, hidden_dim=hidden_dim, num_heads=2)
    tokens = torch.randint(0, V, (2, 30))
    by_steps = DecodeSession(model, batch=2, weights=weights)
    expected = torch.stack([by_steps.step(tokens[:, t]) for t in range(30)], dim=1).flatten(0, 1)
    positions, rows = torch.arange(30).repeat(2), torch.arange(2).repeat_interleave(30)
    for ends in ([], [59], list(range(22, 35)), [0, 3, 4, 9, 29, 30, 31, 50, 51, 52, 53, 55, 57, 59]):
        session = DecodeSession(model, batch=2, weights=weights)
        inner = session._step._session
        logits = inner.prefill(tokens.flatten(), positions, rows, torch.tensor(ends, dtype=torch.int64))
        assert torch.equal(logits, expected[ends])
        assert torch.equal(session.cache.keys[:, :, :, :30], by_steps.cache.keys[:, :, :, :30])
        assert torch.equal(session.cache.values[:, :, :, :30], by_steps.cache.values[:, :, :, :30])


def test_two_sessions_in_two_threads():
    """Two threads, each with its own model, both generate the tokens that they generate alone."""
    models = [make_model("gpt2", std=0.3, hidden_dim=128, num_heads=2) for _ in range(2)]
    prompt = torch.randint(0, V, (2, 5))
    alone = [generate(model, prompt, max_new_tokens=30, temperature=0) for model in models]
    found: dict[int, Tensor] = {}

    def run(i: int) -> None:
        found[i] = generate(models[i], prompt, max_new_tokens=30, temperature=0)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert torch.equal(found[0], alone[0])
    assert torch.equal(found[1], alone[1])


def packed_parameters(model: GPTForCausalLM) -> dict[str, Tensor]:
    parameters = dict(model.trunk.named_parameters()) | {"output_layer.weight": model.output_layer.weight}
    return {name: parameter.detach() for name, parameter in parameters.items()}


def pack(model: GPTForCausalLM, parameters: dict[str, Tensor], weights: str) -> object:
    from gpt_fast import _C

    config = model.config
    return _C.DecodeWeights(
        parameters, num_heads=config.num_heads, activation=config.activation, pre_norm=config.pre_norm,
        eps=config.layer_norm_eps, weights=weights,
    )  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bool], ids=str)
def test_packing_reads_no_dtype_as_another(dtype, weights):
    """Each parameter in turn gets another dtype and is refused, int8 matrices included: they would have no scales."""
    model = make_model("gpt2", hidden_dim=64, num_heads=2)
    parameters = packed_parameters(model)
    pack(model, parameters, weights)
    for name, parameter in parameters.items():
        with pytest.raises(ValueError, match=f"DecodeWeights: {name} has dtype .*; expected float32"):
            pack(model, parameters | {name: parameter.to(dtype)}, weights)


@pytest.mark.parametrize(("rows", "columns"), [(0, 16), (V, 0)], ids=["no_tokens", "no_columns"])
def test_packing_refuses_matrices_without_elements(rows, columns):
    model = make_model("gpt2", hidden_dim=16, num_heads=2)
    changed = {name: torch.zeros(rows, columns) for name in ("token_emb.weight", "output_layer.weight")}
    with pytest.raises(ValueError, match="the parameters do not fit together"):
        pack(model, packed_parameters(model) | changed, "float32")


def test_a_model_with_float64_norms_steps_by_its_modules():
    """The C++ step would round float64 norm weights to float32, so the session runs the model's modules instead."""
    model = make_model("gpt2", hidden_dim=16, num_heads=2)
    for decoder in model.trunk.decoders:
        decoder.layer_norm1.double()
    assert DecodeSession(model).kind == "torch"
    tokens = torch.randint(V, (2, 6))
    with torch.no_grad():
        wanted = wide(model)(tokens).logits[:, 2:]
    torch.testing.assert_close(stepped(model, tokens, 2).double(), wanted, rtol=1e-4, atol=1e-4)
