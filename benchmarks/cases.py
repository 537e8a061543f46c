"""What is measured: one entry per op. An op joins the suite by an entry in OPS here and one in peers.PEERS."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

Shape = dict[str, int]


@dataclass(frozen=True)
class Op:
    """How to feed one op, and what work its mathematics cannot avoid."""

    name: str
    inputs: Callable[[Shape, torch.dtype, str], tuple]  # positional arguments; those to differentiate require grad
    traffic: Callable[[Shape, int, str], int]  # bytes by shape, bytes of an element and direction: each tensor once
    flops: Callable[[Shape, str], int]  # of matrix products only; 0 means bound by memory
    shapes: dict[str, tuple[Shape, ...]]  # by device type, as the models have them
    small: tuple[Shape, ...]  # for sanitizers: a tail in every dimension
    dtypes: dict[str, tuple[torch.dtype, ...]] = field(
        default_factory=lambda: {"cuda": (torch.bfloat16,), "cpu": (torch.float32, torch.bfloat16)}
    )


@dataclass(frozen=True)
class Case:
    """One op at one shape, in one dtype and direction, on one device."""

    op: Op
    shape: tuple[tuple[str, int], ...]
    dtype: torch.dtype
    direction: str  # "forward" or "backward"
    device: str

    @property
    def name(self) -> str:
        sizes = " ".join(f"{size}={value}" for size, value in self.shape)
        return f"{self.op.name} {sizes} {str(self.dtype).removeprefix('torch.')} {self.direction}"

    @property
    def bytes(self) -> int:
        return self.op.traffic(dict(self.shape), self.dtype.itemsize, self.direction)

    @property
    def flops(self) -> int:
        return self.op.flops(dict(self.shape), self.direction)

    def inputs(self) -> tuple:
        torch.manual_seed(0)
        return self.op.inputs(dict(self.shape), self.dtype, self.device)

    def prepare(self, function: Callable[..., Tensor]) -> Callable[[], object]:
        """What to call and time: the forward pass alone, or the backward pass alone, for a random gradient."""
        inputs = self.inputs()
        if self.direction == "forward":
            return lambda: function(*inputs)
        y = function(*inputs)
        dy = torch.randn_like(y)
        leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _layer_norm_inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple:
    x = torch.randn(shape["M"], shape["N"], device=device).to(dtype).requires_grad_()
    weight = torch.rand(shape["N"], device=device).to(dtype).requires_grad_()
    bias = torch.randn(shape["N"], device=device).to(dtype).requires_grad_()
    return x, weight, bias, 1e-5


def _layer_norm_traffic(shape: Shape, element: int, direction: str) -> int:
    M, N = shape["M"], shape["N"]
    statistics = 2 * 4 * M
    if direction == "forward":  # reads x, weight, bias; writes y, mean, rstd
        return element * (2 * M * N + 2 * N) + statistics
    return element * (3 * M * N + 3 * N) + statistics  # reads dy, x, weight, mean, rstd; writes dx, dweight, dbias


OPS: dict[str, Op] = {
    "layer_norm": Op(
        name="layer_norm",
        inputs=_layer_norm_inputs,
        traffic=_layer_norm_traffic,
        flops=lambda shape, direction: 0,
        # GPT-2's four widths; on a CPU its smallest, with few rows (in the cache) and many (in memory).
        shapes={
            "cuda": tuple({"M": 32768, "N": N} for N in (768, 1024, 1280, 1600)),
            "cpu": ({"M": 1024, "N": 768}, {"M": 32768, "N": 768}),
        },
        small=({"M": 5, "N": 100}, {"M": 67, "N": 768}, {"M": 3, "N": 2050}),
    ),
}


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def cases(device: str, small: bool = False) -> Iterator[Case]:
    for op in OPS.values():
        for shape in op.small if small else op.shapes[device]:
            for dtype in op.dtypes[device]:
                for direction in ("forward", "backward"):
                    yield Case(op, tuple(shape.items()), dtype, direction, device)
