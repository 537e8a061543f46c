"""Test decode_attention against the float64 reference: C++, Triton in the interpreter, Triton and CUDA C++ on CUDA."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_fast import ops, reference
from tests import numerics


@pytest.fixture(params=["cpu", *(pytest.param(name, marks=pytest.mark.cuda) for name in ("cuda", "cuda C++"))])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return "cpu" or "cuda". A second run on CUDA uses the kernel of csrc/cuda in place of Triton's."""
    if request.param == "cuda C++":
        if not torch._C._dispatch_has_kernel_for_dispatch_key("gpt_fast::decode_attention_cuda_forward", "CUDA"):
            pytest.skip("csrc/cuda was not built: it needs PyTorch with CUDA and nvcc")
        other = torch.ops.gpt_fast.decode_attention_cuda_forward
        monkeypatch.setattr(torch.ops.gpt_fast, "decode_attention_forward", other)
    return request.param.split()[0]


def inputs(B, H, S, D, *, dtype=torch.float32, device="cpu", scale=1.0):
    """Return q, the two caches, and random lengths from 1 to S. The last length is S."""
    q = (torch.randn(B, H, D, device=device) * scale).to(dtype)
    k, v = (torch.randn(B, H, S, D, device=device).to(dtype) for _ in range(2))
    lengths = torch.randint(1, S + 1, (B,), device=device)
    lengths[-1:] = S
    return q, k, v, lengths


def check(q, k, v, lengths):
    """Assert that the output is as accurate as the reference in the inputs' dtype, and return it.

    That reference rounds the probabilities, as the kernel does.
    """
    got = ops.decode_attention(q, k, v, lengths)
    exact = reference.decode_attention(q.double(), k.double(), v.double(), lengths)
    numerics.assert_as_accurate(got, reference.decode_attention(q, k, v, lengths), exact)
    return got


SHAPES = [
    pytest.param((1, 1, 1, 1), id="one_of_everything"),
    pytest.param((2, 3, 64, 64), id="powers_of_two"),
    pytest.param((3, 2, 37, 24), id="off_powers_of_two"),
    pytest.param((2, 2, 129, 64), id="one_past_a_block"),
    pytest.param((1, 2, 1025, 32), id="one_past_a_split"),
    pytest.param((2, 1, 700, 16), id="several_splits"),
    pytest.param((4, 12, 90, 64), id="many_heads"),
    pytest.param((2, 2, 50, 1), id="head_size_1"),
    pytest.param((2, 2, 50, 3), id="odd_head_size"),
    pytest.param((1, 2, 70, 80), id="head_size_80"),
    pytest.param((1, 2, 70, 128), id="head_size_128"),
    pytest.param((1, 1, 70, 255), id="head_size_255"),
    pytest.param((1, 1, 66, 256), id="largest_head_size"),
]


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_numerics(shape, dtype, device):
    """Test sizes on, off and one past multiples of blocks and splits. Rows have different lengths."""
    check(*inputs(*shape, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_peaked_and_large_scores(dtype, device):
    """With scores in the hundreds, exponentials overflow unless the largest score is subtracted."""
    q, k, v, lengths = inputs(2, 2, 300, 32, dtype=dtype, device=device, scale=30.0)
    check(q, k, v, lengths)
    check(q, -k.abs() * q.sign()[:, :, None], v, lengths)  # all scores far below zero


def test_more_splits_than_are_added_at_a_time(device):
    """A long cache needs more splits than one addition takes. Its largest scores come late, early or in the middle."""
    q, k, v, lengths = inputs(3, 1, 2200, 16, device=device)
    for b, j in enumerate((2190, 3, 1100)):
        k[b, :, j] = q[b] * 4
    lengths.fill_(2200)
    check(q, k, v, lengths)
    check(q, k, v, torch.tensor([2190, 2049, 130], device=device))


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 3), H=st.integers(1, 3), S=st.integers(1, 200), D=st.integers(1, 40),
    dtype=st.sampled_from(numerics.DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(B, H, S, D, dtype, seed):
    torch.manual_seed(seed)
    check(*inputs(B, H, S, D, dtype=dtype))


# ---- exact properties ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 200])
def test_what_lies_past_the_length_changes_nothing(length, device):
    """NaN and infinity past the length change no bit, two runs agree bit for bit, and a length of 0 gives 0."""
    q, k, v, _ = inputs(2, 2, 200, 32, device=device)
    lengths = torch.tensor([min(200, length + 3), length], device=device)
    first = ops.decode_attention(q, k, v, lengths)
    assert torch.equal(first, ops.decode_attention(q, k, v, lengths))
    for b in range(2):
        k[b, :, int(lengths[b]) :] = float("nan")
        v[b, :, int(lengths[b]) :] = float("inf")
    assert torch.equal(ops.decode_attention(q, k, v, lengths), first)
    if length == 0:
        assert (first[1] == 0).all()


def test_keys_of_zero_give_the_mean(device):
    q, k, v, lengths = inputs(2, 2, 150, 48, device=device)
    got = ops.decode_attention(q, torch.zeros_like(k), v, lengths)
    wanted = torch.stack([v[b, :, : int(lengths[b])].double().mean(1) for b in range(2)])
    numerics.assert_rounded_once(got, wanted)


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_a_dominant_key_gives_its_value(dtype, device):
    """The dominant key is first, last, or next to a boundary of blocks or splits."""
    q, k, v, _ = inputs(1, 2, 300, 32, dtype=dtype, device=device)
    for j in (0, 31, 32, 63, 64, 127, 128, 255, 256, 299):
        dominant = torch.zeros_like(k)
        dominant[:, :, j] = 60 * q.sign()
        strong = q.sign() * 10
        lengths = torch.tensor([300], device=device)
        assert torch.equal(ops.decode_attention(strong, dominant, v, lengths), v[:, :, j])


def test_the_batch_and_the_threads_change_no_bit(device, threads):
    q, k, v, lengths = inputs(5, 3, 130, 64, device=device)
    together = ops.decode_attention(q, k, v, lengths)
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(ops.decode_attention(q, k, v, lengths), together)
    for b in range(5):
        assert torch.equal(ops.decode_attention(*(x[b : b + 1] for x in (q, k, v, lengths))), together[b : b + 1])


def test_strided_inputs_are_read_in_place(device):
    """Queries are a view of a packed projection. One cache is a slice of a larger one, the other is transposed."""
    B, H, S, D = 2, 3, 40, 16
    qkv = torch.randn(B, 1, 3 * H * D, device=device)
    q = qkv.unflatten(2, (3, H, D))[:, 0, 0]
    assert not q.is_contiguous()
    k = torch.randn(4, B, H, 64, 2 * D, device=device)[2, :, :, 8 : 8 + S, :D]
    v = torch.randn(B, S, H, D, device=device).transpose(1, 2)
    lengths = torch.tensor([40, 17], device=device, dtype=torch.int32)
    got = check(q, k, v, lengths)
    assert torch.equal(got, ops.decode_attention(q.contiguous(), k.contiguous(), v.contiguous(), lengths.long()))
    columns = torch.stack((lengths, torch.full_like(lengths, 3)), 1)[:, 0]
    assert columns.stride(0) == 2
    assert torch.equal(got, ops.decode_attention(q, k, v, columns))
    apart = torch.randn(B, H, D, S, device=device).transpose(2, 3)  # elements of a row are not neighbours
    check(q, apart, v, lengths)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8)], ids=["no_batch", "no_heads", "no_keys"])
def test_empty(shape, device):
    B, H, S, D = shape
    q, k, v = (torch.randn(B, H, *rest, device=device) for rest in ((D,), (S, D), (S, D)))
    got = ops.decode_attention(q, k, v, torch.full((B,), S, device=device))
    assert got.shape == (B, H, D)
    assert (got == 0).all()


# ---- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)
def test_runs_on_the_implementation_under_test(check_implementation, device):
    q, k, v, lengths = inputs(2, 2, 33, 16, device=device)
    check_implementation("decode_attention", lambda: ops.decode_attention(q, k, v, lengths))


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_opcheck(dtype, device):
    arguments = inputs(2, 3, 21, 16, dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.gpt_fast.decode_attention_forward.default, arguments)


def test_compiles_without_a_graph_break(device):
    arguments = inputs(2, 2, 50, 16, device=device)
    compiled = torch.compile(ops.decode_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), ops.decode_attention(*arguments))


def test_float64_runs_the_reference(device):
    q, k, v, lengths = inputs(2, 2, 20, 8, device=device)
    wide = (q.double(), k.double(), v.double(), lengths)
    assert torch.equal(ops.decode_attention(*wide), reference.decode_attention(*wide))


def bad(**changes):
    values = dict(zip(("q", "k_cache", "v_cache", "lengths"), inputs(2, 2, 5, 4), strict=True))
    return values | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(2, 2, 1, 4)}, r"q has shape \[2, 2, 1, 4\]; expected \[B, H, D\]"),
        ({"k_cache": torch.randn(2, 3, 5, 4)}, r"k_cache has shape \[2, 3, 5, 4\]; expected \[2, 2, 5, 4\]"),
        ({"v_cache": torch.randn(2, 2, 6, 4)}, r"v_cache has shape \[2, 2, 6, 4\]; expected \[2, 2, 5, 4\]"),
        ({"lengths": torch.tensor([1])}, r"lengths has shape \[1\]; expected \[2\]"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "lengths has dtype float32"),
        ({"lengths": torch.tensor([1, 6])}, r"lengths holds 6; expected values in \[0, 6\)"),
        ({"lengths": torch.tensor([-1, 5])}, r"lengths holds -1; expected values in \[0, 6\)"),
        ({"q": torch.randn(2, 2, 4).half()}, "k_cache has dtype float32; expected float16"),
        ({"lengths": torch.ones(2, dtype=torch.int64, device="meta")}, "lengths on meta"),
        ({"v_cache": torch.randn(2, 2, 5, 4, device="meta")}, "v_cache on meta"),
        ({"q": torch.randn(2, 2, 4, requires_grad=True)}, "an input requires a gradient"),
        ({"q": torch.zeros(2, 2, 4, dtype=torch.int64)}, "q has dtype int64"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        ops.decode_attention(**bad(**changes))


@pytest.mark.parametrize("length", [-1, 6])
def test_the_kernel_checks_lengths_itself(length, implementation):
    """The C++ kernel validates lengths, because compiled code skips the validation of the public function."""
    if implementation != "cpp":
        pytest.skip("only the C++ kernel raises; others clamp")
    q, k, v, lengths = inputs(2, 2, 5, 4)
    lengths[0] = length
    with pytest.raises(ValueError, match=rf"decode_attention: lengths holds {length}; expected values in \[0, 6\)"):
        torch.ops.gpt_fast.decode_attention_forward(q, k, v, lengths)
    assert ops.decode_attention(q, k, v, lengths.clamp(0, 5)).isfinite().all()


def test_lengths_out_of_range_read_nothing_out_of_bounds(device, implementation):
    """Triton and CUDA kernels clamp lengths that were not validated to the valid range."""
    if implementation != "triton":
        pytest.skip("the C++ kernel raises")
    q, k, v, _ = inputs(3, 2, 70, 16, device=device)
    wild, tame = (torch.tensor(lengths, device=device) for lengths in ([2**33, -5, 71], [70, 0, 70]))
    got = torch.ops.gpt_fast.decode_attention_forward(q, k, v, wild)
    assert torch.equal(got, torch.ops.gpt_fast.decode_attention_forward(q, k, v, tame))


def test_offsets_beyond_2_to_the_31(device, far_apart):
    """Distances beyond 2^31 lie between the sequences, heads or rows of a cache."""
    for dim, shape in ((0, (2, 2, 20, 8)), (1, (2, 2, 20, 8)), (2, (1, 1, 130, 8))):
        q, k, v, lengths = inputs(*shape, dtype=torch.bfloat16, device=device)
        near = ops.decode_attention(q, k, v, lengths)
        assert torch.equal(ops.decode_attention(q, far_apart(k, dim), far_apart(v, dim), lengths), near)


def test_refuses_heads_that_are_too_large():
    with pytest.raises(ValueError, match="head size is 257; expected 1 to 256"):
        ops.decode_attention(*inputs(1, 1, 2, 257))


def test_every_dtype_agrees_with_every_other(device):
    """For inputs that every dtype holds exactly, the outputs differ by rounding alone."""
    q, k, v, lengths = inputs(2, 2, 90, 32, dtype=torch.bfloat16, device=device)
    outs = [ops.decode_attention(q.to(t), k.to(t), v.to(t), lengths).float() for t in numerics.DTYPES]
    for a, b in itertools.pairwise(outs):
        assert (a - b).abs().max() <= 2**-7 * v.abs().max().float()


# ---- with a new key and value ----------------------------------------------------------------------------------------


def new_inputs(B, H, S, D, lengths, *, dtype=torch.float32, device="cpu"):
    """Return q, k, v, the two caches, which hold NaN from `lengths` on, and `lengths`."""
    q, k, v = (torch.randn(B, H, D, device=device).to(dtype) for _ in range(3))
    k_cache, v_cache = (torch.randn(B, H, S, D, device=device).to(dtype) for _ in range(2))
    for b, length in enumerate(lengths):
        k_cache[b, :, length:] = v_cache[b, :, length:] = float("nan")
    return q, k, v, k_cache, v_cache, torch.tensor(lengths, device=device)


def written(x, cache, lengths):
    """Return a copy of the cache with x [B, H, D] written at `lengths`."""
    cache = cache.clone()
    for b, length in enumerate(lengths.tolist()):
        cache[b, :, length] = x[b]
    return cache


@pytest.fixture
def append_device(device, request):
    if "cuda C++" in request.node.callspec.params.values():
        pytest.skip("csrc/cuda has no kernel that writes the cache")
    return device


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        pytest.param((2, 3, 64, 64), [0, 63], id="empty_and_last_place"),
        pytest.param((3, 2, 37, 24), [5, 0, 36], id="off_powers_of_two"),
        pytest.param((2, 2, 130, 3), [63, 64], id="end_and_start_of_a_tile"),
        pytest.param((3, 1, 300, 16), [127, 128, 255], id="end_and_start_of_a_split"),
        pytest.param((1, 1, 1, 1), [0], id="one_of_everything"),
    ],
)
def test_append_is_a_write_and_decode_attention(shape, lengths, dtype, append_device):
    """Output and caches have the bits of a write followed by `decode_attention`. Nothing else in them changes."""
    q, k, v, k_cache, v_cache, lengths = new_inputs(*shape, lengths, dtype=dtype, device=append_device)
    keys, values = written(k, k_cache, lengths), written(v, v_cache, lengths)
    got = ops.decode_attention_append(q, k, v, k_cache, v_cache, lengths)
    assert got.isfinite().all()
    assert torch.equal(got, ops.decode_attention(q, keys, values, lengths + 1))
    assert torch.equal(k_cache.nan_to_num(9), keys.nan_to_num(9))
    assert torch.equal(v_cache.nan_to_num(9), values.nan_to_num(9))


def test_append_reads_and_writes_strided_tensors_in_place(append_device):
    """q, k and v are views of a packed projection, and the caches are views of one layer of larger caches."""
    B, H, S, D = 2, 3, 40, 16
    q, k, v = torch.randn(B, 3, H, 2 * D, device=append_device)[..., ::2].unbind(1)
    caches = torch.randn(2, 5, B, H, 64, 2 * D, device=append_device)
    before = caches.clone()
    k_cache, v_cache = caches[:, 3, :, :, 8 : 8 + S, ::2]
    lengths = torch.tensor([39, 17], device=append_device, dtype=torch.int32)
    keys, values = written(k, k_cache, lengths), written(v, v_cache, lengths)
    got = ops.decode_attention_append(q, k, v, k_cache, v_cache, lengths)
    assert torch.equal(got, ops.decode_attention(q, keys.contiguous(), values.contiguous(), lengths + 1))
    before[0, 3, :, :, 8 : 8 + S, ::2], before[1, 3, :, :, 8 : 8 + S, ::2] = keys, values
    assert torch.equal(caches, before)


def test_append_of_float64_and_by_the_reference(append_device):
    q, k, v, k_cache, v_cache, lengths = new_inputs(2, 2, 20, 8, [3, 19], device=append_device)
    wide = [x.nan_to_num().double() for x in (q, k, v, k_cache, v_cache)]
    keys, values = written(wide[1], wide[3], lengths), written(wide[2], wide[4], lengths)
    got = ops.decode_attention_append(*wide, lengths)
    assert torch.equal(got, reference.decode_attention(wide[0], keys, values, lengths + 1))
    assert torch.equal(wide[3], keys) and torch.equal(wide[4], values)


def test_append_of_an_empty_batch(append_device):
    arguments = new_inputs(0, 2, 5, 4, [], device=append_device)
    assert ops.decode_attention_append(*arguments[:-1], arguments[-1].long()).shape == (0, 2, 4)


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_append_opcheck(dtype, append_device, implementation):
    if implementation != "triton":
        pytest.skip("elsewhere it is PyTorch's scatter and decode_attention")
    arguments = [x.nan_to_num() for x in new_inputs(2, 3, 21, 16, [4, 20], dtype=dtype, device=append_device)]
    torch.library.opcheck(torch.ops.gpt_fast.decode_attention_append_forward.default, arguments)


def test_append_compiles_without_a_graph_break(append_device):
    eager = new_inputs(2, 2, 50, 16, [7, 49], device=append_device)
    traced = [x.clone() for x in eager]
    compiled = torch.compile(ops.decode_attention_append, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*traced), ops.decode_attention_append(*eager))
    for a, b in zip(traced, eager, strict=True):
        assert torch.equal(a.nan_to_num(9), b.nan_to_num(9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.randn(2, 2, 3)}, r"k has shape \[2, 2, 3\]; expected \[2, 2, 4\]"),
        ({"v": torch.randn(2, 2, 4).half()}, "v has dtype float16; expected float32"),
        ({"v_cache": torch.randn(2, 2, 6, 4)}, r"v_cache has shape \[2, 2, 6, 4\]; expected \[2, 2, 5, 4\]"),
        ({"lengths": torch.tensor([1, 5])}, r"append: lengths holds 5; expected values in \[0, 5\)"),
        ({"lengths": torch.tensor([-1, 0])}, r"append: lengths holds -1; expected values in \[0, 5\)"),
        ({"k": torch.randn(2, 2, 4, requires_grad=True)}, "an input requires a gradient"),
        (
            {"k_cache": torch.randn(2, 2, 0, 4), "v_cache": torch.randn(2, 2, 0, 4)},
            r"k_cache has shape \[2, 2, 0, 4\]; expected room for the new key",
        ),
    ],
)
def test_append_refuses(changes, message):
    names = ("q", "k", "v", "k_cache", "v_cache", "lengths")
    values = dict(zip(names, new_inputs(2, 2, 5, 4, [1, 2]), strict=True)) | changes
    with pytest.raises(ValueError, match=message):
        ops.decode_attention_append(**values)


def test_append_with_lengths_out_of_range_stays_inside_the_cache(append_device, implementation):
    """The Triton kernel clamps lengths that were not validated to places inside the cache."""
    if implementation != "triton":
        pytest.skip("elsewhere values are checked")
    arguments = [x.nan_to_num() for x in new_inputs(3, 2, 70, 16, [69, 0, 69], device=append_device)]
    others = [x.clone() for x in arguments]
    others[-1] = torch.tensor([2**33, -5, 70], device=append_device)
    operator = torch.ops.gpt_fast.decode_attention_append_forward
    assert torch.equal(operator(*arguments), operator(*others))
    assert all(torch.equal(a, b) for a, b in zip(arguments[3:5], others[3:5], strict=True))
