"""Test `gpt_fast.score`: log-probabilities against a softmax of all logits, padding, windows and invalid arguments."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gpt_fast
from gpt_fast import GPT, GPTConfig, GPTForCausalLM, GPTForMaskedLM, GPTForSequenceClassification
from gpt_fast.scoring import score_continuations, sliding
from tests import numerics

V, T = 61, 20
SIZES = {"num_tokens": V, "hidden_dim": 32, "num_heads": 4, "num_layers": 2, "seq_len": T, "dropout": 0.1}


def build(head=GPTForCausalLM, preset="gpt2", **overrides):
    """Return a model in training mode with dropout, with random biases and gains."""
    model = head(GPTConfig.preset(preset, **SIZES | overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens_of(B=3, length=9):
    return torch.randint(0, V, (B, length))


def log_softmax(model, tokens):
    """Return the log-probability of each token except the first of a row, from all logits, in float64."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        logits = model(tokens).logits
    return logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]


@pytest.mark.parametrize("preset", ["notes", "gpt1", "gpt2"])
def test_scores_are_the_log_softmax_of_the_next_token(preset):
    """The model is in float64, so the scores may differ by one rounding to float32 only."""
    model, tokens = build(preset=preset).double(), tokens_of()
    scores = gpt_fast.score(model, tokens)
    assert torch.equal(scores.predicted, torch.arange(9).expand(3, 9) > 0)
    assert not scores.log_probs[:, 0].any()
    numerics.assert_rounded_once(scores.log_probs[:, 1:], log_softmax(model, tokens))
    assert model.training
    assert scores.greedy is None


def test_the_kernels_agree_in_float32():
    model, tokens = build(), tokens_of()
    scores = gpt_fast.score(model, tokens)
    torch.testing.assert_close(scores.log_probs[:, 1:].double(), log_softmax(model, tokens), rtol=1e-5, atol=1e-5)


def test_the_loss_is_their_mean():
    model, tokens = build().eval(), tokens_of()
    scores = gpt_fast.score(model, tokens)
    mean = scores.log_probs.sum() / scores.predicted.sum()
    assert torch.allclose(-mean, model(tokens, tokens).loss, rtol=1e-5)


def test_the_drop_in_is_scored():
    model = GPT(V, 32, 4, 2, T, 0.1).double()
    tokens = tokens_of()
    log_probs = gpt_fast.score(model, tokens).log_probs
    wanted = copy.deepcopy(model).eval()(tokens)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0].log()
    numerics.assert_rounded_once(log_probs[:, 1:], wanted.detach())


@pytest.mark.parametrize("kind", ["lengths", "left mask", "holes"])
def test_a_padded_row_gets_what_it_gets_alone(kind):
    model, tokens = build().double(), tokens_of(3, 12)
    lengths = torch.tensor([12, 5, 1])
    mask = torch.arange(12) < lengths[:, None]
    if kind == "lengths":
        padding = {"lengths": lengths}
    elif kind == "left mask":
        mask = mask.flip(1)
        padding = {"attention_mask": mask.long()}
    else:
        mask[0, 4] = mask[1, 2] = False
        padding = {"key_mask": mask}
    scores = gpt_fast.score(model, tokens, **padding)
    for row in range(3):
        alone = gpt_fast.score(model, tokens[row : row + 1][mask[row : row + 1]][None])
        torch.testing.assert_close(scores.log_probs[row][mask[row]], alone.log_probs[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(scores.predicted[row][mask[row]], alone.predicted[0])
        assert not scores.log_probs[row][~mask[row]].any()
        assert not scores.predicted[row][~mask[row]].any()


def test_what_padding_holds_changes_nothing():
    model, tokens = build(), tokens_of(2, 8)
    lengths = torch.tensor([8, 5])
    before = gpt_fast.score(model, tokens, lengths=lengths)
    tokens[1, 5:] = -7  # not a token id
    assert torch.equal(gpt_fast.score(model, tokens, lengths=lengths).log_probs, before.log_probs)


# ---- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "stride", "expected"),
    [
        (0, 5, []),
        (1, 5, [(0, 0, 1)]),
        (20, 5, [(0, 0, 20)]),
        (21, 5, [(0, 0, 20), (5, 20, 21)]),
        (32, 5, [(0, 0, 20), (5, 20, 25), (10, 25, 30), (15, 30, 32)]),
        (45, 20, [(0, 0, 20), (20, 20, 40), (40, 40, 45)]),
        (22, 1, [(0, 0, 20), (1, 20, 21), (2, 21, 22)]),
    ],
)
def test_windows(length, stride, expected):
    assert sliding(length, 20, stride) == expected


@pytest.mark.parametrize("stride", [1, 7, 19, 20])
def test_a_long_row_is_read_in_windows(stride):
    """Each token's score is conditioned on the tokens before it in its window, whatever the batch of windows."""
    model, tokens = build().double(), tokens_of(2, 53)
    lengths = torch.tensor([53, 41])
    scores = gpt_fast.score(model, tokens, lengths=lengths, stride=stride, batch_size=3)
    for row, length in enumerate(lengths.tolist()):
        wanted, counted = torch.zeros(53, dtype=torch.float64), torch.zeros(53, dtype=torch.bool)
        for begin, first, end in sliding(length, T, stride):
            for position in range(max(first, begin + 1), end):
                wanted[position] = log_softmax(model, tokens[row : row + 1, begin : position + 1])[0, -1]
                counted[position] = True
        assert torch.equal(scores.predicted[row], counted)
        numerics.assert_rounded_once(scores.log_probs[row], wanted)


def test_default_stride_is_half_of_the_positions():
    model, tokens = build(), tokens_of(1, 50)
    half = gpt_fast.score(model, tokens, stride=T // 2)
    assert torch.equal(gpt_fast.score(model, tokens).log_probs, half.log_probs)
    assert half.predicted.sum() == 49


# ---- other targets ---------------------------------------------------------------------------------------------------


def test_labels_choose_positions():
    model, tokens = build().double(), tokens_of()
    labels = tokens.masked_fill(torch.arange(9) % 3 > 0, -100)
    labels[0, 3] = (tokens[0, 3] + 1) % V  # differs from the token that follows
    scores = gpt_fast.score(model, tokens, labels=labels)
    assert torch.equal(scores.predicted, (labels != -100) & (torch.arange(9) > 0))
    wanted = copy.deepcopy(model).eval()(tokens).logits.log_softmax(-1)[0, 2, labels[0, 3]].detach()
    numerics.assert_rounded_once(scores.log_probs[0, 3], wanted)


def test_a_masked_model_sees_both_sides():
    model, tokens = build(GPTForMaskedLM).double(), tokens_of()
    labels = torch.full_like(tokens, -100)
    labels[:, 4] = tokens[:, 4]
    tokens[:, 4] = 2  # the mask
    scores = gpt_fast.score(model, tokens, labels=labels)
    assert torch.equal(scores.predicted, labels != -100)
    logits = copy.deepcopy(model).eval()(tokens).logits[:, 4]
    numerics.assert_rounded_once(
        scores.log_probs[:, 4], logits.log_softmax(-1).gather(1, labels[:, 4:5])[:, 0].detach()
    )


@pytest.mark.parametrize("chunk", [1, V * 5, 1 << 22], ids=["a row", "five rows", "all"])
def test_greedy_tells_the_most_probable_tokens(chunk, monkeypatch):
    monkeypatch.setattr(gpt_fast.scoring, "_CHUNK", chunk)
    model, tokens = build().eval(), tokens_of(4, 12)
    tokens[:, 1:] = torch.where(torch.rand(4, 11) < 0.5, model(tokens).logits[:, :-1].argmax(-1), tokens[:, 1:])
    scores = gpt_fast.score(model, tokens, greedy=True)
    wanted = F.pad(model(tokens).logits[:, :-1].argmax(-1) == tokens[:, 1:], (1, 0))
    assert torch.equal(scores.greedy, wanted)
    assert 0 < scores.greedy.sum() < 44


def test_another_output_layer_is_called_in_chunks(monkeypatch):
    """An output layer with a hook is not fused. It is called for few rows at a time."""
    model, tokens = build().double(), tokens_of()
    wanted, rows = gpt_fast.score(model, tokens), []
    monkeypatch.setattr(gpt_fast.scoring, "_CHUNK", 5 * V)
    model.output_layer.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    scores = gpt_fast.score(model, tokens)
    numerics.assert_rounded_once(scores.log_probs, wanted.log_probs.double())
    assert rows == [5, 5, 5, 5, 4]


class Largest(TorchDispatchMode):
    """Dispatch mode that remembers the size of the largest tensor that any op returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("greedy", [False, True])
def test_no_logits_are_stored(greedy):
    """With 50,000 tokens in the vocabulary, the largest tensor is the weight or about 80 of the 800 rows of logits."""
    model = build(num_tokens=50_000, hidden_dim=8, num_heads=1, num_layers=1)
    tokens = torch.randint(0, 50_000, (40, T))
    with Largest() as seen:
        gpt_fast.score(model, tokens, batch_size=40, greedy=greedy)
    assert seen.numel <= (gpt_fast.scoring._CHUNK if greedy else 50_000 * 8)
    assert seen.numel < 40 * (T - 1) * 50_000 / 5


# ---- texts -----------------------------------------------------------------------------------------------------------


def words_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_texts_follow_the_start_token():
    model = build(start_token=60).double()
    scores = gpt_fast.score(model, ["w3 w5 w8", "w9"], tokenizer=words_tokenizer())
    assert scores.tokens.tolist() == [[60, 3, 5, 8], [60, 9, 0, 0]]
    assert scores.predicted.tolist() == [[False, True, True, True], [False, True, False, False]]
    numerics.assert_rounded_once(scores.log_probs[0, 1:], log_softmax(model, scores.tokens[:1])[0])
    numerics.assert_rounded_once(scores.log_probs[1, 1:2], log_softmax(model, scores.tokens[1:, :2])[0])
    one = gpt_fast.score(model, "w3 w5 w8", tokenizer=words_tokenizer())
    assert one.tokens.shape == (1, 4)


def test_without_a_start_token_the_first_token_is_not_scored():
    scores = gpt_fast.score(build(), ["w3 w5 w8"], tokenizer=words_tokenizer())
    assert scores.tokens.tolist() == [[3, 5, 8]]
    assert scores.predicted.tolist() == [[False, True, True]]


# ---- continuations ---------------------------------------------------------------------------------------------------


def test_continuations():
    """Each continuation has the score that a separate pass gives. A context that is too long loses its first tokens."""
    model = build().double()
    contexts, continuations = ([4, 5, 6], [7], [8] * 30), ([1, 2], [9, 3, 3], list(range(T)))
    found = score_continuations(model, list(zip(contexts, continuations, strict=True)), batch_size=2)
    for context, continuation, got in zip(contexts, continuations, found, strict=True):
        row = torch.tensor([[*context, *continuation][-(T + 1) :]])
        with torch.no_grad():
            logits = copy.deepcopy(model).eval()(row[:, :-1]).logits[0, -len(continuation) :]
        wanted = logits.log_softmax(-1)[torch.arange(len(continuation)), torch.tensor(continuation)].sum()
        assert got.log_prob == pytest.approx(float(wanted), rel=1e-6)
        assert got.is_greedy == (logits.argmax(-1).tolist() == continuation)
        written = logits[:1].argmax(-1).tolist()
        assert score_continuations(model, [(row[0, : -len(continuation)].tolist(), written)])[0].is_greedy


# ---- edges and errors ------------------------------------------------------------------------------------------------


def test_nothing_to_score():
    model = build()
    for shape in ((0, 5), (2, 0), (2, 1)):
        scores = gpt_fast.score(model, torch.zeros(shape, dtype=torch.int64), greedy=True)
        assert scores.log_probs.shape == shape
        assert not scores.predicted.any()
    assert gpt_fast.score(model, [], tokenizer=words_tokenizer()).tokens.shape == (0, 0)
    assert score_continuations(model, []) == []


def test_a_wrapped_model_is_scored():
    model, tokens = build(), tokens_of()
    scores = gpt_fast.score(nn.DataParallel(model), tokens)
    assert torch.equal(scores.log_probs, gpt_fast.score(model, tokens).log_probs)


TOKENS = torch.zeros(2, 6, dtype=torch.int64)
REFUSED = {
    "tokens of a row": ({"inputs": TOKENS[0]}, r"inputs is int64 \[6\]; expected int64 \[B, T\]"),
    "float tokens": ({"inputs": torch.zeros(2, 6)}, r"inputs is float32 \[2, 6\]; expected int64"),
    "an id past the vocabulary": ({"inputs": TOKENS + V}, rf"inputs holds {V}; expected ids in \[0, {V}\)"),
    "texts without a tokenizer": ({"inputs": ["a"]}, "tokenizer is None; expected a tokenizers.Tokenizer"),
    "numbers": ({"inputs": [1, 2]}, "inputs is of type list; expected tokens, a text or texts"),
    "labels of texts": ({"inputs": ["a"], "labels": TOKENS, "tokenizer": words_tokenizer()}, "beside texts"),
    "stride 0": ({"stride": 0}, f"stride is 0; expected 1 to {T}"),
    "stride past the positions": ({"stride": T + 1}, f"stride is {T + 1}; expected 1 to {T}"),
    "no batch": ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
    "both paddings": ({"lengths": torch.tensor([6, 6]), "key_mask": TOKENS == 0}, "both lengths and a mask"),
    "long lengths": ({"lengths": torch.tensor([6, 7])}, "lengths holds 7; expected 0 to 6"),
    "negative lengths": ({"lengths": torch.tensor([6, -2])}, "lengths holds -2; expected 0 to 6"),
    "lengths of another batch": ({"lengths": torch.tensor([6])}, r"lengths is int64 \[1\]; expected int64 \[2\]"),
    "labels of another shape": ({"labels": TOKENS[:, :3]}, r"labels is int64 \[2, 3\]; expected int64 \[2, 6\]"),
    "label past the vocabulary": ({"labels": TOKENS + V}, f"labels holds {V}"),
    "a classifier": ({"model": GPTForSequenceClassification}, "model is a GPTForSequenceClassification"),
    "a masked model without labels": ({"model": GPTForMaskedLM}, "labels is None"),
    "a masked model's long row": (
        {"model": GPTForMaskedLM, "inputs": TOKENS.new_zeros(1, T + 1), "labels": TOKENS.new_zeros(1, T + 1)},
        f"inputs has {T + 1} tokens in a row; expected at most seq_len = {T}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    changed, message = REFUSED[case]
    arguments = {"inputs": TOKENS} | changed
    model = build(arguments.pop("model", GPTForCausalLM), lm_weight=0.0)
    with pytest.raises(ValueError, match=message) as error:
        gpt_fast.score(model, arguments.pop("inputs"), **arguments)
    assert "gpt_fast.score: " in str(error.value)


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [1] * (T + 1))], ids=["no context", "nothing", "long"])
def test_refuses_continuations(pair):
    with pytest.raises(ValueError, match="pair 1 has"):
        score_continuations(build(), [([1], [2]), pair])


def test_a_masked_model_scores_no_continuations():
    """It would read the very tokens that it scores."""
    with pytest.raises(ValueError, match="model is a GPTForMaskedLM.*expected a causal language model"):
        score_continuations(build(GPTForMaskedLM), [([1], [2])])
