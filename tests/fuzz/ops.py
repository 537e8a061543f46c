"""Fuzz of the ops: draw a random call, run forward and backward, and compare with the reference in float64.

`TARGETS[op](seed, index)` runs one draw. It raises AssertionError on a difference. It returns the kind of the draw:
"computed", "not finite" (arguments hold NaN or infinities), "padding" (the padding holds NaN or infinities), or
"refused: " and the name of the argument that was made invalid.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_fast import _activations, ops, reference
from tests import numerics
from tests.fuzz import bounds
from tests.fuzz.draws import INTERPRETED, Draw

Arguments = dict[str, Any]
# "gpt_fast.<op>: what was given; expected what is valid".
MESSAGE = re.compile(r"gpt_fast\.\w+: .+; expected .+", re.DOTALL)


class Op(NamedTuple):
    """Functions that draw and judge the calls of one op.

    `draw` returns the arguments of a valid call. `bound` returns the Bounds for exact arguments and upstream gradients.
    `spoils` holds functions that make a call invalid, with a pattern of the expected error message. `padding` returns,
    for arguments and "upstream", the places whose values have no effect. `pattern` returns, for each result, the places
    that must be not finite and those that may be; without it, these are the reference's. `stored` checks an output from
    which the other results are computed, and returns exact arguments that give this output. `unchecked` calls the
    kernel with invalid values that the public function has not validated, as on a GPU. `writes` returns the expected
    content of the arguments that the op writes to.
    """

    draw: Callable[[Draw], Arguments]
    bound: Callable[[Arguments, list[Tensor], torch.dtype], bounds.Bounds]
    spoils: dict[str, tuple[Callable[[Draw, Arguments], Arguments], str]]
    padding: Callable[[Arguments], dict[str, Tensor]] = lambda arguments: {}
    pattern: Callable[[Arguments, list[Tensor]], dict[str, tuple[Tensor, Tensor]]] | None = None
    differentiable: bool = True
    stored: Callable[[Arguments, tuple[Tensor, ...]], Arguments] | None = None
    unchecked: Callable[[Draw, Arguments], None] | None = None
    writes: Callable[[Arguments], dict[str, Tensor]] = lambda arguments: {}


# ---- one draw --------------------------------------------------------------------------------------------------------


def run_one(op: str, seed: int, index: int) -> str:
    """Run draw `index`: judge the results of a valid call, or check that an invalid call is refused."""
    with poisoned_memory():
        draw, spec = Draw(op, seed, index), OPS[op]
        arguments = spec.draw(draw)
        if draw.chance(0.07):
            return run_refused(op, spec, draw, arguments)
        threads = 1 if INTERPRETED or draw.chance(0.9) else draw.pick((2, 3))
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return run_valid(op, spec, draw, arguments)
        finally:
            torch.set_num_threads(before)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new memory with NaN, so that a value that a kernel forgets to write is noticed."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def run_refused(op: str, spec: Op, draw: Draw, arguments: Arguments) -> str:
    """Make one argument invalid, and check that the public function refuses it with a message in the project's form."""
    name = draw.pick(sorted(spec.spoils))
    spoil, expected = spec.spoils[name]
    arguments = spoil(draw, arguments)
    if arguments is None:
        return "computed"  # this call lacks the argument that was to be made invalid
    try:
        getattr(ops, op)(**arguments)
    except (ValueError, TypeError) as error:
        message = str(error)
        assert MESSAGE.fullmatch(message), f"{name}: the message is not in the project's form: {message}"
        assert re.search(expected, message), f"{name}: refused for another reason: {message}"
        return f"refused: {name}"
    raise AssertionError(f"{name}: the call was not refused")


def run_valid(op: str, spec: Op, draw: Draw, arguments: Arguments) -> str:
    kind = draw.random.random()
    floats = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}
    padding = spec.padding(arguments)
    clean = arguments
    if kind < 0.1 and any(places.any() for places in padding.values()):
        kind_of_draw = "padding"
        clean = arguments | {name: detached(floats[name]).clone() for name in floats if name in padding}
        for name, places in padding.items():
            if name in floats:
                fill_padding(draw, floats[name], places)
                with torch.no_grad():
                    clean[name].masked_fill_(places, 0.0)
                clean[name].requires_grad_(floats[name].requires_grad)
    elif kind < 0.25:
        kind_of_draw = "not finite"
        for name in draw.random.sample(sorted(floats), min(len(floats), draw.pick((0, 1, 1, 2)))):
            draw.poison(floats[name])
        clean = arguments | {
            name: detached(floats[name]).masked_fill(places, 0.0).requires_grad_(floats[name].requires_grad)
            for name, places in padding.items()
            if name in floats
        }
    else:
        kind_of_draw = "computed"

    after = {name: x.detach().clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    after |= spec.writes(after)
    outputs = as_tuple(getattr(ops, op)(**arguments))
    if len({x.dtype for x in floats.values()}) > 1:
        with torch.no_grad():
            expected = [out.dtype for out in as_tuple(definition(op)(**without(clean)))]
        assert [out.dtype for out in outputs] == expected, f"outputs: {[out.dtype for out in outputs]}"
    upstream = [draw.tensor(out.shape, out.dtype, grad=0.0) for out in outputs]
    clean_upstream = upstream
    if kind_of_draw == "not finite" and draw.chance(0.3):
        draw.poison(draw.pick(upstream))
    if "upstream" in padding and kind_of_draw != "computed":
        clean_upstream = [x.masked_fill(padding["upstream"], 0.0) for x in upstream]
        if kind_of_draw == "padding":
            upstream = [x.clone() if shares_memory(x) else x for x in upstream]
            for x in upstream:
                fill_padding(draw, x, padding["upstream"])
    got = results(outputs, arguments, upstream, spec.differentiable)
    for name, x in after.items():
        assert torch.equal(numbers(arguments[name]), numbers(x)), f"{name} was written to where it should not be"

    exact = {name: numerics.exact(x) if isinstance(x, Tensor) else x for name, x in clean.items()}
    if spec.stored is not None:
        exact = spec.stored(exact, outputs)
    for x in exact.values():
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    wide = [x.double() for x in clean_upstream]
    truth = results(as_tuple(definition(op)(**without(exact))), exact, wide, spec.differentiable)
    dtype = next(iter(floats.values())).dtype
    allowed = spec.bound({n: detached(x) for n, x in exact.items()}, wide, dtype)
    may = {}
    if kind_of_draw == "not finite":
        fits = {label: fits_within(truth[label].detach(), allowed[label], value.dtype) for label, value in got.items()}
        may = check_pattern(op, spec, clean, clean_upstream, got, fits)
    elif spec.unchecked is not None and INTERPRETED:  # the C++ kernels validate values themselves
        spec.unchecked(draw, arguments)
    for label, value in got.items():
        bound = torch.as_tensor(allowed[label], dtype=torch.float64).expand(value.shape)
        if label in may:
            bound = bound.masked_fill(may[label], torch.inf)
        numerics.assert_bounded(value, truth[label].detach(), bound, label=label)
    return kind_of_draw


def numbers(x: Tensor) -> Tensor:
    """Return x with NaN replaced, for comparisons."""
    return x.detach().nan_to_num(nan=7.0) if x.is_floating_point() else x


def detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def definition(op: str) -> Callable:
    """Return the reference of an op. For `linear` it is F.linear in float32 or float64, rounded once."""
    if op == "decode_attention_append":
        return lambda **arguments: reference.decode_attention(**appended(arguments))
    return widened_linear if op == "linear" else getattr(reference, op)


def widened_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)


def without(arguments: Arguments) -> Arguments:
    """Return the arguments without `recompute`, which the reference does not take."""
    return {name: x for name, x in arguments.items() if name != "recompute"}


def results(outputs: tuple, arguments: Arguments, upstream: list[Tensor], differentiable: bool) -> dict[str, Tensor]:
    """Return the outputs as "out", "out1", ... and the gradient of each argument that requires one."""
    named = {f"out{n or ''}": out.detach() for n, out in enumerate(outputs)}
    leaves = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    if leaves and differentiable:
        used = [(out, grad) for out, grad in zip(outputs, upstream, strict=True) if out.requires_grad]
        grads = torch.autograd.grad([out for out, _ in used], list(leaves.values()), [grad for _, grad in used])
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
            assert grad.dtype == leaf.dtype and grad.shape == leaf.shape, f"gradient of {name}: {grad.dtype}"
            named[name] = grad
    return named


def fill_padding(draw: Draw, x: Tensor, places: Tensor) -> None:
    with torch.no_grad():
        x.masked_fill_(places, draw.pick((float("nan"), float("inf"), float("-inf"))))


def fits_within(exact: Tensor, bound: Any, dtype: torch.dtype) -> Tensor:
    """Return True where a result within its bound may be a finite number of `dtype`."""
    bound = bound + numerics.rounding(exact, dtype)
    return exact.isfinite() & (exact.abs() - bound <= torch.finfo(dtype).max)


def check_pattern(
    op: str, spec: Op, arguments: Arguments, upstream: list[Tensor], got: dict[str, Tensor], fits: dict[str, Tensor]
) -> dict:
    """Check that the right values are not finite. Values where `fits` is True may also be finite.

    Return for each result where values may be not finite.
    """
    must, multiplied = pattern_of_reference(op, arguments, upstream, spec.differentiable), {}
    with dropout_by_multiplication():
        multiplied = pattern_of_reference(op, arguments, upstream, spec.differentiable)
    pattern = {label: (must[label], must[label] | multiplied[label]) for label in must}
    if spec.pattern is not None:
        for label, (places, may) in spec.pattern({n: detached(x) for n, x in arguments.items()}, upstream).items():
            if label in must:
                pattern[label] = (places, may | pattern[label][1])
    for label, (places, may) in pattern.items():
        wrong = ~got[label].isfinite()
        places = places & ~fits[label]
        assert not (places & ~wrong).any(), (
            f"{label}: {int((places & ~wrong).sum())} of {wrong.numel()} values are finite; expected otherwise"
        )
        assert not (wrong & ~may).any(), (
            f"{label}: {int((wrong & ~may).sum())} of {wrong.numel()} values are not finite; expected otherwise"
        )
    return {label: may for label, (_, may) in pattern.items()}


def pattern_of_reference(
    op: str, arguments: Arguments, upstream: list[Tensor], differentiable: bool, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return True where results of the reference, in their own dtypes or rounded to `dtype`, are not finite."""
    leaves = {}
    for name, x in arguments.items():
        leaves[name] = x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
    outputs = as_tuple(definition(op)(**without(leaves)))
    grads = [x.to(out.dtype) for x, out in zip(upstream, outputs, strict=True)]
    found = results(outputs, leaves, grads, differentiable)
    return {label: ~x.to(dtype or x.dtype).isfinite() for label, x in found.items()}


@contextlib.contextmanager
def dropout_by_multiplication() -> Iterator[None]:
    """Make the reference multiply by the dropout mask, as `torch.nn.functional.dropout` does: a dropped NaN stays NaN.

    The ops may do the same.
    """
    before = reference._dropout
    reference._dropout = lambda x, keep, p: x * (keep.to(x.dtype) * reference.dropout_scale(p))
    try:
        yield
    finally:
        reference._dropout = before


# ---- invalid calls ---------------------------------------------------------------------------------------------------


def changed(name: str, change: Callable[[Draw, Any], Any]) -> Callable[[Draw, Arguments], Arguments | None]:
    """Return a function that changes the argument `name`, or returns None if the call lacks it."""

    def spoil(draw: Draw, arguments: Arguments) -> Arguments | None:
        if arguments.get(name) is None:
            return None
        value = change(draw, arguments[name])
        return None if value is None else arguments | {name: value}

    return spoil


def other_dtype(draw: Draw, x: Tensor) -> Tensor:
    return x.detach().to(draw.pick([dtype for dtype in numerics.DTYPES if dtype != x.dtype]))


def longer(draw: Draw, x: Tensor) -> Tensor:
    """Return x with one more element in its last dimension."""
    return torch.zeros((*x.shape[:-1], x.shape[-1] + 1), dtype=x.dtype)


def always(name: str, *values: Any) -> Callable[[Draw, Arguments], Arguments]:
    return lambda draw, arguments: arguments | {name: draw.pick(values)}


INTEGERS = (torch.int64, torch.int32, torch.bool, torch.uint8)
DROPOUT_SPOILS = {
    "dropout_p": (always("dropout_p", 1.0, -0.1, float("nan"), "0.1", True), r"dropout_p is .+expected a probability"),
    "seed": (always("seed", 3, torch.zeros(2, dtype=torch.int64), torch.zeros(1)), r"seed (is of type|has dtype)"),
    "site": (always("site", 1.5, None, "0"), r"site is .+expected an integer"),
}


def to_integers(draw: Draw, x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=draw.pick(INTEGERS))


# ---- linear ----------------------------------------------------------------------------------------------------------


def draw_linear(draw: Draw) -> Arguments:
    dtype, C, N = draw.dtype(), draw.size(300), draw.size(300)
    return {
        "x": draw.tensor(draw.shape(140, C), dtype),
        "weight": draw.tensor((N, C), dtype, max(C, 1) ** -0.5),
        "bias": draw.tensor((N,), dtype) if draw.chance(0.7) else None,
    }


def bound_linear(a: Arguments, upstream: list[Tensor], dtype: torch.dtype) -> bounds.Bounds:
    return bounds.linear(a["x"], a["weight"], a["bias"], upstream, dtype)


LINEAR_SPOILS = {
    "mixed dtypes": (changed("weight", other_dtype), "has dtype .+expected"),
    "integers": (changed("x", to_integers), "has dtype .+expected"),
    "shape of weight": (changed("weight", longer), "x has shape"),
    "shape of bias": (changed("bias", longer), "bias has shape"),
}


# ---- norms -----------------------------------------------------------------------------------------------------------


def draw_norm_shape(draw: Draw, C: int) -> tuple[int, ...]:
    """Return a shape [..., C]. In the interpreter 8 % have more rows than 512 programs sum at once."""
    if INTERPRETED and draw.chance(0.08):
        return (8209, C)  # 512 programs take at most 16 rows each
    return draw.shape(140, C)


def draw_affine(draw: Draw, C: int, dtype: torch.dtype) -> Arguments:
    """Return weight and bias, the weight alone, or neither. Their dtype may differ from that of x."""
    if draw.chance(0.25):
        dtype = draw.dtype()
    weight = draw.tensor((C,), dtype) if draw.chance(0.85) else None
    return {"weight": weight, "bias": draw.tensor((C,), dtype) if weight is not None and draw.chance(0.8) else None}


def draw_layer_norm(draw: Draw) -> Arguments:
    dtype, C = draw.dtype(), draw.size(300)
    eps = {"eps": draw.pick((1e-5, 1e-12, 1e-3, 2.0))} if draw.chance(0.5) else {}
    return {"x": draw.tensor(draw_norm_shape(draw, C), dtype), **draw_affine(draw, C, dtype), **eps}


def bound_layer_norm(a: Arguments, upstream: list[Tensor], dtype: torch.dtype) -> bounds.Bounds:
    return bounds.layer_norm(a["x"], a["weight"], a.get("eps", 1e-5), upstream[0])


def only_a_bias(draw: Draw, arguments: Arguments) -> Arguments:
    x = arguments["x"]
    return arguments | {"weight": None, "bias": torch.zeros(x.shape[-1:], dtype=x.dtype)}


NORM_SPOILS = {
    "integers": (changed("x", to_integers), "x has dtype .+expected"),
    "eps": (always("eps", 0.0, -1.0, float("nan"), None), "eps is .+expected a positive number"),
    "bias alone": (only_a_bias, "a bias and no weight"),
    "shape of weight": (changed("weight", longer), "weight has shape"),
    "shape of bias": (changed("bias", longer), "bias has shape"),
    "dtype of bias": (changed("bias", other_dtype), "bias has dtype .+expected"),
}


def draw_add_layer_norm(draw: Draw) -> Arguments:
    arguments = draw_layer_norm(draw)
    x = arguments["x"]
    residual = draw.tensor(x.shape, draw.dtype() if draw.chance(0.3) else x.dtype)
    return arguments | {"residual": residual} | draw.dropout()


def row_factor(a: Arguments, rows: int, C: int) -> Tensor:
    """Return dropout's factor [rows, C] of an op that draws its mask by rows."""
    p = a.get("dropout_p", 0.0)
    if p == 0.0:
        return torch.ones(rows, C, dtype=torch.float64)
    return reference.dropout_keep_rows(a["seed"], a.get("site", 0), rows, C, p).double() * reference.dropout_scale(p)


def stored_add_layer_norm(a: Arguments, outputs: tuple[Tensor, ...]) -> Arguments:
    """Check `summed`, which is rounded once. Return arguments that give it, because the other results start from it."""
    x, residual, summed = detached(a["x"]), detached(a["residual"]), outputs[1].detach()
    branch = factor_of_rows(a) * x
    bound = numerics.FLOOR * (residual.abs() + branch.abs())
    numerics.assert_bounded(summed, residual + branch, bound, label="out1")
    return a | {"residual": summed.double() - branch}


def factor_of_rows(a: Arguments) -> Tensor:
    x, C = a["x"], a["x"].shape[-1]
    return row_factor(a, x.numel() // C if C else 0, C).reshape(x.shape)


def bound_add_layer_norm(a: Arguments, upstream: list[Tensor], dtype: torch.dtype) -> bounds.Bounds:
    factor = factor_of_rows(a)
    summed = a["residual"] + factor * a["x"]
    found = bounds.layer_norm(summed, a["weight"], a.get("eps", 1e-5), upstream[0])
    residual = found["x"] + numerics.FLOOR * upstream[1].abs()
    return found | {"out1": torch.zeros_like(summed), "residual": residual, "x": factor * residual}


# ---- embedding -------------------------------------------------------------------------------------------------------


def draw_embedding(draw: Draw) -> Arguments:
    dtype, C = draw.dtype(), draw.size(300)
    V, P = draw.size(140, 1), draw.size(140, 1)
    # In the interpreter, backward takes seconds for each chunk of rows.
    shape = draw.shape(8, draw.size(min(P, 8))) if INTERPRETED else draw.shape(140, draw.size(P))
    integers = [draw.pick((torch.int64, torch.int32)) for _ in range(2)]
    arguments = {
        "tokens": draw.laid_out(torch.randint(0, draw.pick((1, V, V)), shape).to(integers[0])),
        "token_weight": draw.tensor((V, C), dtype),
        "position_weight": draw.tensor((P, C), dtype),
    } | draw.dropout()
    if draw.chance(0.4):
        places = torch.randint(0, P, shape if draw.chance(0.5) else shape[-1:])
        arguments["positions"] = draw.laid_out(places.to(integers[1]))
    return arguments


def positions_of(a: Arguments) -> Tensor:
    positions = a.get("positions")
    return torch.arange(a["tokens"].shape[-1]) if positions is None else positions.long()


def bound_embedding(a: Arguments, upstream: list[Tensor], dtype: torch.dtype) -> bounds.Bounds:
    tokens, C = a["tokens"], a["token_weight"].shape[1]
    factor = row_factor(a, tokens.numel(), C).reshape(*tokens.shape, C)
    weights = a["token_weight"], a["position_weight"]
    return bounds.embedding(tokens, *weights, positions_of(a), factor, upstream[0])


def padding_embedding(a: Arguments) -> dict[str, Tensor]:
    """Return the rows of the tables that no token or position uses, for tables whose elements do not share memory."""
    padding = {}
    for name, used in (("token_weight", a["tokens"]), ("position_weight", positions_of(a))):
        places = torch.ones(a[name].shape, dtype=torch.bool)
        places[used.reshape(-1).long()] = False
        padding[name] = places
    return unshared(a, padding)


def unshared(a: Arguments, padding: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the padding of tensors whose elements do not share memory."""
    return {name: places for name, places in padding.items() if name == "upstream" or not shares_memory(a[name])}


def shares_memory(x: Tensor) -> bool:
    """Return True if two elements of x lie at one address."""
    offsets = torch.zeros(x.shape, dtype=torch.int64)
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        offsets += (torch.arange(size) * stride).reshape(-1, *(1,) * (x.dim() - 1 - dim))
    return offsets.unique().numel() < x.numel()


EMBEDDING_SPOILS = {
    "mixed dtypes": (changed("position_weight", other_dtype), "position_weight has dtype .+expected"),
    "width": (changed("position_weight", longer), "differ in width"),
    "dtype of tokens": (changed("tokens", lambda draw, x: x.to(draw.pick((torch.int16, torch.float32)))), "tokens has"),
    "shape of positions": (
        lambda draw, a: a | {"positions": torch.zeros(a["tokens"].shape[-1] + 1, dtype=torch.int64)},
        "positions has shape",
    ),
    "a token of no row": (
        lambda draw, a: a | {"tokens": torch.full((2, 1), draw.pick((-1, a["token_weight"].shape[0])))}
        | {"positions": None}, "tokens holds",
    ),
    **DROPOUT_SPOILS,
}  # fmt: skip


# ---- mlp -------------------------------------------------------------------------------------------------------------


def draw_mlp(draw: Draw) -> Arguments:
    dtype, C, hidden, C_out = draw.dtype(), draw.size(140), draw.size(200), draw.size(140)
    arguments = {
        "x": draw.tensor(draw.shape(80, C), dtype),
        "fc_weight": draw.tensor((hidden, C), dtype, max(C, 1) ** -0.5),
        "fc_bias": draw.tensor((hidden,), dtype) if draw.chance(0.8) else None,
        "proj_weight": draw.tensor((C_out, hidden), dtype, max(hidden, 1) ** -0.5),
        "proj_bias": draw.tensor((C_out,), dtype) if draw.chance(0.8) else None,
        "activation": draw.pick(list(_activations.ACTIVATIONS)),
    }
    if draw.chance(0.4):
        arguments["recompute"] = draw.chance(0.5)
    return arguments | draw.dropout()


def bound_mlp(a: Arguments, upstream: list[Tensor], dtype: torch.dtype) -> bounds.Bounds:
    x, C, hidden, C_out = a["x"], a["fc_weight"].shape[1], a["fc_weight"].shape[0], a["proj_weight"].shape[0]
    rows = x.shape[:-1].numel()
    p, factor = a.get("dropout_p", 0.0), torch.ones(rows, hidden, dtype=torch.float64)
    if p > 0:
        head = torch.zeros((), dtype=torch.int64)
        keep = reference.dropout_keep_matrix(a["seed"], a.get("site", 0), head, rows, hidden, p)
        factor = keep.double() * reference.dropout_scale(p)
    activation = _activations.ACTIVATIONS[a["activation"]]
    weights = a["fc_weight"], a["fc_bias"], a["proj_weight"], a["proj_bias"]
    found = bounds.mlp(x.reshape(rows, C), *weights, activation, factor, upstream[0].reshape(rows, C_out), dtype)
    return found | {"out": found["out"].reshape(upstream[0].shape), "x": found["x"].reshape(x.shape)}


def pattern_mlp(a: Arguments, upstream: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return where results must be, and may be, not finite.

    Dropped elements pass back 0, whatever the derivative of the activation is. At infinity that derivative is 0 or 1 in
    the limit and NaN by its formula. Both are correct. Backward of gelu starts from the activation's input, which may
    overflow when it is rounded to float16, and so may other operands.
    """
    name = a["activation"]
    wide = {name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in a.items()}
    with activation_replaced(name, lambda stock: lambda z: _Skipping.apply(z, stock)):
        must = pattern_of_reference("mlp", requiring(wide), [x.float() for x in upstream], True, a["x"].dtype)
    with activation_replaced(name, lambda stock: lambda z: stock(z.to(a["x"].dtype).to(z.dtype))):
        may = pattern_of_reference("mlp", requiring(a), upstream, True)
    return {label: (places, places | may[label]) for label, places in must.items()}


def requiring(a: Arguments) -> Arguments:
    """Return the arguments with all floating-point tensors requiring gradients."""
    return {name: x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in a.items()}  # fmt: skip


@contextlib.contextmanager
def activation_replaced(name: str, change: Callable[[Callable], Callable]) -> Iterator[None]:
    """Replace the function of an activation inside the context."""
    table = _activations.ACTIVATIONS
    stock = table[name]
    table[name] = stock._replace(function=change(stock.function))
    try:
        yield
    finally:
        table[name] = stock


MLP_SPOILS = {
    "mixed dtypes": (changed("proj_weight", other_dtype), "has dtype .+expected"),
    "integers": (changed("x", to_integers), "has dtype .+expected"),
    "shape of fc_weight": (changed("fc_weight", longer), "x has shape"),
    "shape of proj_weight": (changed("proj_weight", longer), "proj_weight has shape"),
    "shape of fc_bias": (changed("fc_bias", longer), "fc_bias has shape"),
    "activation": (always("activation", "silu", None, 3), "activation is .+expected one of"),
    **DROPOUT_SPOILS,
}


# ---- linear_cross_entropy --------------------------------------------------------------------------------------------


def draw_linear_cross_entropy(draw: Draw) -> Arguments:
    dtype, C, V = draw.dtype(), draw.size(140), draw.size(300, 1)
    x = draw.tensor(draw.shape(80, C), dtype)
    ignore_index = draw.pick((-100, -100, -1, 0, 3, 10**12, -(2**63)))
    target = torch.randint(0, V, x.shape[:-1])
    ignored = draw.pick((0.0, 0.0, 0.3, 0.9, 1.0))
    target = target.masked_fill(torch.rand(target.shape) < ignored, ignore_index)
    arguments = {
        "x": x,
        "weight": draw.tensor((V, C), dtype, draw.pick((1.0, max(C, 1) ** -0.5))),
        "target": draw.laid_out(target),
        "bias": draw.tensor((V,), dtype) if draw.chance(0.6) else None,
        "label_smoothing": draw.pick((0.0, 0.0, 0.1, 1.0)),
        "reduction": draw.pick(("mean", "sum", "none")),
    }
    return arguments if ignore_index == -100 and draw.chance(0.5) else arguments | {"ignore_index": ignore_index}


def valid_of(a: Arguments) -> Tensor:
    return a["target"] != a.get("ignore_index", -100)


def bound_linear_cross_entropy(a: Arguments, upstream: list[Tensor], dtype: torch.dtype) -> bounds.Bounds:
    x, target, C = a["x"], a["target"].reshape(-1), a["x"].shape[-1]
    dloss = upstream[0].reshape(-1) if a["reduction"] == "none" else upstream[0]
    valid = valid_of(a).reshape(-1)
    found = bounds.linear_cross_entropy(
        x.reshape(target.numel(), C), a["weight"], target, a["bias"], valid, a["label_smoothing"], a["reduction"],
        dloss, dtype,
    )  # fmt: skip
    return found | {"x": found["x"].reshape(x.shape), "out": found["out"].reshape(upstream[0].shape)}


def padding_linear_cross_entropy(a: Arguments) -> dict[str, Tensor]:
    """Return the rows that are ignored, and their upstream gradients."""
    ignored = ~valid_of(a)
    padding = {"x": ignored[..., None].expand(a["x"].shape)}
    if a["reduction"] == "none":
        padding["upstream"] = ignored
    return unshared(a, padding)


def pattern_linear_cross_entropy(a: Arguments, upstream: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return where results must be, and may be, not finite: the reference's pattern on the rows that are not ignored.

    If the reduction is not "none", an upstream gradient that is not finite may make every gradient not finite.
    """
    valid = valid_of(a)
    counted = a | {"x": a["x"][valid], "target": a["target"][valid]}
    leaves = {name: x.requires_grad_() if x is not None and x.is_floating_point() else x
              for name, x in counted.items() if isinstance(x, Tensor)}  # fmt: skip
    loss = reference.linear_cross_entropy(**counted | leaves)
    dloss = upstream[0][valid] if a["reduction"] == "none" else upstream[0]
    found = {name: ~x.isfinite() for name, x in results((loss,), leaves, [dloss], True).items()}
    whole = {"out": valid, "x": valid}
    places = {}
    for name, x in found.items():
        if name == "x" or (name == "out" and a["reduction"] == "none"):
            full = torch.zeros(a["x"].shape if name == "x" else valid.shape, dtype=torch.bool)
            full[whole[name]] = x
            x = full
        places[name] = x
    spoiled = a["reduction"] != "none" and not bool(dloss.isfinite())
    return {name: (x, x | (spoiled and name != "out")) for name, x in places.items()}


LINEAR_CROSS_ENTROPY_SPOILS = {
    "mixed dtypes": (changed("weight", other_dtype), "weight has dtype .+expected"),
    "shape of weight": (changed("weight", longer), "x has shape"),
    "shape of bias": (changed("bias", longer), "bias has shape"),
    "shape of target": (lambda draw, a: a | {"target": a["target"][None]}, "target has shape"),
    "dtype of target": (changed("target", lambda draw, x: x.to(draw.pick((torch.int32, torch.float32)))), "target has"),
    "reduction": (always("reduction", "max", None), "reduction is"),
    "smoothing": (always("label_smoothing", -0.1, 1.1, float("nan"), None), "label_smoothing is"),
    "a class of no row": (
        lambda draw, a: a | {"target": torch.full_like(a["target"], a["weight"].shape[0]), "ignore_index": -100}
        if a["target"].numel() else None, "target holds",
    ),
}  # fmt: skip


# ---- attention -------------------------------------------------------------------------------------------------------


def draw_masks(draw: Draw, B: int, H: int, T: int, S: int) -> Arguments:
    """Return masks in any combination. Packed sequences need B = 1 and T = S."""
    masks: Arguments = {}
    if draw.chance(0.6):
        masks["causal"] = draw.chance(0.5) and T <= S
    elif T > S:
        masks["causal"] = False
    if draw.chance(0.25):
        masks["lengths"] = draw.laid_out(torch.randint(0, S + 1, (B,)).to(draw.pick((torch.int64, torch.int32))))
    if draw.chance(0.25):
        masks["key_mask"] = draw.laid_out(torch.rand(B, S) < draw.pick((0.05, 0.5, 0.95)))
    if draw.chance(0.25):
        shape = [size if draw.chance(0.6) else 1 for size in (B, H, T, S)][draw.pick((0, 0, 0, 1, 2, 3, 4)) :]
        masks["mask"] = draw.laid_out(torch.rand(shape) < draw.pick((0.05, 0.5, 0.95)))
    if draw.chance(0.25):
        masks["window"] = draw.pick((1, 2, 17, max(1, S // 2), max(1, S - 1), max(1, S), S + 1, 2**40, 2**62))
    if B == 1 and T == S and draw.chance(0.5):
        cuts = sorted(draw.random.randint(0, T) for _ in range(draw.pick((0, 1, 2, 3, 5, 12))))
        starts = torch.tensor([0, *cuts, T] if draw.chance(0.5) else [0, *cuts])
        masks["cu_seqlens"] = draw.sliced(starts.to(draw.pick((torch.int64, torch.int32))))
    return masks


def draw_scale(draw: Draw) -> Arguments:
    return {"scale": draw.pick((None, 0.0, -0.3, 1.0, 2, 3.0, -0.0, 1e-30))} if draw.chance(0.4) else {}


def draw_sizes(draw: Draw) -> tuple[int, int, int, int, int]:
    """Return B, H, T, S and D. B = 1 and T = S are frequent."""
    B = 1 if draw.chance(0.4) else draw.pick((0, 1, 2, 2, 3))
    H, T = draw.pick((0, 1, 1, 1, 2, 2, 3)), draw.size(140)
    S = T if draw.chance(0.6) else draw.size(140)
    D = draw.pick((1, 2, 3, 8, 16, 16, 17, 24, 31, 32, 33, 64, 64, 65, 80, 128, 255, 256))
    return B, H, T, S, min(D, 33) if INTERPRETED and draw.chance(0.8) else D


def draw_attention(draw: Draw) -> Arguments:
    dtype = draw.dtype()
    B, H, T, S, D = draw_sizes(draw)
    tensors = {name: draw.tensor((B, H, T if name == "q" else S, D), dtype) for name in ("q", "k", "v")}
    return tensors | draw_masks(draw, B, H, T, S) | draw.dropout() | draw_scale(draw)


def draw_attention_qkv(draw: Draw) -> Arguments:
    dtype = draw.dtype()
    B, H, T, _, D = draw_sizes(draw)
    H = max(H, 1)
    qkv = draw.tensor((B, T, 3 * H * D), dtype)
    return {"qkv": qkv, "num_heads": H} | draw_masks(draw, B, H, T, T) | draw.dropout() | draw_scale(draw)


def split(a: Arguments) -> Arguments:
    """Return the arguments of attention_qkv as arguments of attention, with q, k and v for qkv."""
    if "qkv" not in a:
        return a
    rest = {name: x for name, x in a.items() if name not in ("qkv", "num_heads")}
    return dict(zip("qkv", reference.split_qkv(a["qkv"], a["num_heads"]), strict=True)) | rest


def heads_first(a: Arguments, x: Tensor) -> Tensor:
    """Return an output or upstream gradient [B, T, C] as [B, H, T, D]."""
    return x.unflatten(2, (a["num_heads"], -1)).transpose(1, 2) if "qkv" in a else x


def allowed_of(a: Arguments) -> Tensor:
    names = ("causal", "lengths", "key_mask", "mask", "cu_seqlens", "window")
    found = reference.attention_allowed(a["q"], a["k"], **{name: a[name] for name in names if name in a})
    B, H, T, _ = a["q"].shape
    return found.expand(B, H, T, a["k"].shape[2])


def matrix_factor(a: Arguments) -> Tensor:
    """Return dropout's factor [B, H, T, S]."""
    B, H, T, _ = a["q"].shape
    S, p = a["k"].shape[2], a.get("dropout_p", 0.0)
    if p == 0.0:
        return torch.ones(B, H, T, S, dtype=torch.float64)
    heads = torch.arange(B * H).view(B, H)
    if a.get("cu_seqlens") is None:
        keep = reference.dropout_keep_matrix(a["seed"], a.get("site", 0), heads, T, S, p)
    else:
        sequence, position = reference.packed_positions(a["cu_seqlens"], S)
        b = sequence[:, None] * H + heads[:, :, None, None]
        keep = reference.dropout_keep_at(a["seed"], a.get("site", 0), b, position[:, None], position[None, :], p)
    return keep.double() * reference.dropout_scale(p)


def scale_of(a: Arguments) -> float:
    return a["q"].shape[-1] ** -0.5 if a.get("scale") is None else a["scale"]


def bound_attention(a: Arguments, upstream: list[Tensor], dtype: torch.dtype) -> bounds.Bounds:
    parts, dout = split(a), heads_first(a, upstream[0])
    tensors = parts["q"], parts["k"], parts["v"], allowed_of(parts), matrix_factor(parts), scale_of(parts)
    return merged(a, bounds.attention(*tensors, dout, dtype))


def merged(a: Arguments, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge values for q, k, v and out into values for qkv and the merged output if the op is attention_qkv."""
    if "qkv" not in a:
        return found
    joined = torch.stack([found[name] for name in "qkv"])  # [3, B, H, T, D]
    qkv = joined.permute(1, 3, 0, 2, 4).flatten(2)
    return {"out": found["out"].transpose(1, 2).flatten(2), "qkv": qkv}


def padding_attention(a: Arguments) -> dict[str, Tensor]:
    """Return the keys that lengths, key_mask or cu_seqlens exclude, and the queries after the last packed sequence."""
    parts = split(a)
    B, H, T, D = parts["q"].shape
    S = parts["k"].shape[2]
    dead = torch.zeros(B, S, dtype=torch.bool)
    if parts.get("lengths") is not None:
        dead |= torch.arange(S) >= parts["lengths"][:, None]
    if parts.get("key_mask") is not None:
        dead |= ~parts["key_mask"]
    queries = torch.zeros(B, T, dtype=torch.bool)
    if parts.get("cu_seqlens") is not None:
        after = torch.arange(S) >= int(parts["cu_seqlens"][-1])
        dead |= after
        queries |= after
    keys, queries = (x[:, None, :, None].expand(B, H, x.shape[1], D) for x in (dead, queries))
    padding = merged(a, {"q": queries, "k": keys, "v": keys, "out": queries})
    padding["upstream"] = padding.pop("out")
    return unshared(a, padding)


def pattern_attention(a: Arguments, upstream: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return where results must be, and may be, not finite.

    A weight of 0 (masked, dropped or underflowed) times NaN is NaN in a matrix product, and 0 in a kernel that skips
    the tile. Both are correct. If an output is not finite, its query's gradients may not be finite either, because
    backward starts from the output. An operand may overflow when it is rounded to float16; C++ keeps it in float32.
    """
    parts, dout = split(a), heads_first(a, upstream[0]).float()
    dtype = parts["q"].dtype
    q, k, v = (parts[name].float() for name in "qkv")
    allowed, factor, scale = allowed_of(parts), matrix_factor(parts).float(), scale_of(parts)
    if q.numel() == 0 or k.numel() == 0:
        none = {"out": q, "q": q, "k": k, "v": v}
        nothing = {name: torch.zeros(x.shape, dtype=torch.bool) for name, x in none.items()}
        return {name: (x, x) for name, x in merged(a, nothing).items()}

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    def skipping(weights: Tensor, x: Tensor) -> Tensor:
        """Return the product of weights and x in which a weight of 0 times NaN or infinity is 0."""
        product = torch.where(weights[..., None] == 0, 0.0, weights[..., None] * x[:, :, None])
        return product.sum(-2)

    scores = (q @ k.mT * scale).masked_fill(~allowed, -torch.inf)
    scores = scores.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    # In PyTorch's softmax one NaN makes its whole row NaN, including masked keys.
    softmax = scores.softmax(-1)
    probs, plain = softmax.masked_fill(~allowed, 0.0), softmax.masked_fill(~allowed & softmax.isfinite(), 0.0)
    weights = torch.where(factor == 0, 0.0, probs * factor)
    out = {"must": rounded(skipping(weights, v)), "may": rounded(rounded(plain * factor) @ v)}
    dp = dout @ v.mT
    dp = {"must": torch.where(factor == 0, 0.0, dp * factor), "may": dp * factor}
    # PyTorch computes delta as the sum of P dP, the op's contract as the sum of dout and the output.
    sums = (
        (probs * dp["must"]).masked_fill(probs == 0, 0.0).sum(-1, keepdim=True),
        (dout * out["must"]).sum(-1, keepdim=True),
    )
    delta = {
        "must": torch.where(sums[0].isfinite(), *sums),
        "may": (dout * out["may"]).sum(-1, keepdim=True),
    }
    ds = {
        "must": (probs * (dp["must"] - delta["must"])).masked_fill(probs == 0, 0.0),
        "may": rounded(plain * (dp["may"] - delta["may"])),
    }
    found = {
        "must": {
            "out": out["must"], "q": scale * skipping(ds["must"], k), "k": scale * skipping(ds["must"].mT, q),
            "v": skipping(weights.mT, dout),
        },
        "may": {
            "out": out["may"], "q": scale * (ds["may"] @ k), "k": scale * (ds["may"].mT @ q),
            "v": rounded(plain * factor).mT @ dout,
        },
    }  # fmt: skip
    places = {
        kind: merged(a, {name: ~rounded(x).isfinite() for name, x in tensors.items()})
        for kind, tensors in found.items()
    }
    return {name: (places["must"][name], places["may"][name] | places["must"][name]) for name in places["must"]}


def length_out_of_range(draw: Draw, arguments: Arguments) -> Arguments | None:
    """Give one sequence a length below 0 or past the keys, even if the call has no lengths."""
    B = arguments["q" if "q" in arguments else "qkv"].shape[0]
    if B == 0:
        return None
    lengths = torch.zeros(B, dtype=draw.pick((torch.int64, torch.int32)))
    lengths[draw.random.randrange(B)] = draw.pick((-1, 10_000))
    return arguments | {"lengths": lengths}


ATTENTION_OPTION_SPOILS = {
    "window": (always("window", 0, -1, 1.5), "window is .+expected"),
    "scale": (always("scale", float("nan"), float("inf"), "1"), "scale is .+expected a finite number"),
    "causal": (always("causal", 1, None), "causal is .+expected True or False"),
    "dtype of key_mask": (changed("key_mask", lambda draw, x: x.long()), "key_mask has dtype .+expected bool"),
    "shape of key_mask": (changed("key_mask", longer), "key_mask has shape"),
    "dtype of lengths": (changed("lengths", lambda draw, x: x.to(torch.int16)), "lengths has dtype .+expected"),
    "shape of lengths": (changed("lengths", longer), "lengths has shape"),
    "a length out of range": (length_out_of_range, "lengths holds"),
    "a sequence past the tokens": (
        changed("cu_seqlens", lambda draw, x: torch.tensor([0, 10_000], dtype=x.dtype)),
        "cu_seqlens (holds|is)",
    ),
    "sequences that fall": (
        changed("cu_seqlens", lambda draw, x: torch.tensor([0, 1, 0], dtype=x.dtype)),
        "cu_seqlens (holds|is)",
    ),
    "dtype of mask": (changed("mask", lambda draw, x: x.float()), "mask has dtype .+expected bool"),
    **DROPOUT_SPOILS,
}
ATTENTION_SPOILS = {
    "mixed dtypes": (changed("k", other_dtype), "has dtype .+expected"),
    "integers": (changed("q", to_integers), "has dtype .+expected"),
    "shape of k": (changed("k", longer), "k has shape"),
    "shape of v": (changed("v", longer), "v has shape"),
    "head size": (
        lambda draw, a: a | {name: torch.zeros(1, 1, 1, draw_size, dtype=torch.float32) for name in "qkv"}
        if (draw_size := draw.pick((0, 257))) is not None else None, "head size is",
    ),
    "causal with more queries": (
        lambda draw, a: a | {"q": longer(draw, a["k"].mT).mT, "causal": True, "cu_seqlens": None, "mask": None},
        "no more queries than keys",
    ),
    **ATTENTION_OPTION_SPOILS,
}  # fmt: skip
ATTENTION_QKV_SPOILS = {
    "integers": (changed("qkv", to_integers), "qkv has dtype .+expected"),
    "heads": (changed("qkv", longer), "qkv has shape"),
    "num_heads": (always("num_heads", 0, -1), "qkv has shape"),
    "kind of num_heads": (always("num_heads", 1.0, None), "num_heads is .+expected an integer"),
    **ATTENTION_OPTION_SPOILS,
}


# ---- decode_attention ------------------------------------------------------------------------------------------------


def draw_decode_attention(draw: Draw) -> Arguments:
    dtype = draw.dtype()
    B, H, _, S, D = draw_sizes(draw)
    S = S if draw.chance(0.9) or INTERPRETED else draw.pick((255, 256, 257, 513, 1025))
    return {
        "q": draw.tensor((B, H, D), dtype, grad=0.0),
        "k_cache": draw.tensor((B, H, S, D), dtype, grad=0.0),
        "v_cache": draw.tensor((B, H, S, D), dtype, grad=0.0),
        "lengths": draw.laid_out(torch.randint(0, S + 1, (B,)).to(draw.pick((torch.int64, torch.int32)))),
    }


def as_attention(a: Arguments) -> Arguments:
    caches = {"k": a["k_cache"], "v": a["v_cache"]}
    return {"q": a["q"][:, :, None], **caches, "causal": False, "lengths": a["lengths"]}


def bound_decode_attention(a: Arguments, upstream: list[Tensor], dtype: torch.dtype) -> bounds.Bounds:
    found = bound_attention(as_attention(a), [upstream[0][:, :, None]], dtype)
    return {"out": found["out"][:, :, 0]}


def padding_decode_attention(a: Arguments) -> dict[str, Tensor]:
    """Return the entries of the caches from the length on."""
    padding = padding_attention(as_attention(a))
    return unshared(a, {f"{name}_cache": padding[name] for name in "kv" if name in padding})


def pattern_decode_attention(a: Arguments, upstream: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    found = pattern_attention(as_attention(a), [upstream[0][:, :, None]])
    return {"out": (found["out"][0][:, :, 0], found["out"][1][:, :, 0])}


def unchecked_decode_attention(draw: Draw, a: Arguments) -> None:
    """Assert that the kernel clamps lengths that are out of range."""
    tame, S = a["lengths"], a["k_cache"].shape[2]
    wild = torch.where(tame == S, draw.pick((S + 1, 10_000, 2**30)), torch.where(tame == 0, -5, tame)).to(tame.dtype)
    caches = a["q"], a["k_cache"], a["v_cache"]
    got, expected = (torch.ops.gpt_fast.decode_attention_forward(*caches, lengths) for lengths in (wild, tame))
    assert torch.equal(numbers(got), numbers(expected)), "lengths out of range changed what is computed"


DECODE_ATTENTION_SPOILS = {
    "mixed dtypes": (changed("k_cache", other_dtype), "k_cache has dtype .+expected"),
    "shape of k_cache": (changed("k_cache", longer), "k_cache has shape"),
    "shape of lengths": (changed("lengths", longer), "lengths has shape"),
    "dtype of lengths": (changed("lengths", lambda draw, x: x.bool()), "lengths has dtype .+expected"),
    "a length past the cache": (
        changed("lengths", lambda draw, x: torch.full_like(x, draw.pick((-1, 10_000))) if x.numel() else None),
        "lengths holds",
    ),
    "a gradient": (changed("q", lambda draw, x: x.detach().requires_grad_()), "requires a gradient"),
}  # fmt: skip


# ---- decode_attention_append -----------------------------------------------------------------------------------------


def draw_decode_attention_append(draw: Draw) -> Arguments:
    """Draw caches with room for another key, whose entries do not share memory."""
    a = draw_decode_attention(draw)
    S, dtype = max(1, a["k_cache"].shape[2]), a["q"].dtype
    for name in ("k_cache", "v_cache"):
        if a[name].shape[2] == 0:
            a[name] = draw.tensor((*a["q"].shape[:2], S, a["q"].shape[2]), dtype, grad=0.0, lay=False)
        elif shares_memory(a[name]):
            a[name] = a[name].contiguous()
    rows = {name: draw.tensor(a["q"].shape, dtype, grad=0.0) for name in ("k", "v")}
    lengths = torch.randint(0, S, a["lengths"].shape).to(a["lengths"].dtype)
    return {"q": a["q"], **rows, "k_cache": a["k_cache"], "v_cache": a["v_cache"], "lengths": draw.laid_out(lengths)}


def caches_after(a: Arguments) -> dict[str, Tensor]:
    """Return the caches after the new key and value were written."""
    here = torch.arange(a["k_cache"].shape[2]) == a["lengths"][:, None]  # [B, S]
    return {f"{x}_cache": torch.where(here[:, None, :, None], a[x][:, :, None], a[f"{x}_cache"]) for x in "kv"}


def appended(a: Arguments) -> Arguments:
    """Return the arguments of `decode_attention` that gives the same result after the caches were written."""
    return {"q": a["q"], **caches_after(a), "lengths": a["lengths"] + 1}


def padding_decode_attention_append(a: Arguments) -> dict[str, Tensor]:
    """Return the entries of the caches from the length on, which include the entry that the op writes."""
    return padding_decode_attention({name: x for name, x in a.items() if name not in ("k", "v")})


def unchecked_decode_attention_append(draw: Draw, a: Arguments) -> None:
    """Assert that the kernel clamps lengths that are out of range, for the write and for the query."""
    tame, last = a["lengths"], a["k_cache"].shape[2] - 1
    wild = torch.where(tame == last, draw.pick((last + 1, 10_000, 2**30)), torch.where(tame == 0, -5, tame))
    found = []
    for lengths in (wild.to(tame.dtype), tame):
        caches = a["k_cache"].clone(), a["v_cache"].clone()
        out = torch.ops.gpt_fast.decode_attention_append_forward(a["q"], a["k"], a["v"], *caches, lengths)
        found.append([numbers(x) for x in (out, *caches)])
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected), "lengths out of range changed what is computed"


DECODE_ATTENTION_APPEND_SPOILS = DECODE_ATTENTION_SPOILS | {
    "shape of k": (changed("k", longer), "k has shape"),
    "a full cache": (
        changed("lengths", lambda draw, x: torch.full_like(x, 10_000) if x.numel() else None),
        "lengths holds",
    ),
}


class _Skipping(torch.autograd.Function):
    """Activation whose derivative at infinity is its limit, and which passes back 0 for a gradient of 0."""

    @staticmethod
    def forward(ctx, z, function):
        ctx.save_for_backward(z)
        ctx.function = function
        return function(z)

    @staticmethod
    def backward(ctx, dh):
        (z,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = z.masked_fill(z.isinf(), 0.0).requires_grad_()
            (slope,) = torch.autograd.grad(ctx.function(leaf).sum(), leaf)
        slope = slope.where(~z.isinf(), (z > 0).to(slope.dtype))
        return torch.where((dh == 0) | (slope == 0), 0.0, dh * slope), None


OPS = {
    "attention": Op(draw_attention, bound_attention, ATTENTION_SPOILS, padding_attention, pattern_attention),
    "attention_qkv": Op(
        draw_attention_qkv, bound_attention, ATTENTION_QKV_SPOILS, padding_attention, pattern_attention
    ),
    "decode_attention": Op(
        draw_decode_attention, bound_decode_attention, DECODE_ATTENTION_SPOILS, padding_decode_attention,
        pattern_decode_attention, differentiable=False, unchecked=unchecked_decode_attention,
    ),
    "decode_attention_append": Op(
        draw_decode_attention_append,
        lambda a, upstream, dtype: bound_decode_attention(appended(a), upstream, dtype),
        DECODE_ATTENTION_APPEND_SPOILS,
        padding_decode_attention_append,
        lambda a, upstream: pattern_decode_attention(appended(a), upstream),
        differentiable=False,
        unchecked=unchecked_decode_attention_append,
        writes=caches_after,
    ),
    "layer_norm": Op(draw_layer_norm, bound_layer_norm, NORM_SPOILS),
    "add_layer_norm": Op(
        draw_add_layer_norm, bound_add_layer_norm, NORM_SPOILS | DROPOUT_SPOILS, stored=stored_add_layer_norm
    ),
    "mlp": Op(draw_mlp, bound_mlp, MLP_SPOILS, pattern=pattern_mlp),
    "linear_cross_entropy": Op(
        draw_linear_cross_entropy, bound_linear_cross_entropy, LINEAR_CROSS_ENTROPY_SPOILS,
        padding_linear_cross_entropy, pattern_linear_cross_entropy,
    ),
    "embedding": Op(draw_embedding, bound_embedding, EMBEDDING_SPOILS, padding_embedding),
}  # fmt: skip
if not INTERPRETED:  # `linear` has no Triton kernel, and PyTorch's own product rounds differently
    OPS["linear"] = Op(draw_linear, bound_linear, LINEAR_SPOILS)

TARGETS = {op: functools.partial(run_one, op) for op in OPS}
