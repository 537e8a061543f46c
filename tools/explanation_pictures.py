"""Draws the pictures of docs/reference/how-it-works.md: an op's way, memory kept for backward, a tile of dropout.

`python -m tools.explanation_pictures` writes them into docs/assets. The memory is counted and the mask computed by the
library, so a change there shows in the pictures.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor

from gpt_fast import ops, reference

ASSETS = Path(__file__).resolve().parents[1] / "docs" / "assets"
OURS, OTHER, INK, PALE = "#c1440e", "#8d99a6", "#22303c", "#eef2f5"  # colours
DROPOUT_P, SEED = 0.1, 42
MIB = 1 << 20


# ---- memory kept for backward ----------------------------------------------------------------------------------------


def kept_for_backward() -> dict[str, tuple[float, float]]:
    """Return {op: (MiB that plain PyTorch keeps for backward, MiB that gpt_fast's op keeps)}.

    The ops are attention, mlp and linear_cross_entropy, with the shapes of GPT-2 124M at B = 8, T = 1024 in bfloat16,
    the first two with dropout. Nothing is computed: the tensors are on the device `meta`. Inputs and weights are not
    counted, because both sides keep them.
    """
    B, T, C, H, V = 8, 1024, 768, 12, 50257
    q, k, v = (_tensor(B, H, T, C // H) for _ in range(3))
    x, fc, fc_bias, proj, proj_bias = (
        _tensor(B * T, C),
        _tensor(4 * C, C),
        _tensor(4 * C),
        _tensor(C, 4 * C),
        _tensor(C),
    )
    weight, target = _tensor(V, C), torch.empty(B * T, dtype=torch.int64, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    hidden = torch.ones(T, T, dtype=torch.bool, device="meta").triu(1)

    def plain_attention() -> Tensor:
        scores = (q @ k.mT / math.sqrt(C // H)).masked_fill(hidden, -math.inf)
        return F.dropout(scores.softmax(-1), DROPOUT_P) @ v

    def plain_mlp() -> Tensor:
        return F.linear(F.dropout(F.gelu(F.linear(x, fc, fc_bias), approximate="tanh"), DROPOUT_P), proj, proj_bias)

    mlp = (x, fc, fc_bias, proj, proj_bias)
    return {
        "attention": (
            _kept(plain_attention, q, k, v, hidden),
            _kept(lambda: ops.attention(q, k, v, dropout_p=DROPOUT_P, seed=seed), q, k, v),
        ),
        "mlp": (_kept(plain_mlp, *mlp), _kept(lambda: ops.mlp(*mlp, "gelu_tanh", DROPOUT_P, seed), *mlp)),
        "linear_cross_entropy": (
            _kept(lambda: F.cross_entropy(F.linear(x, weight).float(), target), x, weight),
            _kept(lambda: ops.linear_cross_entropy(x, weight, target), x, weight),
        ),
    }


def _tensor(*shape: int) -> Tensor:
    """Return a bfloat16 tensor of `shape` on the device `meta` that requires grad."""
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


def _kept(call: Callable[[], Tensor], *given: Tensor) -> float:
    """Return the MiB that autograd keeps for the backward pass of `call`, without the tensors in `given`.

    `call` takes no arguments and returns a tensor. Each storage counts once. Gradients that a loss of gpt_fast computes
    in its forward pass count too.
    """
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    for tensor in getattr(result.grad_fn, "sums", ()):  # the loss keeps gradients that its forward pass computed
        keep(tensor)
    for tensor in given:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storages.values()) / MIB


def draw_memory() -> Figure:
    """Draw two bars for each op: the memory that plain PyTorch and gpt_fast keep between forward and backward."""
    kept = kept_for_backward()
    figure, axes = _figure(2.6)
    for place, (plain, ours) in enumerate(kept.values()):
        for offset, value, color in ((-0.19, plain, OTHER), (0.19, ours, OURS)):
            axes.barh(place + offset, value, 0.34, color=color)
            axes.annotate(f" {value:,.0f} MiB", (value, place + offset), va="center", fontsize=9, color=INK)
    axes.set(xlim=(0, 1.18 * max(map(max, kept.values()))), xlabel="MiB kept between forward and backward")
    axes.set_yticks(range(len(kept)), list(kept))
    axes.invert_yaxis()
    axes.legend(
        [Rectangle((0, 0), 1, 1, color=color) for color in (OTHER, OURS)],
        ["plain PyTorch", "gpt_fast"], frameon=False, loc="center right",
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    """Return (figure, its axes): a new figure of the pictures' common width, `height` inches high."""
    figure = Figure(figsize=(7.2, height), layout="constrained")
    return figure, figure.subplots()


# ---- an op's way -----------------------------------------------------------------------------------------------------


def draw_way() -> Figure:
    """Draw a fixed diagram of the stages of a call of `layer_norm`, from the public function to the kernels."""
    figure, axes = _figure(5.0)
    axes.set(xlim=(0, 103), ylim=(0, 70))
    axes.axis("off")
    _box(axes, 50, 65, 46, "gpt_fast.ops.layer_norm(x, weight, bias)", "gpt_fast/ops/layer_norm.py", code=True)
    _box(axes, 50, 52, 46, "shapes, dtypes and devices are validated", "errors name what came and what is expected")
    _box(axes, 14, 38, 26, "reference", "float64, use_reference()", ink=OTHER)
    _box(axes, 61, 38, 48, "autograd.Function: forward, backward", "saves statistics, not intermediates")
    _box(axes, 61, 24, 48, "torch.ops.gpt_fast.layer_norm_forward", "PyTorch's dispatcher chooses by device", code=True)
    for x, title, note in (
        (13, "fake kernel", "torch.compile, export"),
        (38, "C++", "CPU: csrc/cpu/layer_norm.cpp"),
        (65, "Triton", "CUDA: kernels/layer_norm.py"),
        (90, "Triton's interpreter", "tests without a GPU"),
    ):
        _box(axes, x, 7, 23, title, note, ink=OURS if title in ("C++", "Triton") else OTHER)
        _arrow(axes, (61, 20), (x, 11))
    for start, end in (((50, 61), (50, 56)), ((50, 48), (14, 42)), ((50, 48), (61, 42)), ((61, 34), (61, 28))):
        _arrow(axes, start, end)
    return figure


def _box(
    axes: Axes, x: float, y: float, width: float, title: str, note: str, *, ink: str = INK, code: bool = False
) -> None:
    """Draw a box of size `width` × 8 centred at (x, y), with the bold text `title` and a small `note` below it.

    The outline has the colour `ink`. The title is monospaced if `code`. Lengths are in the units of the axes.
    """
    box = FancyBboxPatch((x - width / 2, y - 4), width, 8, "round,pad=0,rounding_size=1.2", fc=PALE, ec=ink, lw=1.3)
    axes.add_patch(box)
    axes.annotate(
        title, (x, y + 1.3), ha="center", va="center", fontsize=8.5, color=INK, weight="bold",
        family="monospace" if code else None,
    )  # fmt: skip
    axes.annotate(note, (x, y - 2), ha="center", va="center", fontsize=7, color=INK)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow from the point `start` to the point `end`, both (x, y) in the units of the axes."""
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=INK, lw=1, shrinkA=0, shrinkB=1)
    )


# ---- a tile of dropout -----------------------------------------------------------------------------------------------


def draw_tile() -> Figure:
    """Draw the dropout mask of the first 16 x 16 elements (query i, key j) of one head's attention weights.

    Dropped elements are crossed out; the probability is 0.2 so that there are enough. A call of the random generator
    Philox returns four words, and each half of a word decides one element. The elements of two calls are coloured. The
    text in a coloured element gives its word and half: "2.1" is half 1 of word 2, both counted from 0.
    """
    size = 16
    keep = reference.dropout_keep_matrix(torch.tensor([SEED]), 1, torch.tensor([0]), size, size, 2 * DROPOUT_P)[0]
    figure, axes = _figure(4.4)
    marked = {(2, 1): OURS, (5, 2): "#1f5a94"}  # (i % 8, (j % 8) // 2) of a call: colour
    for i, j in itertools.product(range(size), range(size)):
        color = marked.get((i % 8, (j % 8) // 2))
        axes.add_patch(Rectangle((j, i), 1, 1, fc=color or "white", ec="#c9d2da", lw=0.6))
        if color:
            label = f"{2 * (i // 8) + j // 8}.{j % 2}"
            axes.annotate(label, (j + 0.5, i + 0.5), ha="center", va="center", fontsize=7, color="white")
        if not keep[i, j]:
            for ends in ((0.15, 0.85), (0.85, 0.15)):
                axes.plot([j + 0.15, j + 0.85], [i + end for end in ends], color="white" if color else INK, lw=1)
    axes.set(xlim=(0, size), ylim=(size, 0), aspect="equal", xlabel="key j", ylabel="query i")
    axes.set_xticks([0.5, 7.5, 8.5, 15.5], ["0", "7", "8", "15"])
    axes.set_yticks([0.5, 7.5, 8.5, 15.5], ["0", "7", "8", "15"])
    axes.tick_params(length=0)
    axes.spines[:].set_color(INK)
    handles = [
        Rectangle((0, 0), 1, 1, color=OURS), Rectangle((0, 0), 1, 1, color="#1f5a94"),
        Line2D([], [], marker="x", ls="", color=INK),
    ]  # fmt: skip
    labels = ["one call of Philox\n(word.half of each element)", "another call", f"dropped, p = {2 * DROPOUT_P}"]
    axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1.03, 0.5), frameon=False, fontsize=8)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "way-of-an-op": draw_way,
    "memory-kept": draw_memory,
    "dropout-tile": draw_tile,
}


def main() -> None:
    """Write each picture as SVG into docs/assets and print its path. An unchanged picture gives the same bytes.

    matplotlib's global settings for SVG are changed.
    """
    # The same picture is the same file, and its text stays text.
    matplotlib.rcParams.update({"svg.hashsalt": "gpt_fast", "svg.fonttype": "none"})
    for name, draw in PICTURES.items():
        draw().savefig(ASSETS / f"{name}.svg", metadata={"Date": None})
        print(ASSETS / f"{name}.svg")


if __name__ == "__main__":
    main()
