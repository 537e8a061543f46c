"""`generate` and its sampling functions."""

import math

import pytest
import torch
from torch import Tensor

from gpt_fast import GPTConfig, GPTForCausalLM, GPTForMaskedLM, generate
from gpt_fast.generation import keep_top_k, keep_top_p, sample

V, SEQ_LEN, PAD = 31, 24, 0


@pytest.fixture(scope="module")
def model() -> GPTForCausalLM:
    """Large random weights, so that the greedy choice depends on all of the context."""
    torch.manual_seed(0)
    config = GPTConfig.preset(
        "gpt2", num_tokens=V, hidden_dim=16, num_heads=2, num_layers=2, seq_len=SEQ_LEN, dropout=0.5, pad_token=PAD
    )
    model = GPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.train()  # generate itself has to switch dropout off


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
    """The new tokens follow each prompt directly; what the padding of the prompt holds changes nothing."""
    tokens, lengths = prompts(3, 8, 1, 8)
    out = generate(model, tokens, max_new_tokens=6, temperature=0, lengths=lengths)
    assert out.shape == (4, 14)
    for row, prompt, length in zip(out.tolist(), tokens.tolist(), lengths.tolist(), strict=True):
        assert row[: length + 6] == greedy_by_hand(model, prompt[:length], 6)
        assert row[length + 6 :] == [PAD] * (8 - length)


def test_seeds(model):
    tokens, _ = prompts(4, 4)
    state = torch.get_rng_state()
    first, same, other = (generate(model, tokens, max_new_tokens=12, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)  # a seed leaves torch's own generator alone


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


def test_sliding_goes_on_from_the_last_tokens(model):
    """Past seq_len the model sees its last seq_len tokens, also where the rows are of unequal length."""
    tokens, lengths = prompts(20, 7)
    out = generate(model, tokens, max_new_tokens=15, temperature=0, lengths=lengths, sliding=True)
    for row, prompt, length in zip(out.tolist(), tokens.tolist(), lengths.tolist(), strict=True):
        assert row[: length + 15] == greedy_by_hand(model, prompt[:length], 15)


def test_no_new_tokens(model):
    tokens, _ = prompts(4)
    assert torch.equal(generate(model, tokens, max_new_tokens=0), tokens)


# --- sampling ---


def test_top_k_keeps_exactly_k():
    """Also where the k-th largest is not alone, and where there are fewer than k."""
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
    """Frequencies of 40,000 draws within four standard deviations of `softmax(logits / temperature)`."""
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5])
    N = 40_000
    drawn = sample(
        logits.expand(N, -1), temperature=0.7, top_k=4, top_p=0.97, generator=torch.Generator().manual_seed(0)
    )
    # top_k drops the -1; of the rest, 2, 1.5 and 1 reach 0.96 together, so the 0 stays too.
    p = (logits / 0.7).masked_fill(logits == -1, -math.inf).softmax(0)
    assert float(p[[0, 2, 4]].sum()) < 0.97
    share = torch.bincount(drawn, minlength=5) / N
    assert ((share - p).abs() <= 4 * (p * (1 - p) / N).sqrt()).all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e6])
def test_extreme_temperatures(temperature):
    logits = torch.tensor([[3e4, 2e4, -3e4]], dtype=torch.float32)
    drawn = {int(sample(logits, temperature=temperature)) for _ in range(50)}
    assert drawn == {0} if temperature < 1 else len(drawn) > 1


# --- what it refuses ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": torch.empty(1, 0, dtype=torch.int64)}, "empty prompt"),
        ({"lengths": torch.tensor([0])}, "empty prompt"),
        ({"lengths": torch.tensor([6])}, "a length of 6 in rows of 5"),
        ({"lengths": torch.tensor([5, 5])}, "wanted 1 integer lengths"),
        ({"tokens": torch.ones(5, dtype=torch.int64)}, r"wanted int64 tokens \[B, T\], got torch.int64 \[5\]"),
        ({"tokens": torch.ones(1, 5)}, "got torch.float32"),
        ({"tokens": torch.tensor([[1, V]])}, "31"),
        ({"temperature": -0.1}, "temperature -0.1; wanted 0"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_k": 0}, "top_k 0; wanted 1"),
        ({"top_p": 0.0}, "top_p 0.0; wanted more than 0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens -1"),
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


def test_refuses_another_head(model):
    with pytest.raises(ValueError, match="wanted a GPTForCausalLM, got GPTForMaskedLM"):
        generate(GPTForMaskedLM(model.config), torch.ones(1, 5, dtype=torch.int64), max_new_tokens=2)
