"""Test the reference implementations against torch.nn.functional in float64, and against Random123's test vectors."""

import math

import pytest
import torch
import torch.nn.functional as F

from gpt_fast import _activations, ops, reference

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


# ---- the generator ---------------------------------------------------------------------------------------------------

# The kat_vectors file of Random123: rounds, counter, key, result.
PI_COUNTER, PI_KEY = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    (7, (0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (ONES,) * 4, (ONES,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI_COUNTER, PI_KEY, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI_COUNTER, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(rounds, counter, key, answer):
    words = reference.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)), rounds)
    assert tuple(words.tolist()) == answer


def philox_in_integers(counter, key):
    """Compute philox4x32-7 in Python integers, as an independent check of the dropout rules below."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


SEEDS = [0, 1, 123456789012345, -1, -(2**63), 2**63 - 1]


def key_of(seed):
    return seed % 2**32, (seed >> 32) % 2**32


@pytest.mark.parametrize("seed", SEEDS)
def test_row_rule_word_for_word(seed):
    p, site, N, C = 0.3, 5, 5, 21
    threshold = math.floor(p * 65536 + 0.5)

    def keep(i, j):
        word = philox_in_integers((j // 8, i, 0, site), key_of(seed))[(j // 2) % 4]
        return ((word >> 16 * (j % 2)) & 0xFFFF) >= threshold

    got = reference.dropout_keep_rows(torch.tensor([seed]), site, N, C, p)
    assert got.tolist() == [[keep(i, j) for j in range(C)] for i in range(N)]


@pytest.mark.parametrize("seed", SEEDS)
def test_matrix_rule_word_for_word(seed):
    p, site, M, N = 0.3, 7, 19, 37
    b = torch.tensor([0, 3])
    threshold = math.floor(p * 65536 + 0.5)

    def keep(b, i, j):
        counter = ((j // 16) * 4 + (j % 8) // 2, (i // 16) * 8 + i % 8, b, site)
        word = philox_in_integers(counter, key_of(seed))[2 * ((i // 8) % 2) + (j // 8) % 2]
        return ((word >> 16 * (j % 2)) & 0xFFFF) >= threshold

    wanted = [[[keep(h, i, j) for j in range(N)] for i in range(M)] for h in b.tolist()]
    seed = torch.tensor([seed])
    assert reference.dropout_keep_matrix(seed, site, b, M, N, p).tolist() == wanted
    at = reference.dropout_keep_at(seed, site, b[:, None, None], torch.arange(M)[:, None], torch.arange(N), p)
    assert at.tolist() == wanted


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1 - 2**-16])
def test_keep_rate_and_scale(p):
    """The keep rate is (65536 - threshold) / 65536 within five standard deviations. The scale is its inverse."""
    n = 1 << 20
    rate = (65536 - reference.dropout_threshold(p)) / 65536
    tolerance = 5 * math.sqrt(rate * (1 - rate) / n)
    seed = torch.tensor([42])
    rows = reference.dropout_keep_rows(seed, 1, 1024, 1024, p)
    matrix = reference.dropout_keep_matrix(seed, 1, torch.arange(4), 512, 512, p)
    assert abs(rows.double().mean().item() - rate) <= tolerance
    assert abs(matrix.double().mean().item() - rate) <= tolerance
    assert reference.dropout_scale(p) * rate == pytest.approx(1.0, abs=1e-15)


def test_masks_of_neighbours_are_independent():
    """Masks of other seeds, sites, heads, rows or columns agree in half of the elements, within five deviations."""
    seed, n = torch.tensor([3]), 512

    def matrix(seed=seed, site=1, head=0):
        return reference.dropout_keep_matrix(seed, site, torch.tensor(head), n, n, 0.5)

    base = matrix()
    others = {
        "seed": matrix(seed=seed + 1), "high seed": matrix(seed=seed + 2**32), "site": matrix(site=2),
        "head": matrix(head=1), "row": base.roll(1, 0), "column": base.roll(1, 1), "row + 8": base.roll(8, 0),
        "column + 8": base.roll(8, 1), "transposed": base.t(),
        "row site": reference.dropout_keep_rows(seed, 1, n, n, 0.5),
    }  # fmt: skip
    for name, other in others.items():
        assert abs((base == other).double().mean().item() - 0.5) <= 5 * 0.5 / n, name


def test_everything_is_dropped_where_the_threshold_is_full():
    assert reference.dropout_threshold(1 - 2**-18) == 65536
    assert reference.dropout_scale(1 - 2**-18) == 0.0
    assert not reference.dropout_keep_rows(torch.tensor([1]), 0, 64, 64, 1 - 2**-18).any()


# ---- the ops against torch.nn.functional -----------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_torchs(causal):
    q, k, v = (randn(2, 3, 11, 8) for _ in range(3))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert torch.allclose(reference.attention(q, k, v, causal=causal), wanted, **CLOSE)
    qkv = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=-1)
    merged = wanted.transpose(1, 2).flatten(2)
    assert torch.allclose(reference.attention_qkv(qkv, 3, causal=causal), merged, **CLOSE)


def test_attention_masks_are_what_their_words_say():
    """All masks together agree with conditions that are written out for each pair of query and key."""
    B, H, T, S = 2, 2, 6, 9
    q, k, v = randn(B, H, T, 4), randn(B, H, S, 4), randn(B, H, S, 4)
    lengths = torch.tensor([9, 7])
    key_mask = torch.rand(B, S) > 0.2
    mask = torch.rand(1, H, T, S) > 0.2
    for causal, window in ((True, None), (True, 3), (False, 3), (False, None)):
        allowed = torch.zeros(B, H, T, S, dtype=torch.bool)
        for b in range(B):
            for h in range(H):
                for t in range(T):
                    i = t + S - T
                    for j in range(S):
                        allowed[b, h, t, j] = (
                            (not causal or j <= i)
                            and (window is None or (i - window < j and (causal or j < i + window)))
                            and j < lengths[b]
                            and key_mask[b, j]
                            and mask[0, h, t, j]
                        )
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        wanted = wanted.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
        got = reference.attention(q, k, v, causal=causal, window=window, lengths=lengths, key_mask=key_mask, mask=mask)
        assert torch.allclose(got, wanted, **CLOSE), (causal, window)


def test_packed_sequences_are_separate_sequences():
    """Packed sequence n gives the output, and has the dropout mask, of batch entry n. Tokens after the last give 0."""
    H, D, sizes = 2, 4, (5, 1, 0, 7)
    T = sum(sizes) + 3
    cu_seqlens = torch.tensor([0, 5, 6, 6, 13], dtype=torch.int32)
    q, k, v = (randn(1, H, T, D) for _ in range(3))
    options = {"causal": True, "dropout_p": 0.4, "seed": torch.tensor([9]), "site": 3}
    got = reference.attention(q, k, v, cu_seqlens=cu_seqlens, **options)
    for n, size in enumerate(sizes):
        part = slice(int(cu_seqlens[n]), int(cu_seqlens[n + 1]))
        batch = [x.new_zeros(n + 1, H, size, D).index_copy(0, torch.tensor([n]), x[:, :, part]) for x in (q, k, v)]
        assert torch.allclose(got[0, :, part], reference.attention(*batch, **options)[n], **CLOSE), n
    assert torch.equal(got[:, :, 13:], torch.zeros(1, H, 3, D, dtype=torch.float64))


def test_attention_dropout_is_the_rule_on_the_probabilities():
    """If v is an identity, the output is the matrix of probabilities after dropout."""
    T, p, seed = 20, 0.3, torch.tensor([11])
    q, k = randn(2, 3, T, T), randn(2, 3, T, T)
    v = torch.eye(T, dtype=torch.float64).expand(2, 3, T, T)
    probs = reference.attention(q, k, v, causal=False)
    dropped = reference.attention(q, k, v, causal=False, dropout_p=p, seed=seed, site=2)
    keep = reference.dropout_keep_matrix(seed, 2, torch.arange(6).view(2, 3), T, T, p)
    assert torch.allclose(dropped, probs * keep * reference.dropout_scale(p), **CLOSE)


def test_decode_attention_is_attention_with_one_query():
    q, k, v, lengths = randn(3, 2, 8), randn(3, 2, 10, 8), randn(3, 2, 10, 8), torch.tensor([10, 1, 4])
    for b, length in enumerate(lengths):
        wanted = F.scaled_dot_product_attention(q[b, :, None], k[b, :, :length], v[b, :, :length])[:, 0]
        assert torch.allclose(reference.decode_attention(q, k, v, lengths)[b], wanted, **CLOSE)


@pytest.mark.parametrize("activation", _activations.ACTIVATIONS)
def test_mlp_is_torchs(activation):
    x, w1, b1, w2, b2 = randn(4, 5, 6), randn(11, 6), randn(11), randn(6, 11), randn(6)
    function = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[activation]
    wanted = F.linear(function(F.linear(x, w1, b1)), w2, b2)
    assert torch.allclose(reference.mlp(x, w1, b1, w2, b2, activation), wanted, **CLOSE)
    keep = reference.dropout_keep_matrix(torch.tensor([5]), 4, torch.tensor(0), 20, 11, 0.3).view(4, 5, 11)
    wanted = F.linear(function(F.linear(x, w1, b1)) * keep * reference.dropout_scale(0.3), w2, b2)
    got = reference.mlp(x, w1, b1, w2, b2, activation, 0.3, torch.tensor([5]), 4)
    assert torch.allclose(got, wanted, **CLOSE)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_linear_cross_entropy_is_torchs(reduction, label_smoothing):
    x, weight, bias = randn(3, 4, 6).requires_grad_(), randn(9, 6).requires_grad_(), randn(9).requires_grad_()
    target = torch.randint(0, 9, (3, 4))
    target[0, 1] = target[2, 3] = -100
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    got = ops.linear_cross_entropy(x, weight, target, bias, **options)
    wanted = F.cross_entropy(F.linear(x, weight, bias).flatten(0, 1), target.flatten(), **options).view(got.shape)
    assert torch.allclose(got, wanted, **CLOSE)
    upstream = randn(*got.shape)
    for a, b in zip(
        torch.autograd.grad(got, (x, weight, bias), upstream), torch.autograd.grad(wanted, (x, weight, bias), upstream),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(a, b, **CLOSE)


def test_linear_cross_entropy_of_nothing_is_zero():
    x, weight = randn(4, 6).requires_grad_(), randn(9, 6).requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_linear_cross_entropy_traced_computes_the_same():
    """A trace computes ignored rows with weight 0, because the number of rows must not depend on data."""
    x, weight, target = randn(5, 6).requires_grad_(), randn(9, 6).requires_grad_(), torch.tensor([1, -100, 3, -100, 8])
    loss = ops.linear_cross_entropy(x, weight, target)
    traced = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")(x, weight, target)
    assert torch.allclose(loss, traced, **CLOSE)
    grads, traced_grads = (torch.autograd.grad(value, (x, weight)) for value in (loss, traced))
    assert all(torch.allclose(a, b, **CLOSE) for a, b in zip(grads, traced_grads, strict=True))


def test_embedding_is_torchs():
    tokens, weight, positions = torch.randint(0, 9, (3, 4)), randn(9, 6), randn(7, 6)
    wanted = F.embedding(tokens, weight) + positions[:4]
    assert torch.allclose(reference.embedding(tokens, weight, positions), wanted, **CLOSE)
    chosen = torch.randint(0, 7, (3, 4))
    wanted = F.embedding(tokens, weight) + positions[chosen]
    assert torch.allclose(reference.embedding(tokens, weight, positions, chosen), wanted, **CLOSE)


def test_add_layer_norm_is_its_parts():
    x, residual, weight, bias, seed = randn(4, 6), randn(4, 6), randn(6), randn(6), torch.tensor([1])
    keep = reference.dropout_keep_rows(seed, 2, 4, 6, 0.3)
    wanted = residual + x * keep * reference.dropout_scale(0.3)
    normed, summed = reference.add_layer_norm(x, residual, weight, bias, 1e-5, 0.3, seed, 2)
    assert torch.allclose(summed, wanted, **CLOSE)
    assert torch.allclose(normed, F.layer_norm(wanted, (6,), weight, bias), **CLOSE)


# ---- roundings that the contract names -------------------------------------------------------------------------------


def test_half_precision_rounds_matrix_operands_and_results_only():
    """The arithmetic is float32, but attention rounds its probabilities and mlp its hidden activation."""
    q, k, v = (torch.randn(1, 2, 8, 4).bfloat16() for _ in range(3))
    probs = torch.softmax(q.float() @ k.float().mT * 0.5, -1)
    wanted = (probs.bfloat16().float() @ v.float()).bfloat16()
    assert torch.equal(reference.attention(q, k, v, causal=False), wanted)
    x, w1, w2 = torch.randn(3, 4).bfloat16(), torch.randn(8, 4).bfloat16(), torch.randn(4, 8).bfloat16()
    hidden = F.relu(x.float() @ w1.float().t()).bfloat16().float()
    assert torch.equal(reference.mlp(x, w1, None, w2, None, "relu"), (hidden @ w2.float().t()).bfloat16())
