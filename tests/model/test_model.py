"""Test the drop-in GPT, its blocks and the trunk against `reference.GPT`, the lecture notes' module with fixed bugs.

The tests call that module "the notes".
"""

import copy
import pathlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import gpt_fast
from gpt_fast import GPT, GPTConfig, GPTModel, reference
from gpt_fast.layers import TransformerDecoder

SIZES = {"num_tokens": 61, "hidden_dim": 48, "num_heads": 4, "num_layers": 3, "seq_len": 20}


def pair(dropout=0.0, **sizes):
    """Return the drop-in GPT and the notes' module with the same weights."""
    ours, notes = (kind(**SIZES | sizes, dropout=dropout) for kind in (GPT, reference.GPT))
    notes.load_state_dict(ours.state_dict())
    return ours, notes


def relative(got, wanted):
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


# ---- drop-in ---------------------------------------------------------------------------------------------------------


def test_state_dicts_are_the_same_both_ways():
    ours, notes = pair()
    wanted = {name: tensor.shape for name, tensor in notes.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == wanted
    ours.load_state_dict(reference.GPT(**SIZES, dropout=0.0).state_dict(), strict=True)
    notes.load_state_dict(ours.state_dict(), strict=True)


def test_constructor_takes_the_notes_arguments_in_their_order():
    ours = GPT(61, 48, 4, 3, 20, 0.1)
    notes = reference.GPT(61, 48, 4, 3, 20, 0.1)
    notes.load_state_dict(ours.state_dict())
    block = TransformerDecoder(48, 4, 192, 0.1)
    block.load_state_dict(reference.TransformerDecoder(48, 4, 192, 0.1).state_dict())


@pytest.mark.parametrize("T", [1, 7, 20])
def test_probabilities(T):
    ours, notes = pair()
    tokens = torch.randint(0, 61, (3, T))
    probabilities = ours(tokens)
    assert torch.allclose(probabilities.sum(-1), torch.ones(3, T))
    assert relative(probabilities, notes(tokens)) < 1e-5


def test_probabilities_and_gradients_in_float64_are_exact():
    """In float64 the two models agree to the last digits, so they compute the same function."""
    ours, notes = (model.double() for model in pair())
    tokens = torch.randint(0, 61, (3, 20))
    assert relative(ours(tokens), notes(tokens)) < 1e-13
    loss = ours.loss(tokens)
    wanted = F.cross_entropy(notes.logits(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - wanted.item()) < 1e-13
    loss.backward(), wanted.backward()
    for (name, parameter), other in zip(ours.named_parameters(), notes.parameters(), strict=True):
        assert relative(parameter.grad, other.grad) < 1e-11, name


def test_every_gradient_in_float32():
    ours, notes = pair()
    tokens = torch.randint(0, 61, (3, 20))
    upstream = torch.randn(3, 20, 61)
    for model in (ours, notes):
        model(tokens).backward(upstream)
    for (name, parameter), other in zip(ours.named_parameters(), notes.parameters(), strict=True):
        assert relative(parameter.grad, other.grad) < 1e-4, name


def test_one_block_with_the_notes_mask():
    ours = TransformerDecoder(48, 4, 192, 0.0)
    notes = reference.TransformerDecoder(48, 4, 192, 0.0)
    notes.load_state_dict(ours.state_dict())
    x, causal = torch.randn(2, 9, 48), torch.ones(9, 9, dtype=torch.bool).triu(1)
    assert relative(ours(x, causal), notes(x, causal)) < 1e-5
    assert relative(ours(x), notes(x, causal)) < 1e-5  # without a mask the block is causal
    seen_by_all = torch.zeros(9, 9, dtype=torch.bool)
    seen_by_all[:, 3] = True
    assert relative(ours(x, seen_by_all), notes(x, seen_by_all)) < 1e-5
    with pytest.raises(ValueError, match=r"mask is torch\.float32"):
        ours(x, causal.float())


def real_text(count):
    """Return bytes of a module of the standard library as tokens."""
    source = pathlib.Path(copy.__file__).read_bytes()
    return torch.tensor(list(source[:count]))


def test_training_curves_of_50_steps_on_real_text_agree():
    ours, notes = pair(num_tokens=256, seq_len=32)
    text = real_text(50 * 4 * 32).view(50, 4, 32)
    curves = []
    for model in (ours, notes):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        curve = []
        for tokens in text:
            if model is ours:
                loss = model.loss(tokens)
            else:
                loss = F.cross_entropy(model.logits(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][0] > 5.4
    assert curves[0][-5:].mean() < 3.5
    assert (curves[0] - curves[1]).abs().max() < 2e-3


# ---- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["notes", "gpt1", "gpt2"])
def test_kernels_and_reference_drop_the_same(preset):
    """With the same seed, kernels and reference give the same results and gradients, including dropout masks."""
    model = GPTModel(GPTConfig.preset(preset, **SIZES, dropout=0.3))
    tokens, seed, upstream = torch.randint(0, 61, (3, 20)), torch.tensor([99]), torch.randn(3, 20, 48)
    results = []
    for context in (torch.enable_grad(), gpt_fast.use_reference()):
        with context:
            hidden = model(tokens, seed=seed)
            grads = torch.autograd.grad(hidden, list(model.parameters()), upstream)
        results.append((hidden, *grads))
    for got, wanted in zip(*results, strict=True):
        assert relative(got, wanted) < 1e-4
    model.eval()
    assert relative(model(tokens), results[0][0]) > 0.05  # dropout changed the results above


def test_every_dropout_has_its_own_site(monkeypatch):
    """All dropouts of one pass have different sites, so no two of them share a mask."""
    for preset, count in (("gpt2", 1 + 3 * 3), ("notes", 1 + 3 * 3)):
        sites = []
        for name in ("dropout_keep_rows", "dropout_keep_matrix"):
            definition = getattr(reference, name)
            monkeypatch.setattr(
                reference, name, lambda seed, site, *a, f=definition, s=sites: (s.append(site), f(seed, site, *a))[1]
            )
        model = GPTModel(GPTConfig.preset(preset, **SIZES))
        with gpt_fast.use_reference():
            model(torch.randint(0, 61, (2, 5)))
        monkeypatch.undo()
        assert len(sites) == len(set(sites)) == count, preset


def test_dropout_follows_torchs_seed_and_stops_in_evaluation():
    model = GPT(**SIZES, dropout=0.2)
    tokens = torch.randint(0, 61, (2, 9))
    torch.manual_seed(5)
    first, second = model(tokens), model(tokens)
    torch.manual_seed(5)
    assert torch.equal(model(tokens), first)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_expected_value_under_dropout_is_the_evaluation_output():
    """The mean of the embeddings' dropout over 3,000 rows, each with its own mask, is the embedding itself."""
    model = GPTModel(GPTConfig.preset("notes", **SIZES | {"num_layers": 1}, dropout=0.0, embedding_dropout=0.3))
    rows, tokens = 3000, torch.randint(0, 61, (1, 6))
    seen = []
    model.decoders[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(tokens.expand(rows, 6))
        model.eval()(tokens)
    dropped, clean = seen
    spread = clean.abs().max() * (0.3 / 0.7 / rows) ** 0.5
    assert (dropped.mean(0, keepdim=True) - clean).abs().max() < 5 * spread


def test_activation_checkpointing_repeats_the_masks():
    block = TransformerDecoder(48, 4, 192, 0.2, attention_dropout=0.2)
    x = torch.randn(2, 9, 48, requires_grad=True)
    grads = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        torch.manual_seed(4)
        grads.append(torch.autograd.grad(run(x).square().sum(), (x, *block.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- the trunk -------------------------------------------------------------------------------------------------------


def test_pre_norm_blocks_alone_and_fused_across_their_border_are_the_same():
    """The trunk fuses each block's last addition with the next norm. A block that is called alone does the addition."""
    config = GPTConfig.preset("gpt2", **SIZES)
    model, seed = GPTModel(config), torch.tensor([3])
    tokens = torch.randint(0, 61, (2, 9))
    x = gpt_fast.ops.embedding(tokens, model.token_emb.weight, model.pos_emb[0], None, 0.1, seed, 0)
    for decoder in model.decoders:
        x = decoder(x, seed=seed)
    assert relative(model.final_norm(x), model(tokens, seed=seed)) < 1e-5


@pytest.mark.parametrize("preset", ["notes", "gpt1", "gpt2"])
def test_a_future_token_changes_no_earlier_bit(preset):
    model = GPTModel(GPTConfig.preset(preset, **SIZES)).eval()
    tokens = torch.randint(0, 61, (2, 20))
    other = tokens.clone()
    other[:, 12:] = (other[:, 12:] + 1) % 61
    before, after = model(tokens), model(other)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])
    assert not torch.equal(model(tokens, causal=False)[:, :12], model(other, causal=False)[:, :12])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("side", ["right_by_lengths", "right_by_mask", "left_by_mask"])
def test_padding_changes_nothing(side, causal):
    """A padded sequence gives the results that it gives alone, whatever tokens its padding holds."""
    model = GPTModel(GPTConfig.preset("gpt2", **SIZES)).eval()
    lengths = torch.tensor([5, 9, 1])
    tokens = torch.randint(0, 61, (3, 9))
    real = torch.arange(9) < lengths[:, None]
    if side == "left_by_mask":
        real = real.flip(1)
    options = {"lengths": lengths} if side == "right_by_lengths" else {"key_mask": real}
    hidden = model(tokens, causal=causal, **options)
    other = model(torch.where(real, tokens, (tokens + 7) % 61), causal=causal, **options)
    for row in range(3):
        alone = model(tokens[row][real[row]][None], causal=causal)[0]
        assert relative(hidden[row][real[row]], alone) < 1e-5
        assert torch.equal(hidden[row][real[row]], other[row][real[row]])


@pytest.mark.parametrize("preset", ["notes", "gpt2"])
def test_fullgraph(preset):
    model = GPTModel(GPTConfig.preset(preset, **SIZES))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens, seed = torch.randint(0, 61, (2, 9)), torch.tensor([3])
    got, wanted = compiled(tokens, seed=seed), model(tokens, seed=seed)
    upstream = torch.randn_like(got)
    parameters = list(model.parameters())
    assert relative(got, wanted) < 1e-5
    for a, b in zip(
        torch.autograd.grad(got, parameters, upstream), torch.autograd.grad(wanted, parameters, upstream), strict=True
    ):
        assert relative(a, b) < 1e-4


def test_deepcopy_and_state_are_independent():
    model = GPT(**SIZES, dropout=0.0)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.pos_emb.add_(1)
    assert not torch.equal(model.pos_emb, twin.pos_emb)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            lambda m: m(torch.zeros(1, 21).long()), "tokens has 21 in a row; expected at most seq_len = 20", id="long"
        ),
        pytest.param(
            lambda m: m(torch.full((1, 3), 61)), r"tokens holds 61; expected values in \[0, 61\)", id="token_high"
        ),
        pytest.param(lambda m: m(torch.full((1, 3), -1)), "tokens holds -1", id="token_negative"),
        pytest.param(
            lambda m: m(torch.zeros(3).long()), r"tokens is int64 \[3\]; expected int64 \[B, T\]", id="no_batch"
        ),
        pytest.param(lambda m: m(torch.zeros(1, 3)), "tokens has dtype float32", id="float_tokens"),
        pytest.param(lambda m: m.loss(torch.zeros(2, 3).long(), torch.full((2, 3), 99)), "target holds 99", id="label"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(GPT(**SIZES, dropout=0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"hidden_dim": 50}, "hidden_dim 50 is not divisible by num_heads 4", id="heads"),
        pytest.param({"hidden_dim": 2048}, "heads of 512; expected at most 256", id="head_size"),
        pytest.param({"dropout": 1.0}, "dropout is 1.0", id="dropout_one"),
        pytest.param({"dropout": -0.1}, "dropout is -0.1", id="dropout_negative"),
        pytest.param({"num_layers": 0}, "num_layers is 0; expected a positive integer", id="layers"),
        pytest.param({"num_tokens": 2.5}, "num_tokens is 2.5", id="tokens"),
    ],
)
def test_sizes_that_make_no_model(changes, message):
    with pytest.raises(ValueError, match=message):
        GPT(**{**SIZES, "dropout": 0.1} | changes)


# ---- configuration ---------------------------------------------------------------------------------------------------

PUBLISHED = [  # name, number of parameters of the language model with tied output layer
    ("gpt1", 116_534_784),
    ("gpt2", 124_439_808),
    ("gpt2-medium", 354_823_168),
    ("gpt2-large", 774_030_080),
    ("gpt2-xl", 1_557_611_200),
]


@pytest.mark.parametrize(("name", "count"), PUBLISHED)
def test_presets_have_the_published_sizes(name, count):
    with torch.device("meta"):
        assert gpt_fast.GPTForCausalLM(GPTConfig.preset(name)).num_parameters() == count


def test_preset_errors_and_overrides():
    with pytest.raises(ValueError, match=r"preset name is 'gpt5'; expected one of notes, gpt1, gpt2, gpt2-medium"):
        GPTConfig.preset("gpt5")
    with pytest.raises(ValueError, match="got layers; expected only num_tokens"):
        GPTConfig.preset("gpt2", layers=3)
    config = GPTConfig.preset("notes", dropout=0.25)
    assert (config.residual_dropout, config.ff_dropout, config.attention_dropout) == (0.25, 0.25, 0.0)
    assert GPTConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"activation": "swish"}, "activation is 'swish'; expected one of relu, gelu, gelu_tanh", id="act"),
        pytest.param({"problem": "ranking"}, "problem is 'ranking'", id="problem"),
        pytest.param({"pooling": "mean"}, "pooling is 'mean'", id="pooling"),
        pytest.param({"pooling": "extract"}, "extract_token is None", id="extract_without_token"),
        pytest.param({"pad_token": 61}, "pad_token is 61; expected None or an id below 61", id="special_token"),
        pytest.param({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0", id="eps"),
        pytest.param({"lm_weight": -1.0}, "lm_weight is -1.0", id="lm_weight"),
    ],
)
def test_bad_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**SIZES | changes)


# --- packed sequences ---


@pytest.mark.parametrize("preset", ["gpt1", "gpt2"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_packed_sequences_are_as_they_are_alone(preset, causal):
    """Four packed sequences, one of them empty, give their own results in a row that is longer than seq_len."""
    torch.manual_seed(0)
    sizes = {"num_tokens": 30, "hidden_dim": 16, "num_heads": 2, "num_layers": 2, "seq_len": 9}
    model = GPTModel(GPTConfig.preset(preset, **sizes)).eval()
    rows = [torch.randint(30, (length,)) for length in (4, 9, 0, 6)]
    cu_seqlens = torch.tensor([0, 4, 13, 13, 19], dtype=torch.int32)
    packed = model(torch.cat(rows)[None], causal=causal, cu_seqlens=cu_seqlens)[0]
    alone = torch.cat([model(row[None], causal=causal)[0] for row in rows if len(row)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_packed_sequences_that_cannot_be():
    model = GPTModel(GPTConfig.preset("gpt2", num_tokens=30, hidden_dim=16, num_heads=2, num_layers=1, seq_len=9))
    row = torch.zeros(1, 12, dtype=torch.int64)
    with pytest.raises(ValueError, match="tokens has 10 in a row; expected at most seq_len = 9"):
        model(row, cu_seqlens=torch.tensor([0, 10, 12], dtype=torch.int32))
    with pytest.raises(ValueError, match="more than one of lengths, key_mask and cu_seqlens"):
        model(row, cu_seqlens=torch.tensor([0, 6, 12], dtype=torch.int32), lengths=torch.tensor([12]))
