"""Test dtypes that no kernel reads: each op refuses them in each argument, or runs the reference in float64."""

import inspect
import re

import pytest
import torch

from gpt_fast import ops, reference
from gpt_fast.ops import _library
from tests import numerics

FLOAT, INTEGER, INT64, BOOL = "floating", "integer", "int64", "bool"
ALLOWED = {
    FLOAT: (*numerics.DTYPES, torch.float64),
    INTEGER: (torch.int64, torch.int32),
    INT64: (torch.int64,),
    BOOL: (torch.bool,),
}
OTHERS = (
    torch.float64, torch.float32, torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool, torch.complex64,
    torch.float8_e4m3fn,
)  # fmt: skip
B, H, T, D, C, F, V = 2, 2, 3, 4, 5, 6, 7


def normal(*shape):
    return torch.randn(*shape)


def below(upper, *shape):
    return torch.randint(upper, shape)


# op → (the kind of each tensor argument, a function that makes valid inputs, options with which all arguments are used)
OPS = {
    "layer_norm": ({"x": FLOAT, "weight": FLOAT, "bias": FLOAT}, lambda: (normal(B, C), normal(C), normal(C)), {}),
    "add_layer_norm": (
        {"x": FLOAT, "residual": FLOAT, "weight": FLOAT, "bias": FLOAT, "seed": INT64},
        lambda: (normal(B, C), normal(B, C), normal(C), normal(C), torch.tensor([7])),
        {"dropout_p": 0.5},
    ),
    "linear": ({"x": FLOAT, "weight": FLOAT, "bias": FLOAT}, lambda: (normal(B, C), normal(F, C), normal(F)), {}),
    "mlp": (
        {
            "x": FLOAT, "fc_weight": FLOAT, "fc_bias": FLOAT, "proj_weight": FLOAT, "proj_bias": FLOAT, "seed": INT64,
        },
        lambda: (normal(B, C), normal(F, C), normal(F), normal(C, F), normal(C), torch.tensor([7])),
        {"dropout_p": 0.5},
    ),
    "linear_cross_entropy": (
        {"x": FLOAT, "weight": FLOAT, "target": INT64, "bias": FLOAT},
        lambda: (normal(B, C), normal(V, C), below(V, B), normal(V)),
        {},
    ),
    "embedding": (
        {"tokens": INTEGER, "token_weight": FLOAT, "position_weight": FLOAT, "positions": INTEGER, "seed": INT64},
        lambda: (below(V, B, T), normal(V, C), normal(T, C), torch.arange(T), torch.tensor([7])),
        {"dropout_p": 0.5},
    ),
    "attention": (
        {
            "q": FLOAT, "k": FLOAT, "v": FLOAT, "lengths": INTEGER, "key_mask": BOOL, "mask": BOOL, "seed": INT64,
        },
        lambda: (
            normal(B, H, T, D), normal(B, H, T, D), normal(B, H, T, D), torch.tensor([1, T]),
            torch.ones(B, T, dtype=torch.bool), torch.ones(T, T, dtype=torch.bool), torch.tensor([7]),
        ),
        {"dropout_p": 0.5},
    ),
    "attention of packed sequences": (
        {"q": FLOAT, "k": FLOAT, "v": FLOAT, "cu_seqlens": INTEGER},
        lambda: (normal(1, H, T, D), normal(1, H, T, D), normal(1, H, T, D), torch.tensor([0, 1, T])),
        {},
    ),
    "attention_qkv": (
        {"qkv": FLOAT, "lengths": INTEGER, "key_mask": BOOL, "mask": BOOL, "seed": INT64},
        lambda: (
            normal(B, T, 3 * H * D), torch.tensor([1, T]), torch.ones(B, T, dtype=torch.bool),
            torch.ones(T, T, dtype=torch.bool), torch.tensor([7]),
        ),
        {"num_heads": H, "dropout_p": 0.5},
    ),
    "attention_qkv of packed sequences": (
        {"qkv": FLOAT, "cu_seqlens": INTEGER},
        lambda: (normal(1, T, 3 * H * D), torch.tensor([0, 1, T])),
        {"num_heads": H},
    ),
    "decode_attention": (
        {"q": FLOAT, "k_cache": FLOAT, "v_cache": FLOAT, "lengths": INTEGER},
        lambda: (normal(B, H, D), normal(B, H, T, D), normal(B, H, T, D), torch.tensor([1, T])),
        {},
    ),
}  # fmt: skip
# For these arguments, float64 beside float32 in the other arguments is allowed. All other arguments refuse it.
SERVED = {
    ("layer_norm", "x"), ("add_layer_norm", "x"), ("add_layer_norm", "residual"), ("attention_qkv", "qkv"),
    ("attention_qkv of packed sequences", "qkv"),
}  # fmt: skip
WRONG = [
    pytest.param(op, name, dtype, id=f"{op}-{name}-{str(dtype).removeprefix('torch.')}")
    for op, (kinds, _, _) in OPS.items()
    for name, kind in kinds.items()
    for dtype in OTHERS
    if dtype not in ALLOWED[kind] or (kind == FLOAT and dtype == torch.float64)
]


def inputs_of(op, device):
    kinds, make, options = OPS[op]
    tensors = dict(zip(kinds, (tensor.to(device) for tensor in make()), strict=True))
    for name, kind in kinds.items():
        if kind == FLOAT and op != "decode_attention":
            tensors[name].requires_grad_()
    return tensors, options


def cast(tensor, dtype):
    return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)


def call(module, op, tensors, options):
    return getattr(module, op.split()[0])(**tensors, **options)


def outputs_of(module, op, tensors, options):
    outputs = call(module, op, tensors, options)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def gradients(outputs, tensors, upstream):
    leaves = [tensor for tensor in tensors.values() if tensor is not None and tensor.requires_grad]
    if not leaves:
        return ()
    return torch.autograd.grad(outputs, leaves, [grad.to(out) for grad, out in zip(upstream, outputs, strict=True)])


def assert_exact(op, tensors, options):
    """Check outputs and gradients against the reference in float64, and return the op's outputs and gradients."""
    truth = {name: numerics.exact(tensor) for name, tensor in tensors.items()}
    outputs, exact_outputs = outputs_of(ops, op, tensors, options), outputs_of(reference, op, truth, options)
    upstream = [torch.randn_like(output) for output in outputs]
    got = [*outputs, *gradients(outputs, tensors, upstream)]
    exact = [*exact_outputs, *gradients(exact_outputs, truth, upstream)]
    # The coarsest dtype sets the tolerance: a gradient in float32 inherits the rounding of a float16 sum.
    eps = max(torch.finfo(tensor.dtype).eps for tensor in got)
    for result, wanted in zip(got, exact, strict=True):
        error = (result.detach().double() - wanted.detach()).abs().max()
        assert error <= 16 * eps * wanted.detach().abs().max()
    return got


@pytest.mark.parametrize(("op", "name", "dtype"), WRONG)
def test_wrong_dtype_of_one_argument(op, name, dtype, device):
    """The op raises an error that names the argument, or agrees with the float64 reference where float64 is allowed."""
    tensors, options = inputs_of(op, device)
    tensors[name] = cast(tensors[name], dtype) if dtype.is_floating_point else tensors[name].detach().to(dtype)
    if dtype == torch.float64 and (op, name) in SERVED:
        outputs = assert_exact(op, tensors, options)
        assert outputs[0].dtype == torch.float64
        return
    with pytest.raises(ValueError, match=r"has dtype \w+\b.*; expected") as error:
        call(ops, op, tensors, options)
    assert str(error.value).startswith("gpt_fast." + op.split()[0].removesuffix("_qkv"))
    assert re.search(rf"\b{name}\b", str(error.value))


AUTOCAST = [
    param for param in WRONG
    if param.values[0] in ("linear", "mlp", "linear_cross_entropy", "attention", "attention_qkv")
    and param.values[1:] != ("qkv", torch.float64)  # autocast leaves float64 as it is, which is allowed
]  # fmt: skip


@pytest.mark.parametrize(("op", "name", "dtype"), AUTOCAST)
def test_autocast_does_not_hide_a_wrong_dtype(op, name, dtype, device):
    tensors, options = inputs_of(op, device)
    tensors[name] = tensors[name].detach().to(dtype)
    with torch.autocast(device, torch.bfloat16), pytest.raises(ValueError, match=rf"\b{name}\b.*"):
        call(ops, op, tensors, options)


@pytest.mark.parametrize("op", OPS)
def test_every_tensor_argument_is_tried(op):
    kinds = {name for other, (kinds, _, _) in OPS.items() if other.split()[0] == op.split()[0] for name in kinds}
    parameters = inspect.signature(getattr(ops, op.split()[0])).parameters
    assert kinds == {name for name, parameter in parameters.items() if "Tensor" in str(parameter.annotation)}


MIXED = [
    pytest.param("layer_norm", {"x": torch.bfloat16}, id="norm_of_bfloat16_by_float32_weights"),
    pytest.param("layer_norm", {"x": torch.float16}, id="norm_of_float16_by_float32_weights"),
    pytest.param(
        "layer_norm", {"weight": torch.bfloat16, "bias": torch.bfloat16}, id="norm_of_float32_by_bfloat16_weights"
    ),
    pytest.param("layer_norm", {"weight": torch.float64, "bias": torch.float64}, id="norm_by_float64_weights"),
    pytest.param("add_layer_norm", {"x": torch.bfloat16}, id="bfloat16_branch"),
    pytest.param("add_layer_norm", {"residual": torch.float16}, id="float16_stream"),
    pytest.param(
        "add_layer_norm", {"x": torch.bfloat16, "residual": torch.float64}, id="bfloat16_branch_on_float64_stream"
    ),
    pytest.param("add_layer_norm", {"x": torch.float64, "residual": torch.float16}, id="float64_branch"),
    pytest.param("add_layer_norm", {"weight": torch.float64, "bias": torch.float64}, id="float64_weights"),
    pytest.param("embedding", {"tokens": torch.int32, "positions": torch.int32}, id="int32_tokens"),
    pytest.param("embedding", {"tokens": torch.int32}, id="int32_tokens_at_int64_positions"),
    pytest.param("attention", {"lengths": torch.int32}, id="int32_lengths"),
    pytest.param("attention of packed sequences", {"cu_seqlens": torch.int32}, id="int32_cu_seqlens"),
    pytest.param("decode_attention", {"lengths": torch.int32}, id="int32_lengths_of_caches"),
]


@pytest.mark.parametrize(("op", "dtypes"), MIXED)
def test_documented_mixes(op, dtypes, device):
    tensors, options = inputs_of(op, device)
    for name, dtype in dtypes.items():
        tensors[name] = cast(tensors[name], dtype)
    outputs = assert_exact(op, tensors, options)
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    assert [grad.dtype for grad in outputs[len(outputs) - len(leaves) :]] == [leaf.dtype for leaf in leaves]


@pytest.mark.parametrize("stream", ["x", "residual"])
@pytest.mark.parametrize("with_weight", [True, False], ids=["weight", "no_weight"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_float64_stream_gives_float64_results(stream, with_weight, p, device):
    tensors, _ = inputs_of("add_layer_norm", device)
    if not with_weight:
        tensors["weight"] = tensors["bias"] = None
    tensors[stream] = cast(tensors[stream], torch.float64)
    normed, summed, *_ = assert_exact("add_layer_norm", tensors, {"dropout_p": p})
    assert normed.dtype == summed.dtype == torch.float64


# ---- the operators: C++ reads no dtype as another -------------------------------------------------------------------

SAMPLE = {
    "float": normal(B, C), "rows": normal(B), "width": normal(C), "hidden": normal(F), "seed": torch.tensor([7]),
}  # fmt: skip
DROPOUT = (0.5, SAMPLE["seed"], 0)
OPTIONS = (torch.tensor([1, T]), torch.ones(B, T, dtype=torch.bool), torch.ones(T, T, dtype=torch.bool), None, True)
HEADS = tuple(normal(B, H, T, D) for _ in range(5))
OPERATORS = {
    "layer_norm_forward": (normal(B, C), normal(C), normal(C), 1e-5),
    "layer_norm_backward": (normal(B, C), normal(B, C), normal(C), normal(B), normal(B), True, True),
    "add_layer_norm_forward": (normal(B, C), normal(B, C), normal(C), normal(C), 1e-5, *DROPOUT),
    "add_layer_norm_backward": (
        normal(B, C), normal(B, C), normal(B, C), normal(C), normal(B), normal(B), torch.float32, torch.float32,
        *DROPOUT, True, True,
    ),
    "linear_forward": (normal(B, C), normal(F, C), normal(F)),
    "linear_backward": (normal(B, F), normal(B, C), normal(F, C), True, True, True),
    "mlp_forward": (normal(B, C), normal(F, C), normal(F), normal(C, F), normal(C), "gelu", *DROPOUT, True),
    "mlp_backward": (
        normal(B, C), normal(B, C), normal(F, C), normal(F), normal(C, F), normal(B, F), "gelu", *DROPOUT, [True] * 5,
    ),
    "linear_cross_entropy_forward": (
        normal(B, C), normal(V, C), below(V, B), normal(V), -100, 0.0, "mean", True, True, True,
    ),
    "linear_cross_entropy_backward": (
        normal(B), normal(B, C), normal(V, C), below(V, B), normal(V), -100, 0.0, True, True, True,
    ),
    "embedding_forward": (below(V, B, T), normal(V, C), normal(T, C), torch.arange(T), *DROPOUT),
    "embedding_backward": (
        normal(B, T, C), below(V, B, T), normal(V, C), normal(T, C), torch.arange(T), *DROPOUT, True, True,
    ),
    "attention_forward": (*HEADS[:3], *OPTIONS, None, *DROPOUT, 1.0),
    "attention_backward": (*HEADS, normal(B, H, T), *OPTIONS, None, *DROPOUT, 1.0),
    "attention_qkv_backward": (
        HEADS[0], normal(B, T, 3 * H * D), H, HEADS[1], normal(B, H, T), *OPTIONS, None, *DROPOUT, 1.0,
    ),
    "decode_attention_forward": (normal(B, H, D), normal(B, H, T, D), normal(B, H, T, D), torch.tensor([1, T])),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_read_no_dtype_as_another(operator, dtype, implementation):
    """Each operator raises if one of its tensors has a dtype that the public functions would refuse."""
    if implementation != "cpp":
        pytest.skip("Triton reads a pointer as the dtype it has")
    function, args = getattr(torch.ops.gpt_fast, operator), OPERATORS[operator]
    function(*args)
    for i, arg in enumerate(args):
        if isinstance(arg, torch.Tensor):
            with pytest.raises((ValueError, RuntimeError), match="dtype|scalar type|not implemented for|Promotion"):
                function(*args[:i], arg.to(dtype), *args[i + 1 :])


def test_a_row_reader_is_there_for_each_kernel_dtype(implementation):
    """The C++ kernels read rows of float32, bfloat16 and float16 each in their own dtype."""
    if implementation != "cpp":
        pytest.skip("of the C++ kernels")
    for dtype in _library.KERNEL_DTYPES:
        x = normal(B, C).to(dtype)
        y, mean, _ = torch.ops.gpt_fast.layer_norm_forward(x, None, None, 1e-5)
        assert y.dtype == dtype
        torch.testing.assert_close(mean, x.float().mean(-1))
