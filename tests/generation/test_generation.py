"""Test `generate` and its sampling functions, on the C++ step and on the model's modules, which a GPU runs."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from gpt_fast import GPT, DecodeSession, GPTConfig, GPTForCausalLM, GPTForMaskedLM, generate, use_reference
from gpt_fast.generation import session as decoding
from gpt_fast.generation import text as generation
from gpt_fast.generation.sampling import Sampling, keep_top_k, keep_top_p, sample

V, SEQ_LEN, PAD = 31, 24, 0


@pytest.fixture(scope="module")
def model() -> GPTForCausalLM:
    """Return a model with weights so large that the greedy choice depends on all of the context."""
    torch.manual_seed(0)
    config = GPTConfig.preset(
        "gpt2", num_tokens=V, hidden_dim=16, num_heads=2, num_layers=2, seq_len=SEQ_LEN, dropout=0.5, pad_token=PAD
    )
    model = GPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.train()  # `generate` itself must switch dropout off


@pytest.fixture(params=["step", "modules"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run each test with both kinds of step: this machine's own (C++, if it is built), and the model's modules."""
    if request.param == "modules":
        checked = decoding.step_kind
        for module in (decoding, generation):
            monkeypatch.setattr(module, "step_kind", lambda *arguments: (checked(*arguments), "torch")[1])
    return request.param


def greedy_by_hand(model: GPTForCausalLM, prompt: list[int], new: int) -> list[int]:
    model.eval()
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(int(model(torch.tensor([tokens[-SEQ_LEN:]])).logits[0, -1].argmax()))
    model.train()
    return tokens


def prompts(*lengths: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, V, (len(lengths), max(lengths)), generator=generator)
    return tokens, torch.tensor(lengths)


def test_greedy_is_the_most_probable_token_each_time(model):
    tokens, _ = prompts(5)
    out = generate(model, tokens, max_new_tokens=9, temperature=0)
    assert out[0].tolist() == greedy_by_hand(model, tokens[0].tolist(), 9)
    assert model.training


def test_a_padded_batch_gives_what_each_row_gives_alone(model):
    """The new tokens follow each prompt directly, and the values in the padding change nothing."""
    tokens, lengths = prompts(3, 8, 1, 8)
    out = generate(model, tokens, max_new_tokens=6, temperature=0, lengths=lengths)
    assert out.shape == (4, 14)
    for row, prompt, length in zip(out.tolist(), tokens.tolist(), lengths.tolist(), strict=True):
        assert row[: length + 6] == greedy_by_hand(model, prompt[:length], 6)
        assert row[length + 6 :] == [PAD] * (8 - length)


@pytest.mark.parametrize("B", [1, 4])
@pytest.mark.parametrize("preset", ["notes", "gpt1", "gpt2"])
def test_equals_the_uncached_reference_for_200_tokens(preset, B):
    """Compare all tokens with the reference, for each preset at reduced width and depth, with an odd head size."""
    config = GPTConfig.preset(preset, num_tokens=101, hidden_dim=36, num_heads=4, num_layers=2, seq_len=220)
    model = shaken(GPTForCausalLM(config)).eval()
    torch.nn.init.normal_(model.trunk.pos_emb)  # without this, some models repeat one token
    tokens = torch.randint(0, 101, (B, 15))
    out = generate(model, tokens, max_new_tokens=200, temperature=0)
    assert len(set(out[:, 15:].flatten().tolist())) > 5  # the model does not repeat one token
    with use_reference(), torch.no_grad():  # attention is causal, so one pass over all tokens replaces 200 passes
        predicted = model(out).logits.argmax(-1)
    assert torch.equal(out[:, 15:], predicted[:, 14:-1])


def shaken(model: torch.nn.Module, std: float = 0.3) -> torch.nn.Module:
    """Give a model weights so large that the greedy choice depends on the context, and random norms and biases."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=std)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def test_the_notes_gpt():
    """The drop-in module `GPT` returns probabilities. Greedy tokens are their argmax."""
    model = shaken(GPT(num_tokens=31, hidden_dim=16, num_heads=2, num_layers=2, seq_len=24, dropout=0.5))
    tokens = torch.randint(0, 31, (2, 5))
    out = generate(model, tokens, max_new_tokens=19, temperature=0)
    assert model.training
    for step in range(5, 24):
        assert torch.equal(out[:, step], model.eval()(out[:, :step])[:, -1].argmax(-1))


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_a_key_mask_gives_what_each_row_gives_alone(model, padding):
    """The new tokens begin at T. It does not matter where in a row its real tokens are."""
    tokens, lengths = prompts(3, 8, 1, 6)
    B, T = tokens.shape
    mask = torch.arange(T) < lengths[:, None]
    if padding == "left":
        mask = mask.flip(1)
    if padding == "holes":
        mask = mask[:, torch.randperm(T)]
    out = generate(model, tokens, max_new_tokens=6, temperature=0, key_mask=mask)
    assert out.shape == (B, T + 6)
    for row, got, prompt in zip(mask, out, tokens, strict=True):
        real = prompt[row].tolist()
        assert got[:T][row].tolist() == real
        assert (got[:T][~row] == PAD).all()
        assert real + got[T:].tolist() == greedy_by_hand(model, real, 6)


def test_repetition_penalty_against_a_plain_loop(model):
    """The penalty applies to every token of a row's prompt, except padding, and to each token generated so far."""
    tokens, lengths = prompts(4, 7)
    out = generate(model, tokens, max_new_tokens=9, temperature=0, repetition_penalty=1.7, lengths=lengths)
    plain = generate(model, tokens, max_new_tokens=9, temperature=0, lengths=lengths)
    assert not torch.equal(out, plain)
    model.eval()
    for row, prompt, length in zip(out.tolist(), tokens.tolist(), lengths.tolist(), strict=True):
        wanted = prompt[:length]
        for _ in range(9):
            logits = model(torch.tensor([wanted])).logits[0, -1]
            for token in set(wanted):
                logits[token] = logits[token] / 1.7 if logits[token] > 0 else logits[token] * 1.7
            wanted.append(int(logits.argmax()))
        assert row[: length + 9] == wanted
    model.train()


@pytest.mark.parametrize("then", ["step", "prefill", "generate", "reset"])
def test_the_last_token_is_read_by_the_next_call(model, then, monkeypatch):
    """`generate` draws n tokens with n - 1 steps after the prompt. The next call reads the last token first."""
    session, other = DecodeSession(model, batch=2), DecodeSession(model, batch=2)
    steps = []
    advance = session.advance
    monkeypatch.setattr(session, "advance", lambda *args, **options: steps.append(1) or advance(*args, **options))
    tokens, lengths = prompts(3, 5)
    out = generate(model, tokens, max_new_tokens=4, temperature=0, lengths=lengths, session=session)
    assert len(steps) == 3
    assert session.lengths.tolist() == (lengths + 4).tolist()
    other.prefill(out, lengths + 4)

    more = torch.tensor([[1, 2], [3, 4]])
    if then == "reset":
        session.reset()
        assert session.lengths.tolist() == [0, 0]
        assert torch.equal(session.prefill(more), DecodeSession(model, batch=2).prefill(more))
    elif then == "generate":
        got, expected = (generate(model, more, max_new_tokens=3, temperature=0, session=s) for s in (session, other))
        assert torch.equal(got, expected)
    elif then == "prefill":
        torch.testing.assert_close(session.prefill(more), other.prefill(more))
    else:
        torch.testing.assert_close(session.step(more[:, 0]), other.step(more[:, 0]))
    assert len(steps) == {"step": 5, "prefill": 4, "generate": 6, "reset": 3}[then]


def test_a_last_token_that_cannot_be_read_stays_unread(model):
    """If the last token gives NaN, the next call raises an error and leaves the session as it was."""
    session = DecodeSession(model, batch=1)
    generate(model, torch.tensor([[1, 2]]), max_new_tokens=2, temperature=0, session=session)
    with torch.no_grad():
        weight = model.trunk.token_emb.weight
        before = weight.clone()
        weight.fill_(math.nan)
    for call in (lambda: session.step(torch.tensor([1])), lambda: session.prefill(torch.tensor([[1]]))):
        with pytest.raises(ValueError, match="logits hold NaN or infinity"):
            call()
        assert session.lengths.tolist() == [4]
    with torch.no_grad():
        weight.copy_(before)


def test_chat_turns(model):
    """A session keeps prompt and answer, and the next turn continues from them, also with rows of unequal length."""
    session = DecodeSession(model, batch=2)
    turns = [prompts(3, 5), (torch.tensor([[4, 9, 0], [7, 1, 2]]), torch.tensor([2, 3]))]
    history: list[list[int]] = [[], []]
    for tokens, lengths in turns:
        out = generate(model, tokens, max_new_tokens=4, temperature=0, lengths=lengths, session=session)
        for b in range(2):
            n = int(lengths[b])
            wanted = greedy_by_hand(model, history[b] + tokens[b, :n].tolist(), 4)
            history[b] += out[b, : n + 4].tolist()
            assert history[b] == wanted
    assert session.lengths.tolist() == [len(row) for row in history]
    with pytest.raises(ValueError, match="the cache is full: a row would hold 35 tokens, it has room for 24"):
        generate(model, tokens, max_new_tokens=16, session=session)
    assert session.lengths.tolist() == [len(row) for row in history]
    with pytest.raises(ValueError, match="session has 2 rows for 1 rows"):
        generate(model, tokens[:1], max_new_tokens=1, session=session)


def test_long_prompts_are_read_in_passes(model, monkeypatch):
    """A prompt that is read three tokens of each row at a time gives the tokens of one that is read at once."""
    tokens, lengths = prompts(14, 9)
    whole = generate(model, tokens, max_new_tokens=6, temperature=0, lengths=lengths)
    monkeypatch.setattr(decoding, "_PROMPT_TOKENS", 6)
    assert torch.equal(whole, generate(model, tokens, max_new_tokens=6, temperature=0, lengths=lengths))


def test_updated_weights_are_noticed(model):
    """`generate` sees the new weights after an optimiser step, `.to()`, a replaced norm or a resized vocabulary."""
    own = shaken(GPTForCausalLM(model.config), std=0.5).eval()
    tokens, _ = prompts(5)

    def check() -> None:
        assert generate(own, tokens, max_new_tokens=8, temperature=0)[0].tolist() == greedy_by_hand(
            own.eval(), tokens[0].tolist(), 8
        )
        own.eval()

    check()
    for fused in (False, True):
        optimizer = torch.optim.AdamW(own.parameters(), lr=0.3, fused=fused)
        session = DecodeSession(own)
        assert not session.stale
        own(tokens, labels=tokens).loss.backward()
        optimizer.step()
        assert session.stale
        check()
    own.to(torch.float64)
    check()
    own.to(torch.float32)
    own.trunk.final_norm = torch.nn.LayerNorm(16)
    check()
    own.resize_embeddings(V + 3)
    check()


def test_a_copied_model_goes_without_the_session(model):
    tokens, _ = prompts(5)
    wanted = generate(model, tokens, max_new_tokens=3, temperature=0)
    copied = copy.deepcopy(model)
    assert torch.equal(generate(copied, tokens, max_new_tokens=3, temperature=0), wanted)
    assert not any("session" in name for name in model.state_dict())


def test_float64(model):
    """A float64 model runs the reference, in float64 throughout."""
    wide = copy.deepcopy(model).double()
    tokens, _ = prompts(5)
    out = generate(wide, tokens, max_new_tokens=9, temperature=0)
    assert out[0].tolist() == greedy_by_hand(wide, tokens[0].tolist(), 9)


def test_seeds(model):
    tokens, _ = prompts(4, 4)
    state = torch.get_rng_state()
    first, same, other = (generate(model, tokens, max_new_tokens=12, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)  # with a seed, torch's own generator does not advance


def test_without_a_seed_torch_governs(model):
    tokens, _ = prompts(4)
    torch.manual_seed(3)
    first = generate(model, tokens, max_new_tokens=12)
    torch.manual_seed(3)
    assert torch.equal(first, generate(model, tokens, max_new_tokens=12))


def test_stop_tokens_end_their_row_alone(model):
    tokens, _ = prompts(4, 4)
    free = generate(model, tokens, max_new_tokens=10, temperature=0).tolist()
    stop = free[0][6]
    out = generate(model, tokens, max_new_tokens=10, temperature=0, stop_tokens=[stop, V + 5]).tolist()
    for got, wanted in zip(out, free, strict=True):
        end = wanted.index(stop, 4) + 1 if stop in wanted[4:] else 14
        assert got == wanted[:end] + [PAD] * (14 - end)


def test_generation_ends_when_every_row_has_stopped(model):
    tokens, _ = prompts(4)
    steps: list[Tensor] = []
    out = generate(model, tokens, max_new_tokens=10, temperature=0, stop_tokens=range(V), stream=steps.append)
    assert len(steps) == 1
    assert out.shape == (1, 14)


def test_stream_sees_every_token(model):
    tokens, lengths = prompts(2, 5)
    steps: list[Tensor] = []
    out = generate(model, tokens, max_new_tokens=4, seed=0, lengths=lengths, stream=steps.append)
    streamed = torch.stack(steps, dim=1)
    assert torch.equal(streamed, torch.stack([out[0, 2:6], out[1, 5:9]]))


def greedy_sliding(model: GPTForCausalLM, prompt: list[int], new: int) -> list[int]:
    """Generate greedily with a window of at most SEQ_LEN tokens. A full window restarts with the last SEQ_LEN // 2."""
    model.eval()
    tokens, window = list(prompt), prompt[-SEQ_LEN:]
    for _ in range(new):
        tokens.append(int(model(torch.tensor([window])).logits[0, -1].argmax()))
        window = [*window, tokens[-1]] if len(window) < SEQ_LEN else tokens[-(SEQ_LEN // 2) :]
    model.train()
    return tokens


def test_sliding_goes_on_from_the_later_half(model):
    """The rows' windows are full at different times, and one prompt alone is longer than the context."""
    tokens, lengths = prompts(20, 7, 30)
    out = generate(model, tokens, max_new_tokens=45, temperature=0, lengths=lengths, sliding=True)
    for row, prompt, length in zip(out.tolist(), tokens.tolist(), lengths.tolist(), strict=True):
        assert row[: length + 45] == greedy_sliding(model, prompt[:length], 45)


def test_no_new_tokens(model):
    tokens, _ = prompts(4)
    assert torch.equal(generate(model, tokens, max_new_tokens=0), tokens)


# --- sampling ---


def test_a_top_k_beyond_the_vocabulary_keeps_all(model):
    """10^20 does not fit into a C++ integer, for which pybind11 would raise TypeError."""
    prompt = torch.tensor([[3, 4]])
    everything = generate(model, prompt, max_new_tokens=8, seed=1)
    assert torch.equal(generate(model, prompt, max_new_tokens=8, seed=1, top_k=10**20), everything)


def test_top_k_keeps_exactly_k():
    """top_k keeps exactly k logits even if the k-th largest occurs twice, and all logits if there are fewer than k."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0], [0.0, -1.0, -2.0, -3.0]])
    assert keep_top_k(logits, 2).isfinite().sum(dim=1).tolist() == [2, 2]
    assert keep_top_k(logits, 2)[1].tolist() == [0.0, -1.0, -math.inf, -math.inf]
    assert torch.equal(keep_top_k(logits, 9), logits)


@pytest.mark.parametrize(("p", "kept"), [(1e-9, 1), (0.499, 1), (0.501, 2), (0.79, 2), (0.81, 3), (0.999, 4)], ids=str)
def test_top_p_keeps_the_fewest_that_reach_it(p, kept):
    logits = torch.tensor([[0.05, 0.3, 0.15, 0.5]]).double().log()
    expected = sorted([3, 1, 2, 0][:kept])
    assert keep_top_p(logits, p).isfinite()[0].nonzero().flatten().tolist() == expected


def test_sampling_follows_the_distribution():
    """Frequencies of 40,000 draws lie within four standard deviations of `softmax(logits / temperature)`."""
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5])
    N = 40_000
    options = Sampling(temperature=0.7, top_k=4, top_p=0.97)
    drawn = sample(logits.expand(N, -1), options, generator=torch.Generator().manual_seed(0))
    # top_k drops the logit -1. The logits 2, 1.5 and 1 together have probability 0.96 < top_p, so the 0 stays too.
    p = (logits / 0.7).masked_fill(logits == -1, -math.inf).softmax(0)
    assert float(p[[0, 2, 4]].sum()) < 0.97
    share = torch.bincount(drawn, minlength=5) / N
    assert ((share - p).abs() <= 4 * (p * (1 - p) / N).sqrt()).all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures(temperature):
    logits = torch.tensor([[3e4, 2e4, -3e4]], dtype=torch.float32)
    drawn = {int(sample(logits, Sampling(temperature))) for _ in range(50)}
    assert drawn == {0} if temperature < 1 else len(drawn) > 1


# --- invalid arguments and damaged models ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": torch.empty(1, 0, dtype=torch.int64)}, "empty prompt"),
        ({"lengths": torch.tensor([0])}, "empty prompt"),
        ({"lengths": torch.tensor([6])}, "lengths holds 6; expected at most the 5 of a row"),
        ({"lengths": torch.tensor([5, 5])}, r"lengths is int64 \[2\]; expected integers \[1\]"),
        ({"tokens": torch.ones(5, dtype=torch.int64)}, r"tokens is int64 \[5\]; expected int64 \[B, T\]"),
        ({"tokens": torch.ones(1, 5)}, "tokens is float32"),
        ({"tokens": torch.tensor([[1, V]])}, "31"),
        ({"temperature": -0.1}, "temperature is -0.1; expected 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; expected more than 0"),
        ({"weights": "int4"}, "weights is 'int4'; expected one of float32, bfloat16, int8, int8-a16"),
        ({"key_mask": torch.ones(1, 4, dtype=torch.bool)}, r"key_mask is bool \[1, 4\]; expected bool \[1, 5\]"),
        ({"key_mask": torch.zeros(1, 5, dtype=torch.bool)}, "empty prompt"),
        (
            {"key_mask": torch.ones(1, 5, dtype=torch.bool), "lengths": torch.tensor([5])},
            "got both lengths and key_mask",
        ),
        ({"top_k": 0}, "top_k is 0; expected an integer of 1"),
        ({"top_p": 0.0}, "top_p is 0.0; expected more than 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 20}, "5 tokens of prompt and 20 new ones make 25, but the model has 24 positions"),
    ],
)
def test_refuses(model, options, message):
    options = {"tokens": torch.ones(1, 5, dtype=torch.int64), "max_new_tokens": 2} | options
    with pytest.raises(ValueError, match=message):
        generate(model, options.pop("tokens"), **options)
    assert model.training


def test_refuses_a_damaged_model(model):
    damaged = GPTForCausalLM(model.config)
    with torch.no_grad():
        damaged.trunk.token_emb.weight[3, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        generate(damaged, torch.ones(1, 5, dtype=torch.int64), max_new_tokens=2)


def test_a_session_survives_damaged_logits(model):
    """Token 3 gives NaN in the middle of a text. The session forgets that step and can continue."""
    damaged = shaken(GPTForCausalLM(model.config.replace(tied=False, pad_token=None)), std=0.5).eval()
    with torch.no_grad():
        damaged.trunk.token_emb.weight[3, 0] = math.nan
    session = DecodeSession(damaged)
    session.prefill(torch.tensor([[5, 8, 2]]))
    with pytest.raises(ValueError, match="NaN"):
        session.step(torch.tensor([3]))
    with pytest.raises(ValueError, match="NaN"):
        session.prefill(torch.tensor([[1, 3]]))
    assert session.lengths.tolist() == [3]
    got = session.step(torch.tensor([7]))
    wanted = damaged(torch.tensor([[5, 8, 2, 7]])).logits[:, -1]
    assert torch.allclose(got, wanted, atol=1e-4, rtol=1e-4)


def test_refuses_another_head(model):
    with pytest.raises(ValueError, match="model is a GPTForMaskedLM; expected a GPTForCausalLM or a GPT"):
        generate(GPTForMaskedLM(model.config), torch.ones(1, 5, dtype=torch.int64), max_new_tokens=2)


def test_padding_takes_no_room(model):
    """A batch may be padded beyond the model's positions, as long as its prompts and new tokens fit."""
    tokens, lengths = prompts(5, 3)
    padded = torch.cat([tokens, torch.full((2, SEQ_LEN), PAD)], dim=1)
    out = generate(model, padded, max_new_tokens=6, temperature=0, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        assert out[row, : length + 6].tolist() == greedy_by_hand(model, tokens[row, :length].tolist(), 6)


def test_a_prompt_whose_padding_passes_the_end_of_the_cache(model):
    """The first prompt fills most of the cache. The second fits, but its padding passes the end of the cache."""
    first, _ = prompts(SEQ_LEN - 6, SEQ_LEN - 6)
    second, lengths = prompts(4, 4)
    padded = torch.cat([second, torch.full((2, 9), PAD)], dim=1)
    session = decoding.DecodeSession(model, batch=2)
    session.prefill(first)
    got = session.prefill(padded, lengths)
    model.eval()
    wanted = model(torch.cat([first, second], dim=1)).logits[:, -1]
    model.train()
    torch.testing.assert_close(got, wanted)


def test_sliding_with_stop_tokens_in_a_batch(model):
    """A row that has stopped keeps its full cache while the other row continues, and must not write past its end."""
    tokens, _ = prompts(4, 4)
    free = generate(model, tokens, max_new_tokens=60, temperature=0, sliding=True)
    for row in range(2):
        for stop in {int(free[row, SEQ_LEN]), int(free[row, SEQ_LEN - 1]), int(free[row, SEQ_LEN + 1])}:
            out = generate(model, tokens, max_new_tokens=60, temperature=0, sliding=True, stop_tokens=[stop]).tolist()
            for got, wanted in zip(out, free.tolist(), strict=True):
                end = wanted.index(stop, 4) + 1 if stop in wanted[4:] else 64
                assert got == wanted[:end] + [PAD] * (64 - end)


def test_greedy_leaves_torchs_generator_alone(model):
    """Greedy generation does not advance torch's generator, so printing a sample does not change later training."""
    tokens, _ = prompts(4)
    state = torch.get_rng_state()
    generate(model, tokens, max_new_tokens=3, temperature=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_session_is_not_copied(model, copy_of):
    session = decoding.DecodeSession(model)
    with pytest.raises(TypeError, match="DecodeSession: cannot be copied or pickled"):
        copy_of(session)


def test_tokens_on_another_device_are_named():
    """The error names `tokens`. Without this check, PyTorch's error would name a weight or a mask."""
    model = GPTForCausalLM(
        GPTConfig.preset("gpt2", num_tokens=31, hidden_dim=16, num_heads=2, num_layers=1, seq_len=24)
    )
    tokens = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"generate: tokens is on meta; expected cpu, as the model"):
        generate(model, tokens, max_new_tokens=2)
    session = DecodeSession(model, batch=2)
    with pytest.raises(ValueError, match="tokens is on meta"):
        session.prefill(tokens)
    with pytest.raises(ValueError, match="tokens is on meta"):
        session.step(tokens[:, 0])
